"""Trees of drafts in Triton: nodes against the reference with poison beside them, the walk from the root, and entries that move."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.attention import coded, moves
from penstock.kernels.attention import triton as kernel
from penstock.kernels.attention.codes import KINDS
from penstock.kernels.attention.reference import seen_by
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
        self, shape: list[tuple[int, int]], kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str
    ) -> None:
        facts = ModelFacts(
            architecture="x", model_type="x", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=2, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=dim, max_position=99,
        )  # fmt: skip
        pages = Pages(facts, dtype, torch.device(device), SIZE, kind)
        lengths = [context + abs(nodes) for context, nodes in shape]
        widest = -(-max(lengths) // SIZE)
        order = torch.randperm(widest * len(shape)).tolist()
        cache = pages.caches(pages.allocate(len(order)).fill_(0xFF))[1]
        self.k, self.v = cache.k, cache.v
        self.codes = None if cache.k_scale is None else coded.codes_of(kind, cache.k_scale)
        rng, want, tables, ancestors = random.Random(3), [], [], []
        self.q = torch.randn(sum(abs(nodes) for _, nodes in shape), heads, dim).to(dtype).to(device)
        first = 0
        for (context, nodes), length in zip(shape, lengths, strict=True):
            bits = torch.full((-nodes,), -1) if nodes < 0 else torch.from_numpy(tree_of(rng, nodes).ancestors)
            blocks = [order.pop() for _ in range(widest)]
            at = torch.arange(length)
            slots = (torch.tensor(blocks)[at // SIZE] * SIZE + at % SIZE).to(device)
            k, v = (torch.randn(length, kv_heads, dim).to(dtype).to(device) for _ in range(2))
            if nodes > 2:
                k[context + 1], v[context + 1] = torch.nan, torch.nan
            if self.codes is None:
                kernel.write_kv(self.k, self.v, k, v, slots)
                keys, values = (kernel.read_kv(part, slots) for part in (self.k, self.v))
            else:
                coded.write_kv(self.k, self.v, self.codes, k, v, slots)
                keys, values = coded.read_kv(self.k, self.v, self.codes, slots)
            seen = seen_by(bits, torch.arange(context, length)[:, None] - at[None])
            keys, values = (part.cpu().double().repeat_interleave(heads // kv_heads, 1) for part in (keys, values))
            for node in range(abs(nodes)):
                there = seen[node] & (at <= context + node)
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
            self.q, self.k, self.v, self.tables, i32(self.device, starts), i32(self.device, self.lengths), self.scale, codes=self.codes,
            ancestors=self.ancestors, **more,
        )  # fmt: skip

    def flat(self) -> Tensor:
        """A row a node."""
        rows = [
            (r, length - count + node + 1)
            for r, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True))
            for node in range(count)
        ]
        tables = self.tables[[r for r, _ in rows]].contiguous()
        lengths = i32(self.device, [length for _, length in rows])
        return kernel.decode_attention(self.q, self.k, self.v, tables, lengths, self.scale, codes=self.codes, ancestors=self.ancestors)

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


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 80)])
def test_nodes_see_their_ancestors_alone(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    case = Case(SHAPE, "", heads, kv_heads, dim, dtype, device)
    case.check(case.flat(), TOLERANCE[dtype], spoilt=False)
    case.check(case.ragged(), TOLERANCE[dtype], spoilt=True)


@pytest.mark.parametrize("kind", KINDS if torch.cuda.is_available() else KINDS[:1])
def test_over_eight_bits(kind: str, device: str) -> None:
    case = Case(SHAPE, kind, 4, 2, 32, torch.bfloat16, device)
    with pytest.raises(ValueError, match="has no trees"):
        case.flat()
    case.check(case.ragged(), 2e-2, spoilt=True)


def test_this_steps_own_keys(device: str) -> None:
    dtype = torch.float16
    case = Case([(37, 7), (20, -5), (3, 20)], "", 4, 2, 32, dtype, device)
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
