"""How one API speaks.

What it is: `Voice`, what a Job asks for everything that a client gets to see of its request: ids, payloads, errors, the mark of the end; and what a voice
is told: `Head`, `Usage`, `Prompt`, `Choice`. openai_voice.py has two.
What it does not know: requests on their way (job.py), what stands around a payload (frame.py), routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, NAME, REASONING, RowExtra, TokenLogprobs
from penstock.transports.gateway import Batch
from penstock.transports.request import Header, JsonReply

VOICE = "voice"
"""The key in a handler's `opt` that names its Voice class: errors of that route are said with its `refuse`, as those of a Job are, also
what is refused at its path before it is asked: for the key, the method, the size of headers. (Where there is no route, errors have the shape of
request.error_reply, or that of VOICES.)"""
VOICES = "voices"
"""The key in a handler's `opt` for Voices of clients that tell by a header which API they speak, where two APIs have one path: {name of the header: Voice class}. Errors of a
route without a VOICE of its own are said with it, and, if any route names that header, those of paths where there is no route."""


class Head(NamedTuple):
    """What a reply says about itself. `rid` is the request's id with one last character for its text process (ids.py), `created` seconds since the
    Unix epoch."""

    rid: str
    created: int
    model: str
    fingerprint: str | None


class Usage(NamedTuple):
    """Tokens: of prompts, of answers, how many of the prompts' a cache had, and how many of the answers' were reasoning (None: not known yet)."""

    prompt: int
    output: int
    cached: int
    reasoning: int | None = None

    @classmethod
    def at(cls, row: int, batch: Batch) -> Usage:
        """Of the prompt and choice of a row, so far."""
        return cls(batch.column("prompt_tokens")[row], batch.column("output_tokens")[row], batch.column("cached_tokens")[row])


class Pieces:
    """Payloads of a stream that are made while they leave: each on another thread, once the client has taken those before it, so that nobody waits for them
    and nothing of them counts as unsent. Payloads that are said later come behind them all. Making them must change nothing that the voice needs for these."""

    __slots__ = ("payloads",)

    def __init__(self, payloads: Iterator[bytes]) -> None:
        self.payloads = payloads


class Prompt:
    """What came back about one prompt itself, with the first row(s) of whichever choice."""

    __slots__ = ("echo", "first", "ids", "logprobs", "made", "offsets", "text")

    ids: list[int] | None
    """Its tokens, with Generation.want_ids or echo."""
    text: str
    """With echo."""
    logprobs: list[TokenLogprobs | None]
    """One a token, with SamplingParams.prompt_logprobs; None: nothing predicts it."""
    offsets: list[int]
    """Where each token begins in `text`, in characters; with echo and prompt_logprobs."""
    first: bytes
    """The first token's own bytes; as `offsets`."""

    made: bytes
    """A voice's JSON of `logprobs`, where all choices show it."""
    echo: Iterable[bytes] | None
    """A voice's parts of what all choices of a stream say of the prompt."""

    def __init__(self) -> None:
        self.made = b""
        self.echo = None
        self.ids = None
        self.text = ""
        self.logprobs = []
        self.offsets = []
        self.first = b""

    def take(self, extra: RowExtra) -> None:
        if extra.prompt_token_ids is not None:
            self.ids = extra.prompt_token_ids.tolist()
        if extra.prompt_logprobs:
            self.logprobs += extra.prompt_logprobs
        if extra.prompt_text:
            self.text = extra.prompt_text
        if extra.prompt_offsets:
            self.offsets = extra.prompt_offsets
            self.first = extra.prompt_first

    def echoed(self) -> list[TokenLogprobs | None]:
        """The prompt's positions for an echo; the first one, which nothing predicts, has its token alone."""
        positions = list(self.logprobs)
        if positions and positions[0] is None:
            token = self.ids[0] if self.ids else -1
            text = self.first.decode("utf-8", "replace")
            positions[0] = TokenLogprobs(ids=[token], logprobs=[], ranks=[], texts=[text], bytes_=[self.first])
        return positions


