"""The gradient of a temperature that is learnt, from those of what makes the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..definition.rows import Rows, Spec
from ..distributed.vocabulary import VocabularyShards

#: Bytes of a product of logits and their gradient that is summed at a time.
_BLOCK_BYTES = 8 * 2**20


def with_temperature(rows: Rows, spec: Spec, shards: VocabularyShards | None = None) -> Rows:
    """Have the gradients of hidden states and bias, or of logits, give that of the temperature too.

    With z the logits before it and L a function of z / temperature, dL / d temperature is
    -sum_j z_j dL/dz_j / temperature. Where z is linear in hidden states h and bias b, the sum is that of h dL/dh and
    b dL/db: the passes need to know nothing of it.
    """
    scalars = rows.scalars
    if not spec.form.tempered or scalars is None or not scalars.requires_grad or not torch.is_grad_enabled():
        return rows
    count, bias = len(rows.hidden), [] if rows.bias is None else [rows.bias]
    hidden_whole = rows.is_linear and spec.form.row_parts == 1
    passed = _Through.apply(shards, count if hidden_whole else 0, scalars[-1], *rows.hidden, *bias)
    return rows._replace(hidden=list(passed[:count]), bias=passed[count] if bias else None)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, shards: VocabularyShards | None, whole: int, factor: Tensor, *made_of: Tensor
    ):
        ctx.save_for_backward(factor, *made_of)
        ctx.settings = shards, whole
        return tuple([x.view_as(x) for x in made_of])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor, *made_of), (shards, whole) = ctx.saved_tensors, ctx.settings
        products = [_dot(x, g).to(factor.dtype) for x, g in zip(made_of, gradients, strict=True)]
        if shards is not None:
            # The first gradients are summed over the ranks already.
            products = [*products[:whole], shards.total(sum(products[whole:], factor.new_zeros(())))]
        return None, None, sum(products, factor.new_zeros(())) / factor, *gradients


def _dot(x: Tensor, gradient: Tensor) -> Tensor:
    """The sum of products, in float32 at least; a class without probability has no part in it."""
    x, gradient = x.reshape(-1), gradient.reshape(-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = x.shape[0] if torch.compiler.is_compiling() else _BLOCK_BYTES // dtype.itemsize
    total = torch.zeros((), dtype=dtype, device=x.device)
    for begin in range(0, x.shape[0], max(1, step)):
        part = x[begin : begin + step].to(dtype)
        total = total + (part.masked_fill(part == -torch.inf, 0) * gradient[begin : begin + step]).sum()
    return total
