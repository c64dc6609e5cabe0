"""The optimisers of the demo model and its heads: Muon for matrices, AdamW for the rest, and the learning rate's course.

This module knows nothing about what is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a stack of matrices near one, by a quintic Newton-Schulz iteration."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """Orthogonalised momentum for the matrices of all layers, those of one shape in one go."""

    def __init__(self, matrices: list[torch.nn.Parameter], *, momentum: float = 0.95, decay: float = 0.05) -> None:
        self.momentum, self.decay = momentum, decay
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape, device=group[0].device)) for shape, group in shapes.items()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; its size per entry is like Adam's, so one learning rate suits both."""
        for group, kept in self._groups:
            gradients = torch.stack([weight.grad for weight in group if weight.grad is not None])
            kept.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(kept, self.momentum)).float()
            update *= -rate * 0.2 * max(kept.shape[-2:]) ** 0.5
            weights = list(group)
            torch._foreach_mul_(weights, 1 - rate * self.decay)
            torch._foreach_add_(weights, list(update.unbind()))


class Learner:
    """A model with its two optimisers."""

    def __init__(self, model: torch.nn.Module, rate: float) -> None:
        self.model, self.rate = model, rate
        tables = ("embed_tokens.weight", "lm_head.weight")
        matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and not name.endswith(tables)]
        rest = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or name.endswith(tables)]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda)

    def step(self, scale: float) -> None:
        """Apply the gradients and clear them."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * scale
        self.adam.step()
        self.muon.step(self.rate * scale)
        self.model.zero_grad(set_to_none=True)


def rate_scale(progress: float) -> float:
    """Warm up for a fiftieth of the time, hold, then fall to nothing over the last 45 percent."""
    return min(1.0, progress / 0.02 + 0.01, max(0.0, (1.0 - progress) / 0.45))
