"""Trees of drafts on the CPU: attention of nodes against float64 with poison beside them, the walk from the root, and entries that move."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention import Scales, api, move_kv, paged_attention, read_kv, reference, write_kv
from penstock.kernels.attention.codes import KINDS
from penstock.kernels.drafting import api as drafting
from penstock.kernels.drafting import reference as drafting_reference


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_parents(rng: random.Random, nodes: int) -> list[int]:
    """Node 0 is the root."""
    return [-1, *(rng.randrange(node) for node in range(1, nodes))]


def line(parents: list[int], node: int) -> list[int]:
    """From the root to the node."""
    found = [node]
    while parents[found[-1]] >= 0:
        found.append(parents[found[-1]])
    return found[::-1]


def bits(parents: list[int]) -> list[int]:
    """Of each node: bit i says whether it sees the entry i places before its own, as a signed number of 64 bits."""
    found = []
    for node in range(len(parents)):
        seen = {node - one for one in line(parents, node)} | set(range(node + 1, 64))
        value = sum(1 << back for back in seen)
        found.append(value - (1 << 64) if value >> 63 else value)
    return found


def seen_places(parents: list[int], context: int) -> list[Tensor]:
    """Of each node, the places that it sees behind `context` entries before the root."""
    return [torch.cat([torch.arange(context), context + torch.tensor(line(parents, node))]) for node in range(len(parents))]


def caches(kind: str, dtype: torch.dtype, blocks: int, kv_heads: int, dim: int, size: int = 16) -> tuple[Tensor, Tensor, Scales | None]:
    """Of NaN, a layer in the middle of pages."""
    if not kind:
        pages = torch.full((blocks, 3, 2, kv_heads, size, dim), torch.nan, dtype=dtype)
        return pages[:, 1, 0], pages[:, 1, 1], None
    bytes_of_codes, bytes_of_scales = 2 * kv_heads * size * dim, 2 * kv_heads * size * 2
    pool = torch.full((blocks, bytes_of_codes + bytes_of_scales), 255, dtype=torch.uint8)
    codes = pool[:, :bytes_of_codes].view(blocks, 2, kv_heads, size, dim)
    scales = pool[:, bytes_of_codes:].view(torch.bfloat16).view(blocks, 2, kv_heads, size)
    return codes[:, 0], codes[:, 1], Scales(kind, scales[:, 0], scales[:, 1])


@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "plain", "window"),
    [(4, 2, 32, False, 0), (6, 1, 80, False, 3), (64, 1, 16, False, 70), (2, 1, 32, True, 0), (2, 1, 32, True, 3)],
)
def test_nodes_see_their_ancestors_alone(
    kind: str, heads: int, kv_heads: int, dim: int, plain: bool, window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(api.native, "library", lambda: None)
    rng = random.Random(dim)
    contexts, sizes = [0, 5, 60, 130, 63, 33], [7, 1, 20, 64, 3, 12]
    trees = [random_parents(rng, size) for size in sizes]
    trees[-1] = [-1, *range(11)]  # a prompt: it is causal
    trees[2] = [0 if parent == 1 else parent for parent in trees[2]]
    k_cache, v_cache, scales = caches(kind, dtype, 64, kv_heads, dim)
    order = torch.randperm(64).tolist()
    tables, slots, want = [], [], []
    q = (torch.randn(sum(sizes), heads, dim) * 2).to(dtype)
    for context, parents in zip(contexts, trees, strict=True):
        length = context + len(parents)
        blocks = [order.pop() for _ in range(-(-length // 16))]
        at = torch.arange(length)
        slots.append((i32(blocks)[at // 16] * 16 + at % 16).int())
        k, v = (torch.randn(length, kv_heads, dim).to(dtype) for _ in range(2))
        if len(parents) == 20:  # a leaf, which nobody else sees
            k[context + 1], v[context + 1] = torch.nan, torch.nan
        write_kv(k_cache, v_cache, k, v, slots[-1], scales)
        tables.append(blocks + [-7] * (13 - len(blocks)))
    first = 0
    for context, parents, where in zip(contexts, trees, slots, strict=True):
        keys, values = (
            read_kv(cache, where, values=values, scales=scales).double().repeat_interleave(heads // kv_heads, 1)
            for cache, values in ((k_cache, False), (v_cache, True))
        )
        for node, places in enumerate(seen_places(parents, context)):
            places = places[-window:]  # the last so many positions
            scores = torch.einsum("hd,khd->hk", q[first + node].double(), keys[places]) * dim**-0.5
            want.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[places]))
        first += len(parents)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    lengths = [context + size for context, size in zip(contexts, sizes, strict=True)]
    ancestors = torch.tensor([bit for parents in trees for bit in bits(parents)])
    assert set(bits(trees[-1])) == {-1}
    at = (q, k_cache, v_cache, i32(tables), i32(starts), i32(lengths), dim**-0.5, window)
    got = paged_attention(*at, scales=scales, ancestors=ancestors)
    limit = 2**-7 if dtype == torch.bfloat16 else 2e-5
    wanted = torch.stack(want)
    spoilt = starts[2] + 1
    for found in (got, reference.paged_attention(*at, scales, ancestors)):
        if found is not got and not plain:
            continue  # with NaN among what one row sees the reference multiplies it by 0 for the others
        if plain:
            clean = torch.ones(len(q), dtype=torch.bool)
            clean[starts[2] : starts[3]] = False
            torch.testing.assert_close(found[clean].double(), wanted[clean], rtol=limit, atol=limit)
        else:
            found[spoilt] = wanted[spoilt].to(dtype)
            torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=limit, equal_nan=True)


@pytest.mark.usefixtures("compiled")
def test_a_chain_is_a_tree_bit_for_bit(dtype: torch.dtype) -> None:
    k_cache, v_cache, _ = caches("", dtype, 16, 2, 32)
    where = torch.arange(100).int()
    write_kv(k_cache, v_cache, torch.randn(100, 2, 32).to(dtype), torch.randn(100, 2, 32).to(dtype), where)
    q = torch.randn(9, 4, 32).to(dtype)
    at = (k_cache, v_cache, i32([list(range(7))]), i32([0, 9]), i32([100]), 0.2)
    assert torch.equal(paged_attention(q, *at), paged_attention(q, *at, ancestors=torch.tensor(bits([-1, *range(8)]))))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 32, 0), (6, 1, 80, 50), (16, 4, 64, 7)])
def test_a_nodes_bits_are_those_that_its_line_has_as_a_chain(
    kind: str, heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype
) -> None:
    """Alone or with others, and however the chain came: token by token or in one piece."""
    rng = random.Random(heads)
    for context, nodes in ((0, 9), (61, 21), (127, 64), (190, 5)):
        parents = random_parents(rng, nodes)
        length, blocks = context + nodes, -(-(context + nodes) // 16)
        k, v = (torch.randn(length, kv_heads, dim).to(dtype) for _ in range(2))
        q = torch.randn(nodes, heads, dim).to(dtype)
        tree_k, tree_v, tree_scales = caches(kind, dtype, blocks, kv_heads, dim)
        write_kv(tree_k, tree_v, k, v, torch.arange(length).int(), tree_scales)
        table, scale, ancestors = i32([list(range(blocks))]), dim**-0.5, torch.tensor(bits(parents))
        more = {"window": window, "scales": tree_scales}
        together = paged_attention(q, tree_k, tree_v, table, i32([0, nodes]), i32([length]), scale, ancestors=ancestors, **more)
        tables = table.repeat(nodes, 1)
        alone = paged_attention(
            q, tree_k, tree_v, tables, i32(range(nodes + 1)), i32(range(context + 1, length + 1)), scale, ancestors=ancestors, **more
        )
        assert torch.equal(together, alone)
        for node, places in enumerate(seen_places(parents, context)):
            chain_k, chain_v, chain_scales = caches(kind, dtype, blocks, kv_heads, dim)
            write_kv(chain_k, chain_v, k[places], v[places], torch.arange(len(places)).int(), chain_scales)
            over = line(parents, node)
            rows, at = q[over], (chain_k, chain_v, table)
            end = i32([len(places)])
            whole = paged_attention(rows, *at, i32([0, len(over)]), end, scale, window, scales=chain_scales)
            last = paged_attention(rows[-1:], *at, i32([0, 1]), end, scale, window, scales=chain_scales)
            assert torch.equal(together[over], whole)
            assert torch.equal(together[node], last[0])


@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize("plain", [False, True], ids=["native", "reference"])
def test_entries_move(kind: str, plain: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(api.native, "library", lambda: None)
    k_cache, v_cache, scales = caches(kind, dtype, 5, 3, 48)
    places = torch.arange(80).int()
    write_kv(k_cache, v_cache, torch.randn(80, 3, 48).to(dtype), torch.randn(80, 3, 48).to(dtype), places, scales)

    def everything() -> Tensor:
        return torch.stack(
            [read_kv(cache, places, values=values, scales=scales).float() for cache, values in ((k_cache, False), (v_cache, True))]
        )

    want = everything()
    source, target = [3, 17, 18, -1, 79, 40, 5], [2, 15, 16, 4, 33, -1, 5]
    for a, b in zip(source, target, strict=True):
        if a >= 0 and b >= 0:
            want[:, b] = want[:, a].clone()
    move_kv(k_cache, v_cache, i32(source), i32(target), scales)
    assert torch.equal(everything(), want)


@pytest.mark.usefixtures("compiled")
def test_what_would_move_from_nowhere_is_refused() -> None:
    k_cache, v_cache, _ = caches("", torch.float32, 2, 1, 16)
    for source, target in (([32], [0]), ([0], [32])):
        with pytest.raises(IndexError, match="outside the cache"):
            move_kv(k_cache, v_cache, i32(source), i32(target))


@pytest.mark.parametrize("walk", [drafting.verify_tree, drafting_reference.verify_tree], ids=["native", "reference"])
def test_the_walk_from_the_root(walk: object) -> None:
    rng = random.Random(4)
    for _ in range(60):
        parents = random_parents(rng, rng.randint(2, 9))
        deepest = max(len(line(parents, node)) - 1 for node in range(len(parents)))
        rows = rng.randint(1, 5)
        slots, positions = rng.sample(range(6), rows), [rng.randint(1, 22) for _ in range(rows)]
        slots[0] = -1 if rng.random() < 0.2 else slots[0]
        history = [[rng.randrange(3) for _ in range(30)] for _ in range(6)]
        widths = [rng.randint(1, len(parents)) for _ in range(rows)]
        drawn = [[-1 if rng.random() < 0.1 else rng.randrange(3) for _ in range(width)] for width in widths]
        counts, kept, sources = [], [], []
        table = torch.tensor(history, dtype=torch.int32)
        for slot, position, tokens in zip(slots, positions, drawn, strict=True):
            path = [0]
            while tokens[path[-1]] >= 0 and slot >= 0:
                following = [
                    c
                    for c in range(len(tokens))
                    if parents[c] == path[-1] and position - 1 + c < 30 and history[slot][position - 1 + c] == tokens[path[-1]]
                ]
                if not following or tokens[following[0]] < 0:
                    break
                path.append(following[0])
            counts.append(len(path))
            kept += [token if node in path else -1 for node, token in enumerate(tokens)]
            sources.append([*path[1:], *[-1] * (deepest - len(path) + 1)])
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            path = [0, *[node for node in sources[row] if node > 0]]
            for i, node in enumerate(path):
                if slot >= 0 and position + i < 30:
                    history[slot][position + i] = max(drawn[row][node], 0)
        bounds = [0, *torch.tensor(widths).cumsum(0).tolist()]
        flat = [token for tokens in drawn for token in tokens]
        found = walk(i32(flat), i32(slots), i32(positions), i32(bounds), table, i32(parents), deepest)  # type: ignore[operator]
        assert [part.tolist() for part in found] == [counts, kept, sources]
        assert table.tolist() == history


@pytest.mark.skipif(native.library() is None, reason="no C kernels here")
def test_more_draws_than_nodes_are_refused() -> None:
    history = torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="nodes"):
        drafting.verify_tree(i32([0, 0, 0]), i32([0]), i32([1]), i32([0, 3]), history, i32([-1, 0]), 1)
    with pytest.raises(IndexError, match="outside the history"):
        drafting.verify_tree(i32([0]), i32([0]), i32([0]), i32([0, 1]), history, i32([-1]), 1)


def test_what_a_walk_leaves_to_be_moved() -> None:
    """Roots at places 15, 20 and 3; the first way needs no move for its first node, the second row is padding, the third has only its root."""
    table = i32([[7, 4, 9], [0, 1, 2], [5, -1, -1]])
    sources, counts = i32([[1, 5, 6, -1], [2, 3, -1, -1], [-1, -1, -1, -1]]), i32([4, 3, 1])
    found = drafting_reference.tree_moves(sources, counts, i32([0, -1, 2]), i32([16, 21, 4]), i32([0, 8, 16, 17]), table, 16)
    assert found[0].tolist() == [[-1, 4 * 16 + 4, 4 * 16 + 5, -1], [-1] * 4, [-1] * 4]
    assert found[1].tolist() == [[-1, 4 * 16 + 1, 4 * 16 + 2, -1], [-1] * 4, [-1] * 4]
    assert found[2].tolist() == [6, 11, 16]
