"""The optional columns of Forward and Sample against the fake device: a model keeps each slot's history, and says every token by computing it alone."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.executor import Executor
from penstock.core.actors.sampler import Sampler
from penstock.core.contract.devices import refuse_columns
from penstock.core.contract.fake_device import FakeDevice, FakeOptions, FakeRunner, FakeViolation
from penstock.core.processes.engine import runner_config
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ProtocolError, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, Move, Sample, SlotSampling, StepDone
from penstock.core.protocol.sampling import SamplingParams

SLOTS, BLOCK, VOCAB, EACH = 4, 4, 41, 16
GREEDY = SamplingParams(temperature=0)
WORDS = -(-VOCAB // 32)


def load() -> FakeRunner:
    config = msgspec.structs.replace(runner_config(build({"max_num_seqs": SLOTS})), block_size=BLOCK)
    options = FakeOptions(vocab_size=VOCAB, max_model_len=EACH * BLOCK, num_blocks=SLOTS * EACH)
    return FakeDevice(options).load(config, lambda *_: None)


def mask_of(allowed: list[set[int]]) -> Any:
    words = np.zeros((len(allowed), WORDS), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            words[row, token // 32] |= np.uint32(1 << token % 32)
    return words.reshape(-1).view(np.int32)


class World:
    """Slots whose blocks are their own. `forward(...)`, then `sample(...)`; keyword columns may be lists."""

    def __init__(self) -> None:
        self.runner = load()
        self.step = 0
        self._first = {slot: slot * EACH for slot in range(SLOTS)}
        self._swapped: set[int] = set()

    def swap(self, a: int, b: int) -> None:
        """Exchange the blocks of two slots by way of the host; the next Forward says so to their tables."""
        here = {"engine": 0, "epoch": 1, "owner": "t", "id": 1}
        self.runner.control(Control(**here, name="host_pages", data=str(2 * EACH).encode()))
        blocks = i32([self._first[slot] + n for slot in (a, b) for n in range(EACH)])
        pages = i32(range(2 * EACH))
        self.runner.move(Move(**here, blocks=blocks, pages=pages[::-1].copy(), out=True))()
        self._first[a], self._first[b] = self._first[b], self._first[a]
        blocks = i32([self._first[slot] + n for slot in (a, b) for n in range(EACH)])
        self.runner.move(Move(**here, blocks=blocks, pages=pages[::-1].copy(), out=False))()
        self._swapped |= {a, b}

    def forward(self, rows: list[tuple[int, int, int]], **columns: Any) -> None:
        """(slot, start, count), decode rows first; each slot that is placed, cloned or swapped gets its blocks."""
        self.step += 1
        fresh = sorted({*columns.get("place_slots", []), *columns.get("clone_dst", []), *self._swapped})
        self._swapped.clear()
        columns.setdefault("num_decode", 0)
        columns |= {
            "block_slots": [slot for slot in fresh for _ in range(EACH)],
            "block_index": list(range(EACH)) * len(fresh),
            "block_ids": [self._first[slot] + n for slot in fresh for n in range(EACH)],
        }
        given = {name: i32(value) if isinstance(value, list) else value for name, value in columns.items()}
        slots, starts, counts = (i32([row[k] for row in rows]) for k in range(3))
        self.runner.forward(Forward(engine=0, epoch=1, step=self.step, slots=slots, starts=starts, counts=counts, **given))

    def sample(self, draws: list[tuple[int, int, int]], fresh: list[int] | None = None, **columns: Any) -> StepDone:
        """(row, slot, position); `fresh` slots get a sampling state."""
        states = [SlotSampling(slot=slot, choice=0, prompt_len=1, params=GREEDY) for slot in fresh or []]
        rows, slots, positions = (i32([draw[k] for draw in draws]) for k in range(3))
        work = Sample(engine=0, epoch=1, step=self.step, rows=rows, slots=slots, positions=positions, places=states, **columns)
        return self.runner.sample(work)()

    def prompt(self, tokens: list[int], slot: int = 0, **columns: Any) -> int:
        """A step of its own for one placed slot; the token."""
        self.forward([(slot, 0, len(tokens))], place_slots=[slot], place_counts=[len(tokens)], place_tokens=tokens)
        return int(self.sample([(0, slot, len(tokens))], [slot], **columns).tokens[0])


def alone(history: list[int]) -> int:
    return World().prompt(history)


class Model:
    """What each slot holds: its tokens, how many of them were computed, and the drafts behind."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.drafts: dict[int, list[int]] = {}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_histories_are_what_the_columns_make_of_them(data: Any) -> None:
    world, model = World(), Model()
    token = st.integers(0, VOCAB - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        if len(model.tokens) == SLOTS and data.draw(st.booleans()):
            world.swap(*data.draw(st.permutations(range(SLOTS)))[:2])
        columns: dict[str, Any] = {
            name: [] for name in ("place_slots", "place_counts", "place_tokens", "clone_src", "clone_dst", "clone_lens")
        }
        columns |= {"write_slots": [], "write_positions": [], "write_tokens": []}
        free = list(range(SLOTS))
        for slot in data.draw(st.lists(st.sampled_from(free), unique=True)):
            if slot not in model.tokens or data.draw(st.booleans()):
                new = data.draw(st.lists(token, min_size=1, max_size=6))
                columns["place_slots"].append(slot)
                columns["place_counts"].append(len(new))
                columns["place_tokens"] += new
                model.tokens[slot], model.computed[slot], model.drafts[slot] = new, 0, []
        before = {slot: list(tokens) for slot, tokens in model.tokens.items()}
        targets = [s for s in free if s not in columns["place_slots"]]
        for slot in data.draw(st.lists(st.sampled_from(targets), unique=True, max_size=2)) if before and targets else []:
            source = data.draw(st.sampled_from(sorted(before)))
            count = data.draw(st.integers(1, len(before[source])))
            columns["clone_src"].append(source)
            columns["clone_dst"].append(slot)
            columns["clone_lens"].append(count)
            model.tokens[slot], model.computed[slot], model.drafts[slot] = before[source][:count], 0, []
        host: dict[int, list[int]] = {}
        for slot in sorted(model.tokens):
            kind = data.draw(st.sampled_from(["", "", "replace", "draft"]))
            mine = model.tokens[slot]
            if not kind or len(mine) > 30:
                continue
            at = len(mine) if kind == "draft" else data.draw(st.integers(1, len(mine)))
            new = data.draw(st.lists(token, min_size=1, max_size=3))
            if kind == "draft" and data.draw(st.booleans()):
                new[0] = alone(mine)
            columns["write_slots"] += [slot] * len(new)
            columns["write_positions"] += range(at, at + len(new))
            columns["write_tokens"] += new
            if kind == "draft":
                host[slot] = new
            else:
                model.tokens[slot] = mine[:at] + new
                model.computed[slot] = min(model.computed[slot], at)
            model.drafts[slot] = []
        lookahead = max(3 if host else 0, data.draw(st.sampled_from([0, 2, 4])))
        decode: list[tuple[int, int, int, list[int]]] = []
        other: list[tuple[int, int, int, list[int]]] = []
        for slot, tokens in model.tokens.items():
            start, drafts = model.computed[slot], host.get(slot) or model.drafts[slot][: lookahead and data.draw(st.integers(0, lookahead))]
            if start == len(tokens):  # a draw that was not computed is always left: this one was cloned or written back
                start -= 1
            if start == len(tokens) - 1 and lookahead:
                decode.append((slot, start, 1 + len(drafts), drafts))
            elif slot in host:
                other.append((slot, start, len(tokens) - start + len(drafts), drafts))
            else:
                other.append((slot, start, len(tokens) - start, []))
        rows = [*decode, *other]
        if not rows:
            return
        world.forward([row[:3] for row in rows], num_decode=len(decode), lookahead=lookahead, **columns)
        fresh = sorted(model.tokens)
        draws = [(i, slot, len(model.tokens[slot])) for i, (slot, *_) in enumerate(rows)]
        done = world.sample(draws, fresh, lookahead=lookahead)
        tokens_left = done.tokens.tolist()
        counts = done.counts.tolist() or [1] * len(rows)
        proposed = done.drafts.reshape(len(rows), -1).tolist() if lookahead else [[] for _ in rows]
        for (slot, start, count, drafts), many, mine in zip(rows, counts, proposed, strict=True):
            for n in range(many):
                drawn = tokens_left.pop(0)
                assert drawn == alone(model.tokens[slot])
                model.tokens[slot] = [*model.tokens[slot], drawn]
                right = n < len(drafts) and drafts[n] == drawn
                assert (n == many - 1) is not right, "it goes on while drafts are right, and no further"
            model.computed[slot] = len(model.tokens[slot]) - 1
            model.drafts[slot] = [draft for draft in mine if draft >= 0]
            assert start + count >= model.computed[slot]
        assert tokens_left == []


@given(st.lists(st.sets(st.integers(0, VOCAB - 1), min_size=1), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mask_leaves_only_what_it_allows(allowed: list[set[int]], data: Any) -> None:
    world = World()
    prompts = [[1, n] for n in range(SLOTS)]
    chosen = [data.draw(st.integers(-1, len(allowed) - 1)) for _ in prompts]
    world.forward(
        [(slot, 0, 2) for slot in range(SLOTS)],
        place_slots=list(range(SLOTS)),
        place_counts=[2] * SLOTS,
        place_tokens=[token for tokens in prompts for token in tokens],
    )
    done = world.sample([(n, n, 2) for n in range(SLOTS)], list(range(SLOTS)), mask=mask_of(allowed), mask_rows=i32(chosen))
    assert done.bad_rows.size == 0
    for prompt, row, token in zip(prompts, chosen, done.tokens.tolist(), strict=True):
        free = alone(prompt)
        assert token in allowed[row] if row >= 0 and free not in allowed[row] else token == free


def test_a_mask_that_allows_nothing_spoils_its_row_alone() -> None:
    world = World()
    world.forward([(0, 0, 1), (1, 0, 1)], place_slots=[0, 1], place_counts=[1, 1], place_tokens=[5, 6])
    done = world.sample([(0, 0, 1), (1, 1, 1)], [0, 1], mask=mask_of([set()]), mask_rows=i32([-1, 0]))
    assert done.bad_rows.tolist() == [1]
    assert done.tokens[0] == alone([5])


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"write_slots": [0], "write_positions": [6], "write_tokens": [1]}, "leaves a gap or goes back"),
        ({"write_slots": [0, 0], "write_positions": [4, 3], "write_tokens": [1, 1]}, "leaves a gap or goes back"),
        ({"write_slots": [0], "write_positions": [0], "write_tokens": [1]}, "leaves a gap or goes back"),
        ({"write_slots": [0], "write_positions": [4], "write_tokens": [VOCAB]}, "outside the vocabulary"),
        ({"write_slots": [0], "write_positions": [4], "write_tokens": []}, "write columns differ"),
        ({"clone_src": [0], "clone_dst": [1], "clone_lens": [9]}, "more than its source has"),
        ({"clone_src": [0, 0], "clone_dst": [1, 1], "clone_lens": [2, 2]}, "two clones go into one slot"),
        ({"clone_src": [0], "clone_dst": [1], "clone_lens": []}, "clone columns differ"),
    ],
)
def test_impossible_clones_and_writes_are_seen(columns: dict[str, Any], what: str) -> None:
    world = World()
    world.prompt([1, 2, 3])
    with pytest.raises(FakeViolation, match=what):
        world.forward([], **columns)


