"""The line of figures in the log, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

from penstock.core.actors.text.log_line import STATS_S, StatsLine
from penstock.core.processes.text_side import WithDefaults
from penstock.core.protocol.config import build
from penstock.core.protocol.messages import EngineStats, SpeculationStats
from penstock.core.telemetry.metrics import Metrics


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))


def at(seconds: float) -> int:
    return round(seconds * 1e9)


def test_figures_of_the_time_since_the_last_line(bench: Any) -> None:
    log, metrics, waiting = Log(), bench.actor.metrics, [0]
    line = StatsLine(metrics, lambda: waiting[0], log)
    metrics.of("trained").count("tokens", "generated", by=1000)  # before anybody looked
    line.tick(at(5))
    metrics.engine_stats(0, EngineStats(running=3, blocks_used=2, blocks_total=8))
    metrics.of("trained").count("tokens", "prompt_computed", by=150)
    metrics.of("trained").count("tokens", "prompt_cached", by=50)
    metrics.of("trained").count("tokens", "generated", by=400)
    waiting[0] = 7
    line.tick(at(5 + STATS_S - 0.1))
    assert log.lines == []
    line.tick(at(5 + STATS_S))
    want = {
        "prompt_tokens_per_s": 20.0,
        "generated_tokens_per_s": 40.0,
        "running": 3,
        "waiting": 7,
        "kv_usage_percent": 25.0,
        "prefix_hit_percent": 25.0,
    }
    assert log.lines == [("stats", want)]
    metrics.engine_stats(0, EngineStats(blocks_total=8))
    waiting[0] = 0
    for i in range(2, 6):
        line.tick(at(5 + i * STATS_S))
    idle = dict.fromkeys(want, 0.0)
    assert log.lines[1:] == [("stats", idle)], "one line at the end of work, then silence"
    metrics.of("trained").count("tokens", "generated", by=10)
    line.tick(at(5 + 7 * STATS_S))
    assert log.lines[-1][1]["generated_tokens_per_s"] == 0.5


def test_an_idle_server_says_nothing() -> None:
    log = Log()
    line = StatsLine(Metrics(["m"]), lambda: 0, log)
    for i in range(5):
        line.tick(at(i * STATS_S))
    assert log.lines == []


def test_it_can_be_turned_off() -> None:
    assert build({}).log_stats
    assert not build({"log_stats": False}).log_stats


def test_default_template_arguments_are_under_what_a_request_gives() -> None:
    class Renderer:
        templates = ("default",)

        def render(self, messages: Any, *, kwargs: dict[str, Any], **how: Any) -> str:
            return f"{messages} {kwargs} {how}"

    with_defaults = WithDefaults(Renderer(), {"enable_thinking": False, "a": 1})
    how: dict[str, Any] = {"tools": None, "add_generation_prompt": True, "continue_final_message": False}
    assert with_defaults.render([], kwargs={"a": 2}, **how) == f"[] { ({'enable_thinking': False, 'a': 2}) } {how}"
    assert with_defaults.templates == ("default",)
    assert not hasattr(with_defaults, "with_template")


def test_default_template_arguments_are_those_of_a_requests_template_too(renderer: Any) -> None:
    with_defaults = WithDefaults(renderer, {"a": 1})
    how: dict[str, Any] = {"tools": None, "add_generation_prompt": True, "continue_final_message": False}
    other = with_defaults.with_template("{{ messages[0].content }}{{ a }}{{ b }}")
    assert other.render([{"role": "user", "content": "x"}], kwargs={"b": 2}, **how) == "x12"


def test_acceptance_is_told_where_somebody_drafts(bench: Any) -> None:
    log, metrics = Log(), bench.actor.metrics
    line = StatsLine(metrics, lambda: 1, log)
    metrics.engine_stats(0, EngineStats(speculation=SpeculationStats(drafts=5, drafted=20, accepted=10)))
    line.tick(at(0))
    metrics.engine_stats(0, EngineStats(speculation=SpeculationStats(drafts=15, drafted=60, accepted=40)))
    line.tick(at(STATS_S))
    assert (log.lines[-1][1]["draft_acceptance_percent"], log.lines[-1][1]["accepted_length"]) == (75.0, 4.0)
    line.tick(at(2 * STATS_S))
    assert (log.lines[-1][1]["draft_acceptance_percent"], log.lines[-1][1]["accepted_length"]) == (0.0, 1.0)
