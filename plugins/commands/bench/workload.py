"""Workloads of the benchmarks.

What it is: seeded request lists: prompt token ids (or text), output lengths, arrival times. Lengths follow clipped log-normals that
resemble ShareGPT conversations (median and spread are stated beside the table), so that no data set is needed.
What it does not know: servers, clients, results.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Median and sigma (of the log) of lengths in tokens, clipped to [low, high]."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return max(self.low, min(self.high, round(self.median * math.exp(self.sigma * rng.gauss(0, 1)))))


SHAREGPT_INPUT = Shape(median=120, sigma=1.0, low=4, high=1024)
SHAREGPT_OUTPUT = Shape(median=160, sigma=0.8, low=4, high=512)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: ids are token ids in [low_id, vocab); `at` is its arrival, seconds after the start."""

    prompt: list[int]
    output: int
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    requests: list[Request] = field(default_factory=list)

    @property
    def input_tokens(self) -> int:
        return sum(len(r.prompt) for r in self.requests)


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Gamma-distributed gaps with mean 1/rate; burstiness 1 is a Poisson process, larger is more regular. rate inf: all at once."""
    if math.isinf(rate):
        return [0.0] * count
    out, now = [], 0.0
    for _ in range(count):
        out.append(now)
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return out


class DoesNotFit(ValueError):
    """What was asked for is longer than the context: measuring something shorter would be another measurement."""


def make(
    *,
    count: int,
    vocab: int,
    seed: int,
    rate: float = math.inf,
    burstiness: float = 1.0,
    input_len: int | None = None,
    output_len: int | None = None,
    prefix_len: int = 0,
    prefixes: int = 1,
    max_len: int | None = None,
    low_id: int = 16,
    inputs: Shape = SHAREGPT_INPUT,
    outputs: Shape = SHAREGPT_OUTPUT,
    values_seed: str | None = None,
) -> Workload:
    """A workload: drawn lengths (ShareGPT-like ones unless said), or fixed ones; `prefixes` distinct shared prefixes of `prefix_len` tokens dealt round robin.

    Drawn lengths are cut to `max_len`, fixed ones never. `values_seed` is of the ids alone: other ids, the same lengths and arrivals. Raises DoesNotFit.
    """
    if vocab <= low_id:
        raise ValueError(f"the vocabulary ({vocab}) must exceed {low_id}")
    fixed = prefix_len + (1 if input_len is None else input_len) + (1 if output_len is None else output_len)
    if max_len is not None and fixed > max_len:
        raise DoesNotFit(
            f"prefix ({prefix_len}), input ({'at least 1' if input_len is None else input_len}) and output"
            f" ({'at least 1' if output_len is None else output_len}) are {fixed} tokens, but the model's context is {max_len}"
        )
    lengths, values, gaps = random.Random(seed), random.Random(seed + 1 if values_seed is None else values_seed), random.Random(seed + 2)
    shared = [[values.randrange(low_id, vocab) for _ in range(prefix_len)] for _ in range(max(1, prefixes))]
    times = arrivals(count, rate, burstiness, gaps)
    requests = []
    for i in range(count):
        own = input_len if input_len is not None else inputs.draw(lengths)
        out = output_len if output_len is not None else outputs.draw(lengths)
        prompt = shared[i % len(shared)] + [values.randrange(low_id, vocab) for _ in range(own)]
        if max_len is not None:
            out = max(1, min(out, max_len - prefix_len - (1 if input_len is None else input_len)))
            prompt = prompt[: max_len - out]
        requests.append(Request(prompt=prompt, output=out, at=times[i]))
    return Workload(requests=requests)
