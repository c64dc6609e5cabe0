"""Trees of drafts in Triton: nodes against the reference with poison beside them, the walk from the root, and entries that move."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton as triton_lang
import triton.language as tl
from torch import Tensor

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.attention import coded, moves
from penstock.kernels.attention import triton as kernel
from penstock.kernels.attention.codes import KINDS
from penstock.kernels.attention.lines import lowest, place_of, seen_of
from penstock.kernels.attention.reference import places_of
from penstock.kernels.drafting import reference, triton
from penstock.plugins.attention.pages import Pages
from penstock.plugins.drafters.trees import Tree

SIZE = 16


def i32(device: str, values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def tree_of(rng: random.Random, nodes: int) -> Tree:
    """Node 1 is a leaf."""
    parents = [-1, *(rng.choice([one for one in range(node) if one != 1]) for node in range(1, nodes))]
    return Tree.made(parents, [0] * nodes)


class Case:
    """Sequences with a tree behind a context (or a prompt: `nodes` below 0), in the second of two layers; the truth in float64."""

    def __init__(
        self,
        shape: list[tuple[int, int]],
        kind: str,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: str,
        window: int = 0,
        *,
        poison: bool = True,
    ) -> None:
        facts = ModelFacts(
            architecture="x", model_type="x", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=2, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=dim, max_position=99,
        )  # fmt: skip
        self.pages, self.window = Pages(facts, dtype, torch.device(device), SIZE, kind), window
        lengths = [context + abs(nodes) for context, nodes in shape]
        widest = -(-max(lengths) // SIZE)
        order = torch.randperm(widest * len(shape)).tolist()
        self.k, self.v, self.codes = self.cache(len(order))
        self.own: list[tuple[Tensor, Tensor]] = []
        self.lines: list[Tensor] = []
        rng, want, tables, ancestors = random.Random(3), [], [], []
        self.q = torch.randn(sum(abs(nodes) for _, nodes in shape), heads, dim).to(dtype).to(device)
        first = 0
        for (context, nodes), length in zip(shape, lengths, strict=True):
            bits = torch.full((-nodes,), -1) if nodes < 0 else torch.from_numpy(tree_of(rng, nodes).ancestors)
            blocks = [order.pop() for _ in range(widest)]
            at = torch.arange(length)
            slots = (torch.tensor(blocks)[at // SIZE] * SIZE + at % SIZE).to(device)
            k, v = (torch.randn(length, kv_heads, dim).to(dtype).to(device) for _ in range(2))
            self.own.append((k, v))
            if nodes > 2 and poison:
                k[context + 1], v[context + 1] = torch.nan, torch.nan
            if self.codes is None:
                kernel.write_kv(self.k, self.v, k, v, slots)
                keys, values = (kernel.read_kv(part, slots) for part in (self.k, self.v))
            else:
                coded.write_kv(self.k, self.v, self.codes, k, v, slots)
                keys, values = coded.read_kv(self.k, self.v, self.codes, slots)
            keys, values = (part.cpu().double().repeat_interleave(heads // kv_heads, 1) for part in (keys, values))
            for node in range(abs(nodes)):
                there = places_of(bits[node], context + node)
                self.lines.append(there)
                there = there[-window:]
                scores = torch.einsum("hd,khd->hk", self.q[first + node].cpu().double(), keys[there]) * dim**-0.5
                want.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[there]))
            first += abs(nodes)
            tables.append(blocks)
            ancestors.append(bits)
        self.want, self.scale = torch.stack(want), dim**-0.5
        self.tables, self.lengths, self.device = i32(device, tables), lengths, device
        self.counts = [abs(nodes) for _, nodes in shape]
        self.ancestors = torch.cat(ancestors).to(device)

    def ragged(self, **more: Tensor) -> Tensor:
        starts = [0, *torch.tensor(self.counts).cumsum(0).tolist()]
        return kernel.ragged_attention(
            self.q, self.k, self.v, self.tables, i32(self.device, starts), i32(self.device, self.lengths), self.scale, self.window,
            codes=self.codes, ancestors=self.ancestors, **more,
        )  # fmt: skip

    def cache(self, blocks: int) -> tuple[Tensor, Tensor, coded.Codes | None]:
        """Of NaN."""
        one = self.pages.caches(self.pages.allocate(blocks).fill_(0xFF))[1]
        return one.k, one.v, None if one.k_scale is None else coded.codes_of(self.pages.kv, one.k_scale)

    def chains(self, *, whole: bool = False, **more: Any) -> Tensor:
        """Each node as the last row of a sequence of its own, in which its line is a chain. whole: in one piece with what lies before it."""
        width = -(-max(len(line) for line in self.lines) // SIZE)
        k_cache, v_cache, codes = self.cache(width * len(self.lines))
        rows = [r for r, count in enumerate(self.counts) for _ in range(count)]
        for node, (r, places) in enumerate(zip(rows, self.lines, strict=True)):
            slots = (width * SIZE * node + torch.arange(len(places))).to(self.device)
            k, v = (part[places] for part in self.own[r])
            if codes is None:
                kernel.write_kv(k_cache, v_cache, k, v, slots)
            else:
                coded.write_kv(k_cache, v_cache, codes, k, v, slots)
        tables = torch.arange(width * len(rows), dtype=torch.int32, device=self.device).view(len(rows), width)
        lengths = i32(self.device, [len(line) for line in self.lines])
        at = (k_cache, v_cache, tables)
        if not whole:
            return kernel.decode_attention(self.q, *at, lengths, self.scale, self.window, codes=codes, **more)
        two = torch.stack([self.q, self.q], 1).flatten(0, 1).contiguous()  # the row before is of no interest
        starts = i32(self.device, range(0, 2 * len(rows) + 1, 2))
        return kernel.ragged_attention(two, *at, starts, lengths, self.scale, self.window, codes=codes, **more)[1::2]

    def flat(self, **more: Any) -> Tensor:
        """A row a node."""
        rows = [
            (r, length - count + node + 1)
            for r, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True))
            for node in range(count)
        ]
        tables = self.tables[[r for r, _ in rows]].contiguous()
        lengths = i32(self.device, [length for _, length in rows])
        at = (self.q, self.k, self.v, tables, lengths, self.scale, self.window)
        return kernel.decode_attention(*at, codes=self.codes, ancestors=self.ancestors, **more)

    def check(self, got: Tensor, tolerance: float, *, spoilt: bool) -> None:
        """`spoilt`: but for trees with poison in them."""
        got, first = got.cpu().double(), 0
        for count in self.counts:
            mine = torch.arange(first, first + count)
            first += count
            if spoilt and bool(self.want[mine].isnan().any()):
                continue
            fine = mine[~self.want[mine].isnan().flatten(1).any(1)]
            assert not got[fine].isnan().any()
            assert (got[fine] - self.want[fine]).norm() <= tolerance * self.want[fine].norm()


SHAPE = [(0, 2), (37, 7), (20, -3), (66, 1)]
if torch.cuda.is_available():  # too much for the interpreter
    SHAPE += [(70, 12), (3, 20), (700, 64)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-5}


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 32, 0), (3, 1, 80, 3), (4, 2, 32, 67)])
def test_nodes_see_their_ancestors_alone(heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype, device: str) -> None:
    """Of the window's positions, which are not places."""
    case = Case(SHAPE, "", heads, kv_heads, dim, dtype, device, window)
    case.check(case.flat(), TOLERANCE[dtype], spoilt=False)
    case.check(case.ragged(), TOLERANCE[dtype], spoilt=True)


