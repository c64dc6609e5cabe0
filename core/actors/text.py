"""The tokenizer actor: everything between an edge and the engines.

What it is: it checks a Submit, has it rendered and tokenised (Encode to its worker), decides admission, writes the ledger entry and admits it to the
engine; it turns the engine's tokens into text for the edges; it keeps every stream alive over an engine's death and re-admits the requests
with the tokens it received. It answers the edges' questions and holds the metrics. It never blocks and never waits.
What it does not know: sockets, threads, HTTP, how a model computes.

A message to an edge is yielded as `To(message, edge)`; edge -1 is a caller in the same process. Life of a request here: ENCODING (with the
worker) -> WAITING (no engine, or replays before it) -> ADMITTED -> gone. A request counts as queued until its first step.
It is long because every message meets the same ledger; what can stand alone lives in core/text/.
"""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from penstock.core.actor import Handling, To
from penstock.core.clock import Clock, SystemClock
from penstock.core.columns import EMPTY_I32, i64
from penstock.core.config import Config
from penstock.core.control import EngineFacts
from penstock.core.errors import Draining, EngineUnavailable, InvalidRequest, NotFound, PenstockError, QueueFull
from penstock.core.hashing import chain
from penstock.core.hookspecs import RequestSummary
from penstock.core.messages import (
    Abort,
    Admit,
    Answer,
    Cancel,
    Drain,
    Drained,
    EdgeStats,
    Encode,
    Encoded,
    EngineDown,
    EngineUp,
    Finished,
    Message,
    Park,
    PeerDown,
    PeerUp,
    Query,
    Rejected,
    RowExtra,
    StartupPhase,
    StepTokens,
    Submit,
    TextDelta,
    TextReady,
    Tick,
    Unpark,
    Vitals,
)
from penstock.core.sampling import SamplingParams
from penstock.core.telemetry_metrics import Metrics
from penstock.core.telemetry_traces import NO_TRACES, Traces
from penstock.core.text import bounds, queries, resolve, spans
from penstock.core.text.admission import Admission
from penstock.core.text.ledger import ADMITTED, ENCODING, GENERAL, WAITING, Ledger, Request
from penstock.core.text.receive import Receiver
from penstock.core.text_api import Tokenizer

Outbound = Message | To

REPLAY_TIMEOUT_S = 300.0
MAX_STRIKES = 2
"""So many engines may die under a request that gets nowhere. After the first, it is a suspect and runs as the only one of its kind; after the
last it is failed: one request that kills engines must not take the server with it."""
"""Streams outlive a dead engine for so long; then they fail as retryable."""
STALL_S = 60.0
"""Admitted work without a step for so long is a stall in the health answer."""
STARTING_RETRY_S = 2.0
SILENT_S = 4.0
"""An engine that root has not heard for so long stands still: it beats once a second, and load balancers should know within ten."""
STUCK_S = 8.0
"""The same for one whose device says that no step takes long, has work, and finishes none."""
MAX_QUERIES = 64
"""Questions that cost work (/tokenize, /detokenize) and may wait for it at a time."""


