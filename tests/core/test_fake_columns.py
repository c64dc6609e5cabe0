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
from penstock.core.protocol.columns import EMPTY_I32, i32, u8
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ProtocolError, UnsupportedFeature
from penstock.core.protocol.messages import POOL_FIRST, POOL_LAST, POOL_MEAN, Control, Forward, Move, Sample, SlotSampling, StepDone
from penstock.core.protocol.sampling import SamplingParams

SLOTS, BLOCK, VOCAB, EACH = 4, 4, 41, 16
GREEDY = SamplingParams(temperature=0)
WORDS = -(-VOCAB // 32)


def load(**declared: Any) -> FakeRunner:
    config = msgspec.structs.replace(runner_config(build({"max_num_seqs": SLOTS})), block_size=BLOCK)
    options = FakeOptions(vocab_size=VOCAB, max_model_len=EACH * BLOCK, num_blocks=SLOTS * EACH, **{"lookahead": 4, **declared})
    return FakeDevice(options).load(config, lambda *_: None)


def mask_of(allowed: list[set[int]]) -> Any:
    words = np.zeros((len(allowed), WORDS), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            words[row, token // 32] |= np.uint32(1 << token % 32)
    return words.reshape(-1).view(np.int32)


class World:
    """Slots whose blocks are their own. `forward(...)`, then `sample(...)`; keyword columns may be lists."""

    def __init__(self, **declared: Any) -> None:
        self.runner = load(**declared)
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
        more = data.draw(st.sampled_from([0, 1, 4]))
        done = world.sample(draws, fresh, lookahead=lookahead, drafts=more)
        tokens_left = done.tokens.tolist()
        counts = done.counts.tolist() or [1] * len(rows)
        assert (done.drafts.size, done.drafters.size) == (more * len(rows), len(rows) if more else 0)
        proposed = done.drafts.reshape(len(rows), -1).tolist() if more else [[] for _ in rows]
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
        world.prompt([1, 2, 3], drafts=2)
        world.forward([row], num_decode=1, lookahead=lookahead)
        return world.sample([(0, 0, position)], lookahead=lookahead)

    if not what:
        assert 1 <= run().counts[0] <= 3
        return
    with pytest.raises(FakeViolation, match=what):
        run()


def test_loose_rows_begin_where_their_histories_end() -> None:
    def second(start: int, count: int, position: int, **more: Any) -> StepDone:
        world = World(drafts=("right",))
        world.prompt([1, 2, 3], drafts=2)
        world.forward([(0, 3, 3)], num_decode=1, lookahead=2)
        assert world.sample([(0, 0, 4)], lookahead=2, drafts=2).counts.tolist() == [3]
        world.forward([(0, start, count)], **{"num_decode": 1, "lookahead": count - 1, "loose": u8([1])} | more)
        return world.sample([(0, 0, position)], lookahead=count - 1)

    exact = second(6, 3, 7, loose=u8([0]))
    for start, count in ((6, 3), (9, 3), (9, 5)):
        done = second(start, count, start + 1)
        assert done.tokens[:3].tolist() == exact.tokens.tolist()
        assert 3 <= done.counts[0] <= count
    with pytest.raises(FakeViolation, match="further than it can"):
        second(5, 3, 6)
    with pytest.raises(FakeViolation, match="draws further than it can"):
        second(9, 3, 6)
    with pytest.raises(FakeViolation, match="a prompt is loose"):
        second(9, 3, 10, num_decode=0)
    with pytest.raises(FakeViolation, match="loose that may not be"):
        second(9, 3, 10, loose=u8([1, 1]))


def test_drafters_are_asked_in_order_and_only_those_that_are_on() -> None:
    def drafts_of(kinds: tuple[str, ...], bits: int) -> tuple[list[int], list[int]]:
        world = World(drafts=kinds)
        world.forward([(0, 0, 2)], place_slots=[0], place_counts=[2], place_tokens=[5, 6])
        done = world.sample([(0, 0, 2)], [0], drafts=2, drafters=bits)
        return done.drafts.tolist(), done.drafters.tolist()

    right, wrong = drafts_of(("right",), 1), drafts_of(("wrong",), 1)
    assert right != wrong
    assert drafts_of(("none", "right"), -1) == (right[0], [1])
    assert drafts_of(("wrong", "right"), -1) == wrong
    assert drafts_of(("wrong", "right"), 0b10) == (right[0], [1])
    assert drafts_of(("wrong", "right"), 0b100)[0] == [-1, -1]


def test_a_draw_without_drafts_leaves_none() -> None:
    world = World()
    world.prompt([1, 2, 3], drafts=2)
    world.forward([(0, 3, 3)], num_decode=1, lookahead=2)
    many = int(world.sample([(0, 0, 4)], lookahead=2).counts[0])
    with pytest.raises(FakeViolation, match="not known"):
        world.forward([(0, 3 + many, 2)], num_decode=1, lookahead=2)


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
        (forward, {"loose": u8([1])}, r"Forward\.loose"),
        (sample, {"mask_rows": i32([-1])}, r"Sample\.mask_rows"),
        (sample, {"lookahead": 1}, r"Sample\.lookahead"),
        (sample, {"drafts": 1}, r"Sample\.drafts"),
        (forward, {"block_groups": u8([0])}, r"Forward\.block_groups"),
        (forward, {"copy_groups": u8([0])}, r"Forward\.copy_groups"),
        (forward, {"place_adapters": i32([0])}, r"Forward\.place_adapters"),
        (forward, {"embed_slots": i32([0])}, r"Forward\.embed_slots"),
        (sample, {"pool_rows": i32([0])}, r"Sample\.pool_rows"),
    ):
        with pytest.raises(UnsupportedFeature, match=name):
            refuse_columns(msgspec.structs.replace(work, **change))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"write_slots": i32([0]), "write_positions": i32([1])}, "write columns differ"),
        ({"clone_src": i32([0]), "clone_dst": i32([1])}, "clone columns differ"),
        ({"embed_slots": i32([0]), "embed_starts": i32([1])}, "embed columns differ"),
        ({"block_groups": u8([0])}, "block_groups is not as long"),
        ({"copy_groups": u8([0])}, "copy_groups is not as long"),
        ({"place_adapters": i32([0])}, "place_adapters is not as long"),
        ({"mask_rows": i32([0, 0]), "mask": i32([0, 0])}, "mask_rows is not as long as rows"),
        ({"pool_rows": i32([0])}, "pool columns differ"),
    ],
)
def test_columns_that_do_not_fit_stop_before_the_device(columns: dict[str, Any], said: str) -> None:
    one = i32([0])
    if "mask" in columns or "pool_rows" in columns:
        actor: Any = Sampler(engine=0, epoch=1)
        work: Any = Sample(engine=0, epoch=1, step=1, rows=one, slots=one, positions=one, **columns)
    else:
        actor = Executor(engine=0, epoch=1)
        work = Forward(engine=0, epoch=1, step=1, slots=one, starts=one, counts=one, num_decode=0, **columns)
    with pytest.raises(ProtocolError, match=said):
        list(actor.handle(work))


TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@given(TOKENS, st.data())
@settings(max_examples=60, deadline=None)
def test_embeddings_stand_for_tokens_in_whatever_parts_they_come(tokens: list[int], data: Any) -> None:
    start = data.draw(st.integers(0, len(tokens) - 1))
    count = data.draw(st.integers(1, len(tokens) - start))
    row = data.draw(st.integers(0, 5))
    cut = data.draw(st.integers(0, start))
    spans = {"embed_slots": [1], "embed_starts": [start], "embed_counts": [count], "embed_rows": [row]}
    placed = {"place_slots": [1], "place_counts": [len(tokens)], "place_tokens": tokens}

    def whole(tokens: list[int]) -> list[int]:
        world = World(embeddings=64)
        world.forward([(1, 0, len(tokens))], **{**placed, "place_tokens": tokens}, **spans)
        return [int(world.sample([(0, 1, len(tokens))], [1]).tokens[0]), int(world.runner._digest[1, len(tokens) - 1])]

    want = whole(tokens)
    assert want == whole([0 if start <= n < start + count else token for n, token in enumerate(tokens)]), "the tokens there play no part"
    assert want[1] != int(load_digest(tokens)), "but the rows do"
    world = World(embeddings=64)
    if cut:  # the embeddings come with the part of the prompt that they belong to
        world.forward([(1, 0, cut)], **placed)
        world.sample([], [1])
        world.forward([(1, cut, len(tokens) - cut)], **spans)
    else:
        middle = count // 2
        halves = {"embed_slots": [1, 1], "embed_starts": [start, start + middle], "embed_counts": [middle, count - middle]}
        halves |= {"embed_rows": [row, row + middle]}
        if not middle:
            halves = {name: column[1:] for name, column in halves.items()}
        world.forward([(1, 0, len(tokens))], **placed, **halves)
    assert int(world.sample([(0, 1, len(tokens))], [1]).tokens[0]) == want[0]