@pytest.mark.parametrize("change", [False, True])
def test_a_clones_table_comes_along_and_what_it_then_writes_into_its_sources_blocks_is_seen(change: bool) -> None:
    world = World()
    world.prompt([1, 2, 3])
    columns: dict[str, Any] = {"clone_src": i32([0]), "clone_dst": i32([1]), "clone_lens": i32([3])}
    if change:
        columns |= {"write_slots": i32([1]), "write_positions": i32([2]), "write_tokens": i32([9])}
    rows = {"slots": i32([0, 1]), "starts": i32([3, 2]), "counts": i32([1, 1])}
    work = Forward(engine=0, epoch=1, step=2, num_decode=0, **rows, **columns)
    if not change:
        world.runner.forward(work)
        return
    with pytest.raises(FakeViolation, match="slot 0 reads foreign or missing KV at position 2"):
        world.runner.forward(work)


@pytest.mark.parametrize(
    ("row", "position", "lookahead", "what"),
    [
        ((0, 3, 3), 4, 2, ""),
        ((0, 3, 4), 4, 2, "not known"),
        ((0, 3, 3), 4, 1, "too many positions"),
        ((0, 3, 3), 5, 2, "a draft was taken for a token"),
        ((0, 3, 3), 3, 2, "more than the lookahead|drawn again"),
        ((0, 3, 2), 6, 2, "more than the lookahead allows"),
        ((0, 3, 2), 4, 0, "not known"),
    ],
)
def test_drafts_are_verified_or_seen(row: tuple[int, int, int], position: int, lookahead: int, what: str) -> None:
    def run() -> StepDone:
        world = World()
        world.prompt([1, 2, 3], lookahead=2)
        world.forward([row], num_decode=1, lookahead=lookahead)
        return world.sample([(0, 0, position)], lookahead=lookahead)

    if not what:
        assert 1 <= run().counts[0] <= 3
        return
    with pytest.raises(FakeViolation, match=what):
        run()


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"mask": mask_of([{1}])}, "wrong size"),
        ({"mask": mask_of([{1}])[:1], "mask_rows": i32([0])}, "wrong size"),
        ({"mask": mask_of([{1}]), "mask_rows": i32([1])}, "does not have"),
    ],
)
def test_impossible_masks_are_seen(columns: dict[str, Any], what: str) -> None:
    with pytest.raises(FakeViolation, match=what):
        World().prompt([1], **columns)


