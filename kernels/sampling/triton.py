"""Sampling on the device in Triton, without a sort. Equal in definition to reference.py: filters first, then Gumbel-max over the kept set.

How a token is drawn. With s(t) = x(t) + noise(t), x = logits / temperature, the draw is the argmax of s over the kept set, and a kept set is
{t: x(t) >= threshold}. So no threshold is needed: take the argmax c of s over all tokens that are not yet ruled out, and ask whether c is
kept. It is, if and only if
    top-k:   fewer than k tokens have x > x(c)
    top-p:   the mass of tokens with x > x(c) is less than p times the mass of what top-k kept
    min-p:   x(c) >= max x + log(min_p)
If not, every token with x <= x(c) is ruled out, and the next candidate is the argmax over the rest. (Rejection by pivots as in FlashInfer's sorting-free
sampling, Ye et al. 2025, arXiv:2501.01005; here the noise is fixed by Philox, so the result is exactly the definition's, not only distributed
like it.) For top-k the k-th largest value is found: the k-th largest among the maxima of groups of 64 tokens is a lower bound of it, so only
groups whose maximum reaches that bound are looked at again, by bisection over the ordered integer image of float32. All later passes skip groups
by their maxima in the same way. Noise: Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (choice, position, purpose 0, token), u = (word
+ 1/2) / 2^32, noise = -log(-log u) in float64; a float32 bound of it, from the word alone, spares the float64 work where a block cannot win.

A row's result depends on that row alone: a fixed order of additions, no float atomics.
What it does not know: slots' owners, requests, grammars.
Long: the filters share their passes over the vocabulary.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import tuned
from penstock.kernels.tile import launched, power

FIELDS = 6
"""Cells of the workspace for each piece of a row: largest logit, its index, the candidate's score, token and value, mass."""
GROUP = 64
"""Tokens of a group; for each group the workspace has two more cells: its maximum, and a place in the list of groups to look at."""


