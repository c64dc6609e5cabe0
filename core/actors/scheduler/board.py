"""The board: everything that the scheduler knows.

What it is: the state of one scheduler, on which its parts work: running sequences as columns (slots.py), waiting ones as entries (waiting.py),
what is due in the next KvStep, Forward and StepTokens, and the steps in flight.
What it does not know: how anything is decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import msgspec
import numpy as np

from penstock.core.actors.scheduler.drafting import Drafting
from penstock.core.actors.scheduler.forecast import Forecast
from penstock.core.actors.scheduler.outline import Blocks, Flight
from penstock.core.actors.scheduler.pace import Pace
from penstock.core.actors.scheduler.slots import Commit, Index, Rows, Slots
from penstock.core.actors.scheduler.waiting import Group, Request, Sequence, WaitingRoom
from penstock.core.contract.policy import SchedulePolicy
from penstock.core.protocol.columns import EMPTY_I64, I32, Column, i32, i64, u8
from penstock.core.protocol.messages import (
    EngineStats,
    PaceStats,
    Plan,
    StepTokens,
)
from penstock.core.runtime.actor import Out
from penstock.core.runtime.clock import Clock

NOBODY: Index = np.empty(0, np.intp)

Planning = Generator[Out, Any, None]


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths in tokens. `depth` is the number of steps that may be in flight; `vocab` bounds prompt ids."""

    engine: int
    epoch: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    depth: int = 1
    mixed_prefill_tokens: int = 0
    """Prompt tokens in a step that also decodes, at most; 0: what the budget leaves."""
    itl_target_ns: int | None = None
    """What such a step should take at most, see pace.py; 0: what is learned; None: there is no such limit."""
    prefill_knee: int = 0
    """Tokens of a step from which on each takes longer, as far as the device knows."""
    prompt_logprobs_weight: float = 1.0
    """What a prompt token with a log-probability takes of a step's budget, in tokens; see contract/devices.py. Without chunked prefill all weigh 1: a prompt
    must fit into a step."""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    vocab: int = 2**31 - 1
    clones: bool = False
    """The device clones slots: see Forward.clone_src."""
    grammars: bool = False
    """There is somebody who makes masks, and the device takes them."""
    beams: bool = False
    """The device takes Forward.write_*, which a beam search needs."""
    lookahead: int = 0
    """The most drafts of the device that a decoding row computes along: see Forward.lookahead."""
    widths: tuple[int, ...] = ()
    """Lookaheads that the device has prepared; (): all up to that."""
    drafters: tuple[str, ...] = ()
    """Who drafts: methods, the first asked first."""
    hosted: tuple[bool, ...] = ()
    """Of each of these: is it on the host? (): none is. The others are Runner.drafters, in order."""
    masks_ahead: bool = False
    """The device takes masks behind drafts: sequences with a grammar have drafts too."""
    loose: bool = False
    """The device takes Forward.loose: with drafts, too, steps are planned while others are in flight."""
    adjusts_ahead: bool = True
    """It can adjust logits by drafts: sequences with penalties or bad words of several tokens have drafts too."""
    reads: tuple[int, ...] = ()
    """Of the drafters on the device, what each reads: see Runner.reads. (): nobody can be spared."""
    forecasts: bool = False
    """Who waits is admitted only if all will fit once they have grown: see forecast.py. Else if there are blocks for its prompt."""
    park_kv_s: float = 5.0
    """A request that is parked for so long (seconds) gives its slots and blocks up."""


