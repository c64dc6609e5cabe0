"""The spans of a request in text, made from timestamps once it is over.

What it is: `tokenize`, `queue`, `prefill`, `decode` and `detokenise`, one beginning where the other ends, so that they tile the request from
the moment it left the edge to its last delta without a gap; with the attributes of the generative AI conventions and the old `gen_ai.latency.*`
family that dashboards read.
What it does not know: the OpenTelemetry SDK, the edge's spans around these.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.actors.text.ledger import Request
from penstock.core.protocol.control import EngineFacts
from penstock.core.telemetry.traces import Traces, gen_ai_attributes


def record(traces: Traces, request: Request, model: str, facts: EngineFacts | None, end_ns: int, to_wall_ns: int) -> None:
    """`facts` of the engine, if one is up; `end_ns` on the monotonic clock; `to_wall_ns` is added to get to the Unix epoch, unless the edge said what it adds itself."""
    to_wall_ns = request.submit.to_wall_ns or to_wall_ns
    context = traces.context(request.submit.traceparent, request.submit.tracestate)
    if context is None and request.submit.traceparent:
        return  # the client's trace is not sampled
    reasons = [choice.finish for choice in request.choices]
    failed = "error" if "error" in reasons else None
    outputs = request.output_tokens
    # Stages in order: name and the moment it ended (0: never reached; then the request ended in it).
    ends = (
        ("tokenize", request.encode_end_ns),
        ("queue", request.scheduled_ns),
        ("prefill", request.first_ns),
        ("decode", request.last_ns if request.first_ns and "abort" not in reasons else 0),
        ("detokenise", end_ns),
    )
    common: dict[str, Any] = {"gen_ai.request.model": model, "gen_ai.response.id": request.submit.rid}
    attributes: dict[str, dict[str, Any]] = {
        "tokenize": {"gen_ai.usage.input_tokens": len(request.prompt)},
        "queue": {"gen_ai.latency.time_in_queue": max(0, request.scheduled_ns - request.encode_end_ns) / 1e9},
        "prefill": {
            "gen_ai.usage.input_tokens": len(request.prompt),
            "gen_ai.usage.cache_read.input_tokens": request.cached,
            "gen_ai.latency.time_in_model_prefill": max(0, request.first_ns - request.scheduled_ns) / 1e9,
        },
        "decode": {
            **gen_ai_attributes(request.submit.kind, model, request.params, max_tokens=request.max_tokens, stream=request.stream),
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": len(request.prompt),
            "gen_ai.usage.output_tokens": outputs,
            "gen_ai.latency.time_to_first_token": max(0, request.first_ns - request.received_ns) / 1e9,
            "gen_ai.latency.e2e": max(0, end_ns - request.received_ns) / 1e9,
            "gen_ai.latency.time_in_model_decode": max(0, request.last_ns - request.first_ns) / 1e9,
            "penstock.system_fingerprint": facts.fingerprint if facts else "",
            **_quality(facts),
            "penstock.preemptions": request.preemptions,
            "penstock.replays": request.replays,
            **_speculation(request),
        },
        "detokenise": {},
    }
    start = min(request.submit.sent_ns or request.arrival_ns, request.arrival_ns)
    for name, at in ends:
        reached = at > 0
        end = min(max(at, start), end_ns) if reached else end_ns
        last = not reached or name == "detokenise"
        events = [(event, when + to_wall_ns) for event, when in request.events if start <= when < end or (last and when >= end)]
        traces.child(
            context,
            name,
            start + to_wall_ns,
            end + to_wall_ns,
            {**common, **attributes[name]},
            events,
            error=failed if last else None,
        )
        start = end
        if not reached:
            return


def _quality(facts: EngineFacts | None) -> dict[str, Any]:
    """What the weights lost, as the engine tells it."""
    if facts is None or facts.quality is None:
        return {}
    told = msgspec.structs.asdict(facts.quality)
    return {f"penstock.quality.{name}": value for name, value in told.items() if value not in (None, "")}


def _speculation(request: Request) -> dict[str, Any]:
    """Of drafts, where there were some, and of drafters that were off."""
    off: dict[str, Any] = {"penstock.speculation.switched_off": request.off} if request.off else {}
    if not request.drafted:
        return off
    return off | {
        "penstock.speculation.drafted_tokens": request.drafted,
        "penstock.speculation.accepted_tokens": request.accepted,
        "penstock.speculation.acceptance": round(request.accepted / request.drafted, 4),
    }
