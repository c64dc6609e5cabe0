"""Entry of drafts on the host: what drafts are worth, putting them behind, prompt lookup.

    verify(tokens[D], slots[R], positions[R], bounds[R + 1], history[S, L]) -> (counts[R], kept[D])
    verify_tree(tokens[D], slots[R], positions[R], bounds[R + 1], history[S, L], parents[N], deepest) -> (counts[R], kept[D], sources[R, deepest])
    put_drafts(drafts[R, K], slots[R], ends[R], history, vocab) -> None
    ngrams(slots[R], ends[R], history, shortest, longest, out[R, K]) -> None

All int32 and contiguous, which callers see to: these are called in every step. The definitions are in reference.py; slots and positions are checked, IndexError for one
outside the history. C's prompt lookup looks from the end of the history backwards, and stops at the first place where `longest` tokens fit.
"""

from __future__ import annotations

import torch

from penstock.kernels import native
from penstock.kernels.checks import require
from penstock.kernels.drafting import reference
from penstock.kernels.native.bind import check


def verify(
    tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor, history: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module."""
    lib = native.library()
    if lib is None:
        return reference.verify(tokens, slots, positions, bounds, history)
    counts, kept = torch.empty_like(slots), torch.empty_like(tokens)
    code = lib.lib.ps_verify(
        tokens.data_ptr(), slots.data_ptr(), positions.data_ptr(), bounds.data_ptr(), len(slots), history.data_ptr(), *history.shape,
        counts.data_ptr(), kept.data_ptr(),
    )  # fmt: skip
    check(code)
    return counts, kept


def verify_tree(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    bounds: torch.Tensor,
    history: torch.Tensor,
    parents: torch.Tensor,
    deepest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the module."""
    lib = native.library()
    if lib is None:
        return reference.verify_tree(tokens, slots, positions, bounds, history, parents, deepest)
    require(len(tokens) == 0 or int(bounds.diff().max()) <= len(parents), "a row must have no more draws than the tree has nodes")
    counts, kept = torch.empty_like(slots), torch.empty_like(tokens)
    sources = torch.empty(len(slots), deepest, dtype=torch.int32)
    code = lib.lib.ps_verify_tree(
        tokens.data_ptr(), slots.data_ptr(), positions.data_ptr(), bounds.data_ptr(), len(slots), history.data_ptr(), *history.shape,
        parents.data_ptr(), deepest, counts.data_ptr(), kept.data_ptr(), sources.data_ptr(),
    )  # fmt: skip
    check(code)
    return counts, kept, sources


def put_drafts(drafts: torch.Tensor, slots: torch.Tensor, ends: torch.Tensor, history: torch.Tensor, vocab: int) -> None:
    """See the module."""
    lib = native.library()
    if lib is None:
        reference.put_drafts(drafts, slots, ends, history, vocab)
        return
    check(
        lib.lib.ps_put_drafts(
            drafts.data_ptr(), slots.data_ptr(), ends.data_ptr(), *drafts.shape, history.data_ptr(), *history.shape, vocab
        )
    )


def ngrams(slots: torch.Tensor, ends: torch.Tensor, history: torch.Tensor, shortest: int, longest: int, out: torch.Tensor) -> None:
    """See the module."""
    require(1 <= shortest <= longest, "shortest must be at least 1 and at most longest")
    lib = native.library()
    if lib is None:
        reference.ngrams(slots, ends, history, shortest, longest, out)
        return
    code = lib.lib.ps_ngrams(
        history.data_ptr(), *history.shape, slots.data_ptr(), ends.data_ptr(), len(slots), shortest, longest, out.data_ptr(),
        out.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    check(code)
