"""What happens to the tokens of a step: the path that every token takes.

What it is: `Receiver.step` accepts rows against the ledger, turns tokens into text, finds stop strings and ends, and collects the rows for
each edge. Rows take one of four paths: FAST (streamed, nothing special: a table look-up and a few appends, about a microsecond), QUIET
(not streamed: kept until the end), SPLIT (taken apart, nothing else), GENERAL (first rows, stop strings, log-probabilities, ends).
What it does not know: admission, the engine's life, queries, spans; it tells the actor what began and what ended.
It is long because the paths share the state of a step, and what one of them leaves the next one must find.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec
import numpy as np

from penstock.core.actors.text.answers import Said
from penstock.core.actors.text.deltas import EdgeBatch, LogprobReader
from penstock.core.actors.text.detokenizer import Decoder, SilentDecoder, Tables
from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.ledger import GENERAL, QUIET, SPLIT, Choice, Held, Ledger, Request, fast_mode
from penstock.core.actors.text.offsets import prompt_offsets
from penstock.core.actors.text.resolve import nothing_left, nothing_obeys, nothing_to_draw
from penstock.core.actors.text.retained import Kept
from penstock.core.actors.text.splitting import StopReason, quick_row, taken_apart
from penstock.core.actors.text.stops import StopMatcher, StopSet, Withheld
from penstock.core.contract.formats import CONTENT, NAME, REASONING, Fragment
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import EMPTY_I32, I32, i32
from penstock.core.protocol.errors import InvalidRequest, PluginFault, described, tamed
from penstock.core.protocol.messages import FAILED, REASON_NAMES, STOP, RowExtra, StepTokens, TokenLogprobs, Vocabulary
from penstock.core.runtime.actor import To
from penstock.core.telemetry.metrics import Metrics
from penstock.core.telemetry.series import Series

log = logging.getLogger("penstock.plugins")


class Receiver:
    """`begun`, `ended` and `aborts` are what the last `step` (or `end`) brought; `take` hands out the rows and frees the ended slots."""

    def __init__(self, tokenizer: Tokenizer, ledger: Ledger, metrics: Metrics, formats: Formats) -> None:
        self._tokenizer = tokenizer
        self._ledger = ledger
        self._metrics = metrics
        self._formats = formats
        self.ends: I32 = EMPTY_I32
        """The model's end tokens; the actor finds out which can be drawn."""
        self._tables = Tables(tokenizer, formats.marks)
        self._table = self._tables.whole
        self._batches: dict[int | Kept, EdgeBatch] = {}
        self._closed: list[Choice] = []
        self._step_ns = -1
        self._reader: LogprobReader | None = None
        self._errors: dict[int, str] = {}
        self.begun: list[tuple[Request, bool]] = []
        """Requests that had a step for the first time (True), or the first time after a replay (False)."""
        self.ended: list[Request] = []
        self.aborts: list[int] = []
        self.held: list[Held] = []
        """Answers that have ended and are to be verified."""

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def widen(self, vocab_size: int) -> None:
        """The model's vocabulary is padded beyond the tokenizer's: those ids have no text."""
        self._tables.widen(vocab_size)

    def open(self, request: Request) -> None:
        """Begin to accept tokens for an encoded request."""
        params = request.params
        stops = StopSet(params.stop) if params.stop else None
        splitters = [self._formats.splitter(request) for _ in range(params.n)]
        request.prompt_text = ""  # only they wanted it
        marks = splitters[0] is not None
        decoders: list[Decoder] = (
            [self._tables.decoder(request.prompt, params.skip_special_tokens, marks) for _ in splitters]
            if request.submit.detokenize
            else [SilentDecoder() for _ in splitters]
        )
        matchers = [StopMatcher(stops) if stops else None for _ in decoders]
        kept = request.kept
        whose = request.edge if kept is None else kept
        batch = self._batches.get(whose)
        if batch is None:
            batch = self._batches[whose] = EdgeBatch(request.edge) if kept is None else kept.batch
        self._ledger.open(request, decoders, matchers, batch)
        if marks:
            for choice, splitter in zip(request.choices, splitters, strict=True):
                choice.splitter = splitter
                if request.grammar:
                    choice.said = Said()

    def forget(self, reader: int | Kept) -> None:
        """No rows come for that edge, or for that stream, any more."""
        self._batches.pop(reader, None)

    # --- one step

    def step(self, message: StepTokens, now_ns: int) -> None:
        """Rows of a living epoch."""
        at_ns = min(message.finished_ns or now_ns, now_ns)
        if len(message.started_seqs):
            self._started(message, at_ns)
        if len(message.preempted_seqs):
            self._preempted(message, at_ns)
        if len(message.drafted_seqs):
            self._drafted(message)
        if message.prompt_logprobs is not None:
            self._prompt_logprobs(message)
        self._reader = LogprobReader(message.logprobs, self._table) if message.logprobs is not None else None
        self._errors = dict(zip(np.flatnonzero(message.reasons == FAILED).tolist(), message.errors, strict=False)) if message.errors else {}
        choices = self._ledger.choices
        before_ns, self._step_ns = self._step_ns, at_ns
        gap_s = (at_ns - before_ns) / 1e9
        series: Series | None = None
        generated = unsteady = 0  # of the rows since the last one of another series
        row = -1
        for seq, incarnation, offset, token, reason in zip(
            message.seqs.tolist(),
            message.incarnations.tolist(),
            message.offsets.tolist(),
            message.tokens.tolist(),
            message.reasons.tolist(),
            strict=True,
        ):
            row += 1
            choice = choices.get(seq)
            if choice is None:
                continue  # ended here before the engine knew: a stop string, a cancelled request
            outputs = choice.outputs
            if (choice.incarnation != incarnation or len(outputs) != offset) and self._refuse(choice, incarnation, offset, token, reason):
                continue
            if token >= 0:
                if choice.series is not series:
                    if series is not None:
                        series.tally(generated, unsteady, gap_s)
                    series = choice.series
                    generated = unsteady = 0
                generated += 1
                last_ns = choice.last_ns
                if last_ns != before_ns:
                    unsteady += 1
                    if last_ns and last_ns != at_ns:  # tokens of one step have no gap between them
                        series.itl.observe((at_ns - last_ns) / 1e9)
                choice.last_ns = at_ns
                outputs.append(token)
            mode = choice.mode
            if reason or mode == GENERAL or token < 0:
                try:
                    self._general(choice, token, reason, row, at_ns)
                except BaseException as error:  # a tokenizer's, say: this answer cannot go on, all others do
                    if choice.finish:
                        raise
                    self._spoil(choice, error)
                continue
            if mode == QUIET:
                continue
            decoder = choice.decoder
            text = decoder.texts[token]
            if text is None or decoder.pending:
                text = decoder.feed(token)
            if mode == SPLIT:
                try:
                    for fragment in quick_row(choice, token, text):
                        self._row(choice, fragment.text, "", None, None, None, fragment)
                except BaseException as error:
                    self._spoil(choice, error)
                continue
            batch = choice.batch
            batch.slots.append(choice.slot)
            batch.texts.append(text)
            batch.tokens.append(token)
            batch.counts.append(1)
            offset += 1
            batch.totals.append(offset)
            batch.reasons.append("")
            choice.sent = choice.undecoded = offset
        if series is not None:
            series.tally(generated, unsteady, gap_s)
        self._reader = None

    def end(
        self, choice: Choice, finish: str, error: str | None = None, code: str | None = None, *, stop_reason: str | None = None
    ) -> None:
        """End a choice from here: a last row with whatever text was held back."""
        try:
            text = self._rest(choice, len(choice.outputs))
        except BaseException as raised:  # the tokenizer fails: what it would have said is lost, the end is not
            tamed(raised)
            text = ""
        if choice.splitter is None:
            self._row(choice, text, finish, stop_reason, error, code)
            return
        try:
            self._split(choice, text, finish, stop_reason, error, code)
        except BaseException as raised:  # as above: the format's
            if choice.finish:
                raise
            self._why(choice, raised)
            self._row(choice, "", finish, None, error, code)

    def _spoil(self, choice: Choice, error: BaseException) -> None:
        """The choice's tokens cannot become text: it ends as an error, and the engine need not go on."""
        self.aborts.append(choice.seq)
        why = self._why(choice, error)
        self._row(choice, "", "error", None, why, "internal_error")

    def _why(self, choice: Choice, error: BaseException) -> str:
        """What the client reads, and the log where the plugin is known."""
        if isinstance(error, PluginFault):
            self._metrics.count("hook_errors", "output_format")
            log.error("request %s: %s", choice.request.submit.rid, error.message)
            return error.message
        self._metrics.count("hook_errors", "tokenizer")
        who = "tokenizer" if choice.splitter is None else "tokenizer or output format"
        return f"The {who} failed on this answer: {described(tamed(error), 300)}"

    def take(self) -> Iterator[To]:
        """The rows collected so far, one TextDelta an edge."""
        for batch in self._batches.values():
            if batch.slots:
                if rows := batch.unsendable():
                    self._unsend(batch, rows)
                yield from batch.out(self._ledger)
        for choice in self._closed:
            self._ledger.recycle(choice)
        self._closed.clear()

    def _unsend(self, batch: EdgeBatch, rows: list[int]) -> None:
        """Texts that nobody could read at the other end: their answers end, and nobody else's."""
        slots = {batch.slots[row] for row in rows}
        for row in rows:
            batch.texts[row] = ""
        wrong = TypeError("its text is no str, or has half a surrogate pair in it")
        for choice in [one for one in self._ledger.choices.values() if one.batch is batch and one.slot in slots]:
            self._spoil(choice, wrong)
            slots.discard(choice.slot)
        for choice in self._closed:  # its end is in the batch, and now another one
            if choice.batch is batch and choice.slot in slots:
                batch.fail(choice.slot, self._why(choice, wrong))

    def close(self, choice: Choice) -> None:
        """End a choice without a row: nobody listens."""
        self._ledger.close(choice, "abort")
        self._ledger.recycle(choice)

    # --- the general path

    def _general(self, choice: Choice, token: int, reason: int, row: int, at_ns: int) -> None:
        """The token, if any, is in the ledger already."""
        request = choice.request
        choice.over = reason > 0
        params = request.params
        outputs = choice.outputs
        finish = REASON_NAMES.get(reason, "")
        stop_reason: int | str | None = None
        if token >= 0:
            if not request.first_ns:
                request.first_ns = at_ns
            if request.replaying or not request.started:  # an engine that did not say so
                self._begin(request, at_ns, 0)
        # The token that stopped the sequence is no text, unless asked for.
        stopped = reason == STOP and token >= 0 and not params.include_stop_str_in_output
        text_end = len(outputs) - stopped
        entry = None
        if token >= 0 and params.logprobs is not None and self._reader is not None:
            entry = self._reader.of_row(row, spelled=request.submit.detokenize)
            if entry is not None and (stopped or (params.skip_special_tokens and token in self._tokenizer.special_ids)):
                entry = _silent(entry)
        if finish:
            text = self._rest(choice, text_end, flush_stops=False)
            if reason == STOP and token in params.stop_token_ids and (params.ignore_eos or token not in self.ends):
                stop_reason = token
        else:
            text = choice.decoder.feed_all(outputs[choice.undecoded :])
            choice.undecoded = len(outputs)
        matcher = choice.matcher
        if matcher is None or params.include_stop_str_in_output:
            if entry is not None:
                choice.logprobs.append(entry)
        elif entry is not None:
            choice.withheld = choice.withheld or Withheld()
            choice.withheld.add(entry, len(text))
        if matcher is not None:
            text, hit = matcher.feed(text, len(outputs) > params.min_tokens)
            if choice.withheld is not None:
                choice.logprobs += choice.withheld.let_out(len(text))
                if hit is not None:
                    choice.logprobs += map(_silent, choice.withheld.rest())
            if hit is not None:
                if not finish:
                    self.aborts.append(choice.seq)
                finish, stop_reason = "stop", hit
                if params.include_stop_str_in_output:
                    text += hit
            if finish:
                text += matcher.flush()
        error, code, param = self._failure(choice, row) if finish == "error" else (None, None, None)
        if choice.splitter is None and finish == "stop" and request.grammar:
            self._hold(choice, text, stop_reason, reason)
        elif choice.splitter is not None:
            if token >= 0 and choice.splitter.channel == REASONING:
                choice.reasoned += 1
            self._split(choice, text, finish, stop_reason, error, code, param)
            finish = choice.finish
        elif finish or request.stream:
            self._row(choice, text, finish, stop_reason, error, code, param=param)
        elif text:
            choice.parts.append(text)
        if not finish:
            choice.mode = fast_mode(choice)

    def _hold(self, choice: Choice, text: str, stop_reason: int | str | None, reason: int) -> None:
        """The answer may be whole: nothing is told before that is known."""
        ids = choice.outputs[: len(choice.outputs) - (reason == STOP)]
        stop = stop_reason if isinstance(stop_reason, str) else ""
        self._ledger.hold(choice, "stop")
        self.held.append(Held(choice, text, stop_reason, np.frombuffer(bytes(ids), np.int32), stop))

    def verified(self, held: Held, error: str, *, disobeys: bool = True) -> None:
        """`error` "": its last row may go out. `disobeys`: the answer is not as asked for, which ends it alone; else it could not be looked at."""
        choice, names = held.choice, held.choice.request.submit.names
        if self._ledger.has(choice.request):
            if error:  # a stop string that cuts it is the client's own
                field = obeyed.field if (obeyed := choice.request.obeyed) is not None else None
                code, param = (
                    (InvalidRequest.default_code, names.get("stop", "stop") if held.stop else field)
                    if disobeys
                    else ("engine_failure", None)
                )
                self._row(choice, held.text, "error", None, error, code, param=param)
            else:
                self._row(choice, held.text, held.finish, held.stop_reason, None, None)
        else:  # nobody listens any more
            self._ledger.recycle(choice)

    def vocabulary(self) -> Vocabulary:
        """For an engine that is to make masks."""
        data = self._table.data
        special = i32(sorted(self._tokenizer.special_ids))
        return Vocabulary(data=b"".join(data), counts=i32([len(token) for token in data]), special=special)

    def _failure(self, choice: Choice, row: int) -> tuple[str, str, str | None]:
        """Why the engine ended a sequence with an error: (message, code, param). If the request's own settings, or its grammar, left it no token to draw, that is the reason, and
        the client's to mend."""
        request = choice.request
        history = np.concatenate([request.prompt, np.frombuffer(bytes(choice.outputs), np.int32)])
        blamed = nothing_left(request.params, self.ends, self.vocab_size, history, len(choice.outputs))
        if blamed:
            error = nothing_to_draw(blamed, len(choice.outputs))
            return error.message, error.code, error.param
        said, grammar = self._errors.get(row, "The engine failed while this request ran."), request.obeyed
        own = None if grammar is None else nothing_obeys(said, grammar.field, request.params)
        return (said, "engine_failure", None) if own is None else (own.message, own.code, own.param)

    def _rest(self, choice: Choice, end: int, *, flush_stops: bool = True) -> str:
        """The text of outputs[undecoded:end] and of what the decoder, and the stop matcher, still hold."""
        text: str = choice.decoder.feed_all(choice.outputs[choice.undecoded : end]) + choice.decoder.flush()
        choice.undecoded = len(choice.outputs)
        if flush_stops and choice.matcher is not None:
            text = choice.matcher.flush() + text
        return text

    def _split(
        self,
        choice: Choice,
        text: str,
        finish: str,
        stop_reason: int | str | None,
        error: str | None,
        code: str | None,
        param: str | None = None,
    ) -> None:
        """Rows of a text that is taken apart, one a fragment; the end is a row of its own."""
        fragments, ended, stop_reason = taken_apart(choice, text, finish, stop_reason)
        if ended and not finish:
            self.aborts.append(choice.seq)
        calling = choice.request.submit.calling
        for fragment in fragments:
            if calling is None or not calling.must or fragment.channel != CONTENT:  # there is none: it is a call's beginning, cut off
                self._row(choice, fragment.text, "", None, None, None, fragment)
        if choice.said is not None:
            choice.said.take(fragments)
            if ended in ("stop", "tool_calls"):
                self._ledger.hold(choice, ended)
                self.held.append(Held(choice, "", stop_reason, EMPTY_I32, stop_reason if isinstance(stop_reason, str) else "", ended))
                return
        if ended or not fragments:
            self._row(choice, "", ended, stop_reason, error, code, param=param)

    def _row(
        self,
        choice: Choice,
        text: str,
        finish: str,
        stop_reason: StopReason,
        error: str | None,
        code: str | None,
        fragment: Fragment | None = None,
        *,
        param: str | None = None,
    ) -> None:
        request = choice.request
        batch = choice.batch
        call_id = ""
        if fragment is not None and fragment.channel != CONTENT:
            batch.marked.append((len(batch.slots), fragment.channel, fragment.call))
            if fragment.channel == NAME:
                call_id = self._formats.call_id(choice.splitter, fragment.call, fragment.text)
        if finish and choice.withheld is not None:
            choice.logprobs += choice.withheld.rest()
        if choice.parts:
            text = "".join(choice.parts) + text
            choice.parts.clear()
        tokens = choice.outputs[choice.sent :]
        extra = request.extra
        offsets: list[int] = []
        if extra is not None and extra.prompt_text is not None and request.params.prompt_logprobs is not None:
            offsets = prompt_offsets(request.prompt.tolist(), extra.prompt_text, self._table.data, self._tokenizer.special_ids)
        unfinished = choice.unfinished and bool(finish)
        if extra is not None or choice.logprobs or stop_reason is not None or error is not None or call_id or unfinished:
            batch.extras.append(
                RowExtra(
                    row=len(batch.slots),
                    stop_reason=stop_reason,
                    logprobs=choice.logprobs or None,
                    prompt_token_ids=extra.prompt_token_ids if extra else None,
                    prompt_logprobs=self._prompt_columns(request) if extra else None,
                    error=error,
                    error_code=code,
                    error_param=param,
                    prompt_text=extra.prompt_text if extra else None,
                    prompt_offsets=offsets,
                    prompt_first=self._table.data[request.prompt[0]] if offsets else b"",
                    call_id=call_id,
                    unfinished=unfinished,
                )
            )
            request.extra = None
            choice.logprobs = []
        batch.slots.append(choice.slot)
        batch.texts.append(text)
        batch.tokens.extend(tokens)
        batch.counts.append(len(tokens))
        choice.sent = len(choice.outputs)
        batch.totals.append(choice.sent)
        batch.reasons.append(finish)
        if finish:
            request.last_ns = max(request.last_ns, choice.last_ns)
            self._ledger.close(choice, finish)
            self._closed.append(choice)
            if not request.open:
                self.ended.append(request)

    def _refuse(self, choice: Choice, incarnation: int, offset: int, token: int, reason: int) -> bool:
        """A row that does not continue the ledger. Behind: an echo of what we have. Ahead: something was lost, and no later row can make
        the answer whole again. But an end without a token that knows less than we do is still the end: an engine may refuse a replay."""
        if choice.incarnation == incarnation and token < 0 and reason and offset < len(choice.outputs):
            return False
        if choice.incarnation != incarnation or offset < len(choice.outputs):
            self._metrics.count("dropped_rows", "stale" if choice.incarnation != incarnation else "duplicate")
            return True
        self._metrics.count("dropped_rows", "gap")
        self.aborts.append(choice.seq)
        self.end(choice, "error", f"Tokens {len(choice.outputs)} to {offset - 1} of the answer were lost.", "internal_error")
        return True

    # --- the rare columns

    def _started(self, message: StepTokens, at_ns: int) -> None:
        start_ns = min(message.started_ns or at_ns, at_ns)
        for seq, cached in zip(message.started_seqs.tolist(), message.started_cached.tolist(), strict=True):
            choice = self._ledger.choices.get(seq)
            if choice is not None:
                self._begin(choice.request, start_ns, cached)

    def _begin(self, request: Request, start_ns: int, cached: int) -> None:
        first, replayed = not request.started, request.replaying
        if first:
            request.started = True
            request.scheduled_ns = max(start_ns, request.encode_end_ns)
            self._ledger.set_cached(request, cached)
        if replayed:
            request.replaying = False
            if request.traced:
                request.events.append(("replayed", start_ns))
        if first or replayed:
            self.begun.append((request, first))

    def _preempted(self, message: StepTokens, at_ns: int) -> None:
        for seq in message.preempted_seqs.tolist():
            choice = self._ledger.choices.get(seq)
            if choice is not None:
                choice.request.preemptions += 1
                if choice.request.traced:
                    choice.request.events.append(("preempted", at_ns))

    def _drafted(self, message: StepTokens) -> None:
        for seq, drafted, accepted in zip(message.drafted_seqs.tolist(), message.drafted.tolist(), message.accepted.tolist(), strict=True):
            choice = self._ledger.choices.get(seq)
            if choice is not None:
                choice.request.drafted += drafted
                choice.request.accepted += accepted

    def _prompt_logprobs(self, message: StepTokens) -> None:
        assert message.prompt_logprobs is not None
        reader = LogprobReader(message.prompt_logprobs, self._table)
        seqs = message.prompt_seqs.tolist()
        for index, (row, position) in enumerate(zip(reader.rows, reader.positions, strict=True)):
            choice = self._ledger.choices.get(seqs[row])
            if choice is not None and choice.request.params.prompt_logprobs is not None:
                kept = choice.request.prompt_logprobs
                if position not in kept:  # what was received once is not replaced by what was computed again
                    kept[position] = reader.entry(index, spelled=choice.request.submit.detokenize)

    def _prompt_columns(self, request: Request) -> list[TokenLogprobs | None] | None:
        if request.params.prompt_logprobs is None:
            return None
        kept = request.prompt_logprobs
        return [kept.get(position) for position in range(len(request.prompt))]


def _silent(entry: TokenLogprobs) -> TokenLogprobs:
    return msgspec.structs.replace(entry, silent=True)
