"""The tokenizer worker: threads that render, tokenise and hash prompts, and work out what edges ask of a tokenizer.

What it is: the taker of Encode and giver of Encoded. Short jobs have a thread of their own, which takes all that wait as one batch; long ones
(by the size of what is to be read) take turns on another, so that a short request overtakes them. The tokenizer releases the GIL for its
part, so that the text loop goes on streaming meanwhile. Templates of requests, which may take their time, have threads of their own, and take turns
(turns.py); one that is the model's own template is none. A job that
fails becomes an Encoded with `error`; it never takes others of its batch with it. After a long job the memory goes back to the system.
What it does not know: actors, loops (`deliver` is whatever thread-safe callback the host hands in), what a request is.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.actors.text import queries
from penstock.core.actors.text.bounds import check_chars
from penstock.core.actors.text.turns import Turns
from penstock.core.contract.text import ChatRenderer, Tokenizer
from penstock.core.protocol.columns import EMPTY_I32, I32, i32
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature, described
from penstock.core.protocol.hashing import chain
from penstock.core.protocol.messages import Encode, Encoded
from penstock.core.protocol.sampling import check_text
from penstock.core.runtime.clock import Clock, SystemClock

log = logging.getLogger("penstock.text")

MAX_BATCH = 256
LONG = 64 << 10
"""A job that reads so much (bytes or characters) takes about 50 ms, longer than others should wait for it."""
TEMPLATED = 2
"""Templates of requests that are rendered at once."""
HUGE = 1 << 20
"""After a job that reads so much, memory is given back."""
M_MMAP_THRESHOLD = -3
MAPPED = 256 << 10
"""Bytes of a large block."""
IDLE_S = 0.5
"""And once more when nothing came for so long."""

_messages = msgspec.json.Decoder(list[dict[str, Any]])
_mapping = msgspec.json.Decoder(dict[str, Any])


def size_of(encode: Encode) -> int:
    """What a job has to read, in bytes or characters."""
    texts = (encode.prompt, encode.messages, encode.tools, encode.template_kwargs, encode.body, *encode.bad_words)
    return sum(map(len, texts)) + encode.ids.nbytes


class _Job:
    __slots__ = ("answer", "encode", "error", "ids", "question", "rendered", "special", "started_ns")

    def __init__(self, encode: Encode, started_ns: int) -> None:
        self.encode = encode
        self.started_ns = started_ns
        self.error: PenstockError | None = None
        self.rendered = ""
        self.special = encode.add_special_tokens
        self.ids: I32 = encode.ids
        self.question: queries.Tokenize | None = None
        self.answer = b""


class TokenizerWorker:
    """`deliver(encoded)` is called on the worker's threads, once for each submitted job. Call `close()` at the end; jobs that wait are dropped."""

    def __init__(
        self, tokenizer: Tokenizer, renderer: ChatRenderer, deliver: Callable[[Encoded], None], *, clock: Clock | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._deliver = deliver
        self._clock: Clock = clock or SystemClock()
        self._short: queue.SimpleQueue[Encode | None] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Encode | None] = queue.SimpleQueue()
        self._turns: Turns[Encode] = Turns(TEMPLATED, self._clock)
        self._turn = threading.Condition()
        self._closing = False
        lanes: list[tuple[str, Callable[..., None], tuple[Any, ...]]]
        lanes = [("tokenizer", self._run, (self._short, MAX_BATCH)), ("tokenizer-long", self._run, (self._long, 1))]
        lanes += [(f"templates-{number}", self._run_templates, ()) for number in range(TEMPLATED)]
        self._threads = [
            threading.Thread(target=target, args=arguments, name=f"penstock-{name}", daemon=True) for name, target, arguments in lanes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, encode: Encode) -> None:
        """Thread-safe; never blocks."""
        if encode.chat_template and getattr(self._renderer, "templates", None) == {"default": encode.chat_template}:
            encode = msgspec.structs.replace(encode, chat_template="")  # it is the model's own
        if encode.chat_template:
            name = hashlib.blake2b(encode.chat_template.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            with self._turn:
                self._turns.put(encode, encode.owner, name)
                self._turn.notify_all()
        else:
            (self._long if size_of(encode) >= LONG else self._short).put(encode)

    def close(self) -> None:
        for waiting in (self._short, self._long):
            waiting.put(None)
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, lane: queue.SimpleQueue[Encode | None], most: int) -> None:
        much = False
        while True:
            try:
                first = lane.get(timeout=IDLE_S if much else None)
            except queue.Empty:  # by now whoever was told has let go of it, too
                much = False
                give_memory_back()
                continue
            batch: list[Encode] = []
            size = 0
            while first is not None:
                batch.append(first)
                size += size_of(first)
                if len(batch) == most or size >= LONG:  # a batch must not be what a short job waits for either
                    break
                try:
                    first = lane.get_nowait()
                except queue.Empty:
                    break
            self._work(batch)
            if first is None:
                return
            if size >= HUGE:
                much = True
                batch.clear()
                give_memory_back()

    def _run_templates(self) -> None:
        starting_s: Callable[[], float] | None = getattr(self._renderer, "starting_s", None)
        while True:
            with self._turn:
                while (encode := self._turns.next()) is None:
                    if self._closing:  # what still waits is another thread's
                        return
                    self._turn.wait()
            self._work([encode])
            with self._turn:
                self._turns.done(encode, idle_s=0.0 if starting_s is None else starting_s())
                self._turn.notify_all()
            if size_of(encode) >= HUGE:
                give_memory_back()

    def _work(self, batch: list[Encode]) -> None:
        try:
            done = encode_batch(self._tokenizer, self._renderer, batch, self._clock)
        except BaseException as error:  # ours, then: whoever waits for this thread must not wait for ever
            log.exception("encoding failed")
            said = f"Encoding failed: {described(error, 300)}"
            done = [Encoded(job=encode.job, error=said, error_status=500) for encode in batch]
        for encoded in done:
            self._deliver(encoded)


