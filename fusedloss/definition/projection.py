"""Logits before they are made: hidden states, the weight and bias that project them, and how."""

# Annotations are evaluated here: a Form's are read, see fusedloss.definition.rows.
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import IGNORED


class Form(NamedTuple):
    """How logits are made, above all those of a projection."""

    softcap: float = 0.0
    """z = softcap * tanh(z / softcap); 0 for none."""
    budget: int = 0
    """Bytes of a chunk of logits, and of what is kept beside them; 0 for as many as the device's rule says."""
    drop_ignored: bool = False
    """Leave ignored rows out of the products: their hidden states may hold anything. Counting them is a host read."""
    mask_target: bool = False
    """Take the target's logit for -inf: a row is compared with all but itself."""
    symmetric: bool = False
    """The weight is the hidden states themselves, whose gradient is that of both. It knows no temperature."""
    tempered: bool = False
    """Whether the logits, of a row form too, are multiplied by the last of ``Rows.scalars``."""
    teacher_softcap: float = 0.0
    """That of the teacher's logits."""
    row_parts: int = 1
    """Over how many ranks of the group the rows of the hidden states are divided too, evenly."""
    most_classes: int = 0
    """The most classes that a rank has, where the ranks must agree on the chunks; 0: nobody else counts."""
    group: str = ""
    """Name of the process group over whose ranks the classes are divided, which sum the hidden states' gradient."""


class Projection:
    """The logits sum_i hidden[i] @ weight[i].T + bias, (*, V), not made yet. A loss takes it in place of logits."""

    def __init__(self, hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, form: Form) -> None:
        self.hidden, self.weight, self.bias, self.form = hidden, weight, bias, form
        first, *others = *hidden[0].shape[:-1], weight[0].shape[0]
        self.shape = torch.Size((first * form.row_parts, *others))
        self.dtype, self.device = hidden[0].dtype, hidden[0].device

    def dim(self) -> int:
        return len(self.shape)

    def logits(self) -> Tensor:
        """All of them, differentiable."""
        return dense_logits(self.hidden, self.weight, self.bias, self.form, None)


def dense_logits(
    hidden: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, form: Form, target: Tensor | None
) -> Tensor:
    """The logits of hidden states, by their definition."""
    columns = hidden[0] if form.symmetric else weight[0]
    if form.drop_ignored and target is not None:
        # Those of ignored rows may hold anything, and 0 times NaN would be in the weight's gradient.
        hidden = [h.masked_fill((target == IGNORED)[..., None], 0) for h in hidden]
    logits = torch.nn.functional.linear(hidden[0], columns, bias)
    for h, w in zip(hidden[1:], weight[1:], strict=True):
        logits = logits + torch.nn.functional.linear(h, w)
    if form.softcap != 0:
        logits = (logits / form.softcap).tanh() * form.softcap
    if form.mask_target:
        assert target is not None
        logits = logits.scatter(-1, target.clamp(min=0)[..., None], -torch.inf)  # ignored rows are not looked at
    return logits
