"""The messages that know no columns: links, life and death of processes, time.

What it is: the part of the message family (core/protocol/messages.py has the rest and re-exports this one) that the root process speaks. It imports
no numpy, so that root stays small. Same rules: frozen, tagged, append-only.
What it does not know: requests, tokens, who handles a message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.pools import PoolSpec

PROTOCOL_LEVEL = 1


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="@", kw_only=True, omit_defaults=True):
    """Base of all messages. Frozen; arrays inside are read-only by convention until the step that names them is done."""


# ------------------------------------------------------------------ links (any process to any process)


class Hello(Message, frozen=True, kw_only=True):
    """First frame on every link, both ways. Levels must be equal, and so must the schema fingerprints of one build; `role` is a ChildSpec's, or
    "root", and whoever takes the link says which it expects."""

    role: str
    id: int
    epoch: int
    protocol_level: int
    schema_fingerprint: str


class Extension(Message, frozen=True, kw_only=True):
    """A plugin actor's own message: `kind` is namespaced by its package, and says which actor takes it (Seat.takes_kinds)."""

    kind: str
    data: bytes


# ------------------------------------------------------------------ from the device queue to whoever asked


class WorkDone(Message, frozen=True, kw_only=True):
    """The device queue's answer to a Move or a Control: `owner` and `id` are those of the work. `error` says why nothing was done ("": it was);
    the device goes on in any case. `data` is what a Control brought."""

    engine: int
    epoch: int
    owner: str
    id: int
    error: str = ""
    data: bytes = b""


# ------------------------------------------------------------------ time


class Tick(Message, frozen=True, kw_only=True):
    """Time passes (once a second, from the host): retention, rates, watchdogs. ns on CLOCK_MONOTONIC."""

    now_ns: int


# ------------------------------------------------------------------ engines


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What rounding lost against the wide model, as far as somebody measured it (quality.json; core/protocol/quality.py)."""

    scheme: str
    """How they are stored: the record's word, or that of config.json or of the options; and what options round besides (output head, KV cache)."""
    status: Literal["wide", "measured", "unmeasured"]
    """"unmeasured": something is quantised, weights or KV cache, and there is no record of what that costs."""
    kl_mean: float | None = None
    """Mean KL divergence from the wide model, nats a token."""
    top1: float | None = None
    """How often the likeliest token is the same, 0 to 1."""
    record: str = ""
    """The record's hash."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine tells when it is ready. Memory in bytes."""

    model: str
    architecture: str
    dtype: str
    device: str
    attention: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    deterministic: bool
    fingerprint: str
    """Changes whenever numerics may change (system_fingerprint)."""
    kv_layout: str
    weights_bytes: int
    workspace_bytes: int
    kv_bytes: int
    slack_bytes: int
    enable_prefix_caching: bool = True
    bounded_steps: bool = False
    """See DeviceCapabilities."""
    grammars: str = ""
    """Whose grammars it can obey: the name of the plugin that makes the masks; "": nobody's."""
    beams: bool = False
    """Can it search with beams."""
    kv_dtype: str = ""
    """What a KV block holds; "": the dtype."""
    quality: Quality | None = None
    """None: there is no model's folder to look into."""
    drafters: list[str] = []
    """The methods of its drafters, the first asked first; none: it does not speculate."""
    lookahead: int = 0
    """The most drafts behind a token."""


class EngineUp(Message, frozen=True, kw_only=True):
    """An engine is ready (from root, or from the engine itself when its link to text opens)."""

    engine: int
    epoch: int
    facts: EngineFacts


class EngineDown(Message, frozen=True, kw_only=True):
    """An engine is gone: everything of this epoch is void."""

    engine: int
    epoch: int
    reason: str = ""


# ------------------------------------------------------------------ root <-> every process


class ChildUp(Message, frozen=True, kw_only=True):
    role: str
    id: int
    epoch: int
    pid: int
    detail: str = ""


