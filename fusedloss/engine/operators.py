"""The operators: schemas, checks of their arguments, what they do to shapes and dtypes (the fakes), and their kernels.

``forward``    statistics and pick indices and, with an epilogue, losses, the coefficients of their gradient, and the
               gradients of their ``row_weight``-weighted sum that the spec asks for
``backward``   the gradients by what makes the logits, times ``upstream``; ``backward_`` that of logits in hand, in
               their own memory
``sums``       the sums of a class term, from statistics with the top class: over the rows, (2, V), or over the classes,
               (2, N), as the spec says
``terms``      losses and coefficients of the rows, from the same statistics: with dL/d error as class weights and
               dL/d agreement of the row's target as the last parameter, their gradient is that of a loss L of the sums
               over the rows
``scale_``     a gradient times a 0-d factor, which the host does not read
``gather``     what each rank of a process group, by its name, has of a tensor, (R, ...)
``sum_over_ranks``  the sum of what they have

Their arguments begin with the :class:`~fusedloss.definition.rows.Rows`, one tensor or list of tensors each, and end
with an encoded :class:`~fusedloss.definition.rows.Spec`, which names the backend. Rows of logits in hand and of hidden
states take the same operators. Layouts are told in :mod:`fusedloss.definition.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.base import Backend
from ..checks import DTYPES, compute_dtype
from ..definition.rows import SCHEMA, Job, Rows, Spec
from ..definition.statistics import COEFFICIENTS, STATISTICS, new_losses, new_statistics
from . import chunks

_library = torch.library.Library("fusedloss", "DEF")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator of that schema, whose kernel is the decorated function on every device."""

    def define(kernel: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _library.define(schema)
        # Autograd must not look inside: an exported graph calls operators with gradients on.
        _library.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedloss::{name}", fake, lib=_library)
        return getattr(torch.ops.fusedloss, name).default

    return define


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *flat, row_weight, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    _check("forward", rows, spec, row_weight=row_weight)
    picks = spec.pick_count(rows.candidates)
    statistics, index = new_statistics(rows.hidden[0], rows.target, picks, int(spec.top_q))
    outputs = new_losses(statistics, picks) if spec.epilogue else _no_losses(statistics)
    return outputs[0], statistics, index, outputs[1], _new_gradients(rows, spec)


@_operator(
    f"forward({SCHEMA}, Tensor? row_weight, str spec) -> "
    "(Tensor loss, Tensor statistics, Tensor index, Tensor coefficients, Tensor[] gradients)",
    _fake_forward,
)
def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *flat, row_weight, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    backend = _check("forward", rows, spec, row_weight=row_weight)
    if rows.is_linear:
        return chunks.forward(rows, row_weight, spec, backend)
    job = Job.new(rows, spec)
    gradients = []
    if any(spec.needed):
        job.grad, job.upstream = backend.new_gradient(rows.logits), row_weight
        gradients = [job.grad]
        backend.with_gradient(job)
    else:
        backend.forward(job)
    if spec.top_q:
        chunks.put_top_q(job, backend)
    loss, coefficients = job.loss, job.coefficients
    if loss is None or coefficients is None:
        loss, coefficients = _no_losses(job.statistics)
    return loss, job.statistics, job.index, coefficients, gradients


def _new_gradients(rows: Rows, spec: Spec) -> list[Tensor]:
    return chunks.new_gradients(rows, spec) if any(spec.needed) else []


def _no_losses(statistics: Tensor) -> tuple[Tensor, Tensor]:
    return statistics.new_empty(0), statistics.new_empty((0, 0))


def _fake_backward(*arguments: Any) -> list[Tensor]:
    *flat, statistics, index, coefficients, upstream, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    _check("backward", rows, spec, statistics, index, coefficients, upstream=upstream)
    return chunks.new_gradients(rows, spec)


_SAVED = "Tensor statistics, Tensor index"
_BACKWARD = f"{_SAVED}, Tensor coefficients, Tensor? upstream, str spec"


@_operator(f"backward({SCHEMA}, {_BACKWARD}) -> Tensor[]", _fake_backward)
def backward(*arguments: Any) -> list[Tensor]:
    *flat, statistics, index, coefficients, upstream, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    backend = _check("backward", rows, spec, statistics, index, coefficients, upstream=upstream)
    if rows.is_linear:
        return chunks.backward(rows, statistics, index, coefficients, upstream, spec, backend)
    gradient = backend.new_gradient(rows.logits)
    backend.backward(Job(rows, spec, statistics, index, None, coefficients, gradient, upstream))
    return [gradient]


def _fake_backward_(*arguments: Any) -> None:
    *flat, statistics, index, coefficients, upstream, text = arguments
    _check("backward_", Rows(*flat), Spec.decode(text), statistics, index, coefficients, upstream=upstream)


@_operator(
    f"backward_({SCHEMA.replace('Tensor[]', 'Tensor(a!)[]', 1)}, {_BACKWARD}) -> ()",
    _fake_backward_,
)
def backward_(*arguments: Any) -> None:
    *flat, statistics, index, coefficients, upstream, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    backend = _check("backward_", rows, spec, statistics, index, coefficients, upstream=upstream)
    backend.backward(Job(rows, spec, statistics, index, None, coefficients, rows.logits, upstream))


def _sums_arguments(arguments: Sequence[Any]) -> tuple[Rows, Spec, Backend, tuple[Any, ...]]:
    *flat, statistics, index, row_weight, top_q, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    backend = _check("sums", rows, spec, statistics, index, row_weight=row_weight, top_q=top_q)
    return rows, spec, backend, (statistics, index, row_weight, top_q)


def _fake_sums(*arguments: Any) -> Tensor:
    rows, spec, *_ = _sums_arguments(arguments)
    count = rows.classes if spec.over_rows else rows.target.shape[0]
    return rows.hidden[0].new_empty((2, count), dtype=torch.float64)


@_operator(f"sums({SCHEMA}, {_SAVED}, Tensor? row_weight, Tensor? top_q, str spec) -> Tensor", _fake_sums)
def sums(*arguments: Any) -> Tensor:
    rows, spec, backend, (statistics, index, row_weight, top_q) = _sums_arguments(arguments)
    if rows.is_linear:
        return chunks.sums(rows, statistics, index, spec, backend)
    return backend.sums(Job(rows, spec, statistics, index, upstream=row_weight, top_q=top_q))


def _fake_terms(*arguments: Any) -> tuple[Tensor, Tensor]:
    *flat, statistics, index, text = arguments
    _check("terms", Rows(*flat), Spec.decode(text), statistics, index)
    return new_losses(statistics, index.shape[0])


@_operator(f"terms({SCHEMA}, {_SAVED}, str spec) -> (Tensor loss, Tensor coefficients)", _fake_terms)
def terms(*arguments: Any) -> tuple[Tensor, Tensor]:
    *flat, statistics, index, text = arguments
    rows, spec = Rows(*flat), Spec.decode(text)
    backend = _check("terms", rows, spec, statistics, index)
    outputs = new_losses(statistics, index.shape[0])
    backend.terms(Job(rows, spec, statistics, index, *outputs))
    return outputs


def _fake_scale_(gradient: Tensor, factor: Tensor, impl: str) -> None:
    _check_scale(gradient, factor)


@_operator("scale_(Tensor(a!) gradient, Tensor factor, str impl) -> ()", _fake_scale_)
def scale_(gradient: Tensor, factor: Tensor, impl: str) -> None:
    _check_scale(gradient, factor)
    _backend("scale_", impl, gradient).scale_(gradient, factor)


# --- checks ---
# The public functions hand over what they have prepared. The operators are public too, as torch.ops.fusedloss, where a
# wrong dtype, size or stride would be a read of other memory. A check takes one to three microseconds.

_DTYPES = {dtype: (dtype, compute_dtype(dtype), torch.int64) for dtype in DTYPES}
_STORAGE, _COMPUTE, _INDEX = range(3)


def _backend(operator: str, impl: str, source: Tensor) -> Backend:
    backend, device = BACKENDS.get(impl), source.device.type
    if backend is None or (backend.runs_on != device and device != "meta"):
        known = [repr(name) for name, x in BACKENDS.items() if x.runs_on == device and x.unavailable() is None]
        raise ValueError(f"{operator}: impl must be one of {', '.join(known)} on a {device} device, got {impl!r}")
    return backend


def _check(
    operator: str,
    rows: Rows,
    spec: Spec,
    statistics: Tensor | None = None,
    index: Tensor | None = None,
    coefficients: Tensor | None = None,
    **of_rows: Tensor | None,
) -> Backend:
    """Check the tensors against each other and the spec, and return the backend that it names."""
    hidden, weight, bias, teacher, target, class_weight, candidates, params, scalars = rows
    if not hidden or len(weight) not in (0, len(hidden)) or (not weight and len(hidden) > 1) or teacher:
        lists = ", ".join(
            f"{len(x)} {name}" for x, name in ((hidden, "hidden"), (weight, "weight"), (teacher, "teacher"))
        )
        raise ValueError(f"{operator}: there must be one tensor of logits, or a weight for each hidden, got {lists}")
    if weight and (operator in ("backward_", "terms") or (operator == "sums" and spec.over_rows)):
        raise ValueError(f"{operator}: rows must be of logits in hand, got {len(weight)} weight")
    first = hidden[0]
    dtypes = _DTYPES.get(first.dtype)
    if dtypes is None:
        raise TypeError(f"{operator}: hidden must be one of {', '.join(map(str, DTYPES))}, got {first.dtype}")
    if first.dim() != 2:
        raise ValueError(f"{operator}: hidden must have two dimensions, got shape {tuple(first.shape)}")
    backend = _backend(operator, spec.impl, first)
    count = first.shape[0] * spec.form.row_parts
    storage, compute, integer = dtypes
    size = _sizes_checker(operator, first)
    if weight:
        classes = weight[0].shape[0] if weight[0].dim() else 0
        for i, (x, w) in enumerate(zip(hidden, weight, strict=True)):
            size(f"hidden[{i}]", x, storage, (first.shape[0], x.shape[-1] if x.dim() else 0), False)
            size(f"weight[{i}]", w, storage, (classes, x.shape[-1]), False)
        if backend.makes_logits and len(weight) > 1:
            raise ValueError(f"{operator}: impl={spec.impl!r} takes one pair of hidden and weight, got {len(weight)}")
    else:
        classes = first.shape[1]
        row, column = first.stride()
        if column != 1 and classes > 1:
            raise ValueError(f"{operator}: logits must have rows of unit stride, got strides {first.stride()}")
        if operator == "backward_" and row < classes and count > 1:
            raise ValueError(f"{operator}: logits must have rows that do not overlap, got strides {first.stride()}")
    if bias is not None:
        if not weight:
            raise ValueError(f"{operator}: bias must be None of logits in hand, got shape {tuple(bias.shape)}")
        size("bias", bias, storage, (classes,), False)
    size("target", target, integer, (count,))
    if class_weight is not None:
        size("class_weight", class_weight, compute, (classes,))
    if scalars is not None:
        size("scalars", scalars, compute, (3,))
    for i, x in enumerate(params):
        size(f"params[{i}]", x, compute, (count,) if x.dim() else (), False)
    if not 0 <= spec.top_k <= 2:
        raise ValueError(f"{operator}: top_k must be 0, 1 or 2, got {spec.top_k}")
    if statistics is None:
        if candidates is not None:
            size("candidates", candidates, integer, (count, candidates.shape[-1] if candidates.dim() else 0))
        picks = spec.pick_count(candidates) if candidates is None or candidates.dim() else 0
    else:
        assert index is not None
        picks = index.shape[0] if index.dim() else 0
        size("index", index, integer, (picks, count))
        size("statistics", statistics, compute, (STATISTICS + picks, count))
        if coefficients is not None:
            size("coefficients", coefficients, compute, (COEFFICIENTS + picks, count))
    for name, x_or_none in of_rows.items():
        if x_or_none is not None:
            size(name, x_or_none, compute, (count,), name == "top_q")
    if (spec.needed or (weight and operator == "backward")) and len(spec.needed) != len(rows.sources):
        raise ValueError(
            f"{operator}: spec must say which of {len(rows.sources)} gradients it needs, got {spec.needed}"
        )
    _check_epilogue(operator, spec, backend, len(params), picks)
    return backend


def _sizes_checker(operator: str, source: Tensor) -> Callable[..., None]:
    device = source.device

    def check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[Any, ...], contiguous: bool = True) -> None:
        if x.dtype is dtype and x.shape == shape and x.device == device and (not contiguous or x.is_contiguous()):
            return
        kind = TypeError if x.dtype is not dtype else ValueError
        raise kind(
            f"{operator}: {name} must be {'contiguous, ' if contiguous else ''}{dtype} of shape {shape} on {device}, "
            f"got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
        )

    return check


