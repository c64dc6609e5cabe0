"""Hypothesis drives scheduler and KV manager with everything at once; the simulation's referee watches every edge, the fake device the KV's
content, and a model computes each sequence alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.protocol.messages import Drain, Park, Plan, Unpark, key_of, seq_of
from penstock.core.protocol.sampling import Beam

PARAMS = ("temperature", "seed", "min_tokens", "logprobs", "prompt_logprobs", "beam")
BEAMS = [
    Beam(width=2),
    Beam(width=3, length_penalty=0.0, early_stopping=True),
    Beam(width=4, length_penalty=2.0, early_stopping="never"),
    Beam(width=4, length_penalty=-1.0),
]
PREFIXES = [[], [3] * 4, [3] * 4 + [5] * 4, [3] * 9, [3, 4] * 8, list(range(1, 14))]


class Teller:
    """A drafter on the host. What it is told must be what sequences say; what it says in turn may be right, wrong, too long, nothing, or no tokens at all."""

    max_lookahead = 5

    def __init__(self, kind: str, machine: Any) -> None:
        self.kind = kind
        self.wrong: list[str] = []
        self._machine = machine
        self._said: dict[int, list[int]] = {}

    def _right(self, seq: int) -> list[int]:
        sim = self._machine.sim
        return [*sim.ledgers[seq].admit.prompt.tolist(), *sim.expected(seq)]

    def begin(self, seq: int, tokens: Any, tenant: str) -> None:
        if seq in self._said or len(tenant) != 32:
            self.wrong.append(f"{seq} began twice, or is nobody's")
        self._said[seq] = []
        self.extend(seq, tokens)

    def extend(self, seq: int, tokens: Any) -> None:
        self._said[seq] += tokens.tolist()
        if self._said[seq] != self._right(seq)[: len(self._said[seq])]:
            self.wrong.append(f"{seq} does not go on so")

    def propose(self, seq: int, most: int) -> Any:
        said = len(self._said[seq])
        right = self._right(seq)[said : said + most]
        if self.kind == "raises" and said % 3 == 0:
            raise RuntimeError("no idea")
        if self.kind == "odd" and said % 3 == 0:
            return np.array([-1] * most)
        if self.kind == "long":
            right += [1] * 9
        if self.kind == "wrong":
            right = [(token + 1) % 7 for token in right]
        return np.array(right[: {"short": 1, "none": 0}.get(self.kind, 99)], np.int32)

    def end(self, seq: int) -> None:
        if self._said.pop(seq, None) is None:
            self.wrong.append(f"{seq} ended, but never began")


def build(sim_class: Any, settings_of: Any, policies: Any, searching: bool = False) -> type[RuleBasedStateMachine]:
    """`searching`: engines that beams fit in, and many of them."""

    class EngineMachine(RuleBasedStateMachine):
        @initialize(
            depth=st.integers(1, 3),
            slots=st.integers(4, 9) if searching else st.integers(1, 5),
            budget=st.integers(4 if searching else 1, 24),
            blocks=st.integers(8, 16) if searching else st.integers(4, 24),
            chunked=st.just(True) if searching else st.booleans(),
            mixed=st.sampled_from([0, 0, 1, 3]),
            limit_ns=st.sampled_from([None, 0, 1_000_000, 15_000_000]),
            caching=st.booleans(),
            forecasts=st.booleans(),
            block=st.sampled_from([1, 2, 4]),
            policy=st.integers(0, len(policies) - 1),
            clones=st.booleans(),
            lookahead=st.sampled_from([0, 0, 1, 2, 5]),
            widths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
            drafts=st.lists(st.sampled_from(["fair", "right", "wrong", "none", "short", "poor"]), min_size=1, max_size=2),
            hosts=st.lists(st.sampled_from(["right", "wrong", "long", "short", "none", "raises", "odd"]), max_size=2),
            hosts_first=st.booleans(),
            loose=st.booleans(),
            reads=st.sampled_from([(), (), (1, 1), (2, 0), (2, 1)]),
            idle=st.lists(st.booleans(), min_size=1, max_size=5),
            park=st.integers(0, 2),
        )
        def start(
            self,
            depth: int,
            slots: int,
            budget: int,
            blocks: int,
            chunked: bool,
            mixed: int,
            limit_ns: int | None,
            caching: bool,
            forecasts: bool,
            block: int,
            policy: int,
            clones: bool,
            lookahead: int,
            widths: list[int],
            drafts: list[str],
            hosts: list[str],
            hosts_first: bool,
            loose: bool,
            reads: tuple[int, ...],
            idle: list[bool],
            park: int,
        ) -> None:
            self.options: dict[str, Any] = {
                "depth": depth,
                "max_num_seqs": slots,
                "max_num_batched_tokens": budget if chunked else max(budget, 8),
                "num_blocks": blocks * (4 // block),
                "block_size": block,
                "enable_chunked_prefill": chunked,
                "mixed_prefill_tokens": mixed if chunked else 0,
                "itl_target_ns": limit_ns if chunked else None,
                "enable_prefix_caching": caching,
                "forecasts": forecasts,
                "max_model_len": 40,
                "prompt_logprobs_weight": (1.0, 2.5)[policy % 2],
                "clones": clones,
                "lookahead": lookahead,
                "loose": loose,
                "reads": reads[: len(drafts)] if lookahead else (),
                "park_kv_s": (0.0, 0.03, 5.0)[park],
            }
            self.policy = policies[policy]
            turns, moods = itertools.cycle(widths), itertools.cycle(idle)
            self.drafts = {"choose": lambda rows: min(next(turns), lookahead), "drafts": tuple(drafts), "idle": lambda: next(moods)}
            self.tellers = [Teller(kind, self) for kind in hosts]
            self.options["drafters"] = (*hosts, *drafts) if hosts_first else (*drafts, *hosts)
            order = (True,) * len(hosts), (False,) * len(drafts)
            self.options["hosted"] = sum(order if hosts_first else order[::-1], ())
            self.sim = sim_class(settings_of(**self.options), self.policy(), hosts=self.tellers, **self.drafts)
            pace = self.sim.scheduler._board.pace
            for _ in range(0 if pace is None else 24):  # what is learned of longer runs
                pace.times.learn(2, 20, 0, False, 9_000_000)
                pace.times.learn(10, 20, 60, True, 12_000_000)
            self.bad: set[int] = set()
            self.keys: list[int] = []
            self.parked: set[int] = set()
            self.epoch = 0

        @rule(
            prefix=st.sampled_from(PREFIXES),
            tail=st.lists(st.integers(0, 5), max_size=6),
            max_tokens=st.integers(0, 12),
            n=st.sampled_from([1, 1, 1, 2, 3, 4]),
            eos=st.sampled_from([[], [7], list(range(0, 60, 3)), list(range(0, 60, 5))]),
            minimum=st.sampled_from([0, 0, 1, 3]),
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 2),
            priority=st.integers(-1, 2),
            prompt_logprobs=st.sampled_from([None, None, None, 2]),
            logprobs=st.sampled_from([None, None, 1]),
            beam=st.sampled_from([None, *BEAMS] if searching else [None, None, *BEAMS]),
            spec_decode=st.sampled_from([None, None, True, False]),
            wait=st.booleans(),
        )
        def admit(
            self,
            prefix: list[int],
            tail: list[int],
            max_tokens: int,
            n: int,
            eos: list[int],
            minimum: int,
            temperature: float,
            seed: int,
            priority: int,
            prompt_logprobs: int | None,
            logprobs: int | None,
            beam: Beam | None,
            spec_decode: bool | None,
            wait: bool,
        ) -> None:
            if len(self.sim.live()) > 12:
                return
            if beam is not None:
                n = min(n, beam.width)
            key = self.sim.admit(
                [*prefix, *tail],
                max_tokens=max_tokens,
                n=n,
                eos=eos,
                min_tokens=min(minimum, max_tokens),
                temperature=temperature,
                seed=seed,
                priority=priority,
                prompt_logprobs=prompt_logprobs,
                logprobs=logprobs,
                beam=beam,
                spec_decode=spec_decode,
                post=not wait,
            )
            self.keys.append(key)

        @rule(steps=st.integers(1, 6))
        def step(self, steps: int) -> None:
            self.sim.drain()
            self.sim.finish(steps)

        @precondition(lambda self: self.keys)
        @rule(data=st.data(), everything=st.booleans())
        def abort(self, data: Any, everything: bool) -> None:
            key = data.draw(st.sampled_from(self.keys))
            seqs = [s for s in self.sim.ledgers if key_of(s) == key]
            self.sim.abort(*(seqs if everything else [data.draw(st.sampled_from(seqs))]))

        @precondition(lambda self: self.keys)
        @rule(data=st.data())
        def park(self, data: Any) -> None:
            key = data.draw(st.sampled_from(self.keys))
            self.parked.add(key)
            self.sim.post(Park(key=key))

        @precondition(lambda self: self.parked)
        @rule(data=st.data())
        def unpark(self, data: Any) -> None:
            key = data.draw(st.sampled_from(sorted(self.parked)))
            self.parked.discard(key)
            self.sim.post(Unpark(key=key))

        @precondition(lambda self: self.parked)
        @rule()
        def time_passes(self) -> None:
            """So much that who is parked gives its memory up."""
            self.sim.clock.advance(5.0)
            self.sim.post(Plan())

        @precondition(lambda self: self.sim.flying)
        @rule(row=st.integers(0, 3))
        def bad_row(self, row: int) -> None:
            self.sim.bad = lambda sample: [row] if row < sample.rows.size else []
            self.sim.finish()
            self.sim.bad = None

        @precondition(lambda self: self.sim.live())
        @rule()
        def crash(self) -> None:
            """The engine dies; text admits again what it has received."""
            old = self.sim
            old.drain()
            self.epoch += 1
            self.tellers = [Teller(teller.kind, self) for teller in self.tellers]
            new = sim_class(settings_of(**self.options), self.policy(), old.clock, hosts=self.tellers, **self.drafts)
            new._keys = old._keys
            by_key: dict[int, list[int]] = {}
            for seq in old.live():
                by_key.setdefault(key_of(seq), []).append(seq)
            for seq, ledger in old.ledgers.items():
                if ledger.reason is not None:
                    new.ledgers[seq] = ledger
            for key, seqs in by_key.items():
                admit = old.ledgers[seqs[0]].admit
                params = {f: getattr(admit.sampling, f) for f in PARAMS}
                new.admit(
                    admit.prompt.tolist(),
                    key=key,
                    incarnation=admit.incarnation + 1,
                    choices=[seq - seq_of(key, 0) for seq in seqs],
                    outputs={seq - seq_of(key, 0): old.ledgers[seq].outputs for seq in seqs},
                    n=admit.sampling.n,
                    max_tokens=admit.max_tokens,
                    eos=admit.eos.tolist(),
                    priority=admit.priority,
                    spec_decode=admit.spec_decode,
                    post=False,
                    **params,
                )
            self.sim = new
            self.parked.clear()
            new.drain()

        @invariant()
        def sound(self) -> None:
            if hasattr(self, "sim"):
                assert self.sim.kv.check() == []

        def teardown(self) -> None:
            if not hasattr(self, "sim"):
                return
            sim = self.sim
            sim.drain()
            sim.run(limit=3000)
            sim.clock.advance(6.0)
            sim.post(Plan())
            sim.run(limit=3000)
            assert sim.kv.counts()[2] == 0, "only parked ones are left, and none of them gave its memory up"
            assert sim.scheduler.progress[1] == 0, "a watchdog would end an engine that only waits for slow clients"
            for key in sorted(self.parked):
                sim.fifo.append(Unpark(key=key))
            sim.drain()
            sim.run(limit=3000)
            assert sim.live() == [], "a sequence starved"
            sim.check_idle()
            for seq, ledger in sim.ledgers.items():
                if ledger.reason in (1, 2):
                    wanted = ledger.admit.sampling.prompt_logprobs
                    family = [sim.ledgers[s] for s in sim.ledgers if key_of(s) == key_of(seq)]
                    if wanted is not None and not any(f.admit.incarnation for f in family):
                        given = [p for f in family for p in f.prompt_logprobs]
                        assert given == list(range(1, ledger.admit.prompt.size))
            assert not any(teller.wrong for teller in self.tellers)
            sim.post(Drain())
            assert sim.drained == 1

    return EngineMachine


def run(engine_sim: Any, examples: int, *, derandomize: bool, searching: bool = False) -> None:
    case = build(*engine_sim, searching).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=derandomize,
        database=None,
    )
    case().runTest()


def test_everything_at_once(engine_sim: Any) -> None:
    run(engine_sim, 40, derandomize=True)


def test_beam_searches_among_others(engine_sim: Any) -> None:
    run(engine_sim, 40, derandomize=True, searching=True)


@pytest.mark.slow
def test_everything_at_once_with_other_examples_every_time(engine_sim: Any) -> None:
    run(engine_sim, 60, derandomize=False)
    run(engine_sim, 60, derandomize=False, searching=True)