class ChildDown(Message, frozen=True, kw_only=True):
    role: str
    id: int
    epoch: int
    status: int
    detail: str = ""


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent every second by each process; `progress` is a count that moves when work is done, `pending` work that should move it."""

    role: str
    id: int
    at_ns: int
    progress: int = 0
    pending: int = 0


class StartupPhase(Message, frozen=True, kw_only=True):
    """Progress of a start. From a child: `phase` began, `seconds` after the process did. From root to text: `phase` took `seconds`."""

    role: str
    id: int
    phase: str
    seconds: float
    table: list[list[str]] = []


class Drain(Message, frozen=True, kw_only=True):
    """Accept nothing new; finish what runs; then leave. `deadline_s` from now."""

    deadline_s: float = 30.0


class Drained(Message, frozen=True, kw_only=True):
    """Answer to Drain: nothing is left here."""

    role: str
    id: int
    cut: int = 0
    """Requests that had to be ended early because the deadline passed."""


class Stop(Message, frozen=True, kw_only=True):
    """Leave now."""

    reason: str = ""


class PeerUp(Message, frozen=True, kw_only=True):
    """From the host to its actors: the link to a peer process is open and both Hellos agree."""

    role: str
    id: int
    epoch: int


class PeerDown(Message, frozen=True, kw_only=True):
    """From the host to its actors: the link to a peer process is gone, and with it everything that was on its way."""

    role: str
    id: int
    epoch: int


class Vital(msgspec.Struct, frozen=True, array_like=True):
    """One process as root sees it. `age_s` since its last heartbeat; `stalled_s` since `progress` last moved while `pending` was not 0."""

    role: str
    id: int
    up: bool
    age_s: float
    progress: int
    pending: int
    stalled_s: float


class Vitals(Message, frozen=True, kw_only=True):
    """Root to text, every second: all processes, so that health can tell idle, busy and stalled apart."""

    rows: list[Vital]


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has used of its budget in a period ("2026-11", "2026-11-28", or "" for all time): tokens, and picodollars."""

    tenant: str
    period: str
    tokens: int
    pusd: int


class Tables(Message, frozen=True, kw_only=True):
    """Root to edges: whose key is whose; to texts: what tenants may use. Before they serve anybody, and after each change. `body` is a KeyTable
    (core/protocol/tables.py) or a TenantTable (core/protocol/tenants.py) as msgpack; `generation` counts from 1, and a later one takes the place of an earlier one. `spent`, of a text's
    first: what was used before its life."""

    generation: int
    body: bytes
    spent: list[Spent] = []


class Spending(Message, frozen=True, kw_only=True):
    """Text to root: what tenants with budgets have used by now, of those where that has changed."""

    rows: list[Spent]


class Boot(Message, frozen=True, kw_only=True):
    """First frame from root to a child: all that it needs to know. `listeners` are the inherited listening sockets, name -> file descriptor
    (edges have "http"); `pools` are all that there are, the default one first.

    `run_dir` holds the sockets `text-N.sock` and `engine-N.sock`. `extra_plugins` are dotted module names to load besides the entry
    points. `module` and `function` name the role's main, so that the core imports no transport.
    """

    role: str
    id: int
    epoch: int
    config: Config
    run_dir: str
    root_pid: int
    module: str
    function: str = "run"
    edges: int = 1
    texts: int = 1
    engines: int = 1
    extra_plugins: list[str] = []
    listeners: dict[str, int] = {}
    pools: list[PoolSpec] = []


# ------------------------------------------------------------------ inside root


class StartChild(Message, frozen=True, kw_only=True):
    """Supervisor to the process port: start this life of a child."""

    role: str
    id: int
    epoch: int


class KillChild(Message, frozen=True, kw_only=True):
    """Supervisor to the process port: send a signal to a child that does not leave by itself."""

    role: str
    id: int
    epoch: int
    signum: int


class ChildExited(Message, frozen=True, kw_only=True):
    """Process port to supervisor: the process is gone and reaped, and all its frames were read. `status` is -n for a signal."""

    role: str
    id: int
    epoch: int
    status: int


class Signalled(Message, frozen=True, kw_only=True):
    """Root itself received a signal."""

    signum: int


class Notice(Message, frozen=True, kw_only=True):
    """Something for the log."""

    level: Literal["debug", "info", "warning", "error"]
    event: str
    fields: dict[str, str | int | float] = {}


class Ready(Message, frozen=True, kw_only=True):
    """Everything is up; `facts` of the engines, by index. `first` is false after a recovery."""

    facts: list[EngineFacts]
    first: bool
    seconds: float


class Leave(Message, frozen=True, kw_only=True):
    """All children are gone: root leaves with this exit status; `error` is the one line for the user, if there is something to say."""

    status: int
    error: str = ""


RootToChild = Hello | Boot | Drain | Stop | EngineUp | EngineDown | Vitals | StartupPhase | Tables | Extension
ChildToRoot = Hello | ChildUp | ChildDown | EngineUp | Heartbeat | StartupPhase | Drained | Extension | Spending
