"""What text says about its own health and its engines'.

What it is: readiness, which edges are told (and load balancers through them), and the longer answer about decoding, both from lanes, ledger and
root's vitals.
What it does not know: HTTP, who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.core.actors.text import queries
from penstock.core.actors.text.desk import Desk
from penstock.core.actors.text.lane import Lane
from penstock.core.actors.text.ledger import ADMITTED, ENCODING, WAITING
from penstock.core.actors.text.pool import Pool
from penstock.core.protocol.messages import Answer, Query, TextReady, Vitals

STALL_S = 60.0
"""Admitted work without a step for so long is a stall in the health answer."""


class Health:
    """`vitals` is root's last word about all processes."""

    def __init__(self, desk: Desk, pool: Pool, lanes: Mapping[int, Lane]) -> None:
        self._desk = desk
        self._pool = pool
        self._lanes = lanes
        self.vitals: Vitals | None = None
        self.started_ns = desk.clock.now_ns()

    def readiness(self) -> TextReady:
        """Is everything up that an answer needs, and if not, what is missing."""
        ages: dict[str, float] = {}
        silent = ""
        for lane in self._lanes.values():
            age_s, word = lane.alive(self.vitals)
            if age_s is not None:
                ages[f"engine-{lane.engine}"] = round(age_s, 3)
            silent = silent or word
        ready, reason, waits = False, silent, True
        if self._desk.drain_at_ns is not None:
            reason, waits = "draining", False
        elif not self.up:
            reason, waits = ("the engine is starting", False) if self._pool.facts is None else ("the engine is being restarted", True)
        elif not silent:
            ready, waits = True, False
        return TextReady(
            ready=ready,
            reason=reason,
            epoch=self.epoch,
            waits=waits,
            limits=self._pool.limits if self._pool.facts is not None else None,
            ages=ages,
        )

    @property
    def up(self) -> bool:
        """Does any engine take requests?"""
        return any(lane.up for lane in self._lanes.values())

    @property
    def epoch(self) -> int:
        return max((lane.epoch for lane in self._lanes.values()), default=0)

    def answer(self, query: Query) -> Answer:
        """Does decoding make progress?"""
        now = self._desk.clock.now_ns()
        lanes = self._lanes.values()
        last_step_ns = max((lane.last_step_ns for lane in lanes), default=0)
        last_token_ns = max((lane.last_token_ns for lane in lanes), default=0)
        waiting = {r.lane for r in self._desk.ledger.requests.values() if r.state == ADMITTED and not r.parked and r.lane is not None}
        quiet_s = max(((now - max(lane.last_step_ns, lane.busy_since_ns)) / 1e9 for lane in waiting), default=0.0)
        status: queries.Status
        if not self.up:
            status = "starting" if self._pool.facts is None else "engine_down"
        elif quiet_s > STALL_S:
            status = "stalled"
        elif self._desk.drain_at_ns is not None:
            status = "draining"
        else:
            status = "busy" if self._desk.ledger.requests else "idle"
        engines = [{"id": lane.engine, "up": lane.up, "epoch": lane.epoch} for lane in lanes]
        details: dict[str, Any] = {
            "requests": len(self._desk.ledger.requests),
            "pending": self._desk.admission.requests,
            "step_age_s": round((now - last_step_ns) / 1e9, 3) if last_step_ns else None,
            "token_age_s": round((now - last_token_ns) / 1e9, 3) if last_token_ns else None,
            "quiet_s": round(quiet_s, 3),
            "uptime_s": round((now - self.started_ns) / 1e9, 3),
            "engine": engines[0] if engines else {"id": 0, "up": False, "epoch": 0},
        }
        if self.vitals is not None:
            details["processes"] = [
                {"role": vital.role, "id": vital.id, "up": vital.up, "age_s": vital.age_s, "stalled_s": vital.stalled_s}
                for vital in self.vitals.rows
            ]
        return queries.health(query, status, self.readiness().ready, details)

    def set_gauges(self) -> None:
        """What /metrics shows of this moment."""
        desk = self._desk
        metrics = desk.metrics
        states = dict.fromkeys(("encoding", "queued", "running", "parked", "replaying"), 0)
        for request in desk.ledger.requests.values():
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
        metrics.set("retained_streams", len(desk.streams))
        metrics.set("retained_bytes", desk.streams.bytes)
        metrics.set("ready", float(self.readiness().ready))
        metrics.set("pending_requests", desk.admission.requests)
        metrics.set("pending_prompt_tokens", desk.admission.tokens)
        metrics.set("uptime_seconds", (desk.clock.now_ns() - self.started_ns) / 1e9)
        metrics.put("otel_spans_exported", desk.traces.exported)
        metrics.put("otel_spans_failed", desk.traces.failed)