class TextActor:
    """`names`: what requests may call the model, the reported one first. `defaults`: sampling defaults (resolve.generation_defaults).

    `secret` salts cache keys, `rng` draws missing seeds; `hooks` is a pluggy relay (request_finished, engine_ready, engine_lost); `log` a
    structlog logger. `shard` is this text process's id.
    """

    name = "text"
    takes: frozenset[type[Message]] = frozenset(
        {
            Submit,
            Cancel,
            Park,
            Unpark,
            Query,
            EdgeStats,
            StepTokens,
            EngineUp,
            EngineDown,
            Encoded,
            Tick,
            Drain,
            PeerUp,
            PeerDown,
            Vitals,
            StartupPhase,
        }
    )
    gives: frozenset[type[Message]] = frozenset(
        {Encode, Admit, Abort, Park, Unpark, TextDelta, Finished, Rejected, Answer, TextReady, Drained}
    )

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        *,
        names: list[str],
        model_path: str = "",
        defaults: dict[str, Any] | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        traces: Traces = NO_TRACES,
        secret: bytes | None = None,
        rng: random.Random | None = None,
        max_strikes: int = MAX_STRIKES,
        hooks: Any = None,
        log: Any = None,
        shard: int = 0,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._names = names
        self._model_path = model_path or names[0]
        self._defaults = defaults or {}
        self._clock: Clock = clock or SystemClock()
        self.metrics = metrics or Metrics(names[0], compat=config.metrics_compat == "vllm")
        self._traces = traces
        self._secret = secret or secrets.token_bytes(32)
        self._rng = rng or random.SystemRandom()
        self._max_strikes = max_strikes
        self._hooks = hooks
        self._log = log
        self._shard = shard
        self.ledger = Ledger()
        self.admission = Admission(
            max_requests=config.max_num_queued_reqs, max_tokens=config.max_num_queued_tokens, status=config.queue_full_status
        )
        self._receiver = Receiver(tokenizer, self.ledger, self.metrics)
        self._edges: set[int] = set()
        self._jobs: dict[int, Request | Query] = {}
        self._job = 0
        self._engine = 0
        self._facts: EngineFacts | None = None
        self._epoch = 0
        self._up = False
        self._down_since_ns = 0
        self._outbox: deque[Request] = deque()
        """Encoded requests that the engine has not been told of: replays, and whoever came behind them."""
        self._suspects: deque[Request] = deque()
        """Those under which an engine died before they got a token."""
        self._trial: Request | None = None
        self._replaying: set[int] = set()
        self._admitted = 0
        self._busy_since_ns = 0
        self._last_step_ns = 0
        self._last_token_ns = 0
        self._started_ns = self._clock.now_ns()
        self._created_s = self._clock.wall_ns() // 1_000_000_000
        self._drain_at_ns: int | None = None
        self._drained = False
        self._said: tuple[bool, str, int] | None = None
        self._vitals: Vitals | None = None
        self._warned_of_ends = False
        self._limits = bounds.limits_of(0, 0, config.max_prompt_chars)
        """Of one prompt; an engine's context decides what the configuration leaves open."""
        self._queries = 0
        """Questions that the worker has."""
        self._handlers: dict[type[Message], Callable[[Any], Handling]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Park: self._park,
            Unpark: self._park,
            Query: self._query,
            EdgeStats: self._edge_stats,
            StepTokens: self._step,
            EngineUp: self._engine_up,
            EngineDown: self._engine_down,
            Encoded: self._encoded,
            Tick: self._tick,
            Drain: self._drain,
            PeerUp: self._peer_up,
            PeerDown: self._peer_down,
            Vitals: self._take_vitals,
            StartupPhase: self._take_phase,
        }

    def handle(self, message: Message) -> Handling:
        return self._handlers[type(message)](message)

    def failed(self, message: Message, error: Exception) -> Handling:
        """A handler raised: what concerns one request or question fails alone; anything else is not survivable."""
        inner = PenstockError("The server made an error while it handled this request. It is logged.")
        if isinstance(message, Submit):
            request = self.ledger.requests.get(message.key)
            if request is None or request.submit is not message:
                return self._refuse(message.key, message.edge, inner)
            return self._abandon(request, inner)
        if isinstance(message, Query):
            return [To(queries.failure(message, inner), message.edge)]
        raise error

    def _abandon(self, request: Request, error: PenstockError) -> Iterator[Outbound]:
        """End a request that cannot go on, whatever stage it is in: nothing of it stays in ledger, admission or engine. The client gets a
        refusal if it has heard nothing yet, and its streams' last row otherwise."""
        if not request.choices:
            self.ledger.remove(request)
            self.admission.leave(request.queued_tokens)
            yield from self._refuse(request.key, request.edge, error)
            yield from self._maybe_drained()
            return
        running = [choice for choice in request.choices if not choice.finish]
        if running and request.state == ADMITTED:
            yield Abort(seqs=i64([choice.seq for choice in running]))
        for choice in running:
            self._receiver.end(choice, "error", error.message, error.code)
        yield from self._deliver()

    # --- requests in

    def _submit(self, message: Submit) -> Iterator[Outbound]:
        yield from self._greet(message.edge)
        now = self._clock.now_ns()
        try:
            if message.key in self.ledger.requests:
                raise InvalidRequest(f"Request key {message.key} is in use.")
            facts = self._open_facts()
            resolve.check_submit(message, self._names)
            params = resolve.sampling_of(message, self._defaults, self._config, facts.vocab_size)
            keep = resolve.keep_of(message, params, facts)
            self._check_size(message, params, facts, keep)
            self.admission.check_request(now)
        except PenstockError as error:
            yield from self._refuse(message.key, message.edge, error)
            return
        request = Request(message, params, now)
        request.traced = self._traces.active
        request.root_hash = resolve.root_hash(facts, self._secret, message.tenant, message.cache_salt)
        self.ledger.add(request)
        self.admission.enter()
        yield Encode(
            job=self._new_job(request),
            kind=message.kind,
            messages=message.messages,
            tools=message.tools,
            template_kwargs=message.template_kwargs,
            prompt=message.prompt or "",
            add_generation_prompt=message.add_generation_prompt,
            continue_final_message=message.continue_final_message,
            add_special_tokens=message.add_special_tokens,
            bad_words=params.bad_words,
            ids=EMPTY_I32 if message.prompt_ids is None else message.prompt_ids,
            keep=keep,
            limits=self._limits,
            want_text=message.echo,
            root_hash=request.root_hash,
            block_size=facts.block_size if facts.enable_prefix_caching else 0,
        )

    def _check_size(self, submit: Submit, params: SamplingParams, facts: EngineFacts, keep: int) -> None:
        """What needs no tokenizer to be refused. Raises PenstockError naming the prompt."""
        param = resolve.prompt_name(submit)
        if submit.prompt_ids is not None:
            if keep:
                bounds.check_count(len(submit.prompt_ids), self._limits, param)
            else:
                resolve.check_fits(len(submit.prompt_ids), params, facts, param)
            resolve.check_ids(submit.prompt_ids, facts.vocab_size, param)
        elif submit.prompt is not None:
            bounds.check_chars(len(submit.prompt), self._limits, param, whole=not keep)

    def _open_facts(self) -> EngineFacts:
        """What a new request is measured by. While an engine is being restarted that is the last one's facts: the request waits for the
        next, as those do that ran in it. Raises what a client is told while none can be taken."""
        if self._drain_at_ns is not None:
            raise Draining("The server is shutting down. Send the request again: another instance may take it.", retry_after_s=2.0)
        if self._facts is None:
            raise EngineUnavailable("The engine is starting. Try again shortly.", retry_after_s=STARTING_RETRY_S)
        return self._facts

    def _new_job(self, owner: Request | Query) -> int:
        self._job += 1
        self._jobs[self._job] = owner
        return self._job

    def _encoded(self, message: Encoded) -> Iterator[Outbound]:
        owner = self._jobs.pop(message.job, None)
        if isinstance(owner, Query):
            self._queries -= 1
            yield self._worked_out(owner, message)
            return
        if owner is None or self.ledger.requests.get(owner.key) is not owner:
            return  # cancelled meanwhile
        facts = self._facts
        assert facts is not None  # no request is accepted before an engine was there
        try:
            if message.error:
                raise queries.error_of(message)
            self._complete(owner, message, facts)
            self._receiver.open(owner)
        except Exception as raised:  # only this request feels it
            error = raised if isinstance(raised, PenstockError) else PenstockError(f"The prompt could not be taken in: {raised!r}"[:300])
            yield from self._abandon(owner, error)
            return
        owner.state = WAITING
        self._outbox.append(owner)
        yield from self._pump()

    def _complete(self, request: Request, message: Encoded, facts: EngineFacts) -> None:
        """Fill in what the prompt decides. Raises what the client is told."""
        submit, params = request.submit, request.params
        prompt = message.ids
        param = resolve.prompt_name(submit)
        resolve.check_prompt(prompt, facts.vocab_size, self._tokenizer.token_text, param)
        resolve.check_words(message.bad_words_ids, facts.vocab_size)
        request.max_tokens = resolve.max_tokens_of(len(prompt), params, facts, submit)
        self.admission.check_tokens(len(prompt), self._clock.now_ns())
        changes: dict[str, Any] = {}
        if params.seed is None:
            changes["seed"] = self._rng.getrandbits(63)
        if message.bad_words_ids:
            changes["bad_words_token_ids"] = [*params.bad_words_token_ids, *message.bad_words_ids]
        if params.min_tokens > request.max_tokens:
            changes["min_tokens"] = request.max_tokens
        if changes:
            request.params = msgspec.structs.replace(params, **changes)
        blamed = resolve.nothing_left(request.params, self._receiver.ends, facts.vocab_size, prompt, 0) if request.max_tokens else []
        if blamed:
            raise resolve.nothing_to_draw(blamed, 0)
        request.prompt = prompt
        request.hashes = message.hashes
        now = self._clock.now_ns()
        request.encode_start_ns = message.started_ns
        request.encode_end_ns = min(message.finished_ns or now, now)
        if submit.want_ids or submit.echo or params.prompt_logprobs is not None:
            text = message.rendered if submit.echo else None
            request.extra = RowExtra(row=0, prompt_token_ids=prompt if submit.want_ids or submit.echo else None, prompt_text=text)
        request.queued_tokens = len(prompt)
        self.admission.measured(len(prompt))

    def _refuse(self, key: int, edge: int, error: PenstockError) -> Iterator[Outbound]:
        if isinstance(error, QueueFull):
            self.metrics.count("admission_rejections", "queue_tokens" if "tokens" in error.message else "queue_requests")
        self.metrics.count("requests_rejected", error.code)
        yield To(
            Rejected(
                key=key,
                status=error.status,
                type=error.type,
                code=error.code,
                message=error.message,
                param=error.param,
                retry_after_s=error.retry_after_s,
            ),
            edge,
        )

    # --- to the engine

    def _pump(self) -> Iterator[Outbound]:
        """Admit what waits, in order; of replays only as many as the engine can run at a time; of suspects one at a time."""
        if not self._up or self._facts is None:
            return
        yield from self._pump_outbox(self._facts)
        while self._suspects and not self._on_trial():
            request = self._suspects.popleft()
            if self.ledger.requests.get(request.key) is request:
                self._trial = request
                yield from self._admit(request)

    def _on_trial(self) -> bool:
        """Does a suspect run that has not got a token yet?"""
        request = self._trial
        if request is None or self.ledger.requests.get(request.key) is not request or request.output_tokens > request.mark:
            self._trial = None
        return self._trial is not None

    def _pump_outbox(self, facts: EngineFacts) -> Iterator[Outbound]:
        outbox = self._outbox
        while outbox:
            request = outbox[0]
            if self.ledger.requests.get(request.key) is not request:
                outbox.popleft()
                continue
            if request.replays and len(self._replaying) >= facts.max_num_seqs:
                return
            outbox.popleft()
            yield from self._admit(request)

    def _admit(self, request: Request) -> Iterator[Outbound]:
        now = self._clock.now_ns()
        if not self._admitted:
            self._busy_since_ns = now
        self._admitted += 1
        request.state = ADMITTED
        request.admitted_ns = request.admitted_ns or now
        request.mark = request.output_tokens
        if request.replays:
            self._replaying.add(request.key)
            request.replaying = True
        yield request.admit(self._receiver.ends, replay=request.replays > 0)
        if request.parked:
            yield Park(key=request.key)

    def _park(self, message: Park | Unpark) -> Iterable[Outbound]:
        request = self.ledger.requests.get(message.key)
        if request is None or request.parked is isinstance(message, Park):
            return ()
        request.parked = not request.parked
        if request.traced:
            request.events.append(("parked" if request.parked else "resumed", self._clock.now_ns()))
        return (message,) if request.state == ADMITTED else ()

    def _cancel(self, message: Cancel) -> Iterable[Outbound]:
        request = self.ledger.requests.get(message.key)
        return () if request is None else self._drop(request, message.cause)

    def _drop(self, request: Request, cause: str) -> Iterator[Outbound]:
        """End a request that nobody waits for any more."""
        self.metrics.count("cancellations", cause)
        if self._log is not None:
            self._log.info("request cancelled", rid=request.submit.rid, cause=cause, output_tokens=request.output_tokens)
        running = [choice for choice in request.choices if not choice.finish]
        for choice in running:
            self._receiver.close(choice)
        if running and request.state == ADMITTED:
            yield Abort(seqs=i64([choice.seq for choice in running]))
        yield from self._finish(request)
        if self._outbox or self._suspects:  # it may have been the one that the others waited for, and no step follows
            yield from self._pump()

    # --- the engine's life

    def _engine_up(self, message: EngineUp) -> Iterator[Outbound]:
        if message.epoch < self._epoch or (self._up and message.epoch == self._epoch):
            return
        if self._up:
            yield from self._lose("it was replaced")
        self._engine, self._epoch, self._facts, self._up = message.engine, message.epoch, message.facts, True
        self._receiver.widen(message.facts.vocab_size)
        self._find_ends(message.facts.vocab_size)
        self._limits = bounds.limits_of(message.facts.max_model_len, self._tokenizer.max_chars_per_token, self._config.max_prompt_chars)
        self.metrics.engine_up(message.engine, message.epoch, message.facts)
        self._last_step_ns = self._clock.now_ns()
        self._hook("engine_ready", engine=message.engine, epoch=message.epoch)
        for request in (*self._suspects, *self._outbox):
            self._rehash(request, message.facts)
        yield from self._pump()
        yield from self._say_ready()

    def _find_ends(self, vocab_size: int) -> None:
        """Checkpoints' files name end tokens that their models do not have (added tokens, -1); such an id must reach no engine."""
        self._receiver.ends, unknown = resolve.drawable(self._tokenizer.eos_ids, vocab_size)
        if unknown and not self._warned_of_ends and self._log is not None:
            left = "answers end at the others" if len(self._receiver.ends) else "no end token is left: answers run to their limit"
            self._log.warning(f"end tokens that the model does not have are ignored; {left}", ids=unknown, vocab_size=vocab_size)
        self._warned_of_ends = True

    def _engine_down(self, message: EngineDown) -> Iterator[Outbound]:
        if self._up and message.epoch == self._epoch:
            yield from self._lose(message.reason)
            yield from self._say_ready()

    def _lose(self, reason: str) -> Iterator[Outbound]:
        """Every request waits again, with what was received for it; no stream ends but that of a request which may be what kills engines."""
        self._up = False
        self._down_since_ns = self._clock.now_ns()
        self.metrics.engine_down(self._engine)
        self._hook("engine_lost", engine=self._engine, epoch=self._epoch, reason=reason)
        waiting = [request for request in (*self._suspects, *self._outbox) if self.ledger.requests.get(request.key) is request]
        lost = [request for request in self.ledger.requests.values() if request.state == ADMITTED]
        for request in lost:
            request.state = WAITING
            request.replaying = False
            request.replays += 1
            request.strikes = 0 if request.output_tokens > request.mark else request.strikes + 1
            request.incarnation += 1
            for choice in request.choices:
                choice.incarnation = request.incarnation
                choice.mode = GENERAL  # its next row may tell that the replay has begun
            self.metrics.count("replays")
            self.metrics.count("tokens", "replayed", by=sum(len(choice.outputs) for choice in request.choices if not choice.finish))
        again = sorted(lost + waiting, key=lambda request: (not request.replays, request.arrival_ns))
        self._outbox = deque(request for request in again if not request.strikes)
        self._suspects = deque(request for request in again if 0 < request.strikes < self._max_strikes)
        self._trial = None
        self._replaying.clear()
        self._admitted = 0
        for request in again:
            if request.strikes >= self._max_strikes:
                yield from self._condemn(request)

    def _condemn(self, request: Request) -> Iterator[Outbound]:
        self.metrics.count("requests_condemned")
        text = f"The engine died {request.strikes} times while it worked on this request, so it is not tried again."
        for choice in [choice for choice in request.choices if not choice.finish]:
            self._receiver.end(choice, "error", text, "engine_failure")
        yield from self._deliver()

    def _rehash(self, request: Request, facts: EngineFacts) -> None:
        """The new engine's cache key may differ from the one that the request was hashed for."""
        root = resolve.root_hash(facts, self._secret, request.submit.tenant, request.submit.cache_salt)
        blocks = len(request.prompt) // facts.block_size if facts.enable_prefix_caching else 0
        if root != request.root_hash or len(request.hashes) != 16 * blocks:
            request.root_hash = root
            request.hashes = chain(root, request.prompt, facts.block_size) if blocks else b""

    def _step(self, message: StepTokens) -> Iterable[Outbound]:
        if not self._up or message.epoch != self._epoch or message.engine != self._engine:
            self.metrics.count("dropped_rows", "stale", by=len(message.seqs))
            return ()
        now = self._clock.now_ns()
        self._last_step_ns = now
        if len(message.tokens):
            self._last_token_ns = now
        self.metrics.engine_stats(message.engine, message.stats)
        receiver = self._receiver
        receiver.step(message, now)
        if not (receiver.begun or receiver.ended or receiver.aborts):
            return receiver.take()
        return self._after_step(now)

    def _after_step(self, now_ns: int) -> Iterator[Outbound]:
        """What a step changed besides text."""
        receiver = self._receiver
        begun, receiver.begun = receiver.begun, []
        aborts, receiver.aborts = receiver.aborts, []
        for request, first in begun:
            self._replaying.discard(request.key)
            if first:
                self.admission.start(len(request.prompt), now_ns)
                self.metrics.count("tokens", "prompt_cached", by=request.cached)
                self.metrics.count("tokens", "prompt_computed", by=len(request.prompt) - request.cached)
        if aborts:
            yield Abort(seqs=i64(aborts))
        yield from self._deliver()
        if self._outbox or self._suspects:
            yield from self._pump()

    def _deliver(self) -> Iterator[Outbound]:
        """Rows first, then the ends that they brought."""
        yield from self._receiver.take()
        ended, self._receiver.ended = self._receiver.ended, []
        for request in ended:
            yield from self._finish(request)

    # --- ends

    def _finish(self, request: Request) -> Iterator[Outbound]:
        now = self._clock.now_ns()
        self.ledger.remove(request)
        if not request.started:
            self.admission.leave(request.queued_tokens)
        if request.state == ADMITTED:
            self._admitted -= 1
        self._replaying.discard(request.key)
        times = _times(request)
        yield To(
            Finished(
                key=request.key,
                prompt_tokens=len(request.prompt),
                output_tokens=request.output_tokens,
                cached_tokens=request.cached,
                queue_ns=times[0],
                prefill_ns=times[1],
                decode_ns=times[2],
                first_token_ns=request.first_ns,
                preemptions=request.preemptions,
                done_ns=now,
            ),
            request.edge,
        )
        self._measure(request, now, times)
        if request.traced:
            fingerprint = self._facts.fingerprint if self._facts else ""
            spans.record(self._traces, request, self._names[0], fingerprint, now, self._clock.wall_ns() - self._clock.now_ns())
        yield from self._maybe_drained()

    def _measure(self, request: Request, now_ns: int, times: tuple[int, int, int]) -> None:
        metrics = self.metrics
        queue, prefill, decode = (ns / 1e9 for ns in times)
        reasons = [choice.finish for choice in request.choices]
        for reason in reasons:
            metrics.count("requests_finished", reason)
        if request.first_ns:
            metrics.ttft.observe((request.first_ns - request.received_ns) / 1e9)
            metrics.encode.observe(max(0, request.encode_end_ns - request.arrival_ns) / 1e9)
            metrics.queue.observe(queue)
            metrics.prefill.observe(prefill)
            metrics.decode.observe(decode)
            metrics.inference.observe(prefill + decode)
            metrics.e2e.observe((request.last_ns - request.received_ns) / 1e9)
            longest = max(len(choice.outputs) for choice in request.choices)
            if longest > 1:
                metrics.tpot.observe(decode / (longest - 1))
            metrics.prompt.observe(len(request.prompt))
            metrics.output.observe(request.output_tokens)
            metrics.longest.observe(longest)
            metrics.computed.observe(len(request.prompt) - request.cached)
            metrics.preempted.observe(request.preemptions)
            metrics.params_n.observe(request.params.n)
            if request.params.max_tokens is not None:
                metrics.params_max.observe(request.params.max_tokens)
        total = (now_ns - request.received_ns) / 1e9
        if self._log is not None:
            self._log.debug(
                "request finished",
                rid=request.submit.rid,
                prompt_tokens=len(request.prompt),
                output_tokens=request.output_tokens,
                reasons=reasons,
                seconds=round(total, 4),
            )
        if self._hooks is not None:
            summary = RequestSummary(
                rid=request.submit.rid,
                model=self._names[0],
                tenant=request.submit.tenant,
                prompt_tokens=len(request.prompt),
                output_tokens=request.output_tokens,
                cached_tokens=request.cached,
                finish_reasons=reasons,
                queue_s=queue,
                prefill_s=prefill,
                decode_s=decode,
                total_s=total,
            )
            self._hook("request_finished", summary=summary)

    def _hook(self, name: str, **arguments: Any) -> None:
        if self._hooks is None:
            return
        try:
            getattr(self._hooks, name)(**arguments)
        except Exception as error:  # a plugin's mistake is its own
            self.metrics.count("hook_errors", name)
            if self._log is not None:
                self._log.warning("a plugin's hook failed", hook=name, error=repr(error))

    def _end_all(self, finish: str, error: PenstockError) -> Iterator[Outbound]:
        """Every stream ends now, with what it has."""
        aborts: list[int] = []
        for request in list(self.ledger.requests.values()):
            if not request.choices:
                yield from self._abandon(request, error)
                continue
            for choice in [choice for choice in request.choices if not choice.finish]:
                if request.state == ADMITTED:
                    aborts.append(choice.seq)
                self._receiver.end(choice, finish, error.message if finish == "error" else None, error.code if finish == "error" else None)
        if aborts:
            yield Abort(seqs=i64(aborts))
        yield from self._deliver()
        yield from self._maybe_drained()

    # --- time, draining, edges

    def _tick(self, message: Tick) -> Iterator[Outbound]:
        now = message.now_ns
        if self._drain_at_ns is not None and now >= self._drain_at_ns and self.ledger.requests:
            yield from self._end_all("abort", Draining("The server shut down before this request was done.", retry_after_s=2.0))
        if self._facts is not None and not self._up and self.ledger.requests and now - self._down_since_ns > REPLAY_TIMEOUT_S * 1e9:
            error = EngineUnavailable(f"The engine died and did not come back within {REPLAY_TIMEOUT_S:g} s. Send the request again.")
            yield from self._end_all("error", error)
        yield from self._pump()
        yield from self._say_ready(again=True)

    def _drain(self, message: Drain) -> Iterator[Outbound]:
        deadline = self._clock.now_ns() + round(message.deadline_s * 1e9)
        self._drain_at_ns = deadline if self._drain_at_ns is None else min(deadline, self._drain_at_ns)
        yield from self._say_ready()
        yield from self._maybe_drained()

    def _maybe_drained(self) -> Iterator[Outbound]:
        if self._drain_at_ns is not None and not self._drained and not self.ledger.requests:
            self._drained = True
            yield Drained(role="text", id=self._shard)

    def _readiness(self) -> TextReady:
        ages, silent = self._engine_ages()
        ready, reason, waits = False, silent, True
        if self._drain_at_ns is not None:
            reason, waits = "draining", False
        elif not self._up:
            reason, waits = ("the engine is starting", False) if self._facts is None else ("the engine is being restarted", True)
        elif not silent:
            ready, waits = True, False
        return TextReady(
            ready=ready,
            reason=reason,
            epoch=self._epoch,
            waits=waits,
            limits=self._limits if self._facts is not None else None,
            ages=ages,
        )

    def _engine_ages(self) -> tuple[dict[str, float], str]:
        """Seconds since each engine gave a sign of life, as root last saw it or as its steps show; and what to say if one stands still."""
        ages: dict[str, float] = {}
        silent = ""
        if self._vitals is None or not self._up or self._facts is None:
            return ages, silent
        step_s = (self._clock.now_ns() - self._last_step_ns) / 1e9
        for vital in self._vitals.rows:
            if vital.role != "engine" or vital.id != self._engine or not vital.up:
                continue
            name = f"{vital.role}-{vital.id}"
            ages[name] = round(min(vital.age_s, step_s), 3)
            if ages[name] > SILENT_S:
                silent = f"the engine has not been heard of for {ages[name]:.0f} s"
            elif self._facts.bounded_steps and min(vital.stalled_s, step_s) > STUCK_S:
                silent = f"the engine has work and has finished no step for {min(vital.stalled_s, step_s):.0f} s"
        return ages, silent

    def _say_ready(self, *, again: bool = False) -> Iterator[Outbound]:
        """To all edges if it is news; `again`: in any case, as a sign of life."""
        word = self._readiness()
        self.metrics.set("ready", float(word.ready))
        if again or (word.ready, word.reason, word.epoch) != self._said:
            self._said = (word.ready, word.reason, word.epoch)
            for edge in sorted(self._edges):
                yield To(word, edge)

    def _greet(self, edge: int) -> Iterator[Outbound]:
        """An edge that we did not know learns whether it may send."""
        if edge not in self._edges:
            self._edges.add(edge)
            yield To(self._readiness(), edge)

    def _peer_up(self, message: PeerUp) -> Iterator[Outbound]:
        if message.role == "edge":
            self._edges.discard(message.id)
            yield from self._greet(message.id)

    def _peer_down(self, message: PeerDown) -> Iterator[Outbound]:
        if message.role == "engine" and self._up and message.epoch == self._epoch:
            yield from self._lose("its link broke")
            yield from self._say_ready()
        elif message.role == "edge":
            self._edges.discard(message.id)
            for request in [request for request in self.ledger.requests.values() if request.edge == message.id]:
                for out in self._drop(request, "disconnect"):
                    if not (isinstance(out, To) and out.index == message.id):
                        yield out
            self._receiver.forget_edge(message.id)

    def _edge_stats(self, message: EdgeStats) -> Iterator[Outbound]:
        self.metrics.edge(message.edge, message.counters)
        return self._greet(message.edge)

    def _take_phase(self, message: StartupPhase) -> Iterable[Outbound]:
        self.metrics.set("startup_phase_seconds", message.seconds, f"{message.role}-{message.id}", message.phase)
        return ()

    def _take_vitals(self, message: Vitals) -> Iterable[Outbound]:
        self._vitals = message
        return ()

    # --- questions

    def _query(self, message: Query) -> Iterator[Outbound]:
        yield from self._greet(message.edge)
        try:
            if message.what in queries.LABOUR:
                if self._queries >= MAX_QUERIES:
                    raise QueueFull(f"{self._queries} questions are being worked on already. Try again in a second.", retry_after_s=1.0)
                yield Encode(
                    job=self._new_job(message),
                    kind=queries.LABOUR[message.what],
                    body=message.body,
                    limits=self._limits,
                    vocab_size=self._receiver.vocab_size,
                )
                self._queries += 1
                return
            answer = self._answer(message)
        except PenstockError as error:
            answer = queries.failure(message, error)
        yield To(answer, message.edge)

    def _answer(self, query: Query) -> Answer:
        facts = self._facts
        match query.what:
            case "models":
                return queries.models(query, self._names, self._model_path, self._created_s, facts)
            case "tokenizer_info":
                return Answer(id=query.id, body=msgspec.json.encode(self._tokenizer.info()))
            case "server_info":
                return queries.server_info(query, self._names, self._config, facts, self._epoch)
            case "health":
                return self._health(query)
            case "metrics":
                self._set_gauges()
                return Answer(id=query.id, body=self.metrics.render())
        raise NotFound(f"This server cannot answer {query.what!r}.")

    def _worked_out(self, query: Query, encoded: Encoded) -> To:
        """What the worker made of a question."""
        if encoded.error:
            return To(queries.failure(query, queries.error_of(encoded)), query.edge)
        return To(Answer(id=query.id, body=encoded.body), query.edge)

    def _health(self, query: Query) -> Answer:
        now = self._clock.now_ns()
        expects = any(request.state == ADMITTED and not request.parked for request in self.ledger.requests.values())
        quiet_s = (now - max(self._last_step_ns, self._busy_since_ns)) / 1e9 if expects else 0.0
        status: queries.Status
        if not self._up:
            status = "starting" if self._facts is None else "engine_down"
        elif expects and quiet_s > STALL_S:
            status = "stalled"
        elif self._drain_at_ns is not None:
            status = "draining"
        else:
            status = "busy" if self.ledger.requests else "idle"
        details: dict[str, Any] = {
            "requests": len(self.ledger.requests),
            "pending": self.admission.requests,
            "step_age_s": round((now - self._last_step_ns) / 1e9, 3) if self._last_step_ns else None,
            "token_age_s": round((now - self._last_token_ns) / 1e9, 3) if self._last_token_ns else None,
            "quiet_s": round(quiet_s, 3),
            "uptime_s": round((now - self._started_ns) / 1e9, 3),
            "engine": {"id": self._engine, "up": self._up, "epoch": self._epoch},
        }
        if self._vitals is not None:
            details["processes"] = [
                {"role": vital.role, "id": vital.id, "up": vital.up, "age_s": vital.age_s, "stalled_s": vital.stalled_s}
                for vital in self._vitals.rows
            ]
        return queries.health(query, status, details)

    def _set_gauges(self) -> None:
        metrics = self.metrics
        states = dict.fromkeys(("encoding", "queued", "running", "parked", "replaying"), 0)
        for request in self.ledger.requests.values():
            if request.state == ENCODING:
                states["encoding"] += 1
            elif request.replays and (request.state == WAITING or request.replaying):
                states["replaying"] += 1
            elif request.parked:
                states["parked"] += 1
            else:
                states["running" if request.started else "queued"] += 1
        for state, count in states.items():
            metrics.set("requests", count, state)
        metrics.set("ready", float(self._readiness().ready))
        metrics.set("pending_requests", self.admission.requests)
        metrics.set("pending_prompt_tokens", self.admission.tokens)
        metrics.set("uptime_seconds", (self._clock.now_ns() - self._started_ns) / 1e9)
        metrics.put("otel_spans_exported", self._traces.exported)
        metrics.put("otel_spans_failed", self._traces.failed)


def _times(request: Request) -> tuple[int, int, int]:
    """Queue, prefill and decode in ns; 0 for what was never reached."""
    queue = request.scheduled_ns - request.encode_end_ns if request.scheduled_ns else 0
    prefill = request.first_ns - request.scheduled_ns if request.first_ns else 0
    decode = request.last_ns - request.first_ns if request.first_ns and request.last_ns else 0
    return max(0, queue), max(0, prefill), max(0, decode)
