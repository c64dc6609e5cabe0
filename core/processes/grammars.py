"""The grammar worker: compiles grammars and verifies answers in processes of their own.

What it is: the taker of CheckGrammar and giver of GrammarChecked. Two lanes, one for compiling and one for verifying, each a thread with a child process
(core/processes/grammar_child.py) that is started when it is needed, one job at a time. A job that takes too long has its child killed, one that
takes too much memory kills it: that job fails, and the next starts a new child. What was compiled, or refused, is kept.
What it does not know: actors, loops (`deliver` is whatever thread-safe callback the host hands in), what a grammar is.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from penstock.core.contract.text import Tokenizer
from penstock.core.processes.fenced import Child, TooSlow, Unusable
from penstock.core.protocol.errors import InvalidRequest, PenstockError, described
from penstock.core.protocol.messages import CheckGrammar, Grammar, GrammarChecked, Vocabulary

log = logging.getLogger("penstock.grammars")
COMPILE_S = 4.0
VERIFY_S = 4.0
CHILD = "penstock.core.processes.grammar_child"
MOST_KEPT = 256
"""Answers that are kept, and the bytes of their sources and results."""
MOST_BYTES = 16 << 20


class Setup(msgspec.Struct):
    """What a child is told first. `counts` as in Vocabulary; `backend` as in the configuration."""

    extra: list[str]
    data: bytes
    counts: list[int]
    special: list[int]
    backend: str | None = None


class Job(msgspec.Struct):
    kind: str
    source: str
    verify: bool = False
    ids: list[int] = []
    """To verify: the answer's tokens; none: those of `text`, whichever they are."""
    text: str = ""


class Done(msgspec.Struct):
    """`error` "": it went well. `unsupported`: 400 `unsupported_feature` instead of `invalid_request`."""

    compiled: bytes = b""
    error: str = ""
    unsupported: bool = False
    ours: bool = False
    """An error of the process that worked on it."""
    broken: bool = False
    """The backend is to blame, or whoever brings it: no client."""
    field: str = ""
    """Of a part of a layout, or of an answer: what the client calls the grammar that the error is about."""


class GrammarWorker:
    """`deliver(checked)` is called on the worker's threads, once for each submitted job. Call `close()` at the end; jobs that wait are dropped."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        deliver: Callable[[GrammarChecked], None],
        *,
        extra: Sequence[str] = (),
        backend: str | None = None,
        compile_s: float = COMPILE_S,
        verify_s: float = VERIFY_S,
    ) -> None:
        self._tokenizer = tokenizer
        self._deliver = deliver
        self._setup = Setup(list(extra), vocabulary.data, vocabulary.counts.tolist(), vocabulary.special.tolist(), backend)
        self._kept: OrderedDict[tuple[str, str], Done] = OrderedDict()
        self._kept_bytes = 0
        self._closed = False
        self._queues: tuple[queue.SimpleQueue[CheckGrammar | None], ...] = (queue.SimpleQueue(), queue.SimpleQueue())
        self._children: list[Child[Done] | None] = [None, None]
        self._threads = [
            threading.Thread(target=self._run, args=(lane, limit_s), name=f"penstock-grammars-{lane}", daemon=True)
            for lane, limit_s in enumerate((compile_s, verify_s))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: CheckGrammar) -> None:
        """Thread-safe; never blocks."""
        self._queues[job.verify].put(job)

    def close(self) -> None:
        """A job that runs is broken off."""
        self._closed = True
        for waiting in self._queues:
            waiting.put(None)
        for child in self._children:
            if child is not None:
                child.kill()
        for thread in self._threads:
            thread.join()

    def _run(self, lane: int, limit_s: float) -> None:
        while (check := self._queues[lane].get()) is not None and not self._closed:
            try:
                done = self._verify(lane, check, limit_s) if check.verify else self._compile(lane, check.grammar, limit_s)
            except BaseException as error:  # a tokenizer's, say: this request alone feels it
                done = Done(error=f"It could not be checked ({described(error, 300)}).", ours=True)
            self._deliver(_checked(check, done))
        child = self._children[lane]
        if child is not None:
            child.bury()

    def _compile(self, lane: int, grammar: Grammar, limit_s: float) -> Done:
        key = grammar.form, grammar.source
        done = self._kept.pop(key, None)
        if done is None:
            done, certain = self._ask(lane, Job(grammar.form, grammar.source), limit_s)
            if not certain:
                return done
            self._kept_bytes += len(grammar.source) + len(done.compiled)
        self._kept[key] = done
        while len(self._kept) > MOST_KEPT or self._kept_bytes > MOST_BYTES:
            (_, source), old = self._kept.popitem(last=False)
            self._kept_bytes -= len(source) + len(old.compiled)
        return done

    def _verify(self, lane: int, check: CheckGrammar, limit_s: float) -> Done:
        for part in check.parts:
            done = self._ask(lane, Job(part.grammar.form, part.grammar.source, verify=True, text=part.text), limit_s)[0]
            if done.error:
                return msgspec.structs.replace(done, field=part.grammar.field)
        if check.parts:
            return Done()
        ids = check.ids.tolist()
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        if check.stop:  # it was completed within the last token's text
            from_ = len(self._tokenizer.decode(ids[:-1], skip_special_tokens=True)) - len(check.stop) + 1
            at = text.find(check.stop, max(0, from_))
            end = at + len(check.stop) * check.stop_stays if at >= 0 else len(text)
            if end < len(text):
                text = text[:end]
                ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0].tolist() if text else []
        return self._ask(lane, Job(check.grammar.form, check.grammar.source, verify=True, ids=ids, text=text), limit_s)[0]

    def _ask(self, lane: int, job: Job, limit_s: float) -> tuple[Done, bool]:
        """What the child says, and whether it would say the same again."""
        child = self._children[lane]
        try:
            if child is None:
                child = self._children[lane] = Child(CHILD, Done)
                if self._closed:
                    raise EOFError
                ready = child.start(self._setup)
                if ready.error:
                    raise Unusable(ready.error)
            done = child.ask(job, limit_s)
            if done.broken:
                log.error("%s", done.error)
            return done, not done.broken
        except TooSlow:
            done, certain = Done(error=f"It takes more than {limit_s:g} seconds to work out.", ours=True), True
        except (EOFError, OSError, msgspec.MsgspecError):
            done, certain = Done(error="The process that worked on it ended: it may take too much memory.", ours=True), False
        except Unusable as error:
            done, certain = Done(error=f"Grammars cannot be worked on in a process of their own: {error}", broken=True), False
        if not self._closed:
            log.warning("a grammar's process is given up: %s", done.error)
        self._children[lane] = None
        if child is not None:
            child.bury()
        return done, certain


def _checked(check: CheckGrammar, done: Done) -> GrammarChecked:
    if not done.error:
        return GrammarChecked(job=check.job, compiled=done.compiled)
    if done.broken:
        return GrammarChecked(job=check.job, error=done.error, error_code=PenstockError.default_code, error_status=PenstockError.status)
    field = done.field or check.grammar.field
    if check.verify:
        status = PenstockError.status if done.ours else InvalidRequest.status
        return GrammarChecked(job=check.job, error=f"The answer does not obey {field}. {done.error}", error_status=status)
    error = InvalidRequest(f"{field} cannot be used: {done.error}", param=field)
    return GrammarChecked(
        job=check.job,
        error=error.message,
        error_param=field,
        error_code="unsupported_feature" if done.unsupported else error.code,
        error_status=error.status,
    )
