"""Checks of what a linear form makes its logits from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_bool, check_dense, check_dtype, check_number, has_autocast
from ..definition.projection import Form, Projection
from ..distributed.fsdp import check_whole
from . import budgets

#: What a caller calls the hidden states, the weight, the bias and the cap: of a student, and of its teacher.
NAMES = ("input", "linear_weight", "linear_bias", "softcap")
TEACHER_NAMES = ("teacher_input", "teacher_weight", "teacher_bias", "teacher_softcap")


def project(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    softcap: float | None,
    budget: int | None,
    drop_ignored: bool | None,
    row_parts: int = 1,
    names: tuple[str, str, str, str] = NAMES,
) -> Projection:
    """Check what makes the logits and cast it under autocast. The pairs after the first are those of adapters."""
    of_hidden, of_weight, of_bias, of_cap = names
    for h, w in zip(hidden, weight, strict=True):
        for name, value in ((of_hidden, h), (of_weight, w), (of_bias, bias)):
            if value is None and name == of_bias:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.layout is not torch.strided or value.is_nested:
                check_dense(name, value)
            if value.dtype not in DTYPES:  # of a quantized weight, whose numbers autocast would take for its values
                check_dtype(name, value)
        check_whole(w)
        if h.dim() < 1 or w.dim() != 2:
            raise ValueError(
                f"{of_hidden} must be (*, D) and {of_weight} (V, D), got shapes {tuple(h.shape)} and {tuple(w.shape)}"
            )
        if h.shape[-1] != w.shape[1]:
            raise ValueError(f"{of_hidden} has D = {h.shape[-1]} features, but {of_weight} {w.shape[1]}")
        if w.shape[0] != weight[0].shape[0]:
            raise ValueError(f"the output layer has {weight[0].shape[0]} classes, but an adapter of it {w.shape[0]}")
    if bias is not None and bias.shape != weight[0].shape[:1]:
        raise ValueError(f"{of_bias} must be ({weight[0].shape[0]},), one a class, got shape {tuple(bias.shape)}")
    if hidden[0].device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        *pairs, bias = autocast(*hidden, *weight, bias)
        hidden, weight = pairs[: len(hidden)], pairs[len(hidden) :]
    first = hidden[0]
    for name, values in (("input of an adapter", hidden), (of_weight, weight), (of_bias, [bias])):
        for value in values:
            if value is None:
                continue
            if value.device != first.device:
                raise ValueError(f"{name} is on {value.device}, but {of_hidden} on {first.device}")
            if value.dtype != first.dtype:
                raise ValueError(f"{name} is {value.dtype}, but {of_hidden} {first.dtype}")
    if softcap is not None:
        check_number(of_cap, softcap, 0, above=True)
    budget = budgets.checked_budget(budget, weight[0].shape[0] * first.element_size() * (1 if softcap is None else 2))
    if drop_ignored is None:
        drop_ignored = first.device.type == "cpu"
    else:
        check_bool(drop_ignored=drop_ignored)
    if row_parts > 1:
        drop_ignored = False  # whose rows they are matters
    cap = float(softcap or 0.0)
    if torch.compiler.is_compiling():  # which would make a variable of it, that the second loss of a graph cannot read
        cap = float(f"{cap}")
    form = Form(cap, budget, drop_ignored, teacher_softcap=0.0, row_parts=row_parts)
    return Projection(hidden, weight, bias, form)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Return tensors in the dtype in which autocast would multiply them."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
