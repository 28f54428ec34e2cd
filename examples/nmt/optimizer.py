"""Muon for the matrices of the layers, AdamW for the embedding, the norms and the biases.

In a run of a few hundred updates Muon gets much further than AdamW alone: README.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), at the size of AdamW's updates (Liu et al. 2025).

    torch.optim.Muon does the same, always in bf16, which is very slow on a CPU without instructions for it.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(state["momentum"], group["momentum"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(_orthogonal(ahead.to(self._dtype)), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def _orthogonal(x: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition of x, by five steps of a Newton-Schulz iteration."""
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.T


class MuonAdamW:
    def __init__(self, model: nn.Module, lr: float, dtype: str) -> None:
        """`lr` is AdamW's; Muon's is twice that."""
        named = list(model.named_parameters())
        self._parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.dim() == 2 and "embedding" not in name]
        others = [p for name, p in named if p.dim() != 2 or "embedding" in name]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, 2 * lr, torch.bfloat16 if dtype == "bf16" else torch.float32), 2 * lr),
            (torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True), lr),
        ]

    def step(self, share: float) -> None:
        """One update at `share` of the full learning rates; the gradients are spent."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for part, lr in self._parts:
            for group in part.param_groups:
                group["lr"] = share * lr
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part, _ in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for (part, _), saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)


def schedule(step: int, steps: int) -> float:
    """The share of the full learning rate: up over the first 5 % of the updates, then down to 0, linearly."""
    warmup = max(1, round(0.05 * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
