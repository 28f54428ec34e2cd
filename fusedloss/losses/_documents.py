"""What the docstrings of the losses share: the options, and the text of a linear form."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.options import DEFAULTS

_OPTIONS_DOC = {
    "temperature": """number or 0-d tensor from 1e-30 to 1e30 that divides the logits, after the softcap and before all
other options; statistics are those of the quotients. A value on a GPU is not checked: bad ones give NaN rows.
Differentiated if it requires grad, but not with softcap or inplace_backward; the gradient, from sum_j z_j dL/dz_j,
loses digits if the logits have a large common offset.""",
    "weight": "(V,) class weights w. A row's loss is multiplied by the weight of its target.",
    "ignore_index": "target value whose rows are skipped: their loss and gradient are 0, their logits are not read.",
    "reduction": '"mean" over the targets not ignored, "sum", or "none" for losses of the target\'s shape.',
    "label_smoothing": "eps in [0, 1]: (1 - eps) * loss + (eps / V) * sum_j w_j (-log p_j).",
    "smoothing_over": """"all" V classes as above, or "others": eps / (V - 1) for each class except the target,
(1 - eps - eps / (V - 1)) * loss + eps / (V - 1) * sum_j w_j (-log p_j), as in fairseq.""",
    "z_loss": "adds z_loss * lse^2 to each row, lse = log sum_j exp z_j (weighted as the row is).",
    "token_weight": "tensor of the target's shape that multiplies each target's loss. Differentiated if it\n"
    "requires grad.",
    "normalizer": """number or 0-d tensor that replaces the divisor of "mean", for gradient accumulation and for
several ranks; :func:`~fusedloss.normalizer` computes it. Or "token_weight", for the sum of the token weights of the
targets that count.""",
    "return_stats": "also return :class:`~fusedloss.RowStats` of each row, detached.",
    "stats": """additional statistics that ``return_stats=True`` returns: ("entropy",) for the entropy of softmax(z), in
nats.""",
    "inplace_backward": """write the gradient into the logits' memory in the backward pass. The logits must not be
needed after that; a second backward raises. This needs an implementation with kernels, and computed logits; those in
the memory of a leaf that requires grad raise. Under torch.compile the gradient is always a new tensor.""",
    "group": """of torch.distributed: each rank has the logits of some classes, any number of them, in the order of the
ranks. Targets, class weights, candidates and all other arguments cover all classes and are the same on every rank; so
are the loss and the upstream gradients. A :class:`~fusedloss.VocabularyShards` in its place saves a collective in each
call.""",
    "impl": """"cpu", "triton" or "cuda" (GPUs), or "reference"; None takes FUSEDLOSS_IMPL or else the fastest
that is ready. "cuda" computes the gradient of "mean" and "sum" with the loss, from one read of the logits. The
backward then does nothing if the upstream gradient is 1; if it is not, bfloat16 gradients are rounded twice. "cpu" does
so for at most 64 classes, and for losses with a teacher or soft targets. Neither does so under torch.compile, nor for
float16, whose gradients could vanish before they are scaled. Under function
transforms (torch.func, forward-mode differentiation) "reference" runs, whatever `impl` is.""",
}

_SHAPES_DOC = """
Shapes:
    input (*, V) of float64, float32, bfloat16 or float16 with any strides; target (*) of int64, int32, int16, int8
    or uint8. The loss is float32, float64 for float64 input. Without a target that counts, it and the gradients are 0.

Raises:
    TypeError, ValueError: an argument of the wrong kind, shape or range.
    IndexError: a target outside [0, V) that is not ignore_index (on a GPU: that row's loss is NaN).
    RuntimeError: the named implementation cannot run here; `inplace_backward` would overwrite a leaf; a function
        transform together with `inplace_backward` or `group`.
"""

_LINEAR_DOC = """{summary}

This is the linear form of :func:`~fusedloss.{row}`.
The logits ``input @ linear_weight.T + linear_bias`` are computed one chunk at a time and never stored. "mean" and "sum"
compute the gradients together with the loss (three matrix products in all). The logits are recomputed for the gradients
(four) with "none", with a learnable argument (such as a gamma that requires grad), and for flex losses of several
chunks without `per_chunk`. The weight's gradient is accumulated at least in float32. Gradients are computed only for
tensors that require them.

Args:
    input: hidden states (*, D) of float64, float32, bfloat16 or float16. Under autocast it, the weight and the bias
        are cast as by torch.nn.functional.linear.
    linear_weight: (V, D), such as the weight of the output layer, tied or not.
    target: (*) class indices of any integer dtype.
    linear_bias: (V,) or None.
    softcap: cap c > 0 of the logits, z = c tanh(z / c); None for none.
    budget: bytes that a chunk of logits may take (with softcap, including its slope). None takes
        FUSEDLOSS_LINEAR_BUDGET or else 128 MiB, and for the gradient of a weight (V, D) on NVIDIA GPUs up to 4 V D.
    drop_ignored: leave ignored rows out of the chunks and products. The host reads their number, so that None does it
        on a CPU only. Without it their hidden states must be finite: else the weight's gradient is NaN, as in PyTorch.
    sequence_parallel: with a group: each rank has an equal part of the hidden states, (S / R, *, D), in the order of
        the ranks along the first dimension; the target is that of all ranks, (S, *). The parts are gathered chunk by
        chunk, and their gradient is scattered likewise. No rank ever holds all of them, except where a loss over the
        classes runs in PyTorch.
{arguments}
    impl: as below, or "triton_fused": on a GPU, kernels compute the logits where they need them and store none. Only
        gradients take chunks of `budget` bytes, and gradients of "mean" and "sum" take four products too.

Returns and raises as the row form. Also raises ValueError for sizes, dtypes or devices that do not match, and for a
budget too small for the logits of one row.

The row form, :func:`~fusedloss.{row}`:

{document}
"""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="        ")


def row_form(loss: Callable[..., Any], without: Sequence[str]) -> str:
    """Return the docstring of a loss with the shared options, except those in `without`."""
    options = ""
    for name, text in _OPTIONS_DOC.items():
        if name not in without:
            default = DEFAULTS[name]  # type: ignore[literal-required]
            shown = "" if default is None else f" Default: {default!r}."
            options += _wrapped(f"{name}: {text}{shown}") + "\n"
    return f"{inspect.cleandoc(loss.__doc__ or '')}\n\nOptions of every row loss:\n{options}{_SHAPES_DOC}"


def of_teacher(loss: Callable[..., Any], names: Sequence[str]) -> str:
    """Return the docstring of a loss against a teacher, with %others% replaced by arguments that it does not name."""
    document = inspect.cleandoc(loss.__doc__ or "")
    (line,) = re.findall(r"^ *%others%.*$", document, re.M) or [""]
    others = [x for x in names if not re.search(rf"^ +([a-z_, ]*, )?{x}(, [a-z_, ]*)?: \S", document, re.M)]
    return document.replace(line, _wrapped(line.strip().replace("%others%", ", ".join(others)))) if line else document


def linear_form(row: Callable[..., Any], arguments: Sequence[str]) -> str:
    """Return the docstring of the linear form of a loss, which has these arguments."""
    document = inspect.getdoc(row) or ""
    return _LINEAR_DOC.format(
        summary=document.splitlines()[0].replace("of logits", "of hidden states"),
        row=row.__name__,
        arguments=_wrapped(f"{', '.join(x for x in arguments if f'    {x}: ' not in _LINEAR_DOC)}: as below."),
        document=textwrap.indent(document, "    "),
    )
