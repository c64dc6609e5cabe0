"""Running sequences as columns: what is computed for all alike, for slots side by side or from what was kept must be what is computed one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock.core.actors.scheduler.slots import Rows, Slots
from penstock.core.actors.scheduler.tally import at_least
from penstock.core.protocol.columns import i32

LONGEST = 200


def filled(block: int, count: int = 24, seed: int = 0) -> tuple[Slots, np.random.Generator]:
    """Slots as if sequences of all lengths decoded in them, some near their limits."""
    random = np.random.default_rng(seed)
    slots = Slots(count, LONGEST, block)
    slots.computed[:] = random.integers(1, 100, count)
    slots.length[:] = slots.computed + 1
    slots.limit[:] = slots.length + random.integers(1, 60, count)
    slots.capacity[:] = (slots.computed // block + random.integers(0, 2, count)) * block
    slots.seq[:] = random.integers(1, 1 << 40, count)
    slots.incarnation[:] = random.integers(1, 9, count)
    slots.stop_count[:] = 3
    slots.stops = random.integers(0, 99, (3, count)).astype(np.int32)
    return slots, random


def one_by_one(slots: Slots, rows: Rows, early: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for slot, count in zip(rows.slots.tolist(), rows.counts.tolist(), strict=True):
        end = slots.computed.item(slot) + count
        reach = max(end, min(end + slots.beyond + early, slots.limit.item(slot)))
        if slots.capacity.item(slot) < reach:
            found[slot] = reach
    return found


@pytest.mark.parametrize("block", [8, 12])
@pytest.mark.parametrize("beyond", [0, 4])
@pytest.mark.parametrize("drafts", ["none", "alike", "each"])
@pytest.mark.parametrize("early", [0, 15])
def test_who_needs_blocks_and_how_far(block: int, beyond: int, drafts: str, early: int) -> None:
    for seed, some in enumerate([range(24), range(5, 23), [1, 2, 5, 9, 23]]):
        slots, random = filled(block, seed=seed)
        slots.beyond = beyond
        if seed == 1:
            slots.limit[:] = LONGEST  # nobody comes to a limit
        rows = slots.gather(i32(list(some)), ascending=True)
        assert isinstance(rows.at, slice) == (seed < 2)
        if drafts == "alike":
            slots.widen_alike(rows, 4)
        elif drafts == "each":
            slots.widen(
                rows,
                np.minimum(random.integers(0, 5, rows.slots.size), slots.limit[rows.index] - slots.length[rows.index]).astype(np.int32),
            )
        short, reach = slots.short(rows, early)
        assert dict(zip(short.tolist(), reach.tolist(), strict=True)) == one_by_one(slots, rows, early)
        if not early:
            assert slots.reach(short).tolist() == reach.tolist()
        slots.hold(short, reach)
        assert slots.capacity[short].tolist() == [slots.whole(tokens) for tokens in reach.tolist()]
        assert slots.short(rows, early)[0].size == 0


def test_slots_that_are_not_side_by_side_in_order_are_no_slice() -> None:
    slots, _ = filled(8)
    many = list(range(3, 23))
    assert slots.gather(i32(many), ascending=True).at == slice(3, 23)
    for listed, ascending in (([3, 5, 4, *many[3:]], False), ([1, *many], True), (many[:3], True), ([], True)):
        rows = slots.gather(i32(listed), ascending=ascending)
        assert rows.at is rows.index


def test_rows_that_are_gathered_anew_have_the_drafts_of_the_step_being_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, _ = filled(8)
    rows = slots.gather(i32(range(6)), ascending=True)
    slots.widen_alike(rows, 3)
    again = slots.gather(i32([4, 9, 1]))
    assert (again.ahead.tolist(), again.counts.tolist(), again.tokens, again.most) == ([3, 0, 3], [4, 1, 4], 9, 3)
    slots.widen(rows, i32([0, 1, 2, 0, 3, 0]))
    assert slots.gather(i32([4, 0, 1])).counts.tolist() == [4, 1, 2]
    slots.narrow(rows)
    assert (rows.counts.tolist(), rows.tokens, rows.most) == ([1] * 6, 6, 0)
    assert slots.gather(i32([4])).counts.tolist() == [1]
    slots.widen(rows, i32([0] * 6))
    assert not slots.wide


def test_a_sequence_that_enters_while_a_step_is_planned_has_no_drafts(make_sim: Any) -> None:
    sim = make_sim(lookahead=2, max_num_seqs=4)
    sim.admit([1, 2], max_tokens=30)
    sim.finish(2)
    slots = sim.scheduler._board.slots
    holder = slots.holder[0]
    rows = slots.gather(i32([0]))
    slots.widen_alike(rows, 2)
    slots.leave(0)
    assert slots.enter(holder, i32([1, 2, 3]), 2, 2) == 0
    assert slots.gather(i32([0])).counts.tolist() == [1]


def test_what_tokens_need_of_their_rows() -> None:
    slots, _ = filled(8)
    rows = slots.gather(i32([7, 3, 5]))
    table = rows.table()
    pairs = table.view(np.int32)
    assert rows.table() is table
    assert table[:, 1].tolist() == slots.seq[[7, 3, 5]].tolist()
    assert pairs[:, 5].tolist() == slots.incarnation[[7, 3, 5]].tolist()
    assert pairs[:, 6:].T.tolist() == slots.stops[:2, [7, 3, 5]].tolist()
    assert rows.select(np.array([1])).table()[0, 1] == slots.seq[3]


def test_of_how_many_rows_so_many_drafts_were_right() -> None:
    assert at_least(np.bincount([0, 2, 2, 1]), 4) == [4, 3, 2, 0, 0]
    assert at_least(np.bincount(np.zeros(0, np.int64)), 2) == [0, 0, 0]
