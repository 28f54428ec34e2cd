"""The gradient of a temperature that is learnt, from those of what makes the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..definition.rows import Rows, Spec
from ..distributed.vocabulary import VocabularyShards
from . import budgets

#: Bytes of a product of logits and their gradient that is summed at a time, on a CPU.
_BLOCK_BYTES = 8 * 2**20


def needed(rows: Rows, of_sources: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients of ``rows.sources`` that of the temperature is made of, too."""
    count = len(rows.hidden)
    others = tuple(of_sources[count : count + len(rows.weight)])
    return (True,) * count + others + (True,) * (rows.bias is not None)


def by_scalars(rows: Rows, spec: Spec, gradients: Sequence[Tensor | None], shards: VocabularyShards | None) -> Tensor:
    """Return the gradient of ``rows.scalars``, of which the last is the factor f of the logits z, 1 / temperature.

    L is a function of f z, so that f dL/df is the sum of z_j dL/dz_j. Where z is linear in hidden states h and a bias
    b, that is the sum of h dL/dh and b dL/db: the passes need to know nothing of it.
    """
    scalars, count = rows.scalars, len(rows.hidden)
    assert scalars is not None
    hidden = [_dot(x, g) for x, g in zip(rows.hidden, gradients[:count], strict=True) if g is not None]
    bias = [_dot(rows.bias, gradients[-1])] if rows.bias is not None and gradients[-1] is not None else []
    zero = scalars.new_zeros(())
    if shards is None:
        total = sum([*hidden, *bias], zero)
    elif rows.is_linear and spec.form.row_parts == 1:  # whose gradients are summed over the ranks already
        total = sum(hidden, zero) + shards.total(sum(bias, zero))
    else:
        total = shards.total(sum([*hidden, *bias], zero))
    return torch.cat([scalars.new_zeros(3), (total / scalars[-1]).to(scalars.dtype).reshape(1)])


def _dot(x: Tensor, gradient: Tensor) -> Tensor:
    """The sum of products, in float32 at least. Where x is not finite, in an ignored row, its gradient is 0."""
    x, gradient = x.reshape(-1), gradient.reshape(-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    at_a_time = budgets.at_a_time(x.device, _BLOCK_BYTES)
    step = x.shape[0] if torch.compiler.is_compiling() else at_a_time // dtype.itemsize
    total = torch.zeros((), dtype=dtype, device=x.device)
    for begin in range(0, x.shape[0], max(1, step)):
        part = x[begin : begin + step].to(dtype)
        total = total + (part.masked_fill(~part.isfinite(), 0) * gradient[begin : begin + step]).sum()
    return total
