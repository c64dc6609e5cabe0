"""How requests end.

What it is: the one place where a request leaves ledger, admission and its lane, whatever stage it is in and whoever wants it gone: its last
token came, its client left, it cannot go on (`abandon`), it kills engines, the server shuts down. It tells the edge, counts, and writes spans.
What it does not know: why; how tokens become text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from penstock.core.actors.text import spans
from penstock.core.actors.text.desk import Desk, Outbound
from penstock.core.actors.text.ledger import Request
from penstock.core.actors.text.obedience import obeys
from penstock.core.actors.text.pool import Pool
from penstock.core.contract.hookspecs import RequestSummary
from penstock.core.protocol.errors import Cancelled, PenstockError
from penstock.core.protocol.messages import Finished, Rejected
from penstock.core.protocol.tenants import SloClass
from penstock.core.runtime.actor import To


class Ending:
    def __init__(self, desk: Desk, pool: Pool) -> None:
        self._desk = desk
        self._pool = pool

    def deliver(self) -> Iterator[To]:
        """Rows first, then the ends that they brought."""
        receiver = self._pool.receiver
        yield from receiver.take()
        ended, receiver.ended = receiver.ended, []
        for request in ended:
            yield from self.finish(request)

    def finish(self, request: Request) -> Iterator[To]:
        """Every choice has ended."""
        desk = self._desk
        now = desk.clock.now_ns()
        desk.ledger.remove(request)
        self._settle(request)
        if not request.started:
            desk.admission.leave(request.queued_tokens)
        if request.lane is not None:
            request.lane.release(request)
        times = _times(request)
        yield from self._tell(
            request,
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
                reasoning_tokens=request.reasoning_tokens,
            ),
        )
        self._measure(request, now, times)
        if request.traced:
            self._record(request, now)

    def _settle(self, request: Request, *, refused: bool = False) -> None:
        """With its tenant's limits."""
        charge, tenants = request.charge, self._desk.tenants
        if charge is not None and tenants is not None:
            request.charge = None
            tenants.settle(charge, refused=refused, prompt=len(request.prompt), cached=request.cached, output=request.output_tokens)

    def _record(self, request: Request, now_ns: int) -> None:
        """Its spans, once the engine has said all of it."""
        lane, desk = request.lane, self._desk
        to_wall_ns = desk.clock.wall_ns() - desk.clock.now_ns()
        if lane is not None:
            request.off += [one for one in lane.off if one not in request.off]
        record = functools.partial(spans.record, desk.traces, request, self._pool.names[0], self._pool.facts, now_ns, to_wall_ns)
        cut = {choice.seq for choice in request.choices if not choice.over}
        if cut and lane is not None and lane.speculates(request):
            lane.late.wait(request, cut, record, now_ns)
        else:
            record()

    def _tell(self, request: Request, message: Finished | Rejected) -> Iterator[To]:
        """Its end, to whoever listens."""
        kept = request.kept
        if kept is None:
            yield To(message, request.edge)
            return
        yield from kept.end(request.key, message, self._desk.clock.now_ns())
        if kept.ended:
            self._pool.receiver.forget(kept)

    def drop(self, request: Request, cause: str) -> Iterator[Outbound]:
        """End a request that nobody waits for any more."""
        lane = request.lane
        self._note_cancelled(request, cause)
        running = request.running
        for choice in running:
            self._pool.receiver.close(choice)
        if lane is not None:
            yield from lane.stop(request, running)
        yield from self.finish(request)
        if lane is not None:  # it may have been the one that others waited for, and no step follows
            yield from lane.pump()

    def revoke(self, request: Request, cause: str = "client") -> Iterator[Outbound]:
        """End a request because somebody said so; whoever waits for it, now or later, is told."""
        lane = request.lane
        self._note_cancelled(request, cause)
        yield from self.abandon(request, Cancelled("The request was cancelled."), finish="abort")
        if lane is not None:  # as in `drop`
            yield from lane.pump()

    def _note_cancelled(self, request: Request, cause: str) -> None:
        request.series.count("cancellations", cause)
        if self._desk.log is not None:
            self._desk.log.info("request cancelled", rid=request.submit.rid, cause=cause, output_tokens=request.output_tokens)

    def abandon(self, request: Request, error: PenstockError, *, finish: str = "error") -> Iterator[Outbound]:
        """End a request that cannot go on, whatever stage it is in: nothing of it stays in ledger, admission or engine. The client gets a
        refusal if it has heard nothing yet, and its streams' last row otherwise."""
        if not request.choices:
            self._desk.ledger.remove(request)
            self._settle(request, refused=True)
            self._desk.admission.leave(request.queued_tokens)
            yield from self._tell(request, self._desk.refusal(request.key, error))
            return
        running = request.running
        if request.lane is not None:
            yield from request.lane.stop(request, running)
        for choice in running:
            self._pool.receiver.end(choice, finish, error.message, error.code)
        yield from self.deliver()

    def stop(self, request: Request) -> Iterator[Outbound]:
        """End it with what there is, as if a stop string had come now. What must obey a grammar is cut off, and says so."""
        if not request.choices:
            yield from self.revoke(request)
            return
        lane, running = request.lane, request.running
        if lane is not None:
            yield from lane.stop(request, running)
        finish, why = ("length", None) if obeys(request.submit) else ("stop", "client")
        for choice in running:
            self._pool.receiver.end(choice, finish, stop_reason=why)
        yield from self.deliver()
        if lane is not None:  # as in `drop`
            yield from lane.pump()

    def condemn(self, request: Request) -> Iterator[Outbound]:
        """It is what kills engines, as far as anybody can tell."""
        request.series.count("requests_condemned")
        text = f"The engine died {request.strikes} times while it worked on this request, so it is not tried again."
        yield from self.abandon(request, PenstockError(text, code="engine_failure"))

    def everything(self, finish: str, error: PenstockError) -> Iterator[Outbound]:
        """Every stream ends now, with what it has."""
        for request in list(self._desk.ledger.requests.values()):
            yield from self.abandon(request, error, finish=finish)

    def _judge(self, request: Request, slo: SloClass, gap_s: float | None) -> None:
        """Did it get what its class is to get? `gap_s`: the mean between its tokens; None: there was one alone."""
        count = self._desk.metrics.count
        if slo.ttft_ms:
            met = request.first_ns - request.received_ns <= slo.ttft_ms * 1e6
            count("slo_requests", request.class_, "ttft", "true" if met else "false")
        if slo.itl_ms and gap_s is not None:
            count("slo_requests", request.class_, "itl", "true" if gap_s * 1e3 <= slo.itl_ms else "false")

    def _measure(self, request: Request, now_ns: int, times: tuple[int, int, int]) -> None:
        desk, series = self._desk, request.series
        queue, prefill, decode = (ns / 1e9 for ns in times)
        reasons = [choice.finish for choice in request.choices]
        for reason in reasons:
            series.count("requests_finished", reason)
        if request.first_ns:
            series.ttft.observe((request.first_ns - request.received_ns) / 1e9)
            series.encode.observe(max(0, request.encode_end_ns - request.arrival_ns) / 1e9)
            series.queue.observe(queue)
            series.prefill.observe(prefill)
            series.decode.observe(decode)
            series.inference.observe(prefill + decode)
            series.e2e.observe((request.last_ns - request.received_ns) / 1e9)
            longest = max(len(choice.outputs) for choice in request.choices)
            if longest > 1:
                series.tpot.observe(decode / (longest - 1))
            series.prompt.observe(len(request.prompt))
            series.output.observe(request.output_tokens)
            series.longest.observe(longest)
            series.computed.observe(len(request.prompt) - request.cached)
            series.preempted.observe(request.preemptions)
            series.params_n.observe(request.params.n)
            if request.params.max_tokens is not None:
                series.params_max.observe(request.params.max_tokens)
            if request.slo is not None:
                self._judge(request, request.slo, decode / (longest - 1) if longest > 1 else None)
        total = (now_ns - request.received_ns) / 1e9
        if desk.log is not None:
            desk.log.debug(
                "request finished",
                rid=request.submit.rid,
                prompt_tokens=len(request.prompt),
                output_tokens=request.output_tokens,
                reasons=reasons,
                seconds=round(total, 4),
            )
        if desk.hears:
            summary = RequestSummary(
                rid=request.submit.rid,
                model=self._pool.names[0],
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
            desk.hook("request_finished", summary=summary)


def _times(request: Request) -> tuple[int, int, int]:
    """Queue, prefill and decode in ns; 0 for what was never reached."""
    queue = request.scheduled_ns - request.encode_end_ns if request.scheduled_ns else 0
    prefill = request.first_ns - request.scheduled_ns if request.first_ns else 0
    decode = request.last_ns - request.first_ns if request.first_ns and request.last_ns else 0
    return max(0, queue), max(0, prefill), max(0, decode)