def load_digest(tokens: list[int]) -> Any:
    world = World()
    world.prompt(tokens, 1)
    return world.runner._digest[1, len(tokens) - 1]


@given(TOKENS, st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS))
@settings(max_examples=40, deadline=None)
def test_an_adapter_changes_what_its_sequence_says_and_a_clone_keeps_it(tokens: list[int], adapters: list[int]) -> None:
    world = World(adapters=3)
    size = len(tokens)
    rows = [(slot, 0, size) for slot in range(SLOTS)]
    placed = {"place_slots": list(range(SLOTS)), "place_counts": [size] * SLOTS, "place_tokens": tokens * SLOTS}
    world.forward(rows, **placed, place_adapters=adapters)
    draws = [(n, n, size) for n in range(SLOTS)]
    said = world.sample(draws, list(range(SLOTS))).tokens.tolist()
    digests = world.runner._digest[:, size - 1].tolist()
    for slot, adapter in enumerate(adapters):
        assert (digests[slot] == digests[0]) is (adapter == adapters[0])
        if adapter == 0:
            assert said[slot] == alone(tokens)
    world.forward([(1, 0, size)], clone_src=[0], clone_dst=[1], clone_lens=[size])
    assert int(world.sample([(0, 1, size)], [1]).tokens[0]) == said[0]
    world.forward([(0, 0, size)], place_slots=[0], place_counts=[size], place_tokens=tokens)
    assert int(world.sample([(0, 0, size)], [0]).tokens[0]) == alone(tokens), "the next sequence in that slot has none"


@given(TOKENS, st.data())
@settings(max_examples=40, deadline=None)
def test_a_pooled_vector_comes_once_whatever_the_parts(tokens: list[int], data: Any) -> None:
    kinds = u8([POOL_LAST, POOL_FIRST, POOL_MEAN])
    slots, rows = [0, 1, 2], i32([0, 1, 2])
    placed = {"place_slots": slots, "place_counts": [len(tokens)] * 3, "place_tokens": tokens * 3}
    declared = {"pool_kinds": tuple(kinds.tolist())}
    world = World(**declared)
    world.forward([(slot, 0, len(tokens)) for slot in slots], **placed)
    done = world.sample([], pool_rows=rows, pool_kinds=kinds)
    hidden = world.runner.facts.hidden_size
    assert (done.pooled_counts.tolist(), len(done.pooled), done.pooled.dtype) == ([hidden] * 3, 3 * hidden, np.float32)
    last, first, mean = done.pooled.reshape(3, hidden)
    each = [pooled(tokens[: n + 1], POOL_LAST) for n in range(len(tokens))]
    assert last.tolist() == each[-1]
    assert first.tolist() == each[0]
    assert mean == pytest.approx(np.mean(each, axis=0), abs=1e-6)

    cut = data.draw(st.integers(0, len(tokens) - 1))
    if not cut:
        return
    world = World(**declared)
    world.forward([(slot, 0, cut) for slot in slots], **placed)
    part = world.sample([], pool_rows=rows, pool_kinds=kinds)
    assert (part.pooled_counts.tolist(), len(part.pooled)) == ([0] * 3, 0)
    world.forward([(slot, cut, len(tokens) - cut) for slot in slots])
    assert world.sample([], pool_rows=rows, pool_kinds=kinds).pooled.tolist() == done.pooled.tolist()


