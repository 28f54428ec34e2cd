"""Makes the linear form of a loss: the same loss of hidden states and the output layer's weight."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..distributed import dtensor, sequence
from ..engine.project import project

_DOC = """{summary}

The linear form of :func:`~fusedloss.{row}`: the same loss of the logits ``input @ linear_weight.T + linear_bias``,
which are made a chunk at a time and never stored. "mean" and "sum" make the gradients together with the loss (three
matrix products in all); "none", flex losses and parameters that require grad make the logits once more for them (four).
The weight's gradient is summed in float32 at least. Gradients are computed only for what requires them.

Args:
    input: hidden states (*, D) of float64, float32, bfloat16 or float16. Under autocast it, the weight and the bias
        are cast as by torch.nn.functional.linear.
    linear_weight: (V, D), such as the weight of the output layer, tied or not.
    target: (*) class indices of any integer dtype.
    linear_bias: (V,) or None.
    softcap: cap c > 0 of the logits, z = c tanh(z / c); None for none.
    budget: bytes that a chunk of logits may take (with softcap, and its slope); None takes FUSEDLOSS_LINEAR_BUDGET or
        else 128 MiB, and where an NVIDIA GPU sums the gradient of a weight (V, D) up to 4 V D bytes.
    drop_ignored: leave ignored rows out of the products. Their number is read by the host, so that None does it on a
        CPU only.
    sequence_parallel: with a group, whose ranks then have an equal part of the hidden states each, (S / R, *, D), one
        after the other along the first dimension; the target is that of all of them, (S, *). They are gathered chunk by
        chunk, and their gradient is sent back likewise: no rank ever has all of them, but where a loss over the classes
        runs in PyTorch.
    {arguments}: as below. An `impl` of these alone is "triton_fused": on a GPU, kernels make the logits wherever they
        look at them and store none; only gradients are chunks of `budget` bytes, and gradients of "mean" and "sum" take
        four products too.

Returns and raises as the row form, and ValueError for sizes, dtypes or devices that do not fit together and for a
budget too small for the logits of one row.

The row form, :func:`~fusedloss.{row}`:

{document}
"""


def linear_form(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The form over hidden states of a loss over logits."""

    def linear(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *arguments: Any,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        budget: int | None = None,
        drop_ignored: bool | None = None,
        sequence_parallel: bool = False,
        **options: Any,
    ) -> Any:
        input, linear_weight, linear_bias, group, sequence_parallel = dtensor.local_projection(
            input, linear_weight, linear_bias, options.get("group"), sequence_parallel
        )
        if group is not None:
            options["group"] = group
        parts = sequence.row_parts(sequence_parallel, group)
        projection = project(input, linear_weight, linear_bias, softcap, budget, drop_ignored, parts)
        return loss(projection, target, *arguments, **options)

    shared = inspect.signature(linear).parameters
    own = list(inspect.signature(loss).parameters.values())
    positional = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in own if p.kind is p.KEYWORD_ONLY and p.name != "inplace_backward"]
    form = [p for p in shared.values() if p.kind is p.KEYWORD_ONLY]
    sources = [shared[name] for name in ("input", "linear_weight")]
    linear.__signature__ = inspect.Signature([*sources, *positional[1:], *form, *keyword])  # type: ignore[attr-defined]
    linear.__name__ = f"linear_{loss.__name__}"
    linear.__qualname__ = linear.__name__
    linear.__module__ = loss.__module__
    linear.__doc__ = _DOC.format(
        summary=inspect.getdoc(loss).splitlines()[0].replace("of logits", "of hidden states"),  # type: ignore[union-attr]
        row=loss.__name__,
        arguments=", ".join(p.name for p in (*positional[2:], *keyword)),
        document=textwrap.indent(inspect.getdoc(loss) or "", "    "),
    )
    return linear
