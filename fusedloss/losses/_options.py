"""The shared options in each loss's signature and documentation."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from ..engine.options import DEFAULTS, RowOptions

_OPTIONS_DOC = {
    "weight": "(V,) class weights w. A row's loss is multiplied by that of its target.",
    "ignore_index": "target value whose rows count for nothing: no loss, no gradient, not looked at.",
    "reduction": '"mean" over the targets not ignored, "sum", or "none" for losses of the target\'s shape.',
    "label_smoothing": "eps in [0, 1]: (1 - eps) * loss + (eps / V) * sum_j w_j (-log p_j).",
    "smoothing_over": """"all" V classes as above, or "others": eps / (V - 1) for each class but the target,
(1 - eps - eps / (V - 1)) * loss + eps / (V - 1) * sum_j w_j (-log p_j), as in fairseq.""",
    "z_loss": "adds z_loss * lse^2 to each row, lse = log sum_j exp z_j (weighted as the row is).",
    "token_weight": "tensor of the target's shape by which each target's loss is multiplied. Differentiated if it\n"
    "requires grad.",
    "normalizer": """number or 0-d tensor that replaces the divisor of "mean", for gradient accumulation and for
ranks, of which :func:`~fusedloss.normalizer` counts the targets; or "token_weight" for the sum of the
token weights of the targets that count.""",
    "return_stats": "also return :class:`~fusedloss.RowStats` of each row, detached.",
    "inplace_backward": """let the gradient take the logits' memory in the backward pass. The logits must not be
needed after that; a second backward raises. Needs an implementation with kernels, and computed
logits; those in the memory of a leaf that requires grad raise. Under torch.compile the gradient is a
new tensor all the same.""",
    "group": """of torch.distributed: this rank has the logits of some of the classes, any number, its ranks one
after the other have those of all. Targets, class weights, candidates and all else are of all
classes, and the same on every rank; so are the loss and the upstream gradients. A
:class:`~fusedloss.VocabularyShards` in its place saves a collective in each call.""",
    "impl": """"cpu", "triton" or "cuda" (GPUs), or "reference"; None takes FUSEDLOSS_IMPL or else the fastest
that is ready. "cuda" makes the gradient of "mean" and "sum" with the loss, of one read of the logits, and the backward
does nothing where the upstream gradient is 1; where it is not, bfloat16 gradients are rounded twice. Not so for
float16, whose gradients could vanish before they are scaled, and under torch.compile. Under function transforms
(torch.func, forward-mode differentiation) "reference" runs, whatever is named.""",
}

_SHAPES_DOC = """
Shapes:
    input (*, V) of float64, float32, bfloat16 or float16 with any strides; target (*) of int64, int32, int16, int8
    or uint8. The loss is float32, float64 for float64 input. With no target to count, it is 0 and so are the gradients.

Raises:
    TypeError, ValueError: an argument of the wrong kind, shape or range.
    IndexError: a target outside [0, V) that is not ignore_index (on a GPU: that row's loss is NaN).
    RuntimeError: the named implementation cannot run here; `inplace_backward` would overwrite a leaf; a function
        transform together with `inplace_backward` or `group`.
"""

_Loss = TypeVar("_Loss", bound=Callable[..., Any])


def row_form(*without: str) -> Callable[[_Loss], _Loss]:
    """Spells out the shared options in a loss's signature and docstring; `without`: those it does not take."""

    def document(loss: _Loss) -> _Loss:
        signature = inspect.signature(loss)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                # The text, as of the loss's own arguments: a TypedDict wraps it in a ForwardRef.
                annotation=RowOptions.__annotations__[name].__forward_arg__,
            )
            for name, value in DEFAULTS.items()
            if name not in without
        ]
        loss.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
        options = "".join(
            textwrap.indent(f"{name}: {textwrap.indent(text, '    ').strip()}\n", "    ")
            for name, text in _OPTIONS_DOC.items()
            if name not in without
        )
        loss.__doc__ = f"{inspect.cleandoc(loss.__doc__ or '')}\n\nOptions of every row loss:\n{options}{_SHAPES_DOC}"
        return loss

    return document