def pooled(tokens: list[int], kind: int) -> list[float]:
    world = World(pool_kinds=(kind,))
    world.forward([(0, 0, len(tokens))], place_slots=[0], place_counts=[len(tokens)], place_tokens=tokens)
    said: list[float] = world.sample([], pool_rows=i32([0]), pool_kinds=u8([kind])).pooled.tolist()
    return said


def test_a_step_without_the_new_columns_says_nothing_new() -> None:
    world = World(adapters=1, embeddings=1, pool_kinds=(0,))
    world.forward([(0, 0, 1)], place_slots=[0], place_counts=[1], place_tokens=[5])
    done = world.sample([(0, 0, 1)], [0])
    assert int(done.tokens[0]) == alone([5])
    assert done.pooled_counts is EMPTY_I32


PLACED = {"place_slots": [0], "place_counts": [2], "place_tokens": [1, 2]}


@pytest.mark.parametrize(
    ("declared", "columns", "what"),
    [
        ({}, {"block_groups": u8([1] * EACH)}, "beyond the 1 there are"),
        ({}, {"block_groups": u8([0])}, "not as long as its blocks"),
        ({}, {"block_groups": u8([0] * EACH)}, ""),
        ({}, {"copy_src": [5], "copy_dst": [6], "copy_groups": u8([1])}, "beyond the 1 there are"),
        ({}, {"copy_src": [5], "copy_dst": [6], "copy_groups": u8([0, 0])}, "not as long as its blocks"),
        ({}, {"copy_src": [5], "copy_dst": [6], "copy_groups": u8([0])}, ""),
        ({}, {"place_adapters": [0]}, ""),
        ({}, {"place_adapters": [1]}, "beyond the 0 that are resident"),
        ({"adapters": 2}, {"place_adapters": [3]}, "beyond the 2 that are resident"),
        ({"adapters": 2}, {"place_adapters": [-1]}, "beyond the 2 that are resident"),
        ({"adapters": 2}, {"place_adapters": [1, 1]}, "not as long as place_slots"),
        ({}, {"embed_slots": [0], "embed_starts": [0], "embed_counts": [1], "embed_rows": [0]}, "beyond the 0 that are held"),
        (
            {"embeddings": 2},
            {"embed_slots": [0], "embed_starts": [0], "embed_counts": [2], "embed_rows": [1]},
            "beyond the 2 that are held",
        ),
        ({"embeddings": 2}, {"embed_slots": [0], "embed_starts": [1], "embed_counts": [2], "embed_rows": [0]}, "outside its history"),
        ({"embeddings": 2}, {"embed_slots": [0], "embed_starts": [0], "embed_counts": [0], "embed_rows": [0]}, "outside its history"),
        ({"embeddings": 2}, {"embed_slots": [0], "embed_starts": [0], "embed_counts": [1], "embed_rows": []}, "embed columns differ"),
    ],
)
def test_what_a_device_does_not_declare_is_seen(declared: dict[str, Any], columns: dict[str, Any], what: str) -> None:
    world = World(**declared)
    if not what:
        world.forward([(0, 0, 2)], **PLACED, **columns)
        return
    with pytest.raises(FakeViolation, match=what):
        world.forward([(0, 0, 2)], **PLACED, **columns)


def test_an_embedding_behind_what_was_computed_is_seen() -> None:
    world = World(embeddings=4)
    world.forward([(0, 0, 1)], **PLACED)
    world.sample([], [0])
    with pytest.raises(FakeViolation, match="slot 0 reads foreign or missing KV at position 0"):
        world.forward([(0, 1, 1)], embed_slots=[0], embed_starts=[0], embed_counts=[1], embed_rows=[0])


@pytest.mark.parametrize(
    ("rows", "kinds", "what"),
    [
        ([0], [POOL_MEAN], "beyond"),
        ([1], [POOL_LAST], "was not computed"),
        ([0], [], "differ in length"),
    ],
)
def test_impossible_pooling_is_seen(rows: list[int], kinds: list[int], what: str) -> None:
    world = World(pool_kinds=(POOL_LAST,))
    world.forward([(0, 0, 2)], **PLACED)
    with pytest.raises(FakeViolation, match=what):
        world.sample([], pool_rows=i32(rows), pool_kinds=u8(kinds))