def keep_large_apart() -> None:
    """Large blocks are mapped, and go back to the system as soon as they are free. glibc would stop doing so after the first ones, and keep what lies between
    others (mallopt(3), M_MMAP_THRESHOLD)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)


def give_memory_back() -> None:
    """Tokenising takes some 150 bytes a character for a moment; glibc would keep them for the thread that took them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def encode_batch(tokenizer: Tokenizer, renderer: ChatRenderer, batch: list[Encode], clock: Clock) -> list[Encoded]:
    """The worker's work, in order; never raises for a bad job."""
    jobs = [_Job(encode, clock.now_ns()) for encode in batch]
    for job in jobs:
        if job.encode.kind == "detokenize":
            _guarded(job, lambda job: setattr(job, "answer", queries.detokenize(job.encode, tokenizer)))
            continue
        if job.encode.kind == "tokenize":
            _guarded(job, _begin_question)
        if job.error is None:
            _guarded(job, lambda job: _render(job, tokenizer, renderer))
    for special in (False, True):
        some = [job for job in jobs if job.error is None and not len(job.ids) and job.special is special and job.rendered]
        if some:
            _tokenise(tokenizer, some, special)
    return [_finish(job, tokenizer, clock) for job in jobs]


def _begin_question(job: _Job) -> None:
    job.question = queries.Tokenize(job.encode)
    job.encode = job.question.encode
    job.special = job.encode.add_special_tokens


def _param(job: _Job) -> str:
    return "messages" if job.encode.kind == "chat" else "prompt"


def _guarded(job: _Job, work: Callable[[_Job], None], param: str = "") -> None:
    try:
        work(job)
    except PenstockError as error:
        job.error = error
    except BaseException as error:  # whatever a template, a tokenizer or strange text does, only this request feels it
        what = f"{param} cannot" if param else "The prompt cannot"
        job.error = InvalidRequest(f"{what} be encoded: {described(error)}"[:500], param=param or _param(job))


