"""How requests come in.

What it is: from a Submit to a request that waits in a lane: checks, admission, the job for the tokenizer worker, and what the prompt decides once
it is tokens. Questions that cost work go to the same worker. Whatever fails on the way ends in Ending.abandon or, before there is a request,
in a refusal.
What it does not know: what an engine does with a request, how it ends.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from penstock.core.actors.text import bounds, queries, resolve
from penstock.core.actors.text.desk import Desk, Outbound
from penstock.core.actors.text.ending import Ending
from penstock.core.actors.text.lane import Lane
from penstock.core.actors.text.ledger import Request
from penstock.core.actors.text.obedience import obeys
from penstock.core.actors.text.pool import Pool
from penstock.core.actors.text.told import Tellers
from penstock.core.protocol.columns import EMPTY_I32
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.errors import (
    Draining,
    EngineUnavailable,
    InvalidRequest,
    PenstockError,
    PluginFault,
    QueueFull,
    StreamExists,
    described,
)
from penstock.core.protocol.messages import Answer, Counted, Encode, Encoded, GrammarChecked, Query, RowExtra, Submit
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.actor import To

log = logging.getLogger("penstock.plugins")

STARTING_RETRY_S = 2.0
MAX_QUERIES = 64
"""Questions that cost work (/tokenize, /detokenize) and may wait for it at a time."""


class Intake:
    """`place(request)` chooses the lane of a request that is ready; `rng` draws missing seeds."""

    def __init__(self, desk: Desk, pool: Pool, ending: Ending, *, place: Callable[[Request], Lane], rng: random.Random) -> None:
        self._desk = desk
        self._pool = pool
        self._ending = ending
        self._place = place
        self._rng = rng
        self._jobs: dict[int, Request | Query] = {}
        self._job = 0
        self._tellers = Tellers()
        self._questions = 0
        """Those that the worker has."""

    # --- requests

    def submit(self, message: Submit) -> Iterator[Outbound]:
        desk, pool = self._desk, self._pool
        now = desk.clock.now_ns()
        try:
            if message.key in desk.ledger.requests:
                raise InvalidRequest(f"Request key {message.key} is in use.")
            facts = self._open_facts()
            resolve.check_submit(message, pool.names)
            account, whose = desk.tenants.account(message) if desk.tenants is not None else None, resolve.MODELS
            if account is not None:
                account.check_model(message.model or pool.names[0])
                facts, whose = account.facts(facts), account.whose(facts)
            pool.formats.check(message)
            params = resolve.sampling_of(message, pool.defaults, desk.config, facts.vocab_size)
            resolve.check_beam(message, params, facts, pool.receiver.ends)
            pool.obedience.check(message, params, facts, pool.receiver.ends)
            keep = resolve.keep_of(message, params, facts)
            self._check_size(message, params, facts, keep, whose)
            desk.admission.check_request(now)
            owner = message.tenant or message.peer
            if message.chat_template:
                desk.admission.check_template(owner)
            if account is not None and desk.tenants is not None:
                desk.tenants.check(account, message)
            class_ = account.limits.klass if account is not None else ""
            series = desk.metrics.of(pool.names[0], class_) if class_ else pool.series
            request = Request(message, params, series, now)
            if message.retain_s:
                request.kept = desk.streams.open(request)
            elif desk.streams.find(message.rid, message.tenant) is not None:
                raise StreamExists(message.rid)
        except PenstockError as error:
            yield from desk.refuse(message.key, message.edge, error)
            return
        request.traced = desk.traces.active
        request.root_hash = pool.root_hash(request, facts)
        if params.prompt_logprobs is not None and message.tells:
            request.told = self._tellers.of(message)
        if account is not None and desk.tenants is not None:
            request.charge = desk.tenants.enter(account, message)
            request.priority = account.priority(message.priority)
            request.class_, request.slo = class_, desk.tenants.classes.get(class_)
        desk.ledger.add(request)
        desk.admission.enter()
        if message.chat_template:
            desk.admission.template_enters(owner)
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
            limits=pool.limits,
            want_text=message.echo,
            root_hash=request.root_hash,
            block_size=facts.block_size if facts.enable_prefix_caching else 0,
            chat_template=message.chat_template,
            owner=owner if message.chat_template else "",
        )

    def _open_facts(self) -> EngineFacts:
        """What a new request is measured by. While an engine is being restarted that is the last one's facts: the request waits for the
        next, as those do that ran in it. Raises what a client is told while none can be taken."""
        if self._desk.drain_at_ns is not None:
            raise Draining("The server is shutting down. Send the request again: another instance may take it.", retry_after_s=2.0)
        if self._pool.facts is None:
            raise EngineUnavailable("The engine is starting. Try again shortly.", retry_after_s=STARTING_RETRY_S)
        return self._pool.facts

    def _check_size(self, submit: Submit, params: SamplingParams, facts: EngineFacts, keep: int, whose: str) -> None:
        """What needs no tokenizer to be refused. Raises PenstockError naming the prompt."""
        param, limits = resolve.prompt_name(submit), self._pool.limits
        if submit.prompt_ids is not None:
            if keep:
                bounds.check_count(len(submit.prompt_ids), limits, param)
            else:
                resolve.check_fits(len(submit.prompt_ids), params, facts, param, whose)
            resolve.check_ids(submit.prompt_ids, facts.vocab_size, param)
        elif submit.prompt is not None:
            bounds.check_chars(len(submit.prompt), limits, param, whole=not keep)

    def _new_job(self, owner: Request | Query) -> int:
        self._job += 1
        self._jobs[self._job] = owner
        return self._job

    # --- what the worker made of them

    def encoded(self, message: Encoded) -> Iterator[Outbound]:
        owner = self._jobs.pop(message.job, None)
        if isinstance(owner, Query):
            self._questions -= 1
            yield _worked_out(owner, message)
            return
        if owner is None:
            return
        if owner.submit.chat_template:
            self._desk.admission.template_leaves(owner.submit.tenant or owner.submit.peer)
        if not self._desk.ledger.has(owner):
            return  # cancelled meanwhile
        facts = self._pool.facts
        assert facts is not None  # no request is accepted before an engine was there
        try:
            if message.error:
                raise queries.error_of(message)
            self._complete(owner, message, facts)
            if owner.charge is not None and (standing := owner.charge.account.standing()) is not None:
                yield To(Counted(key=owner.key, standing=standing), owner.edge)
            if obeys(owner.submit):
                owner.obeyed = self._pool.formats.grammar(owner)
            else:
                self._pool.receiver.open(owner)
        except Exception as raised:  # only this request feels it
            yield from self._ending.abandon(owner, _not_taken(raised))
            return
        if owner.obeyed is not None:
            yield self._pool.obedience.compile(owner)
            return
        yield from self._place(owner).enter(owner)

    def compiled(self, request: Request, checked: GrammarChecked) -> Iterator[Outbound]:
        """What became of its grammar."""
        if not self._desk.ledger.has(request):
            return  # cancelled meanwhile
        if checked.error:
            yield from self._ending.abandon(request, queries.error_of(checked))
            return
        request.grammar = checked.compiled
        try:
            self._pool.receiver.open(request)
        except Exception as raised:
            yield from self._ending.abandon(request, _not_taken(raised))
            return
        yield from self._place(request).enter(request)

    def _complete(self, request: Request, message: Encoded, facts: EngineFacts) -> None:
        """Fill in what the prompt decides. Raises what the client is told."""
        submit, params, pool = request.submit, request.params, self._pool
        prompt = message.ids
        charge, whose = request.charge, resolve.MODELS
        if charge is not None:
            facts, whose = charge.account.facts(facts), charge.account.whose(facts)
        resolve.check_prompt(prompt, facts.vocab_size, pool.tokenizer.token_text, resolve.prompt_name(submit))
        resolve.check_words(message.bad_words_ids, facts.vocab_size)
        if request.told is not None:
            request.told.add(len(prompt), params, submit)
        request.max_tokens = resolve.max_tokens_of(len(prompt), params, facts, submit, whose)
        self._desk.admission.check_tokens(len(prompt), self._desk.clock.now_ns())
        if charge is not None and self._desk.tenants is not None:
            asked = request.max_tokens * params.n if "max_tokens" in submit.explicit else 0
            self._desk.tenants.measure(charge, len(prompt), asked)
        changes: dict[str, Any] = {}
        if params.seed is None:
            changes["seed"] = self._rng.getrandbits(63)
        if message.bad_words_ids:
            changes["bad_words_token_ids"] = [*params.bad_words_token_ids, *message.bad_words_ids]
        if params.min_tokens > request.max_tokens:
            changes["min_tokens"] = request.max_tokens
        if changes:
            request.params = msgspec.structs.replace(params, **changes)
        blamed = resolve.nothing_left(request.params, pool.receiver.ends, facts.vocab_size, prompt, 0) if request.max_tokens else []
        if blamed:
            raise resolve.nothing_to_draw(blamed, 0)
        request.prompt = prompt
        if submit.split:
            request.prompt_text = message.rendered
        request.hashes = message.hashes
        now = self._desk.clock.now_ns()
        request.encode_start_ns = message.started_ns
        request.encode_end_ns = min(message.finished_ns or now, now)
        if submit.want_ids or submit.echo or params.prompt_logprobs is not None:
            text = message.rendered if submit.echo else None
            request.extra = RowExtra(row=0, prompt_token_ids=prompt if submit.want_ids or submit.echo else None, prompt_text=text)
        request.queued_tokens = len(prompt)
        self._desk.admission.measured(len(prompt))

    # --- questions that cost work

    def question(self, query: Query) -> Encode:
        """The worker's job for it. Raises QueueFull."""
        if self._questions >= MAX_QUERIES:
            raise QueueFull(f"{self._questions} questions are being worked on already. Try again in a second.", retry_after_s=1.0)
        self._questions += 1
        facts = self._pool.facts
        return Encode(
            job=self._new_job(query),
            kind=queries.LABOUR[query.what],
            body=query.body,
            limits=self._pool.limits,
            vocab_size=facts.vocab_size if facts is not None and query.what == "tokenize" else self._pool.receiver.vocab_size,
        )


def _worked_out(query: Query, encoded: Encoded) -> To:
    """What the worker made of a question."""
    if encoded.error:
        return To(queries.failure(query, queries.error_of(encoded)), query.edge)
    return To(Answer(id=query.id, body=encoded.body), query.edge)


def _not_taken(raised: Exception) -> PenstockError:
    if isinstance(raised, PluginFault):
        log.error("%s", raised.message)
    return raised if isinstance(raised, PenstockError) else PenstockError(f"The prompt could not be taken in: {described(raised, 300)}")
