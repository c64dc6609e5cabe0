"""The ledger: what was accepted, and every token that was received for it.

What it is: `Request` and `Choice` entries, and columns over *slots* (one slot a live choice), so that the rows of a step become the columns
of a delta by fancy indexing and not by per-row Python. The ledger is what turns an engine's death into a pause: `readmit` gives the
Admit that continues a request from the tokens that text has received.
What it does not know: text, stop strings, the engine's state, who is connected.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from penstock.core.actors.text.answers import Said
from penstock.core.actors.text.detokenizer import ByteDecoder, Decoder
from penstock.core.actors.text.quota import Charge
from penstock.core.actors.text.stops import StopMatcher, Withheld
from penstock.core.actors.text.told import Told
from penstock.core.contract.formats import Splitter
from penstock.core.protocol.columns import EMPTY_I32, I32, i32
from penstock.core.protocol.messages import Admit, Grammar, ParkCause, RowExtra, Submit, TokenLogprobs, seq_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.tenants import SloClass
from penstock.core.telemetry.series import Series

if TYPE_CHECKING:
    from penstock.core.actors.text.lane import Lane
    from penstock.core.actors.text.retained import Kept

# Request.state
ENCODING, WAITING, ADMITTED = "encoding", "waiting", "admitted"
# Choice.mode: which path a received token takes
FAST, QUIET, GENERAL, SPLIT = 0, 1, 2, 3


class Choice:
    """One of a request's sequences. `sent` counts the tokens that have gone to the edge; `parts` and `logprobs` wait to go."""

    __slots__ = (
        "batch",
        "decoder",
        "finish",
        "incarnation",
        "index",
        "last_ns",
        "logprobs",
        "made",
        "matcher",
        "mode",
        "outputs",
        "over",
        "parts",
        "reasoned",
        "request",
        "said",
        "sent",
        "seq",
        "series",
        "slot",
        "splitter",
        "undecoded",
        "undone",
        "unfinished",
        "withheld",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.series = request.series
        self.index = index
        self.seq = seq_of(request.key, index)
        self.slot = -1
        self.incarnation = 0
        self.outputs: array[int] = array("i")
        self.sent = 0
        self.undecoded = 0
        """Outputs from here on have no text yet (in QUIET mode until the end)."""
        self.parts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.withheld: Withheld | None = None
        """Those of tokens that may turn out to be no text, as a stop string may end there."""
        self.decoder: Any = None
        """ByteDecoder (all paths but GENERAL need it) or any Decoder."""
        self.matcher: StopMatcher | None = None
        self.splitter: Splitter | None = None
        """Takes its text apart; None: all of it is content."""
        self.said: Said | None = None
        """What it said, channel by channel; kept if that is to be verified."""
        self.reasoned = 0
        """Tokens of reasoning."""
        self.made = False
        """Has a call of a tool been complete?"""
        self.undone = 0
        """Calls that began and are not complete."""
        self.unfinished = False
        """Did it end by itself, or by a stop string, while there were such?"""
        self.mode = GENERAL
        self.batch: Any = None
        """The EdgeBatch of the request's edge."""
        self.last_ns = 0
        self.finish = ""
        """Why it ended; "" while it runs."""
        self.over = False
        """Did the engine end it?"""


class Request:
    """An accepted request. Times in ns on CLOCK_MONOTONIC, 0 if not reached yet."""

    __slots__ = (
        "accepted",
        "admitted_ns",
        "arrival_ns",
        "cached",
        "charge",
        "choices",
        "class_",
        "drafted",
        "edge",
        "encode_end_ns",
        "encode_start_ns",
        "events",
        "extra",
        "first_ns",
        "grammar",
        "hashes",
        "incarnation",
        "kept",
        "key",
        "lane",
        "last_ns",
        "mark",
        "max_tokens",
        "obeyed",
        "off",
        "open",
        "params",
        "parked",
        "preemptions",
        "priority",
        "prompt",
        "prompt_logprobs",
        "prompt_text",
        "queued_tokens",
        "received_ns",
        "replaying",
        "replays",
        "root_hash",
        "scheduled_ns",
        "series",
        "slo",
        "started",
        "state",
        "stream",
        "strikes",
        "submit",
        "told",
        "traced",
    )

    def __init__(self, submit: Submit, params: SamplingParams, series: Series, now_ns: int) -> None:
        self.submit = submit
        self.key = submit.key
        self.edge = submit.edge
        self.stream = submit.stream and params.beam is None
        """Rows go out as they are made. Beams have one each, at the end."""
        self.params = params
        self.priority = submit.priority
        self.series = series
        """Whose figures it adds to: those of its pool and class."""
        self.state = ENCODING
        self.prompt: I32 = EMPTY_I32
        self.prompt_text = ""
        self.hashes = b""
        self.root_hash = b""
        self.max_tokens = 0
        self.obeyed: Grammar | None = None
        """What its answers obey, from their first token on."""
        self.grammar = b""
        """That, compiled, for the engine."""
        self.lane: Lane | None = None
        """Where it waits or runs, once it is encoded."""
        self.queued_tokens = 0
        """What admission counts for it, while it waits."""
        self.class_ = ""
        """Its tenant's, if that has one; `slo` says what it is to get."""
        self.slo: SloClass | None = None
        self.charge: Charge | None = None
        """What it holds of its tenant's limits; None: there are none, or it has been settled."""
        self.choices: list[Choice] = []
        self.open = 0
        """Choices that still run."""
        self.incarnation = 0
        self.started = False
        self.parked: frozenset[ParkCause] = frozenset()
        """Why nothing is produced for it."""
        self.kept: Kept | None = None
        """The retained stream that it belongs to."""
        self.cached = 0
        self.preemptions = 0
        self.drafted = self.accepted = 0
        """Drafts that were verified, and the right ones, as far as the engine has said."""
        self.off: list[str] = []
        """Drafters that were off while it ran, each with why; only filled when traced."""
        self.replays = 0
        self.replaying = False
        """Admitted again, not yet heard of."""
        self.mark = 0
        """Output tokens when it was last admitted."""
        self.strikes = 0
        """Engines in a row that died under it before it got a token."""
        self.arrival_ns = now_ns
        self.received_ns = min(submit.received_ns or now_ns, now_ns)
        self.encode_start_ns = 0
        self.encode_end_ns = 0
        self.admitted_ns = 0
        self.scheduled_ns = 0
        self.first_ns = 0
        self.last_ns = 0
        self.extra: RowExtra | None = None
        """What the first row to the edge must carry besides text."""
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        self.told: Told | None = None
        """With prompt_logprobs: the count of its reply, which other prompts share."""
        self.traced = False
        self.events: list[tuple[str, int]] = []
        """(name, ns) for spans; only filled when traced."""

    @property
    def running(self) -> list[Choice]:
        """Choices that have not ended."""
        return [choice for choice in self.choices if not choice.finish]

    @property
    def output_tokens(self) -> int:
        return sum(len(choice.outputs) for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoned for choice in self.choices)

    def admit(self, eos: I32, *, replay: bool) -> Admit:
        """The Admit for every choice that still runs, with the tokens received so far."""
        running = self.running
        params = self.params
        outputs = np.concatenate([np.frombuffer(bytes(choice.outputs), dtype=np.int32) for choice in running]) if replay else EMPTY_I32
        return Admit(
            key=self.key,
            incarnation=self.incarnation,
            prompt=self.prompt,
            hashes=self.hashes,
            root_hash=self.root_hash,
            choices=i32([choice.index for choice in running]),
            sampling=msgspec.structs.replace(params, min_tokens=0) if self.grammar else params,
            max_tokens=self.max_tokens,
            eos=EMPTY_I32 if params.ignore_eos else eos,
            outputs=outputs,
            output_counts=i32([len(choice.outputs) for choice in running]) if replay else EMPTY_I32,
            priority=self.priority,
            arrival_ns=self.arrival_ns,
            spec_decode=self.submit.spec_decode,
            replay=replay,
            grammar=self.grammar,
            grammar_min_tokens=params.min_tokens if self.grammar else 0,
        )


class Held(NamedTuple):
    """A choice that has ended, and whose end is not told before it is known to obey its grammar: what its last row would be, and its tokens (I32, without
    one that ended it; none of one that was taken apart), whose text a stop string has cut unless `stop` is ""."""

    choice: Choice
    text: str
    stop_reason: int | str | None
    ids: I32
    stop: str
    finish: str = "stop"


class Ledger:
    """All live entries. Columns are indexed by slot: keys I64, indices I32, prompts I32 (tokens), cached I32."""

    def __init__(self, slots: int = 256) -> None:
        self.requests: dict[int, Request] = {}
        self.choices: dict[int, Choice] = {}
        """By seq; only those that may still receive tokens."""
        self.keys = np.zeros(slots, np.int64)
        self.indices = np.zeros(slots, np.int32)
        self.prompts = np.zeros(slots, np.int32)
        self.cached = np.zeros(slots, np.int32)
        self._free = list(range(slots - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.requests[request.key] = request

    def has(self, request: Request) -> bool:
        """Is it (and not another one of its key) still here?"""
        return self.requests.get(request.key) is request

    def open(self, request: Request, decoders: list[Decoder], matchers: list[StopMatcher | None], batch: Any) -> None:
        """Give each choice its slot; from now on tokens are accepted."""
        for index, (decoder, matcher) in enumerate(zip(decoders, matchers, strict=True)):
            choice = Choice(request, index)
            choice.decoder = decoder
            choice.matcher = matcher
            choice.batch = batch
            choice.slot = self._slot()
            self.keys[choice.slot] = request.key
            self.indices[choice.slot] = index
            self.prompts[choice.slot] = len(request.prompt)
            self.cached[choice.slot] = 0
            request.choices.append(choice)
            self.choices[choice.seq] = choice
        request.open = len(request.choices)

    def set_cached(self, request: Request, tokens: int) -> None:
        request.cached = tokens
        for choice in request.choices:
            if not choice.finish:
                self.cached[choice.slot] = tokens

    def close(self, choice: Choice, finish: str) -> None:
        """No more tokens are accepted. Its slot stays readable until `recycle`."""
        choice.finish = finish
        choice.request.open -= 1
        self.choices.pop(choice.seq, None)

    def hold(self, choice: Choice, finish: str) -> None:
        """The same, but the end is still to be told, by `close`."""
        choice.finish = finish
        del self.choices[choice.seq]

    def recycle(self, choice: Choice) -> None:
        """The slot may serve another choice: every delta that names it has been built."""
        self._free.append(choice.slot)
        choice.slot = -1

    def remove(self, request: Request) -> None:
        del self.requests[request.key]

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def slots(self) -> int:
        return len(self.keys)

    def _slot(self) -> int:
        if not self._free:
            old = len(self.keys)
            for name in ("keys", "indices", "prompts", "cached"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            self._free = list(range(2 * old - 1, old - 1, -1))
        return self._free.pop()


def fast_mode(choice: Choice) -> int:
    """The cheapest path that this choice's tokens may take once its first row is out."""
    request = choice.request
    if choice.matcher is not None or request.params.logprobs is not None or not isinstance(choice.decoder, ByteDecoder):
        return GENERAL
    if choice.splitter is not None:
        return SPLIT if request.submit.parallel_calls and choice.said is None else GENERAL
    return FAST if request.stream else QUIET