class Board:
    """One scheduler's state. Parts read and write it; nobody else does."""

    def __init__(self, settings: SchedulerSettings, policy: SchedulePolicy, clock: Clock) -> None:
        self.settings = settings
        self.policy = policy
        self.clock = clock
        self.block = settings.block_size
        self.caching = settings.enable_prefix_caching
        self.longest = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        # --- running
        self.slots = Slots(settings.max_num_seqs, self.longest, settings.block_size)
        self.rows: Rows | None = None
        """The decoding cohort; None when it must be gathered anew."""
        self.prefilling: list[int] = []
        """Slots in PREFILL, first admitted first."""
        self.forking: dict[int, int] = {}
        """Slot of a choice that has no blocks yet -> slot whose prompt blocks it will share."""
        self.leaving: list[int] = []
        """Slots in LEAVING or ENDED."""
        # --- waiting
        self.requests: dict[int, Request] = {}
        self.live: dict[int, Sequence] = {}
        """Every sequence that has not ended, by seq."""
        self.groups: dict[int, Group] = {}
        """Of beams, by key."""
        self.held: set[int] = set()
        """Sequences whose blocks were not released yet, ended ones included."""
        self.waiting = WaitingRoom(policy)
        self.blocked = False
        """The first in line did not fit; nothing has been released since."""
        self.forecast = Forecast() if settings.forecasts else None
        self.uncached = 1.0
        """Share of the last admitted prompts that had to be computed: how many look-ups are worth a try."""
        self.prefill_turn = False
        """A prompt that must be computed whole did not fit beside the decodes: it goes first."""
        # --- for the next KvStep, the next Forward, the next StepTokens
        self.releases: list[tuple[int, int, int]] = []
        self.commits: list[Commit] = []
        self.carried: list[Blocks] = []
        self.preempted: list[int] = []
        self.failures: list[tuple[Sequence, str]] = []
        self.closed: list[tuple[int, int]] = []
        """Sequences with a grammar that are over, for GrammarClose: seq, incarnation."""
        self.anew: list[Group] = []
        """Searches with a grammar that begin anew: their places in it do too."""
        self.given_up: dict[tuple[int, int], str] = {}
        """Living ones whose grammar is too much, by the same: why."""
        # --- steps
        self.step = 0
        self.done_step = 0
        self.flights: deque[Flight] = deque()
        self.plan_queued = False
        self.again = False
        """Something happened while planning that makes another try worthwhile."""
        self.draining = False
        self.drained = False
        self.lost = False
        self.pace = None if settings.itl_target_ns is None else Pace(settings.itl_target_ns, settings.prefill_knee)
        self.paced = None if self.pace is None else PaceStats()
        """What the pace chose last."""
        # --- drafts
        self.drafting: Drafting | None = None
        self.wishes = 0
        """Living sequences that want drafts always or never."""
        # --- counters
        self.parked_live = 0
        self.parks: dict[int, int] = {}
        """Requests that are parked and may hold slots: until when, in ns of the clock; the longest parked first."""
        self.obeying = 0
        """Living sequences with a grammar."""
        self.preemptions = 0
        self.prompt_computed = 0
        self.prompt_cached = 0
        self.kv = (0, 0, settings.num_blocks, 0, 0, 0)
        """used, cached, total blocks; prefix queries, hits; quarantined: from the last grant."""
        self.stale = 0
        """Messages of another epoch or out of order, dropped."""
        self.ones: I32 = np.ones(settings.max_num_seqs, np.int32)
        self.ones.flags.writeable = False
        self.range: I32 = np.arange(settings.max_num_seqs, dtype=np.int32)
        self.range.flags.writeable = False
        self.places: Index = np.arange(settings.max_num_seqs * (1 + settings.lookahead))
        """The same and more of them, to index with."""
        self.steps: I32 = np.arange(settings.max_num_seqs * (1 + settings.lookahead), dtype=np.int32)

    def wake(self) -> Iterable[Out]:
        """Plan once all queued messages were handled."""
        if not self.plan_queued and not self.lost:
            self.plan_queued = True
            return (Plan(),)
        return ()

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, what should make more of them: living sequences that are not parked, steps in flight)."""
        return self.done_step, len(self.live) - self.parked_live + len(self.flights)

    def leftovers(self) -> dict[str, int]:
        """What an idle scheduler still holds: must be empty (for tests and post-mortems)."""
        counts = {
            "live": len(self.live),
            "held": len(self.held),
            "requests": len(self.requests),
            "waiting": len(self.waiting),
            "slots": self.slots.count - len(self.slots.free),
            "prefilling": len(self.prefilling),
            "forking": len(self.forking),
            "leaving": len(self.leaving),
            "releases": len(self.releases),
            "carried": len(self.carried),
            "flights": len(self.flights),
            "parked": self.parked_live,
            "parks": len(self.parks),
            "obeying": self.obeying,
            "wishes": self.wishes,
            "groups": len(self.groups),
        }
        return {name: count for name, count in counts.items() if count}

    def stats(self, batch_tokens: int) -> EngineStats:
        used, cached, total, queries, hits, quarantined = self.kv
        waiting = self.waiting.sequences
        return EngineStats(
            running=len(self.live) - waiting,
            waiting=waiting,
            parked=self.parked_live,
            blocks_used=used,
            blocks_cached=cached,
            blocks_total=total,
            steps=self.done_step,
            preemptions=self.preemptions,
            prefix_queries=queries,
            prefix_hits=hits,
            prompt_computed=self.prompt_computed,
            prompt_cached=self.prompt_cached,
            batch_tokens=batch_tokens,
            quarantined=quarantined,
            speculation=None if self.drafting is None else self.drafting.stats(),
            pace=self.paced,
        )

    def report(self, rows: list[tuple[int, int, int, int]], errors: list[str] | None = None, **columns: Any) -> StepTokens:
        """Ends that no step brought: (seq, incarnation, offset, reason). `columns`: more of StepTokens."""
        return StepTokens(
            engine=self.settings.engine,
            epoch=self.settings.epoch,
            step=self.done_step,
            seqs=i64([r[0] for r in rows]),
            incarnations=i32([r[1] for r in rows]),
            offsets=i32([r[2] for r in rows]),
            tokens=i32([-1] * len(rows)),
            reasons=u8([r[3] for r in rows]),
            stats=self.stats(0),
            preempted_seqs=self.take_preempted(),
            errors=errors or [],
            **columns,
        )

    def take_preempted(self) -> Column:
        if not self.preempted:
            return EMPTY_I64
        preempted, self.preempted = self.preempted, []
        return i64(preempted)

    def received(self, sequence: Sequence) -> int:
        """How many outputs were given to text."""
        if sequence.slot >= 0:
            return int(self.slots.known[sequence.slot] - self.slots.prompt[sequence.slot])
        return int(sequence.outputs.size)

    def slot_of(self, seq: int) -> int:
        sequence = self.live.get(seq)
        return -1 if sequence is None else sequence.slot
