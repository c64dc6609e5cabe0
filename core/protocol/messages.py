"""Every struct that may enter a mailbox.

What it is: the closed family of messages, one tagged union per edge of the actor graph, plus `Extension` for plugin actors.
Columns are numpy arrays of equal length unless a `*_counts` column says otherwise (then the payload is the concatenation of the rows:
CSR with counts). One message a step per edge of the graph, never one a sequence.
Evolution rule: append fields with defaults, never reorder, never reuse a tag; `tests/contract` keeps a snapshot.
What it does not know: who handles a message (`route` in `core/runtime/wiring.py` makes that table of what each actor takes and gives), loops, sockets.
It is long because the contract of each edge is what its fields say, and both of its ends are read together.

Identity: a request is `key` (int64, below 2**56, given by the edge: see `edge_key`); one of its `n` choices is `seq = key << 7 | choice`.
`incarnation` counts re-admissions of the same sequence (after a preemption it stays, after an engine's death it grows).
`step` counts from 1 within an `epoch`; an epoch is one life of an engine process.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.core.protocol.calling import Calling
from penstock.core.protocol.columns import EMPTY_F32, EMPTY_I32, EMPTY_I64, EMPTY_U8, Column
from penstock.core.protocol.control import PROTOCOL_LEVEL as PROTOCOL_LEVEL
from penstock.core.protocol.control import Boot as Boot
from penstock.core.protocol.control import ChildDown as ChildDown
from penstock.core.protocol.control import ChildExited as ChildExited
from penstock.core.protocol.control import ChildToRoot as ChildToRoot
from penstock.core.protocol.control import ChildUp as ChildUp
from penstock.core.protocol.control import Drain as Drain
from penstock.core.protocol.control import Drained as Drained
from penstock.core.protocol.control import EngineDown as EngineDown
from penstock.core.protocol.control import EngineFacts as EngineFacts
from penstock.core.protocol.control import EngineUp as EngineUp
from penstock.core.protocol.control import Extension as Extension
from penstock.core.protocol.control import Heartbeat as Heartbeat
from penstock.core.protocol.control import Hello as Hello
from penstock.core.protocol.control import KillChild as KillChild
from penstock.core.protocol.control import Leave as Leave
from penstock.core.protocol.control import Message as Message
from penstock.core.protocol.control import Notice as Notice
from penstock.core.protocol.control import PeerDown as PeerDown
from penstock.core.protocol.control import PeerUp as PeerUp
from penstock.core.protocol.control import Quality as Quality
from penstock.core.protocol.control import Ready as Ready
from penstock.core.protocol.control import RootToChild as RootToChild
from penstock.core.protocol.control import Signalled as Signalled
from penstock.core.protocol.control import Spending as Spending
from penstock.core.protocol.control import StartChild as StartChild
from penstock.core.protocol.control import StartupPhase as StartupPhase
from penstock.core.protocol.control import Stop as Stop
from penstock.core.protocol.control import Tables as Tables
from penstock.core.protocol.control import Tick as Tick
from penstock.core.protocol.control import Vital as Vital
from penstock.core.protocol.control import Vitals as Vitals
from penstock.core.protocol.control import WorkDone as WorkDone
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.standing import Standing

CHOICE_BITS = 7

# Reasons in StepTokens.reasons
RUNNING, STOP, LENGTH, ABORTED, FAILED = 0, 1, 2, 3, 4
REASON_NAMES: dict[int, str] = {STOP: "stop", LENGTH: "length", ABORTED: "abort", FAILED: "error"}


# Channels of an answer, in TextDelta.channels
CONTENT, REASONING, NAME, ARGUMENTS, DONE = 0, 1, 2, 3, 4


def seq_of(key: int, choice: int) -> int:
    return key << CHOICE_BITS | choice


def key_of(seq: int) -> int:
    return seq >> CHOICE_BITS


def choice_of(seq: int) -> int:
    return seq & ((1 << CHOICE_BITS) - 1)


# Kinds in Sample.pool_kinds: the final hidden state of the last position, of the first, the mean of all
POOL_LAST, POOL_FIRST, POOL_MEAN = 0, 1, 2


# ------------------------------------------------------------------ edge -> text


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must obey. `source` of the kinds: "json": a JSON schema; "regex": an expression for the whole answer; "choice": a JSON list of texts;
    "grammar": Lark or GBNF; "layout": a Part of core/contract/layouts.py as JSON. `field` is what the client calls it, for errors."""

    kind: Literal["json", "regex", "choice", "grammar", "layout"]
    source: str
    field: str = ""
    compact: bool = False
    """Of the kind "json": without white space."""

    @property
    def form(self) -> Literal["json", "compact_json", "regex", "choice", "grammar", "layout"]:
        """Its kind as backends have it."""
        return "compact_json" if self.compact and self.kind == "json" else self.kind


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an answer, and what it must obey."""

    grammar: Grammar
    text: str


OnDisconnect = Literal["cancel", "continue", "park"]
ParkCause = Literal["slow", "user", "detached"]


class Submit(Message, frozen=True, kw_only=True):
    """One prompt of one request. Exactly one of `messages`, `prompt`, `prompt_ids` (I32) is given.

    `messages`, `tools`, `template_kwargs` are raw JSON (the chat template's input); `rid` is the id that the client sees. `kind` "chat" goes with
    `messages`. `model` "" is the default one. `tenant` (RequestContext.tenant) and `cache_salt` say who shares prefixes with whom. `stream`
    informs: rows come as they are made in any case. `traceparent`, `tracestate`, `received_ns` may be left out.
    """

    key: int
    edge: int
    rid: str
    kind: Literal["chat", "completion"]
    model: str
    sampling: SamplingParams
    messages: bytes = b""
    tools: bytes = b""
    template_kwargs: bytes = b""
    prompt: str | None = None
    prompt_ids: Column | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    echo: bool = False
    stream: bool = False
    explicit: list[str] = msgspec.field(default_factory=list)
    """Sampling fields that the client itself gave, by our names; the others take the model's generation_config.json defaults."""
    want_ids: bool = False
    """Send prompt_token_ids with the first delta."""
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    tracestate: str = ""
    received_ns: int = 0
    sent_ns: int = 0
    """When it left the edge: there `receive` ends and text's first span begins."""
    to_wall_ns: int = 0
    """What the edge adds to a moment on CLOCK_MONOTONIC to get its spans' time since the Unix epoch; text adds the same, so that their spans
    touch. 0: no span was begun."""
    prompt_name: str = ""
    """What the client calls this prompt ("prompt[3]"), for errors; "" is "messages" or "prompt"."""
    names: dict[str, str] = msgspec.field(default_factory=dict)
    """What the client calls fields that are called otherwise here, for errors: {"max_tokens": "max_completion_tokens"}."""
    chat_template: str = ""
    """Instead of the model's; "" is the model's own."""
    grammar: Grammar | None = None
    split: bool = False
    """Take the answer apart: reasoning, and with `tools` calls, come in channels of their own. Of `chat` only."""
    parallel_calls: bool = True
    """Otherwise the answer ends with its first call."""
    calling: Calling | None = None
    """With `split`: the calls that the answer may, or must, have. None: none, or whatever the model makes of `tools`."""
    group: int = 0
    """Of several prompts that one reply answers, the key of the first; 0: this is its only one."""
    tells: int = -1
    """How many of the answers tell the prompt's log-probabilities: what is told in one reply is bounded. -1: all of them, and a chat's reply once. 0: no
    reply is made of them, and there is no bound (the Python API)."""
    retain_s: float = 0.0
    """Keep the stream's rows, under `rid`, until so long after its end or after its last reader left; 0: do not. All requests of a `rid` are one stream."""
    on_disconnect: OnDisconnect = "cancel"
    """With `retain_s`, once nobody listens: end it, go on, or wait for somebody."""
    context: bytes = b""
    """With `retain_s`: what an edge needs to answer it again. The first request of a stream brings it."""
    peer: str = ""
    """With chat_template: where it came from (an address), for turns among those who have no tenant."""
    detokenize: bool = True
    """False: the tokens are all that is wanted. No text is made of them, nor spellings of log-probabilities; there can be no stop strings then."""
    spec_decode: bool | None = None
    """As in Admit."""
    key_mark: str = ""
    """Which key of the tables it came with (Principal.mark); "": with none of them."""
    tables: int = 0
    """The generation of the tables that the edge knew that key by."""


class Cancel(Message, frozen=True, kw_only=True):
    """The client went away, or the edge gave the stream up. Idempotent. `cause` is a metric label."""

    key: int
    cause: Literal["disconnect", "slow_client", "timeout", "drain", "client"] = "disconnect"


class Park(Message, frozen=True, kw_only=True):
    """Stop producing for this request, keep its state. Travels edge -> text -> engine. `why`: the client reads too slowly, said so, or is not there; text goes on once
    no reason is left, and an engine is told of the first and the last only."""

    key: int
    why: ParkCause = "slow"


class Unpark(Message, frozen=True, kw_only=True):
    key: int
    why: ParkCause = "slow"


class Attach(Message, frozen=True, kw_only=True):
    """From now on this edge listens to a retained stream; another one that did is told, by a Rejected. The answer is an Attached with the same `mark`, behind which all
    its rows come again, and then the rest. A stream that is not there any more is a Rejected for each of `keys`."""

    rid: str
    tenant: str
    edge: int
    keys: list[int]
    mark: int = 0


class Detach(Message, frozen=True, kw_only=True):
    """The client of a retained stream went away (`key` is any of its keys), or was cut off. Ignored from an edge that does not listen to it. `cause` is what
    the metrics say if that ends it."""

    key: int
    edge: int
    cause: Literal["disconnect", "slow_client"] = "disconnect"


class Query(Message, frozen=True, kw_only=True):
    """A question of an edge that is answered by one `Answer` with the same `id`.

    what: "models" | "tokenize" | "detokenize" | "tokenizer_info" | "metrics" | "health" | "server_info" | "cancel" | "control" | "stream"; `body` is its JSON argument.
    """

    id: int
    edge: int
    what: str
    body: bytes = b""


class EdgeStats(Message, frozen=True, kw_only=True):
    """Cumulative counters of one edge, so that text holds one consistent view: flat name{label="value"} -> number."""

    edge: int
    counters: dict[str, float]


# ------------------------------------------------------------------ text -> edge


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position: the chosen token first, then the top k, most likely first. Texts are the tokens decoded alone, bytes their UTF-8."""

    ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    texts: list[str]
    bytes_: list[bytes]
    silent: bool = False
    """The chosen token adds nothing to the text: a special token that is left out, one that ended the answer, or one of the stop string that did."""


class RowExtra(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rare parts of a delta row: `row` indexes the columns of the TextDelta that carries it."""

    row: int
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_token_ids: Column | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    error_code: str | None = None
    prompt_text: str | None = None
    """With echo: the prompt as text, in the request's first row."""
    prompt_offsets: list[int] = []
    """With echo and prompt_logprobs: where each prompt token begins in prompt_text, in characters."""
    prompt_first: bytes = b""
    """With those: the bytes of the prompt's first token, which has no entry in prompt_logprobs."""
    call_id: str = ""
    """In a row of channel NAME: what the call is called in the conversation."""
    error_param: str | None = None
    unfinished: bool = False
    """Of an end with the reason `length`: tokens did not run out; the answer ended (stop_reason says how) within a call, whose arguments are not complete."""


class TextDelta(Message, frozen=True, kw_only=True):
    """All that one step brought for one edge. Rows of one (key, choice) come in order; `reasons` non-empty ends the choice.

    keys I64, choices I32, texts, counts I32 (tokens in the row), tokens I32 (CSR by counts), prompt_tokens I32, cached_tokens I32,
    output_tokens I32 (total so far), reasons ("" = goes on, else stop | length | tool_calls | abort | error).
    channels U8 and calls I32 say what a row's text is: CONTENT, REASONING, NAME (a call begins; its function), ARGUMENTS (JSON text), DONE (they are
    complete, and valid; no text), and of which of the choice's calls, from 0 (-1: of none). Both are empty where all rows are CONTENT.
    """

    keys: Column
    choices: Column
    texts: list[str]
    counts: Column
    tokens: Column
    prompt_tokens: Column
    cached_tokens: Column
    output_tokens: Column
    reasons: list[str]
    extras: list[RowExtra] = msgspec.field(default_factory=list)
    channels: Column = EMPTY_U8
    calls: Column = EMPTY_I32


class Attached(Message, frozen=True, kw_only=True):
    """What comes behind this for the keys of the Attach with this `mark` is its answer. What came before was meant for another reader, perhaps on the same edge."""

    mark: int


class Finished(Message, frozen=True, kw_only=True):
    """The request is over: every choice has ended. Nothing follows for this key. Times in ns on CLOCK_MONOTONIC, 0 if never reached."""

    key: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    first_token_ns: int = 0
    preemptions: int = 0
    done_ns: int = 0
    """When text was done with it: there the edge's `send` begins."""
    reasoning_tokens: int = 0
    """Of output_tokens, those of reasoning."""


class Counted(Message, frozen=True, kw_only=True):
    """The request is let in, and this is where its tenant stands then. Only for tenants with limits; before its first row."""

    key: int
    standing: Standing


class Rejected(Message, frozen=True, kw_only=True):
    """The request never started. Fields as in PenstockError."""

    key: int
    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    standing: Standing | None = None
    """Where its tenant stands, if its limits refused it."""


class Answer(Message, frozen=True, kw_only=True):
    """The answer to a Query: JSON (or Prometheus text for "metrics"), or an error as in Rejected when status is not 200."""

    id: int
    body: bytes
    status: int = 200


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How large one prompt may be (core/actors/text/bounds.py). `context_chars` 0: the tokenizer gives no such bound."""

    max_model_len: int
    max_chars: int
    context_chars: int
    max_ids: int


class TextReady(Message, frozen=True, kw_only=True):
    """Sent to each edge on connect, whenever readiness changes, and every second as a sign of life: is everything up that answers need, and
    if not, what is missing."""

    ready: bool
    reason: str = ""
    epoch: int = 0
    waits: bool = False
    """Not ready, but requests are taken and wait: an engine is being restarted."""
    limits: Limits | None = None
    ages: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds since each process that answers depend on was last heard of, by name ("engine-0")."""


# ------------------------------------------------------------------ inside the text process


class Encode(Message, frozen=True, kw_only=True):
    """Text -> its tokenizer worker (off the loop): render and tokenise one prompt, fields as in Submit; or work out the answer to a question
    of that kind, whose Query has `body`. `job` comes back."""

    job: int
    kind: Literal["chat", "completion", "tokenize", "detokenize"]
    messages: bytes = b""
    tools: bytes = b""
    template_kwargs: bytes = b""
    prompt: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    bad_words: list[str] = msgspec.field(default_factory=list)
    ids: Column = EMPTY_I32
    """A prompt that came as tokens (then `prompt` is empty): it is only cut and hashed."""
    keep: int = 0
    """Keep only so many of the last tokens; 0 keeps all."""
    root_hash: bytes = b""
    block_size: int = 0
    """Hash full prompt blocks of this size from `root_hash`; 0: no hashes are wanted."""
    limits: Limits | None = None
    """Bounds of the text (rendered, if by a template), checked before it is tokenised; None: none."""
    want_text: bool = False
    """Send the text of the ids that are left (an echo)."""
    body: bytes = b""
    vocab_size: int = 0
    """Of the model, or of the tokenizer while no model is known: ids beyond are no tokens."""
    chat_template: str = ""
    owner: str = ""
    """With chat_template: whose turn it takes."""


class Encoded(Message, frozen=True, kw_only=True):
    """The worker's answer: `ids` I32, or an error as in Rejected. `rendered` is the prompt text."""

    job: int
    ids: Column = EMPTY_I32
    rendered: str = ""
    bad_words_ids: list[list[int]] = msgspec.field(default_factory=list)
    error: str = ""
    error_param: str | None = None
    started_ns: int = 0
    finished_ns: int = 0
    error_code: str = ""
    hashes: bytes = b""
    """16 bytes per full prompt block, if asked for."""
    error_status: int = 400
    body: bytes = b""
    """The answer to a question, as JSON."""


class CheckGrammar(Message, frozen=True, kw_only=True):
    """Text -> its grammar worker (off the loop): compile `grammar`; or, with `verify`, say whether an answer obeys it: its tokens `ids` (I32, without an
    end token), whose text is cut before `stop` (or behind it, `stop_stays`) if a stop string ended it; of an answer that was taken apart, whether each of `parts` obeys its own. `job`
    comes back."""

    job: int
    grammar: Grammar
    verify: bool = False
    ids: Column = EMPTY_I32
    stop: str = ""
    parts: list[Check] = msgspec.field(default_factory=list)
    stop_stays: bool = False


class GrammarChecked(Message, frozen=True, kw_only=True):
    """The worker's answer: `compiled`, for an engine; or an error as in Rejected. `error` "" to `verify`: it obeys."""

    job: int
    compiled: bytes = b""
    error: str = ""
    error_param: str | None = None
    error_code: str = ""
    error_status: int = 400


# ------------------------------------------------------------------ text -> engine


class Vocabulary(Message, frozen=True, kw_only=True):
    """What tokens mean, once a life of an engine and before the first Admit with a grammar: `data` are the bytes of all tokens (CSR by `counts` I32, one
    entry a token), `special` I32 those that are no text."""

    data: bytes
    counts: Column
    special: Column = EMPTY_I32


class Admit(Message, frozen=True, kw_only=True):
    """A request enters an engine. `prompt` I32; `hashes` are 16 bytes per full prompt block (see core/protocol/hashing.py).

    `choices` I32 are those to run (all of 0..n-1 at first). `outputs` I32 are tokens that text already received for them (CSR by
    `output_counts`), which are computed again, never sampled again; `sampling.seed` is always set. `eos` I32 are the model's
    end tokens (unless ignore_eos) ; `root_hash` is the 16-byte hash-chain root of this request's cache key.
    `max_tokens` is resolved against the context; 0: the prompt is computed and nothing drawn. `prefill_only` and `kv_handle` are for disaggregation, `adapter` for LoRA.
    """

    key: int
    incarnation: int
    prompt: Column
    hashes: bytes
    root_hash: bytes
    choices: Column
    sampling: SamplingParams
    max_tokens: int
    eos: Column
    outputs: Column = EMPTY_I32
    output_counts: Column = EMPTY_I32
    priority: int = 0
    arrival_ns: int = 0
    replay: bool = False
    prefill_only: bool = False
    kv_handle: bytes = b""
    adapter: int = 0
    grammar: bytes = b""
    """A compiled grammar that every choice obeys; b"": none."""
    grammar_min_tokens: int = 0
    """With a grammar, min_tokens (`sampling` has 0): its end may come earlier if nothing else is allowed."""
    spec_decode: bool | None = None
    """Drafts for it: True whatever they cost, False never, None as far as they pay."""


class Abort(Message, frozen=True, kw_only=True):
    """Stop the given sequences (I64) now; their blocks return within two steps. Unknown ones are ignored."""

    seqs: Column


# ------------------------------------------------------------------ engine -> text


class SpeculationStats(msgspec.Struct, frozen=True, array_like=True):
    """Of drafts, cumulative but for `width`, `chosen`, `states` (of each drafter: 2 good, 1 keep, 0 off, -1 idle) and `reasons`."""

    drafts: int = 0
    """Rows of steps that computed drafts along."""
    drafted: int = 0
    """These drafts."""
    accepted: int = 0
    """Those that were right, and all before them."""
    places: list[int] = []
    """The same for each place behind the known token."""
    draft_ns: int = 0
    """What drafters took, as far as the device measures it."""
    step_ns: int = 0
    """The steps in which they did."""
    width: int = 0
    """Of the last step in which anything was decoded: the most drafts that a row computed along."""
    states: list[int] = []
    chosen: int = 0
    """Drafts behind each token as they were found to pay, for the step that was planned last."""
    reasons: list[str] = []
    """Of each drafter, why it is off ("": it is on). Empty where none is off."""


class PaceStats(msgspec.Struct, frozen=True, array_like=True):
    """Of the last step that decoded while prompts waited."""

    limit_ns: int = 0
    """What it was to take at most."""
    prompt_tokens: int = 0
    """Prompt tokens that it might have."""


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and cumulative counters of one engine, read at a step's end."""

    running: int = 0
    waiting: int = 0
    parked: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_computed: int = 0
    prompt_cached: int = 0
    batch_tokens: int = 0
    quarantined: int = 0
    speculation: SpeculationStats | None = None
    pace: PaceStats | None = None

    @property
    def drafts(self) -> int:
        return 0 if self.speculation is None else self.speculation.drafts

    @property
    def drafted(self) -> int:
        return 0 if self.speculation is None else self.speculation.drafted

    @property
    def accepted(self) -> int:
        return 0 if self.speculation is None else self.speculation.accepted

    @property
    def draft_s(self) -> float:
        return 0.0 if self.speculation is None else self.speculation.draft_ns / 1e9

    @property
    def drafting_s(self) -> float:
        return 0.0 if self.speculation is None else self.speculation.step_ns / 1e9


class LogprobColumns(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sparse log-probabilities. Row i: `rows[i]` (index into the step's token rows; for prompts: index into `slots`/`seqs` given beside),
    `positions[i]` (0-based position of the predicted token in the sequence), then counts[i] ids and values, the predicted token first.
    `ranks[i]` is the predicted token's 1-based rank. `ids` I32 and `values` F32 (log-softmax of the raw logits) are CSR by `counts`; after the
    predicted token come the most likely ones, best first (as many as were asked for). All others are I32.
    """

    rows: Column = EMPTY_I32
    positions: Column = EMPTY_I32
    counts: Column = EMPTY_I32
    ranks: Column = EMPTY_I32
    ids: Column = EMPTY_I32
    values: Column = EMPTY_F32


class StepTokens(Message, frozen=True, kw_only=True):
    """The tokens of one step. Columns: seqs I64, incarnations I32, offsets I32 (index of the token in the sequence's output),
    tokens I32, reasons U8. A row with token -1 carries a reason only. Text accepts only offset == its ledger's length.

    started_*: sequences that were first scheduled in this step (cached_tokens from the prefix cache); times in ns.
    prompt_*: prompt log-probabilities, LogprobColumns.rows indexing `prompt_seqs`.
    """

    engine: int
    epoch: int
    step: int
    seqs: Column
    incarnations: Column
    offsets: Column
    tokens: Column
    reasons: Column
    stats: EngineStats
    started_ns: int = 0
    finished_ns: int = 0
    started_seqs: Column = EMPTY_I64
    started_cached: Column = EMPTY_I32
    preempted_seqs: Column = EMPTY_I64
    logprobs: LogprobColumns | None = None
    prompt_seqs: Column = EMPTY_I64
    prompt_logprobs: LogprobColumns | None = None
    errors: list[str] = msgspec.field(default_factory=list)
    """Why, for each FAILED row in order."""
    drafted_seqs: Column = EMPTY_I64
    """I64: sequences that end with this step and had drafts verified; I32, for each how many, and how many were right."""
    drafted: Column = EMPTY_I32
    accepted: Column = EMPTY_I32


# ------------------------------------------------------------------ inside the engine cell


class Plan(Message, frozen=True, kw_only=True):
    """The scheduler's note to itself: every message that was already queued is handled before it plans."""


class KvStep(Message, frozen=True, kw_only=True):
    """Everything the scheduler wants of the KV manager for one step, applied in this order:

    1. commit: sequences' computed lengths grew to `commit_lens`; `commit_tokens` (CSR by `commit_counts`) are the token values of all
       positions of the newly completed blocks whose hashes did not come with the look-up. Prompt blocks may be committed as soon as the
       Forward that writes them was given to the device queue, generated ones when their values are known.
    2. release: (seqs, incarnations) give all their blocks back (hashed ones stay cached until evicted; where `release_drop` is 1 the
       blocks' content is not trusted and nothing stays).
    3. lookup: new sequences; `lookup_hashes` are their prompt block hashes (16 bytes each, CSR by `lookup_counts`), `lookup_roots` 16 bytes
       each. The grant says how many tokens were hit: whole blocks, at most `lookup_max` tokens (length - 1; 0 for seqs with
       prompt_logprobs). A look-up takes effect together with the sequence's reserve row, and a denied one keeps nothing. -1: the next
       block is just being computed by another sequence; ask again next step. A denied row still tells what was found. `lookup_again` is 1 where the request was already counted.
    4. fork: `fork_dst` shares all full blocks of `fork_src`'s first `fork_lens` tokens and gets its own copy of a partial last one. If it has
       blocks already (both are beams of one search, equally long), those that differ go back, and its own partial last one takes the copy.
    5. reserve: each sequence must hold blocks for `reserve_lens` tokens. Granted row by row in order; a denied row changes nothing.
       Rows of looked-up sequences come last, leave at least `keep_free` blocks, and after the first of them that memory denies the
       rest are denied too (nobody overtakes).
    """

    step: int
    release_seqs: Column = EMPTY_I64
    release_incarnations: Column = EMPTY_I32
    commit_seqs: Column = EMPTY_I64
    commit_lens: Column = EMPTY_I32
    commit_tokens: Column = EMPTY_I32
    commit_counts: Column = EMPTY_I32
    lookup_seqs: Column = EMPTY_I64
    lookup_incarnations: Column = EMPTY_I32
    lookup_max: Column = EMPTY_I32
    lookup_hashes: bytes = b""
    lookup_counts: Column = EMPTY_I32
    lookup_roots: bytes = b""
    fork_src: Column = EMPTY_I64
    fork_dst: Column = EMPTY_I64
    fork_lens: Column = EMPTY_I32
    reserve_seqs: Column = EMPTY_I64
    reserve_lens: Column = EMPTY_I32
    release_drop: Column = EMPTY_U8
    lookup_again: Column = EMPTY_U8
    keep_free: int = 0


class KvGrant(Message, frozen=True, kw_only=True):
    """The KV manager's answer. `block_*` rows (block_seqs I64, block_index I32, block_ids I32) are every block that a sequence newly
    holds, shared ones included, in order; copies are (source, destination) blocks for the head of the next Forward."""

    step: int
    granted: Column = EMPTY_U8
    forked: Column = EMPTY_U8
    lookup_cached: Column = EMPTY_I32
    block_seqs: Column = EMPTY_I64
    block_index: Column = EMPTY_I32
    block_ids: Column = EMPTY_I32
    copy_src: Column = EMPTY_I32
    copy_dst: Column = EMPTY_I32
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    quarantined: int = 0


class GrammarOpen(Message, frozen=True, kw_only=True):
    """Scheduler -> masks: sequences (I64) obey `grammar` from here on. `outputs` I32 (CSR by `output_counts`) are what they have so far. `ends` I32 end a
    sequence, and may be drawn only where the grammar may end. Said again of sequences that begin anew."""

    seqs: Column
    incarnation: int
    grammar: bytes
    ends: Column
    min_tokens: int = 0
    outputs: Column = EMPTY_I32
    output_counts: Column = EMPTY_I32
    beams: bool = False
    """They are beams of one search: any of them may go on from where another one was (Drawn.sources)."""


class GrammarClose(Message, frozen=True, kw_only=True):
    """Scheduler -> masks: these (seqs I64, incarnations I32) are over."""

    seqs: Column
    incarnations: Column


class GrammarFailed(Message, frozen=True, kw_only=True):
    """Masks -> scheduler: a sequence cannot go on, since its grammar is too much for the backend: `error` says why. Comes before the mask of zeros.
    `broken`: the backend itself is to blame, not the request."""

    seq: int
    incarnation: int
    error: str
    broken: bool = False


class MaskRequest(Message, frozen=True, kw_only=True):
    """Scheduler -> masks: rows (I32) of Sample `step` that need a mask, and whose they are. It can be made once every earlier request's Drawn is here."""

    step: int
    rows: Column
    seqs: Column
    incarnations: Column
    draft_counts: Column = EMPTY_I32
    """I32: drafts that each of them computes along (`drafts` I32 is CSR), of which masks are wanted too; empty: none."""
    drafts: Column = EMPTY_I32


class Drawn(Message, frozen=True, kw_only=True):
    """Scheduler -> masks: what was drawn (tokens I32, -1: nothing) for the rows of the MaskRequest of `step`."""

    step: int
    seqs: Column
    incarnations: Column
    tokens: Column
    sources: Column = EMPTY_I64
    """I64: whose place in the grammar, as it was before this step, each goes on from; empty: each from its own."""
    counts: Column = EMPTY_I32
    """I32: tokens of each, where some have several (CSR by it); empty: one each."""


class MaskReady(Message, frozen=True, kw_only=True):
    """Masks -> sampler: `mask` I32 [rows x ceil(vocab / 32)] for those `rows` of Sample `step`. A row of zeros: its sequence cannot go on."""

    step: int
    rows: Column
    mask: Column
    counts: Column = EMPTY_I32
    """I32: masks of each row, the first for its next token, the others behind its drafts, as far as it is known what may
    follow them; empty: one each."""


class Draft(Message, frozen=True, kw_only=True):
    """Scheduler -> drafters on the host, which it asks: what may follow these sequences (seqs I64)? At most `most` I32 tokens each, of those that `drafters`
    U8 has as bits. Before that: `ended` I64 are over; `news` I64 go on with `tokens` I32 (CSR by `counts` I32), those of them in `begun` begin with them.
    `roots`: of each of these the 16 bytes that its prefix cache begins with: who has others must not profit from it."""

    step: int
    seqs: Column
    most: Column
    drafters: Column
    news: Column = EMPTY_I64
    counts: Column = EMPTY_I32
    tokens: Column = EMPTY_I32
    begun: Column = EMPTY_I64
    roots: bytes = b""
    ended: Column = EMPTY_I64


class Drafted(Message, frozen=True, kw_only=True):
    """Drafters on the host -> scheduler: for each of Draft.seqs so many (counts I32) `tokens` I32, and who (drafters U8) made them. `broken`: those that are not
    asked any more from now on, by their numbers, and why."""

    step: int
    counts: Column
    tokens: Column
    drafters: Column
    broken: dict[int, str] = msgspec.field(default_factory=dict)


class Forward(Message, frozen=True, kw_only=True):
    """One step of the model, columnar. Positions, token values and slot mapping live on the device; a *slot* (0..max_num_seqs-1) holds a
    running sequence's token history and block table.

    Applied in this order: copies (blocks copy_src -> copy_dst); places (slots that a sequence enters: its history becomes the
    `place_counts[i]` tokens, its block table is emptied; `place_tokens` is CSR); embeds; clones; writes; blocks (block_table[block_slots, block_index] = block_ids);
    rows: for row i compute the tokens at positions [starts[i], starts[i]+counts[i]) of slots[i]. A position at or beyond the known
    history is the token that an earlier Sample put there. Decode rows (counts == 1 at the end of the history) come first: `num_decode`.

    All columns are I32; no slot has two rows. KV of positions before `starts` is in the blocks of the slot's table: position p lies in block
    table[p // block_size] at offset p % block_size. What is computed must be written there before `sample`. `engine`, `epoch` and `step` go
    into StepDone as they are.

    The columns behind `block_ids` but `prompt_rows` are optional: a device gets only those that its DeviceCapabilities name, and a runner refuses the others by name.
    """

    engine: int
    epoch: int
    step: int
    slots: Column
    starts: Column
    counts: Column
    num_decode: int
    copy_src: Column = EMPTY_I32
    copy_dst: Column = EMPTY_I32
    place_slots: Column = EMPTY_I32
    place_counts: Column = EMPTY_I32
    place_tokens: Column = EMPTY_I32
    block_slots: Column = EMPTY_I32
    block_index: Column = EMPTY_I32
    block_ids: Column = EMPTY_I32
    write_slots: Column = EMPTY_I32
    """Writes: history[write_slots, write_positions] = write_tokens. The rows of a slot come in ascending order without a gap, the first at or before the
    end of what it has; its history ends behind the last one."""
    write_positions: Column = EMPTY_I32
    write_tokens: Column = EMPTY_I32
    clone_src: Column = EMPTY_I32
    """Clones: slot clone_dst[i] gets the first clone_lens[i] tokens of slot clone_src[i]'s history, which end its own, and its block table. All sources are
    read before anything is written. Sampling state is not cloned: Sample.places brings it."""
    clone_dst: Column = EMPTY_I32
    clone_lens: Column = EMPTY_I32
    lookahead: int = 0
    """The width of the step: a decode row counts 1 to 1 + lookahead positions. Behind the last token that is known stand drafts, put there by the last Sample
    of that slot (Sample.drafts) or by writes, and so many of them are computed along: never more than stand there, often fewer, for each row its own. 0:
    one position a decode row, as without speculation."""
    block_groups: Column = EMPTY_U8
    """U8: of which KV group (DeviceCapabilities.kv_groups) each row of block_ids is; a slot has a block table a group. Empty: group 0."""
    copy_groups: Column = EMPTY_U8
    """U8: of which KV group each copy is. Empty: group 0."""
    place_adapters: Column = EMPTY_I32
    """The resident adapter (1 to DeviceCapabilities.adapters) that each placed sequence is computed with, 0 for none; clones keep it. Empty: none."""
    embed_slots: Column = EMPTY_I32
    """Embeds: the positions embed_starts[i] to embed_starts[i] + embed_counts[i] - 1 of slot embed_slots[i] enter the model as rows embed_rows[i] and
    following of the device's embeddings (DeviceCapabilities.embeddings), whatever their tokens are. They lie within the history and are not computed yet."""
    embed_starts: Column = EMPTY_I32
    embed_counts: Column = EMPTY_I32
    embed_rows: Column = EMPTY_I32
    prompt_rows: Column = EMPTY_I32
    """Rows whose prompt log-probabilities the step's Sample asks for (its prompt_rows): of them the hidden states of all tokens are wanted, not only of
    the last. Every device gets it."""
    loose: Column = EMPTY_U8
    """U8, for each row: 1 for decode rows that were planned while a step that drafts was in flight, so that how far that brought them is not known. Such a row
    begins at its slot's last token, wherever the Samples before have put it; `starts` says the last position that this can be, for which there are blocks. It counts
    as if all drafts that were asked for stood there: where fewer do, any tokens may stand in their places, or the row may compute fewer. Its Sample's
    position is the one behind, at most what that says. Only for a runner with `loose`. Empty: all zeros."""
    place_unread: Column = EMPTY_U8
    """U8, for each of place_slots: 1 for a sequence that drafters need not look at, since no drafts are wanted for it: the device keeps nothing for them, and makes no drafts
    for it by those that read sequences (Runner.reads). Clones are as their source. Only for a runner with `reads`. Empty: all zeros."""
    read_slots: Column = EMPTY_I32
    """Slots of such sequences that drafts are wanted for from now on, behind this step already. Drafters read before the next drafts what they have missed; only where all that
    read at all can (READS_TOKENS)."""


class SlotSampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling state of a sequence that enters a slot: it holds until another one comes, or until Forward places the slot anew. `choice` (which of
    the request's n) and `params.seed` (always set) make the draw's random numbers. `prompt_len` separates prompt from output in the slot's history (penalties look at
    both as in vLLM: repetition at prompt and output, frequency and presence at output only). `params.beam`: it is one of a search's, and of the tokens that
    its masks leave the likeliest are told, with the log-probabilities that they have among all. Order: penalties, logit_bias, allowed_token_ids,
    bad_words_token_ids, stop_ids while less than min_tokens exist; then temperature, top_k, top_p, min_p."""

    slot: int
    choice: int
    prompt_len: int
    params: SamplingParams
    stop_ids: Column = EMPTY_I32
    """Ids masked out until min_tokens outputs exist (end tokens and stop_token_ids)."""


class Sample(Message, frozen=True, kw_only=True):
    """Draw one token for each row: from the last computed position of Forward row `rows[i]`, into slot `slots[i]` at position
    `positions[i]` (absolute, so that Philox counters do not depend on batching). Many-to-one for n > 1.

    `prompt_rows`: Forward rows whose prompt log-probabilities are wanted (every position computed in this step that predicts a prompt
    token), with `prompt_topk` each.

    All columns are I32. `engine`, `epoch` and `step` are those of the Forward before. `places` come first. A Forward row that nothing is drawn
    from (a part of a prompt) has no row here. Each token is also written to history[slots[i], positions[i]]: the next Forward may compute it
    before anybody read it.
    """

    engine: int
    epoch: int
    step: int
    rows: Column
    slots: Column
    positions: Column
    places: list[SlotSampling] = msgspec.field(default_factory=list)
    prompt_rows: Column = EMPTY_I32
    prompt_topk: Column = EMPTY_I32
    mask: Column = EMPTY_I32
    """Tokens that may be drawn: Q rows of ceil(vocab_size / 32) words, bit t % 32 of word t // 32 for token t."""
    mask_rows: Column = EMPTY_I32
    """For each row its row of `mask`, or -1 for none; empty: none at all. With a lookahead the mask is for the row's first token. A runner with `masks_ahead` gets,
    where masks follow drafts, 1 + lookahead entries a row instead: for its next token, and for each behind a draft; -2: there nothing is drawn, the
    row's tokens end in front of it."""
    lookahead: int = 0
    """As in its Forward. Above 0, row i is drawn for at every position from positions[i] to the end of what its Forward row computed, each as if it were
    alone, as long as the token that was drawn is the one that stands there (a draft): StepDone.counts tokens in all."""
    pool_rows: Column = EMPTY_I32
    """Forward rows of sequences that are pooled: one in each step that computes a part of such a prompt, the vector comes with its last part."""
    pool_kinds: Column = EMPTY_U8
    """U8, for each of pool_rows: POOL_LAST, POOL_FIRST or POOL_MEAN, as far as DeviceCapabilities.pool_kinds names it."""
    masked: bool = False
    """Its mask is still to come: the sampler holds it until then. No device sees it."""
    drafts: int = 0
    """Behind the last token that was drawn for each row the device puts up to so many new drafts into the history, whatever `lookahead` is; what stood there is
    gone. 0: none, and no drafter runs: the step costs what it costs without speculation. So a slot whose last Sample had 0 has no drafts, and counts 1 in
    the next step; a Sample with drafts there makes them anew."""
    drafters: int = -1
    """With drafts: which of Runner.drafters may make them, as bits. A row gets those of the first one that has any for it."""


class StepDone(Message, frozen=True, kw_only=True):
    """Step `step` of this `engine` and `epoch` has left the device. `slots` I32 as in Sample, `tokens` I32 drawn for them; `started_ns` and
    `finished_ns` on CLOCK_MONOTONIC around the device's work; `logprobs` for rows whose SamplingParams.logprobs is not None."""

    engine: int
    epoch: int
    step: int
    slots: Column
    tokens: Column
    started_ns: int = 0
    finished_ns: int = 0
    logprobs: LogprobColumns | None = None
    """rows index tokens."""
    prompt_logprobs: LogprobColumns | None = None
    """rows index Sample.prompt_rows."""
    bad_rows: Column = EMPTY_I32
    """Rows whose logits held NaN or infinity only: their sequences fail, nobody else's."""
    counts: Column = EMPTY_I32
    """I32, with a lookahead: tokens of each row, at least one. `tokens` is CSR then, and `logprobs.rows` index tokens. Empty: one each."""
    drafts: Column = EMPTY_I32
    """I32 [rows x Sample.drafts]: the drafts that now stand behind each row's last token, -1 from where on there are none. Empty: none at all."""
    pooled: Column = EMPTY_F32
    """F32: the pooled vectors, CSR by pooled_counts."""
    pooled_counts: Column = EMPTY_I32
    """I32, for each of Sample.pool_rows how many numbers it has: 0 while its prompt goes on, else the hidden size."""
    drafters: Column = EMPTY_U8
    """U8, for each row: who of Runner.drafters made its drafts. Empty: the first."""
    draft_ns: int = 0
    """Of the step's time, what drafters took, in ns; 0: not measured."""


class DeviceLost(Message, frozen=True, kw_only=True):
    """The device cannot go on; the engine leaves with a non-zero status and its sequences are replayed elsewhere or later."""

    engine: int
    epoch: int
    step: int
    error: str


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Copy whole KV blocks between the device's pool and the runner's host memory: pair i is block `blocks[i]` and host page `pages[i]`, both I32.
    `out`: from blocks to pages; else from pages to blocks. Answered by one WorkDone with this `owner` (the name of the actor that sent it and takes
    WorkDone) and `id`, once all bytes are where they belong.

    It runs between two steps, never between a Forward and its Sample: behind step `after` if that is still to come (0: at the next boundary),
    and before every Forward that was sent behind it.
    """

    engine: int
    epoch: int
    owner: str
    id: int
    blocks: Column
    pages: Column
    out: bool
    after: int = 0


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A named call on the runner, in order with steps: place and answer as for Move. `name` "fence" is answered by the queue itself: everything before
    it has been given to the device."""

    engine: int
    epoch: int
    owner: str
    id: int
    name: str
    data: bytes = b""
    after: int = 0


class DeviceWork(Message, frozen=True, kw_only=True):
    """An entry for the ordered device queue: exactly one of forward, sample, move and control."""

    forward: Forward | None = None
    sample: Sample | None = None
    move: Move | None = None
    control: Control | None = None


def message_types() -> list[type[Message]]:
    """Every concrete message, in definition order."""
    return [value for value in globals().values() if isinstance(value, type) and issubclass(value, Message) and value is not Message]


# The unions that links decode: one per edge of the graph.
EdgeToText = Hello | Submit | Cancel | Park | Unpark | Query | EdgeStats | Extension | Attach | Detach
TextToEdge = Hello | TextDelta | Finished | Rejected | Answer | TextReady | Extension | Attached | Counted
TextToEngine = Hello | Admit | Abort | Park | Unpark | Extension | Vocabulary
EngineToText = Hello | EngineUp | StepTokens | Extension


def union_of(link: Literal["edge>text", "text>edge", "text>engine", "engine>text", "root>child", "child>root"]) -> Any:
    return {
        "edge>text": EdgeToText,
        "text>edge": TextToEdge,
        "text>engine": TextToEngine,
        "engine>text": EngineToText,
        "root>child": RootToChild,
        "child>root": ChildToRoot,
    }[link]