@pytest.mark.parametrize(
    ("kind", "window"),
    [(kind, window) for kind in KINDS for window in (0, 5)] if torch.cuda.is_available() else [("int8", 0), ("fp8_e4m3", 5)],
)
def test_over_eight_bits(kind: str, window: int, device: str) -> None:
    case = Case(SHAPE, kind, 4, 2, 32, torch.bfloat16, device, window)
    case.check(case.flat(), 2e-2, spoilt=False)
    case.check(case.ragged(), 2e-2, spoilt=True)


LONG = [(0, 3), (61, 5)] if not torch.cuda.is_available() else [(0, 3), (61, 7), (1020, 20), (3, 64), (5000, 16)]


EVERY = (
    [(kind, window) for kind in ("", *KINDS) for window in (0, 5, 66)] if torch.cuda.is_available() else [("", 0), ("", 66), ("int8", 5)]
)


@pytest.mark.parametrize(("kind", "window"), EVERY)
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_nodes_bits_are_those_that_its_line_has_as_a_chain(kind: str, deterministic: bool, window: int, device: str) -> None:
    """By itself; in deterministic mode also in one piece with what lies before it, over several segments, and however many rows the workspace holds at once."""
    case = Case(LONG, kind, 4, 2, 32, torch.bfloat16, device, window, poison=False)
    if deterministic:  # a segment's length follows from the tables' width
        segments = [kernel.segment_of(width * SIZE) for width in (case.tables.shape[1], -(-max(map(len, case.lines)) // SIZE))]
        assert segments[0] == segments[1]
    got = case.flat(deterministic=deterministic)
    assert torch.equal(got, case.chains(deterministic=deterministic))
    if deterministic:
        assert torch.equal(got, case.chains(deterministic=True, whole=True))
        pieces = -(-case.tables.shape[1] * SIZE // kernel.segment_of(case.tables.shape[1] * SIZE))
        few = torch.empty(3 * 4 * pieces * (32 + 2), dtype=torch.float32, device=device)
        assert torch.equal(got, case.flat(deterministic=True, workspace=few))
        with pytest.raises(ValueError, match="rows of their own"):
            case.ragged(deterministic=True)


def test_the_words_of_lines(device: str) -> None:
    """Numbers of bits, and the lowest of them, of words of every kind."""
    words = torch.tensor([-1, 1, -5, -(1 << 63), (1 << 63) - 1, -2, *torch.randint(-(1 << 62), 1 << 62, (26,)).tolist()], device=device)
    ones = [[at for at in range(64) if word >> at & 1] for word in words.tolist()]
    counts = i32(device, [1 + at % 40 for at in range(len(words))])
    many, kept, where = torch.empty_like(counts), torch.empty_like(words), torch.empty_like(counts)
    triton_lang.jit(_look)[(1,)](words, counts, many, kept, where, N=len(words))
    assert many.tolist() == [len(at) for at in ones]
    wanted = [sum(1 << bit for bit in at[:count]) for at, count in zip(ones, counts.tolist(), strict=True)]
    assert [word & ((1 << 64) - 1) for word in kept.tolist()] == wanted
    # The row at place 100 that does not see place 98 is at position 99.
    assert where.tolist() == [100, 99, *range(97, 97 - 30, -1)]


def _look(words, counts, many, kept, where, N: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.arange(0, N)
    word = tl.load(words + n)
    tl.store(many + n, seen_of(word))
    tl.store(kept + n, lowest(word, tl.load(counts + n)))
    tl.store(where + n, place_of(tl.load(words + 2), 100, 99 - n))


@pytest.mark.parametrize("window", [0, 6])
def test_this_steps_own_keys(window: int, device: str) -> None:
    dtype = torch.float16
    case = Case([(37, 7), (20, -5), (3, 20)], "", 4, 2, 32, dtype, device, window)
    parts: list[list[Tensor]] = [[], []]
    for table, length, count in zip(case.tables.tolist(), case.lengths, case.counts, strict=True):
        at = torch.arange(length - count, length)
        slots = (torch.tensor(table)[at // SIZE] * SIZE + at % SIZE).to(device)
        for own, cache in zip(parts, (case.k, case.v), strict=True):
            own.append(kernel.read_kv(cache, slots).nan_to_num(0.5))
    own_k, own_v = (torch.cat(own).contiguous() for own in parts)
    got = case.ragged(new_k=own_k, new_v=own_v)
    case.check(got, TOLERANCE[dtype], spoilt=False)


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_entries_move(kind: str, device: str) -> None:
    facts = ModelFacts(
        architecture="x", model_type="x", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=48,
        max_position=99,
    )  # fmt: skip
    pages = Pages(facts, torch.bfloat16, torch.device(device), SIZE, kind)
    whole = torch.randint(0, 255, (5, pages.allocate(1).nbytes + 64), dtype=torch.uint8, device=device)  # something lies behind each page
    pool, before = whole[:, :-64], whole.clone()
    source = [[3, 17, 18, -1], [79, 40, 5, -1], [64, 66, 70, 71]]
    target = [[2, 15, 16, 4], [33, -1, 5, -1], [63, 64, 65, 66]]
    shape = (3, 2, 2, SIZE, 48)
    if kind:
        codes = 3 * 2 * 2 * SIZE * 48
        words = pool[:, codes:].view(torch.int32).view(-1, 3, 2, SIZE)
        moves.move_kv(pool[:, :codes].view(-1, *shape), i32(device, source), i32(device, target), words)
    else:
        moves.move_kv(pool.view(torch.bfloat16).view(-1, *shape), i32(device, source), i32(device, target))
    caches, want = pages.caches(pool), pages.caches(before[:, :-64])
    pairs = [(a, b) for row, to in zip(source, target, strict=True) for a, b in zip(row, to, strict=True) if a >= 0 and b >= 0]
    for got, wanted in zip(caches, want, strict=True):
        assert wanted.k_scale is not None or not kind
        parts = [(got.k, wanted.k, 2), (got.v, wanted.v, 2)]
        if kind:
            assert got.k_scale is not None
            assert wanted.k_scale is not None
            v, w = (
                one.v.view(-1, 2, 48, SIZE)
                if one.v.is_contiguous()
                else one.v.as_strided((5, 2, 48, SIZE), (one.v.stride(0), 48 * SIZE, SIZE, 1))
                for one in (got, wanted)
            )
            scales = [coded.codes_of(kind, one.k_scale).words for one in (got, wanted) if one.k_scale is not None]
            parts = [(got.k, wanted.k, 2), (v, w, 3), (scales[0], scales[1], 2)]
        for mine, theirs, axis in parts:
            for a, b in pairs:
                theirs[b // SIZE].select(axis - 1, b % SIZE).copy_(theirs[a // SIZE].select(axis - 1, a % SIZE).clone())
            assert torch.equal(
                mine.view(torch.uint8) if kind else mine.view(torch.int16), theirs.view(torch.uint8) if kind else theirs.view(torch.int16)
            )
    assert torch.equal(whole, before)


def test_the_walk_from_the_root(device: str) -> None:
    rng = random.Random(4)
    for _ in range(12):
        tree = tree_of(rng, rng.randint(2, 12))
        rows = rng.randint(1, 5)
        slots, positions = rng.sample(range(6), rows), [rng.randint(1, 22) for _ in range(rows)]
        slots[0] = -1 if rng.random() < 0.2 else slots[0]
        widths = [rng.randint(1, tree.nodes) for _ in range(rows)]
        drawn = [-1 if rng.random() < 0.1 else rng.randrange(3) for width in widths for _ in range(width)]
        one = torch.randint(0, 3, (6, 30), dtype=torch.int32, device=device)
        other = one.clone()
        columns = [i32(device, column) for column in (drawn, slots, positions, [0, *torch.tensor(widths).cumsum(0).tolist()])]
        parents = torch.from_numpy(tree.parents).to(device)
        mine = triton.verify_tree(*columns, one, parents, tree.deepest)
        theirs = reference.verify_tree(*columns, other, parents, tree.deepest)
        assert [part.tolist() for part in mine] == [part.tolist() for part in theirs]
        assert torch.equal(one, other)
        table = torch.randint(-1, 40, (6, 3), dtype=torch.int32, device=device)
        moved = mine[2], mine[0], *columns[1:], table, SIZE
        assert [part.tolist() for part in triton.tree_moves(*moved)] == [part.tolist() for part in reference.tree_moves(*moved)]