def test_a_runner_without_optional_columns_refuses_them_by_name() -> None:
    none = i32([])
    forward = Forward(engine=0, epoch=1, step=1, slots=none, starts=none, counts=none, num_decode=0)
    sample = Sample(engine=0, epoch=1, step=1, rows=none, slots=none, positions=none)
    refuse_columns(forward)
    refuse_columns(sample)
    for work, change, name in (
        (forward, {"write_slots": i32([0])}, r"Forward\.write_slots"),
        (forward, {"clone_src": i32([0])}, r"Forward\.clone_src"),
        (forward, {"lookahead": 1}, r"Forward\.lookahead"),
        (sample, {"mask_rows": i32([-1])}, r"Sample\.mask_rows"),
        (sample, {"lookahead": 1}, r"Sample\.lookahead"),
    ):
        with pytest.raises(UnsupportedFeature, match=name):
            refuse_columns(msgspec.structs.replace(work, **change))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"write_slots": i32([0]), "write_positions": i32([1])}, "write columns differ"),
        ({"clone_src": i32([0]), "clone_dst": i32([1])}, "clone columns differ"),
        ({"mask_rows": i32([0, 0]), "mask": i32([0, 0])}, "mask_rows is not as long as rows"),
    ],
)
def test_columns_that_do_not_fit_stop_before_the_device(columns: dict[str, Any], said: str) -> None:
    one = i32([0])
    if "mask" in columns:
        actor: Any = Sampler(engine=0, epoch=1)
        work: Any = Sample(engine=0, epoch=1, step=1, rows=one, slots=one, positions=one, **columns)
    else:
        actor = Executor(engine=0, epoch=1)
        work = Forward(engine=0, epoch=1, step=1, slots=one, starts=one, counts=one, num_decode=0, **columns)
    with pytest.raises(ProtocolError, match=said):
        list(actor.handle(work))
