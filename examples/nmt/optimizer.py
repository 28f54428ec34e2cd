"""Muon for the matrices of the layers, AdamW for the embedding, the norms and the biases.

In a run of a few hundred updates Muon gets much further than AdamW alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonAdamW:
    def __init__(self, model: nn.Module, lr: float) -> None:
        """`lr` is AdamW's; Muon's is twice that."""
        named = list(model.named_parameters())
        self._parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.dim() == 2 and "embedding" not in name]
        others = [p for name, p in named if p.dim() != 2 or "embedding" in name]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, 2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), 2 * lr),
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
