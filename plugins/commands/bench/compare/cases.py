"""What the servers are asked, and what is read off their answers.

What it is: the cases of `penstock bench compare` by name: a workload of each, whose lengths and arrivals are the same in every round and whose ids are new in each (a prefix cache
helps within a round, as it would in use, and never across rounds), and the figures of a round.
What it does not know: servers, turns, ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.plugins.commands.bench import report, workload
from penstock.plugins.commands.bench.client import Record
from penstock.plugins.commands.bench.workload import Shape, Workload


class NotMeasured(Exception):
    """A round of which no figure can be taken; its text says why."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One server's answers to one round of a case."""

    load: Workload
    records: Sequence[Record]
    wall: float

    def summary(self) -> dict[str, Any]:
        return report.summarise(self.records, self.wall, {})


@dataclass(frozen=True, kw_only=True)
class Figure:
    label: str
    more_is_better: bool
    read: Callable[[Turn], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`count` requests unless --requests says another number (None: it is about one request)."""

    name: str
    what: str
    shape: dict[str, Any]
    figures: tuple[Figure, ...]
    count: int | None = None
    paced: bool = False
    """Requests arrive at --rate, not all at once."""


def _output_rate(turn: Turn) -> float:
    return float(turn.summary()["output_tokens_per_s"])


def _prompt_rate(turn: Turn) -> float:
    (record,) = turn.records
    return turn.load.input_tokens / record.ttft


def _answer_rate(turn: Turn) -> float:
    """Of one answer with its short prompt: between first and last token alone it would be anything where a server hands over many at once."""
    (record,) = turn.records
    return len(record.tokens) / (record.tokens[-1] - record.sent)


def _of_summary(kind: str, part: str) -> Callable[[Turn], float]:
    def read(turn: Turn) -> float:
        return float(turn.summary()[kind].get(part, math.nan))

    return read


OUTPUT_RATE = Figure(label="output tokens/s", more_is_better=True, read=_output_rate)


def _token_time(share: float) -> Callable[[Turn], float]:
    """TPOT of the requests, ms: gaps between single tokens are 0 where some arrive together, and say more of the way than of the server."""

    def read(turn: Turn) -> float:
        each = [statistics.fmean(record.gaps) for record in turn.records if record.gaps]
        return report.percentile(each, share) * 1e3

    return read


FIRST_P50 = Figure(label="TTFT p50, ms", more_is_better=False, read=_of_summary("ttft_ms", "p50"))
FIRST_P95 = Figure(label="TTFT p95, ms", more_is_better=False, read=_of_summary("ttft_ms", "p95"))
TOKEN_P50 = Figure(label="TPOT p50, ms", more_is_better=False, read=_token_time(0.5))
TOKEN_P95 = Figure(label="TPOT p95, ms", more_is_better=False, read=_token_time(0.95))

CASES = {
    case.name: case
    for case in (
        Case(
            name="offline",
            what="all at once, log-normal lengths of up to 512 in and 128 out",
            shape={"inputs": Shape(median=120, sigma=1.0, low=4, high=512), "outputs": Shape(median=80, sigma=0.8, low=4, high=128)},
            figures=(OUTPUT_RATE,),
            count=64,
        ),
        Case(
            name="decode",
            what="one request, 32 in, 128 out",
            shape={"input_len": 32, "output_len": 128},
            figures=(Figure(label="tokens/s", more_is_better=True, read=_answer_rate),),
        ),
        Case(
            name="prefill",
            what="one request, 2,048 in, 1 out",
            shape={"input_len": 2048, "output_len": 1},
            figures=(Figure(label="prompt tokens/s", more_is_better=True, read=_prompt_rate),),
        ),
        Case(
            name="prefix",
            what="all at once, 1,024 common tokens and 16 to 64 own ones, 32 out",
            shape={"prefix_len": 1024, "inputs": Shape(median=32, sigma=0.5, low=16, high=64), "output_len": 32},
            figures=(OUTPUT_RATE,),
            count=32,
        ),
        Case(
            name="poisson",
            what="Poisson arrivals, ShareGPT-like lengths (up to 1,024 in and 512 out)",
            shape={},
            figures=(FIRST_P50, FIRST_P95, TOKEN_P50, TOKEN_P95),
            count=64,
            paced=True,
        ),
        Case(
            name="burst",
            what="all at once, ShareGPT-like lengths (up to 1,024 in and 512 out)",
            shape={},
            figures=(OUTPUT_RATE, FIRST_P50),
            count=256,
        ),
    )
}

USUAL = ("offline", "decode", "prefill", "prefix")
WARMING = "warming"
WARM_SHARE = 4
"""A warming turn has a quarter of a round's requests, at least two."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the cases are made from."""

    vocab: int
    context: int | None
    seed: int = 0
    requests: int | None = None
    rate: float = 4.0

    def load(self, case: Case, round_: int | str) -> Workload:
        """Of one round. Raises workload.DoesNotFit."""
        made = workload.make(
            count=1 if case.count is None else self.requests or case.count,
            vocab=self.vocab,
            seed=self.seed,
            rate=self.rate if case.paced else math.inf,
            max_len=self.context,
            values_seed=f"{self.seed} {case.name} {round_}",
            **case.shape,
        )
        if round_ == WARMING:
            return Workload(requests=made.requests[: max(2, len(made.requests) // WARM_SHARE)])
        return made

    def longest(self, cases: Sequence[Case]) -> int:
        """Tokens of the longest request, with its answer."""
        return max(len(request.prompt) + request.output for case in cases for request in self.load(case, 0).requests)


def figures(case: Case, turn: Turn) -> dict[str, float]:
    """By label, those that can be told (of answers that come whole, no time a token). Raises NotMeasured: a server that fails requests, or answers with more or fewer tokens than were asked for, did other work than its neighbours."""
    summary = turn.summary()
    if summary["failed"]:
        raise NotMeasured(f"{summary['failed']} of {summary['requests']} requests failed: {'; '.join(summary['errors'])}")
    if summary["short"]:
        made, wanted = summary["output_tokens"], sum(record.want for record in turn.records)
        raise NotMeasured(f"{made} tokens came where {wanted} were asked for with ignore_eos: its figures would be of other work")
    found = {figure.label: figure.read(turn) for figure in case.figures}
    told = {label: value for label, value in found.items() if math.isfinite(value) and value > 0}
    if not told:
        raise NotMeasured(f"no {next(iter(found))} can be told from its answers")
    return told
