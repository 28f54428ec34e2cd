"""Logits before they are made: hidden states, the weight and bias that project them, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """How the logits of a projection are made."""

    softcap: float
    """z = softcap * tanh(z / softcap); 0 for none."""
    budget: int
    """Bytes of a chunk of logits, and of what is kept beside them; 0 for as many as the device's rule says."""
    drop_ignored: bool
    """Leave ignored rows out of the products. Counting them is a host read."""
    mask_target: bool = False
    """Take the target's logit for -inf: a row is compared with all but itself."""
    group: str = ""
    """Name of the process group over whose ranks the classes are divided, which sum the hidden states' gradient."""
    row_parts: int = 1
    """Over how many of its ranks the rows of the hidden states are divided too, evenly."""
    most_rows: int = 0
    """Rows of a chunk where the ranks must agree on them; 0: by the budget."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The logits hidden @ weight.T + bias, (*, V), before they are made. A loss takes it in place of logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    form: Form

    @property
    def shape(self) -> torch.Size:
        first, *others = *self.hidden.shape[:-1], self.weight.shape[0]
        return torch.Size((first * self.form.row_parts, *others))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def dim(self) -> int:
        return self.hidden.dim()

    def flatten(self) -> Projection:
        """With hidden states (N, D)."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def logits(self, target: Tensor | None = None) -> Tensor:
        """All of them, differentiable: the definition."""
        return dense_logits(self.hidden, self.weight, self.bias, self.form, target)


def dense_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form, target: Tensor | None = None
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if form.softcap != 0:
        logits = (logits / form.softcap).tanh() * form.softcap
    if form.mask_target:
        assert target is not None
        logits = logits.scatter(-1, target.clamp(min=0)[..., None], -torch.inf)  # ignored rows are not looked at
    return logits