def _render(job: _Job, tokenizer: Tokenizer, renderer: ChatRenderer) -> None:
    encode = job.encode
    if encode.kind == "chat":
        messages = _decoded(_messages, encode.messages, "messages", "must be a list of message objects")
        if not messages:
            raise InvalidRequest("messages must hold at least one message.", param="messages")
        tools = _decoded(_messages, encode.tools, "tools", "must be a list of tool objects") if encode.tools else None
        kwargs = _decoded(_mapping, encode.template_kwargs, "chat_template_kwargs", "must be an object") if encode.template_kwargs else {}
        if encode.chat_template:
            renderer = _templated(renderer, encode.chat_template)
        rendered = renderer.render(
            messages,
            tools=tools or None,
            add_generation_prompt=encode.add_generation_prompt,
            continue_final_message=encode.continue_final_message,
            kwargs=kwargs,
        )
        if not isinstance(rendered, str):
            raise TypeError(f"the chat renderer gave {type(rendered).__name__}, not a text")
        check_text(rendered, "messages")
        job.rendered = rendered
        if tokenizer.bos_id is not None and job.rendered.startswith(tokenizer.token_text(tokenizer.bos_id)):
            job.special = False  # the template wrote it already; twice would be another prompt
    else:
        job.rendered = encode.prompt
    if encode.limits is not None:
        check_chars(len(job.rendered), encode.limits, _param(job), whole=not encode.keep)


def _templated(renderer: ChatRenderer, template: str) -> ChatRenderer:
    """A renderer of a plugin need not be a TemplatedRenderer."""
    found: Callable[[str], ChatRenderer] | None = getattr(renderer, "with_template", None)
    if found is None:
        raise UnsupportedFeature("This model's chat renderer takes no template from a request. Leave it out.", param="chat_template")
    return found(template)


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes, param: str, what: str) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{param} {what} ({error}).", param=param) from None


def _tokenise(tokenizer: Tokenizer, jobs: list[_Job], special: bool) -> None:
    try:
        found = tokenizer.encode_batch([job.rendered for job in jobs], add_special_tokens=special)
        for job, ids in zip(jobs, found, strict=True):
            job.ids = ids
    except BaseException:  # one text spoiled the batch: find out which
        for job in jobs:
            _guarded(job, lambda job: setattr(job, "ids", tokenizer.encode_batch([job.rendered], add_special_tokens=special)[0]))


def _finish(job: _Job, tokenizer: Tokenizer, clock: Clock) -> Encoded:
    if job.error is None:
        _guarded(job, lambda job: setattr(job, "answer", job.question.answer(job.ids, tokenizer) if job.question else job.answer))
    encode = job.encode
    hashes = b""
    bad_words: list[list[int]] = []
    if job.error is None:
        if encode.keep and len(job.ids) > encode.keep:
            job.ids = job.ids[-encode.keep :]
        if encode.block_size:
            hashes = chain(encode.root_hash, job.ids, encode.block_size)
        if encode.bad_words:
            _guarded(job, lambda job: bad_words.extend(bad_word_ids(tokenizer, encode.bad_words)), "bad_words")
        if encode.want_text and (encode.keep or len(encode.ids)):
            _guarded(job, lambda job: setattr(job, "rendered", tokenizer.decode(job.ids.tolist(), skip_special_tokens=True)))
    error = job.error
    if error is not None:
        return Encoded(
            job=encode.job,
            error=error.message,
            error_param=error.param,
            error_code=error.code,
            error_status=error.status,
            started_ns=job.started_ns,
            finished_ns=clock.now_ns(),
        )
    return Encoded(
        job=encode.job,
        ids=job.ids if len(job.ids) else EMPTY_I32,
        rendered=job.rendered,
        bad_words_ids=bad_words,
        started_ns=job.started_ns,
        finished_ns=clock.now_ns(),
        hashes=hashes,
        body=job.answer,
    )


def bad_word_ids(tokenizer: Tokenizer, words: list[str]) -> list[list[int]]:
    """The token sequences of each word, at the beginning of a text and after a space, where that is another single spelling.

    Raises InvalidRequest for a word without tokens.
    """
    plain = [word.lstrip() for word in words]
    bare = tokenizer.encode_batch(plain, add_special_tokens=False)
    spaced = tokenizer.encode_batch([" " + word for word in plain], add_special_tokens=False)
    out: list[list[int]] = []
    for word, alone, inside in zip(words, bare, spaced, strict=True):
        if not len(alone):
            raise InvalidRequest(f"bad_words holds {word!r}, which has no tokens.", param="bad_words")
        out.append(i32(alone).tolist())
        # A separate space token followed by the bare word is covered already.
        if (
            len(inside)
            and inside.tolist() != alone.tolist()
            and not (len(inside) > len(alone) and inside[-len(alone) :].tolist() == alone.tolist())
        ):
            out.append(inside.tolist())
    return out