@triton.jit
def philox_word(token, choice, position, seed):
    """First output word (uint32) of Philox4x32-10 for tokens [N] (uint32); choice, position uint32, seed int64."""
    c0 = tl.zeros_like(token) + choice
    c1 = tl.zeros_like(token) + position
    c2 = tl.zeros_like(token)
    c3 = token
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full(token.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(token.shape, 0xCD9E8D57, tl.uint32)
    k0 = tl.zeros_like(token) + k0
    k1 = tl.zeros_like(token) + k1
    w0 = tl.full(token.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(token.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        h0 = tl.umulhi(m0, c0)
        l0 = m0 * c0
        h1 = tl.umulhi(m1, c2)
        l1 = m1 * c2
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0


@triton.jit
def _list(maxima, listing, heat, pivot, least, GROUPS: tl.constexpr, GROUPS_P: tl.constexpr):
    """List the groups whose largest x is above pivot and at least `least`, ascending; how many tokens they have."""
    g = tl.arange(0, GROUPS_P)
    top = tl.div_rn(tl.load(maxima + g, mask=g < GROUPS, other=float("-inf")).to(tl.float32), heat)
    want = (g < GROUPS) & (top > pivot) & (top >= least)
    place = tl.cumsum(want.to(tl.int32), 0) - 1
    tl.debug_barrier()  # nobody reads the old list any more
    tl.store(listing + place, g.to(tl.float64), mask=want)
    tl.debug_barrier()
    return tl.sum(want.to(tl.int32), 0) * 64


@triton.jit
def _candidate(
    logits, V, begin, end, listing, temperature, floor, least, choice, position, seed, score, token, value, LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Best (score, token, x) so far joined with tokens [begin, end) (of the list, if LISTED) whose x > floor and x >= least. Of equal scores the
    lowest id."""
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        if LISTED:
            at = tl.load(listing + at // 64, mask=inside, other=0.0).to(tl.int32) * 64 + at % 64
        x = tl.div_rn(tl.load(logits + at, mask=inside & (at < V), other=float("-inf")), temperature)
        fine = (x > floor) & (x >= least)
        x = tl.where(fine, x, float("-inf"))
        # noise < 22.8809 always
        if tl.max(x, 0).to(tl.float64) + 22.8809 >= score:
            word = philox_word(at.to(tl.uint32), choice, position, seed)
            # noise <= -log(1 - u), and 1 - u = ((2^32 - 1 - word) + 1/2) / 2^32; 1e-3 covers the roundings of float32
            rest = (0xFFFFFFFF - word.to(tl.int64)).to(tl.float32) + 0.5
            bound = x + (0.6931472 * (32.0 - tl.log2(rest)) + 1e-3)
            if tl.max(bound, 0).to(tl.float64) + 1e-5 * tl.abs(score) >= score:
                u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
                scores = tl.where(fine, x.to(tl.float64) - tl.log(-tl.log(u)), float("-inf"))
                top = tl.max(scores, 0)
                if (top > score) & (top > float("-inf")):
                    score = top
                    token = tl.min(tl.where(scores == top, at, 2147483647), 0)
                    value = tl.max(tl.where(at == token, x, float("-inf")), 0)
    return score, token, value


@triton.jit
def _above(logits, V, count, listing, heat, top, pivot, least, BLOCK: tl.constexpr):
    """(number, mass) of listed tokens with x > pivot and x >= least; mass in units of exp(top), float64 in a fixed order."""
    number = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        at = tl.load(listing + at // 64, mask=inside, other=0.0).to(tl.int32) * 64 + at % 64
        x = tl.div_rn(tl.load(logits + at, mask=inside & (at < V), other=float("-inf")), heat)
        counted = (x > pivot) & (x >= least)
        number += counted.to(tl.int32)
        mass += tl.where(counted, tl.exp(x - top), 0.0).to(tl.float64)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _ordered(x):
    """int32 image of float32 in the same order (as signed integers)."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _kth_group(maxima, heat, top, k, GROUPS: tl.constexpr, GROUPS_P: tl.constexpr):
    """The k-th largest of the groups' maxima (or a lower value that as many reach); the lowest float if there are fewer groups."""
    g = tl.arange(0, GROUPS_P)
    key = _ordered(tl.div_rn(tl.load(maxima + g, mask=g < GROUPS, other=float("-inf")).to(tl.float32), heat)).to(tl.int64)
    low = tl.full([], -2139095041, tl.int64)  # the image of -inf: all groups reach it
    high = _ordered(top).to(tl.int64) + 1
    exact = tl.full([], 0, tl.int32)
    while (high - low > 1) & (exact == 0):
        middle = low + (high - low) // 2
        count = tl.sum(((key >= middle) & (g < GROUPS)).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
        exact = (count == k).to(tl.int32)
    return _unordered(low.to(tl.int32))


@triton.jit
def _kth(logits, V, count, listing, heat, top, bound, k, BLOCK: tl.constexpr):
    """A value v with {x >= v} = the tokens that top-k keeps; they are all listed and at least `bound`."""
    low = _ordered(bound).to(tl.int64)  # count(x >= low) >= k
    high = _ordered(top).to(tl.int64) + 1  # count(x >= high) < k
    exact = tl.full([], 0, tl.int32)
    while (high - low > 1) & (exact == 0):
        middle = low + (high - low) // 2
        number = tl.zeros([BLOCK], tl.int32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < count
            at = tl.load(listing + at // 64, mask=inside, other=0.0).to(tl.int32) * 64 + at % 64
            x = tl.div_rn(tl.load(logits + at, mask=inside & (at < V), other=float("-inf")), heat)
            number += (inside & (at < V) & (_ordered(x).to(tl.int64) >= middle)).to(tl.int32)
        reach = tl.sum(number, 0)
        low = tl.where(reach >= k, middle, low)
        high = tl.where(reach >= k, high, middle)
        exact = (reach == k).to(tl.int32)
    return _unordered(low.to(tl.int32))


@launched(do_not_specialize_on_alignment=["slots", "positions"])
def _survey(
    logits, temperature, top_p, seeds, choices, positions, slots, cells, maxima, V, stride, PIECES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (R, PIECES): a piece's largest logit, its first index, the best candidate of all tokens, the mass, and the groups' maxima."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        line = logits + row * stride
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        where = tl.full([BLOCK], 2147483647, tl.int32)
        wrong = tl.zeros([BLOCK], tl.int32)
        begin = piece * CHUNK
        for first in range(0, CHUNK, BLOCK):
            at = begin + first + tl.arange(0, BLOCK)
            x = tl.load(line + at, mask=at < V, other=float("-inf"))
            wrong = wrong | (x != x).to(tl.int32)
            better = x > best
            best = tl.where(better, x, best)
            where = tl.where(better, at, where)
            groups = tl.max(tl.reshape(x, [BLOCK // 64, 64]), 1)
            at_group = row * (PIECES * CHUNK // 64) + (begin + first) // 64 + tl.arange(0, BLOCK // 64)
            tl.store(maxima + at_group, groups.to(tl.float64))
        top = tl.max(best, 0)
        first_index = tl.min(tl.where(best == top, where, 2147483647), 0)
        heat = tl.load(temperature + slot)
        score = tl.full([], float("-inf"), tl.float64)
        token = tl.full([], 2147483647, tl.int32)
        value = tl.full([], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float64)
        if (heat > 0) & (top > float("-inf")):
            if tl.load(top_p + slot) < 1.0:
                peak = tl.div_rn(top, heat)
                for first in range(0, CHUNK, BLOCK):
                    at = begin + first + tl.arange(0, BLOCK)
                    x = tl.div_rn(tl.load(line + at, mask=at < V, other=float("-inf")), heat)
                    mass += tl.exp(x - peak).to(tl.float64)
            score, token, value = _candidate(
                line, V, begin, begin + CHUNK, cells, heat, float("-inf"), float("-inf"), tl.load(choices + slot).to(tl.uint32),
                tl.load(positions + row).to(tl.uint32), tl.load(seeds + slot), score, token, value, False, BLOCK,
            )  # fmt: skip
        at_cell = cells + (row * PIECES + piece) * 6
        tl.store(at_cell + 5, tl.sum(mass, 0))
        tl.store(at_cell, tl.where(tl.max(wrong, 0) > 0, float("inf"), top).to(tl.float64))
        tl.store(at_cell + 1, first_index.to(tl.float64))
        tl.store(at_cell + 2, score)
        tl.store(at_cell + 3, token.to(tl.float64))
        tl.store(at_cell + 4, value.to(tl.float64))


@launched(do_not_specialize_on_alignment=["slots", "positions"])
def _choose(
    logits, temperature, top_k, top_p, min_p, seeds, choices, positions, slots, cells, maxima, listings, out, V, stride, PIECES: tl.constexpr,
    PIECES_P: tl.constexpr, GROUPS: tl.constexpr, GROUPS_P: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (R): join the pieces, then accept or reject candidates until one is kept."""
    row = tl.program_id(0).to(tl.int64)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    result = tl.full([], -1, tl.int32)
    if slot >= 0:
        line = logits + row * stride
        p = tl.arange(0, PIECES_P)
        here = p < PIECES
        cell = cells + (row * PIECES + p) * 6
        tops = tl.load(cell, mask=here, other=float("-inf"))
        best = tl.max(tops, 0)
        result = tl.min(tl.where(tops == best, tl.load(cell + 1, mask=here, other=2147483647.0), 2147483647.0), 0).to(tl.int32)
        heat = tl.load(temperature + slot)
        if (best == float("inf")) | (best == float("-inf")):
            result = tl.full([], -1, tl.int32)
        elif heat > 0:
            top = tl.div_rn(best.to(tl.float32), heat)
            if tl.abs(top) <= 3.4028234663852886e38:
                scores = tl.load(cell + 2, mask=here, other=float("-inf"))
                score = tl.max(scores, 0)
                tokens = tl.load(cell + 3, mask=here, other=2147483647.0)
                chosen = tl.min(tl.where(scores == score, tokens, 2147483647.0), 0)
                values = tl.load(cell + 4, mask=here, other=float("-inf"))
                value = tl.max(tl.where((scores == score) & (tokens == chosen), values, float("-inf")), 0).to(tl.float32)
                result = chosen.to(tl.int32)
                k = tl.load(top_k + slot)
                share = tl.load(top_p + slot)
                relative = tl.load(min_p + slot)
                by_k = (k > 0) & (k < V)
                by_p = share < 1.0
                if by_k | by_p | (relative > 0):
                    choice = tl.load(choices + slot).to(tl.uint32)
                    position = tl.load(positions + row).to(tl.uint32)
                    seed = tl.load(seeds + slot)
                    above = maxima + row * GROUPS
                    listing = listings + row * GROUPS
                    least = tl.full([], float("-inf"), tl.float32)  # what top-k and min-p ask of x
                    wanted = tl.full([], float("inf"), tl.float64)  # the mass above an accepted candidate is less than this
                    if by_k:
                        bound = _kth_group(above, heat, top, k, GROUPS, GROUPS_P)
                        count = _list(above, listing, heat, float("-inf"), bound, GROUPS, GROUPS_P)
                        least = _kth(line, V, count, listing, heat, top, bound, k, BLOCK)
                    if by_p:
                        if by_k:
                            count = _list(above, listing, heat, float("-inf"), least, GROUPS, GROUPS_P)
                            _, total = _above(line, V, count, listing, heat, top, float("-inf"), least, BLOCK)
                            wanted = share.to(tl.float64) * total
                        else:
                            alive = here & (tops > float("-inf"))
                            peaks = tl.div_rn(tops.to(tl.float32), heat)
                            fade = tl.exp(tl.where(alive, peaks - top, 0.0)).to(tl.float64)
                            masses = tl.load(cell + 5, mask=here, other=0.0)
                            wanted = share.to(tl.float64) * tl.sum(tl.where(alive, masses * fade, 0.0), 0)
                    if relative > 0:
                        least = tl.maximum(least, top + tl.log(relative))
                    searching = tl.full([], 1, tl.int32)
                    if value < least:
                        count = _list(above, listing, heat, float("-inf"), least, GROUPS, GROUPS_P)
                        score = tl.full([], float("-inf"), tl.float64)
                        score, result, value = _candidate(
                            line, V, 0, count, listing, heat, float("-inf"), least, choice, position, seed, score, result, value, True, BLOCK
                        )  # fmt: skip
                    while by_p & (searching > 0):
                        count = _list(above, listing, heat, value, least, GROUPS, GROUPS_P)
                        number, mass = _above(line, V, count, listing, heat, top, value, least, BLOCK)
                        if (mass < wanted) | (number == 0):
                            searching = tl.full([], 0, tl.int32)
                        else:
                            score = tl.full([], float("-inf"), tl.float64)
                            score, result, value = _candidate(
                                line, V, 0, count, listing, heat, value, least, choice, position, seed, score, result, value, True, BLOCK
                            )  # fmt: skip
    tl.store(out + row, result)


def _pieces(vocab: int) -> tuple[int, dict[str, int]]:
    config = tuned("sampling.survey")
    return -(-vocab // config["CHUNK"]), config


def workspace_elements(rows: int, vocab: int) -> int:
    """float64 elements that `draw` needs."""
    pieces, config = _pieces(vocab)
    return rows * (pieces * FIELDS + 2 * (pieces * config["CHUNK"] // GROUP))


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor, *,
    slots: Tensor | None = None, out: Tensor | None = None, workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token a row [R] int32, -1 for bad and padding rows; settings as in kernels/sampling/api.py, by slot where `slots` is given."""
    rows, vocab = logits.shape
    require(logits.dtype == torch.float32 and logits.stride(1) == 1 and vocab > 0, "logits must be [R, V] float32")
    out = torch.empty(rows, dtype=torch.int32, device=logits.device) if out is None else out
    if rows == 0:
        return out
    pieces, config = _pieces(vocab)
    groups = pieces * config["CHUNK"] // GROUP
    cells = workspace_elements(rows, vocab)
    workspace = torch.empty(cells, dtype=torch.float64, device=logits.device) if workspace is None else workspace
    require(workspace.dtype == torch.float64 and workspace.numel() >= cells, "the workspace is too small")
    maxima = workspace[rows * pieces * FIELDS :]
    listings = maxima[rows * groups :]
    _survey[(rows, pieces)](
        logits, temperature, top_p, seeds, choices, positions, slots, workspace, maxima, vocab, logits.stride(0), PIECES=pieces, SLOTS=slots is not None,
        **config,
    )  # fmt: skip
    _choose[(rows,)](
        logits, temperature, top_k, top_p, min_p, seeds, choices, positions, slots, workspace, maxima, listings, out, vocab, logits.stride(0),
        PIECES=pieces, PIECES_P=power(pieces), GROUPS=groups, GROUPS_P=power(groups), SLOTS=slots is not None, **tuned("sampling.choose"),
    )  # fmt: skip
    return out


@launched(do_not_specialize_on_alignment=["slots", "pool_rows", "depths", "positions"])
def _penalise(
    logits, pool_rows, counts, in_prompt, repetition, frequency, presence, slots, depths, positions, history, V, stride, h_stride,
    SLOTS: tl.constexpr, DEEPEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, ceil(V / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    pool = tl.load(pool_rows + row).to(tl.int64)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    if (pool >= 0) & (slot >= 0):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = at < V
        x = tl.load(logits + row * stride + at, mask=mask, other=0.0)
        count = tl.load(counts + pool * V + at, mask=mask, other=0)
        if DEEPEST > 0:
            depth = tl.load(depths + row)
            before = history + slot * h_stride + tl.load(positions + row)
            for back in tl.static_range(1, DEEPEST + 1):
                token = tl.load(before - back, mask=back <= depth, other=-1)
                count += (at == token).to(tl.int32)
        prompt = tl.load(in_prompt + pool * V + at, mask=mask, other=0)
        factor = tl.where((count > 0) | (prompt != 0), tl.load(repetition + slot), 1.0)
        x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
        x = x - tl.load(frequency + slot) * count.to(tl.float32) - tl.load(presence + slot) * (count > 0).to(tl.float32)
        tl.store(logits + row * stride + at, x, mask=mask)


def penalise_(
    logits: Tensor, pool_rows: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor, *,
    slots: Tensor | None = None, ahead: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> None:  # fmt: skip
    """Penalties in place, on the rows with pool_rows[r] >= 0; formula as reference.penalise; counts [P, V] int32, in_prompt [P, V] bool. `ahead`: (depths [R],
    positions [R], history [S, L], deepest): the last depths[r] tokens before positions[r] in the slot's history count once more each; none above `deepest`."""
    rows, vocab = logits.shape
    depths, positions, history, deepest = (pool_rows, pool_rows, pool_rows, 0) if ahead is None else ahead
    require(ahead is None or slots is not None, "tokens ahead are found by slot")
    if rows:
        _penalise[(rows, -(-vocab // 4096))](
            logits, pool_rows, counts, in_prompt.view(torch.uint8), repetition, frequency, presence, slots, depths, positions, history, vocab,
            logits.stride(0), history.stride(0), SLOTS=slots is not None, DEEPEST=power(deepest) if deepest else 0, BLOCK=4096, num_warps=8,
        )  # fmt: skip


@launched(do_not_specialize=["entries"], do_not_specialize_on_alignment=["rows", "ids", "values"])
def _bias(logits, rows, ids, values, entries, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < entries, other=-1)
    token = tl.load(ids + at, mask=at < entries, other=0)
    live = row >= 0
    cell = logits + tl.where(live, row, 0).to(tl.int64) * stride + token
    tl.store(cell, tl.load(cell, mask=live, other=0.0) + tl.load(values + at, mask=live, other=0.0), mask=live)


def scatter_bias_(logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
    """logits[rows[e], ids[e]] += values[e] (-inf bans the token); rows below 0 are padding; (row, id) pairs must be distinct."""
    if rows.shape[0]:
        _bias[(-(-rows.shape[0] // 256),)](logits, rows, ids, values, rows.shape[0], logits.stride(0), BLOCK=256)


@launched(do_not_specialize_on_alignment=["mask_rows"])
def _mask(logits, mask, mask_rows, V, stride, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(mask_rows + row).to(tl.int64)
    if which >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(mask + which * words + at // 32, mask=at < V, other=-1)
        drop = ((word >> (at % 32)) & 1) == 0
        tl.store(logits + row * stride + at, tl.full([BLOCK], float("-inf"), tl.float32), mask=drop & (at < V))


def mask_(logits: Tensor, mask: Tensor, mask_rows: Tensor) -> None:
    """Row r keeps the tokens whose bit is 1 in mask[mask_rows[r]] [ceil(V / 32)] int32 (bit t % 32 of word t // 32); below 0: untouched."""
    rows, vocab = logits.shape
    require(mask.shape[1] == -(-vocab // 32) and mask.is_contiguous(), "mask must be [Q, ceil(V / 32)] int32")
    if rows:
        _mask[(rows, -(-vocab // 4096))](logits, mask, mask_rows, vocab, logits.stride(0), mask.shape[1], BLOCK=4096, num_warps=8)


@launched(do_not_specialize=["entries"], do_not_specialize_on_alignment=["rows", "slots", "positions", "starts", "sizes"])
def _ban(logits, history, rows, slots, positions, words, starts, sizes, entries, stride, h_stride, LONGEST: tl.constexpr):
    """Grid (E)."""
    entry = tl.program_id(0)
    row = tl.load(rows + entry)
    size = tl.load(sizes + entry)
    if (row >= 0) & (size > 0):
        word = words + tl.load(starts + entry)
        slot = tl.load(slots + row)
        before = tl.load(positions + row) - (size - 1)
        i = tl.arange(0, LONGEST)
        inside = i < size - 1
        if (slot >= 0) & (before >= 0):
            had = tl.load(history + slot.to(tl.int64) * h_stride + before + i, mask=inside, other=0)
            same = tl.min((had == tl.load(word + i, mask=inside, other=0)).to(tl.int32), 0)
            if same == 1:
                tl.store(logits + row.to(tl.int64) * stride + tl.load(word + size - 1), float("-inf"))


def ban_words_(
    logits: Tensor, history: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, words: Tensor, starts: Tensor, sizes: Tensor,
    longest: int,
) -> None:  # fmt: skip
    """Bad words: for entry e, if the tokens before positions[rows[e]] in slot slots[rows[e]]'s history [S, L] equal all but the last token of
    words[starts[e] : starts[e] + sizes[e]] (flat int32), that last token becomes -inf in row rows[e] (below 0: padding). longest >= max(sizes)."""
    if rows.shape[0]:
        _ban[(rows.shape[0],)](
            logits, history, rows, slots, positions, words, starts, sizes, rows.shape[0], logits.stride(0), history.stride(0),
            LONGEST=power(max(longest, 2)), num_warps=1,
        )  # fmt: skip


@launched(do_not_specialize=["rows"], do_not_specialize_on_alignment=["pool_rows", "tokens"])
def _count(counts, pool_rows, tokens, rows, V, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pool = tl.load(pool_rows + at, mask=at < rows, other=-1)
    token = tl.load(tokens + at, mask=at < rows, other=-1)
    live = (pool >= 0) & (token >= 0)
    tl.atomic_add(counts + tl.where(live, pool, 0).to(tl.int64) * V + tl.where(live, token, 0), 1, mask=live)


def count_(counts: Tensor, pool_rows: Tensor, tokens: Tensor) -> None:
    """counts[pool_rows[r], tokens[r]] += 1 where both are 0 or more."""
    if tokens.shape[0]:
        _count[(-(-tokens.shape[0] // 128),)](counts, pool_rows, tokens, tokens.shape[0], counts.shape[1], BLOCK=128)


@launched(do_not_specialize_on_alignment=["pool_rows"])
def _clear(counts, in_prompt, pool_rows, V, BLOCK: tl.constexpr):
    pool = tl.load(pool_rows + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (at < V) & (pool >= 0)
    tl.store(counts + pool * V + at, tl.zeros([BLOCK], tl.int32), mask=mask)
    tl.store(in_prompt + pool * V + at, tl.zeros([BLOCK], tl.uint8), mask=mask)


@launched(do_not_specialize_on_alignment=["pool_rows", "slots", "splits", "ends"])
def _start(counts, in_prompt, pool_rows, history, slots, splits, ends, V, h_stride, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    pool = tl.load(pool_rows + entry).to(tl.int64)
    slot = tl.load(slots + entry).to(tl.int64)
    split = tl.load(splits + entry)
    end = tl.load(ends + entry)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (at < end) & (pool >= 0) & (slot >= 0)
    token = tl.load(history + slot * h_stride + at, mask=live, other=0)
    tl.store(in_prompt + pool * V + token, tl.full([BLOCK], 1, tl.uint8), mask=live & (at < split))
    tl.atomic_add(counts + pool * V + token, 1, mask=live & (at >= split))


def start_counts(
    counts: Tensor, in_prompt: Tensor, pool_rows: Tensor, history: Tensor, slots: Tensor, splits: Tensor, ends: Tensor
) -> None:
    """Fill pool rows from histories: in_prompt from positions [0, splits[e]), counts from [splits[e], ends[e]). Pool rows are distinct."""
    entries, vocab = pool_rows.shape[0], counts.shape[1]
    if entries:
        flags = in_prompt.view(torch.uint8)
        _clear[(entries, -(-vocab // 4096))](counts, flags, pool_rows, vocab, BLOCK=4096)
        _start[(entries, -(-history.shape[1] // 1024))](
            counts, flags, pool_rows, history, slots, splits, ends, vocab, history.stride(0), BLOCK=1024
        )