def _check_epilogue(operator: str, spec: Spec, backend: Backend, params: int, picks: int) -> None:
    """Check the epilogue's name, the number of its parameters, and that there are the picks that it looks at."""
    kind, name, known = operator.rstrip("_"), spec.epilogue, backend.epilogues
    if kind == "sums":
        kind = f"sums over {'rows' if spec.over_rows else 'classes'}"
    count = known.find(kind, name)
    if count is None:
        names = [repr(x) for x in ("", *known.rows, *known.classes) if known.find(kind, x) is not None]
        raise ValueError(f"{operator}: no epilogue named {name!r}; there are {', '.join(names)}")
    if params != count:
        raise ValueError(f"{operator}: {name!r} takes {count} params, got {params}")
    if (spec.top_q and spec.top_k < 1) or (kind == "forward" and name in known.classes and spec.top_k < 1):
        raise ValueError(f"{operator}: {name or 'top_q'!r} needs top_k >= 1, got {spec.top_k}")
    if name in known.classes and (picks < 1 or (kind == "terms" and picks > 1)):
        raise ValueError(f"{operator}: {name!r} needs the top class among the picks, got {picks} picks")


def _check_scale(gradient: Tensor, factor: Tensor) -> None:
    dtypes = _DTYPES.get(gradient.dtype)
    if dtypes is None:
        raise TypeError(f"scale_: gradient must be one of {', '.join(map(str, DTYPES))}, got {gradient.dtype}")
    _sizes_checker("scale_", gradient)("factor", factor, dtypes[_COMPUTE], (), False)