class ToolCall:
    """One call in an answer. `arguments`: JSON text, in the pieces that came; not complete if the answer was cut off."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.arguments: list[str] = []


class Choice:
    """One answer of a whole reply."""

    __slots__ = ("_others", "calls", "error", "logprobs", "pieces", "reason", "reasoning", "stop_reason", "tokens", "unfinished")

    pieces: list[str]
    """Its text, in the pieces that came."""
    reasoning: list[str]
    """With Generation.split: what it says to itself."""
    calls: list[ToolCall]
    """With Generation.split."""
    tokens: list[int]
    """With Generation.want_ids."""
    logprobs: list[TokenLogprobs]
    """One a token, with SamplingParams.logprobs."""
    reason: str
    """Why it ended, as in Sink.row."""
    stop_reason: int | str | None
    """Which stop string or token id it was, if one was asked for."""
    unfinished: bool
    """Its reason is `length`, but no tokens ran out: it ended within a call."""
    error: PenstockError | None
    """Why it failed, if it did so alone: another choice did not."""

    def __init__(self) -> None:
        self.pieces = []
        self.reasoning = []
        self.calls = []
        self.tokens = []
        self.logprobs = []
        self.reason = ""
        self.stop_reason = None
        self.unfinished = False
        self.error = None
        self._others: list[tuple[int, list[str] | ToolCall]] = []
        """What is no text, each with the number of pieces of text before it."""

    def take(self, text: str, row: int, batch: Batch) -> None:
        """A row that may be of any channel."""
        channel, _ = batch.channel(row)
        if channel == CONTENT:
            if text:
                self.pieces.append(text)
        elif channel == REASONING:
            if text:
                self._think(text)
        elif channel == NAME:
            extra = batch.extra(row)
            self.calls.append(ToolCall(extra.call_id if extra else "", text))
            self._others.append((len(self.pieces), self.calls[-1]))
        elif channel == ARGUMENTS:
            self.calls[-1].arguments.append(text)

    def _think(self, text: str) -> None:
        self.reasoning.append(text)
        at, last = self._others[-1] if self._others else (-1, None)
        if not isinstance(last, list) or at != len(self.pieces):
            last = []
            self._others.append((len(self.pieces), last))
        last.append(text)

    def parts(self) -> Iterable[tuple[int, str | ToolCall]]:
        """All that it says, in the order in which it said it: (CONTENT or REASONING, the text) or (NAME, the call)."""
        at = 0
        for before, other in self._others:
            if at < before:
                yield CONTENT, "".join(self.pieces[at:before])
            at = before
            yield (REASONING, "".join(other)) if isinstance(other, list) else (NAME, other)
        if at < len(self.pieces):
            yield CONTENT, "".join(self.pieces[at:])


class Voice(Protocol):
    """One reply in one API's words; a voice serves one request. `index` counts choices over all prompts: n of the first prompt, n of the second. Every
    payload is the bytes of one message, without what a Frame puts around it. Of a row, `batch` knows at index `row` what its text does not say.

    A whole reply: `begin`, `whole`. A stream: `begin`; `around` once a choice if `plain` (see there); then of each choice `opened`, rows, `closed`; at last
    `ended`, or `broken`. A request that fails before anything was sent: `refuse`.

    A route names its class in its `opt`, under VOICE (the word "voice"): `@post("/plain", opt={"voice": Plain})`. Then its errors are said by that class's
    `refuse`, also those of what is refused at its path before it is asked: for the key, the method, the size of headers. All members are looked for at start.
    """

    plain: bool
    """A row of content is nothing but its text: `around` it stands the same every time, and `piece` is asked only about rows of other channels."""

    def begin(self, head: Head) -> str:
        """The reply's id. Comes first."""
        ...

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        """The body. `timings` (milliseconds, by name) if the client asked for them."""
        ...

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """What stands before and after the text, which is a JSON string, in the payload of a plain row. None: not yet; a voice that says so at the
        beginning is asked again after each `piece`, which is asked about every row until then (and what it says then may be another)."""
        ...

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterable[bytes | Pieces]:
        """The choice's first row is here; what it says follows. What may be large here (about the prompt) comes in Pieces."""
        ...

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterable[bytes]:
        """A row, of which `text` may be "". With Generation.split `batch.channel(row)` says what the text is."""
        ...

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterable[bytes]:
        """The choice has ended: "stop", "length", "tool_calls", "abort", or "error" with the error of this choice alone. Its last text has been said."""
        ...

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterable[bytes]:
        """Every choice has ended: what comes last, with the mark of the end if the API has one."""
        ...

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        """The whole request failed in the middle of its stream: nothing comes after this."""
        ...

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        """The reply that an error is, as long as nothing was sent; called on the class, as there may be no request yet. `request.error_headers` gives the headers that belong to an error; `headers` are more."""
        ...
