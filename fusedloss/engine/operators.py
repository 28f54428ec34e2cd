"""The operators: schemas, checks of their arguments, what they do to shapes and dtypes (the fakes), and their kernels.

``forward``    statistics and pick indices and, with an epilogue, losses, the coefficients of their gradient, and the
               gradients of their ``row_weight``-weighted sum that the spec asks for
``backward``   the gradients by what makes the logits, times ``upstream``; ``backward_`` that of logits in hand, in
               their own memory
``sums``       the sums of a class term, from statistics with the top class: over the rows, (2, V), or over the classes,
               (2, N), as the spec says; of a term of two rows (3, N)
``terms``      losses and coefficients of the rows, from the same statistics: with dL/d error as class weights and
               dL/d agreement of the row's target as the last parameter, their gradient is that of a loss L of the sums
               over the rows
``scale_``     a gradient times a 0-d factor, which the host does not read
``gather``     what each rank of a process group, by its name, has of a tensor, (R, ...)

Their arguments begin with the :class:`~fusedloss.definition.rows.Rows`, one tensor or list of tensors each, and end
with an encoded :class:`~fusedloss.definition.rows.Spec`, which names the backend. Rows of logits in hand and of hidden
states take the same operators. Layouts are told in :mod:`fusedloss.definition.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.base import Backend
from ..checks import DTYPES, compute_dtype
from ..definition.divergences import SOFT_TARGETS
from ..definition.rows import SCHEMA, Job, Rows, Spec, decode
from ..definition.statistics import COEFFICIENTS, MOMENTS, SECONDS, STATISTICS
from . import chunks

_library = torch.library.Library("fusedloss", "DEF")


#: Of an operator of rows, its kernel behind the checks.
_KERNELS: dict[Any, Callable[..., Any]] = {}


def call(operator: Any, rows: Rows, spec: Spec, *more: Tensor | None) -> Any:
    """Run an operator on what the public functions have prepared.

    The dispatcher, the checks and the string take a fifth of a small call. They are for those who look at operators: a
    compiler, a mode, a trace, a profiler, tensors of a class of its own, those whose sign is a bit of the tensor, and
    zeros that have no memory.
    """
    if seen(
        *rows.hidden, *rows.weight, *rows.teacher, *rows.params,
        rows.bias, rows.target, rows.class_weight, rows.candidates, rows.scalars, *more,
    ):  # fmt: skip
        return operator(*rows, *more, spec.encode())
    return _KERNELS[operator](rows, spec, BACKENDS[spec.impl], *more)


def seen(*tensors: Tensor | None) -> bool:
    """Tell whether something looks at the operators that these tensors go through."""
    if torch.compiler.is_compiling():
        return True
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg() or x._is_zerotensor()):
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator, whose kernel is the same on every device."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedloss::{name}", fake, lib=_library)
    return getattr(torch.ops.fusedloss, name).default


def _operator(name: str, more: str, returns: str, fake: Callable[..., Any], schema: str = SCHEMA) -> Callable[..., Any]:
    """Define an operator of rows and `more`, whose kernel is the decorated function; `fake` takes what that takes."""
    names = [argument.split()[-1] for argument in more.split(", ")]

    def define(kernel: Callable[..., Any]) -> Any:
        def checked(run: Callable[..., Any]) -> Callable[..., Any]:
            def checks_and_runs(*arguments: Any) -> Any:
                count = len(arguments) - len(names) - 1
                rows, given, spec = Rows(*arguments[:count]), arguments[count:-1], decode(arguments[-1])
                return run(rows, spec, _check(name, rows, spec, **dict(zip(names, given, strict=True))), *given)

            return checks_and_runs

        operator = _define(f"{name}({schema}, {more}, str spec) -> {returns}", checked(kernel), checked(fake))
        _KERNELS[operator] = kernel
        return operator

    return define


def _results(job: Job, gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    statistics, index, loss, coefficients = job.statistics, job.index, job.loss, job.coefficients
    if loss is None or coefficients is None:
        loss, coefficients = statistics.new_empty(0), statistics.new_empty((0, 0))
    return loss, statistics, index, coefficients, gradients


def _fake_forward(rows: Rows, spec: Spec, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return _results(Job.new(rows, spec), chunks.new_gradients(rows, spec) if any(spec.needed) else [])


@_operator(
    "forward",
    "Tensor? row_weight",
    "(Tensor loss, Tensor statistics, Tensor index, Tensor coefficients, Tensor[] gradients)",
    _fake_forward,
)
def forward(
    rows: Rows, spec: Spec, backend: Backend, row_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    if rows.weight:
        return chunks.forward(rows, row_weight, spec, backend)
    job = Job.new(rows, spec)
    gradients = []
    if any(spec.needed):
        job.grad, job.upstream = backend.new_gradient(rows.hidden[0]), row_weight
        gradients = [job.grad]
        backend.with_gradient(job)
    else:
        backend.forward(job)
    if spec.top_q:
        chunks.put_top_q(job, backend)
    return _results(job, gradients)


_SAVED = "Tensor statistics, Tensor index"
_BACKWARD = f"{_SAVED}, Tensor coefficients, Tensor? upstream"


def _write(gradient: Tensor, rows: Rows, spec: Spec, backend: Backend, *saved: Any) -> None:
    statistics, index, coefficients, upstream = saved
    backend.backward(Job(rows, spec, statistics, index, None, coefficients, gradient, upstream))


@_operator("backward", _BACKWARD, "Tensor[]", lambda rows, spec, *_: chunks.new_gradients(rows, spec))
def backward(rows: Rows, spec: Spec, backend: Backend, *saved: Any) -> list[Tensor]:
    if rows.weight:
        statistics, index, coefficients, upstream = saved
        return chunks.backward(rows, statistics, index, coefficients, upstream, spec, backend)
    gradient = backend.new_gradient(rows.hidden[0])
    _write(gradient, rows, spec, backend, *saved)
    return [gradient]


@_operator("backward_", _BACKWARD, "()", lambda *_: None, schema=SCHEMA.replace("Tensor[]", "Tensor(a!)[]", 1))
def backward_(rows: Rows, spec: Spec, backend: Backend, *saved: Any) -> None:
    _write(rows.logits, rows, spec, backend, *saved)


def _fake_sums(rows: Rows, spec: Spec, *_: Any) -> Tensor:
    count = rows.classes if spec.over_rows else rows.target.shape[0]
    return rows.hidden[0].new_empty((3 if rows.teacher else 2, count), dtype=torch.float64)


@_operator("sums", f"{_SAVED}, Tensor? row_weight, Tensor? top_q", "Tensor", _fake_sums)
def sums(
    rows: Rows,
    spec: Spec,
    backend: Backend,
    statistics: Tensor,
    index: Tensor,
    row_weight: Tensor | None,
    top_q: Tensor | None,
) -> Tensor:
    if rows.weight:
        return chunks.sums(rows, statistics, index, spec, backend)
    return backend.sums(Job(rows, spec, statistics, index, upstream=row_weight, top_q=top_q))


def _new_losses(rows: Rows, spec: Spec, backend: Backend, statistics: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and coefficients to be written."""
    picks, count = index.shape
    return statistics.new_empty(count), statistics.new_empty((COEFFICIENTS + picks, count))


@_operator("terms", _SAVED, "(Tensor loss, Tensor coefficients)", _new_losses)
def terms(rows: Rows, spec: Spec, backend: Backend, statistics: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    outputs = _new_losses(rows, spec, backend, statistics, index)
    backend.terms(Job(rows, spec, statistics, index, *outputs))
    return outputs


@torch.no_grad()
def _scale_(gradient: Tensor, factor: Tensor, impl: str) -> None:
    _check_scale(gradient, factor, impl).scale_(gradient, factor)


def _fake_scale_(gradient: Tensor, factor: Tensor, impl: str) -> None:
    _check_scale(gradient, factor, impl)


scale_ = _define("scale_(Tensor(a!) gradient, Tensor factor, str impl) -> ()", _scale_, _fake_scale_)


# --- checks ---
# The public functions hand over what they have prepared. The operators are public too, as torch.ops.fusedloss, where a
# wrong dtype, size or stride would be a read of other memory. A check takes one to three microseconds.

_DTYPES = {dtype: (dtype, compute_dtype(dtype), torch.int64) for dtype in DTYPES}


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
    if not hidden or len(weight) not in (0, len(hidden)) or (not weight and len(hidden) > 1):
        got = f"{len(hidden)} hidden, {len(weight)} weight, {len(teacher)} teacher"
        raise ValueError(f"{operator}: there must be one tensor of logits, or a weight for each hidden, got {got}")
    if weight and (operator in ("backward_", "terms") or (operator == "sums" and spec.over_rows)):
        raise ValueError(f"{operator}: rows must be of logits in hand, got {len(weight)} weight")
    first = hidden[0]
    dtypes, device = _DTYPES.get(first.dtype), first.device
    if dtypes is None:
        raise TypeError(f"{operator}: hidden must be one of {', '.join(map(str, DTYPES))}, got {first.dtype}")
    if first.dim() != 2:
        raise ValueError(f"{operator}: hidden must have two dimensions, got shape {tuple(first.shape)}")
    backend = BACKENDS.get(spec.impl)
    if backend is None or (backend.runs_on != device.type and device.type != "meta"):
        raise _no_backend(operator, spec.impl, device)
    if (spec.epilogue in backend.epilogues.pairs) != (len(teacher) > 0):
        raise ValueError(f"{operator}: teacher is for an epilogue of two rows, got {len(teacher)} of {spec.epilogue!r}")
    storage, compute, integer = dtypes
    count, classes = first.shape
    sizes: list[tuple[str, Tensor, torch.dtype, tuple[Any, ...], bool]] = []  # the last: contiguous
    if weight:
        classes = weight[0].shape[0] if weight[0].dim() else 0
        for i, (x, w) in enumerate(zip(hidden, weight, strict=True)):
            features = x.shape[-1] if x.dim() else 0
            sizes.append((f"hidden[{i}]", x, storage, (count, features), False))
            sizes.append((f"weight[{i}]", w, storage, (classes, features), False))
        form = spec.form
        if form.symmetric and (
            len(weight) > 1
            or weight[0].shape != first.shape
            or form.tempered
            or form.row_parts > 1
            or any(spec.needed[1:])
        ):
            raise ValueError(
                f"{operator}: a symmetric form needs one weight of hidden's shape {tuple(first.shape)} without "
                f"a gradient, all rows and no temperature, got {len(weight)} weight, the first of shape "
                f"{tuple(weight[0].shape)}"
            )
        if backend.makes_logits and len(weight) > 1:
            raise ValueError(f"{operator}: impl={spec.impl!r} takes one pair of hidden and weight, got {len(weight)}")
        count = count * spec.form.row_parts
        if bias is not None:
            sizes.append(("bias", bias, storage, (classes,), False))
    else:
        if bias is not None:
            raise ValueError(f"{operator}: bias must be None of logits in hand, got shape {tuple(bias.shape)}")
        row, column = first.stride()
        if column != 1 and classes > 1 and count > 0:
            raise ValueError(f"{operator}: logits must have rows of unit stride, got strides {first.stride()}")
        if operator == "backward_" and row < classes and count > 1:
            raise ValueError(f"{operator}: logits must have rows that do not overlap, got strides {first.stride()}")
    sizes.append(("target", target, integer, (count,), True))
    if class_weight is not None:
        sizes.append(("class_weight", class_weight, compute, (classes,), True))
    if scalars is not None:
        sizes.append(("scalars", scalars, compute, (4,), True))
    elif spec.form.tempered:
        raise ValueError(f"{operator}: logits with a temperature need scalars, got None")
    if teacher:
        _add_second(operator, sizes, rows, spec, storage, compute, (count, classes))
    for i, x in enumerate(params):
        sizes.append((f"params[{i}]", x, compute, (count,) if x.dim() else (), False))
    if not 0 <= spec.top_k <= 2:
        raise ValueError(f"{operator}: top_k must be 0, 1 or 2, got {spec.top_k}")
    picks = spec.top_k + spec.below
    if index is not None and statistics is not None:
        picks, moments = index.shape[0] if index.dim() else 0, MOMENTS if spec.moments else 0
        more = STATISTICS + picks + moments + (SECONDS if teacher else 0)
        sizes.append(("index", index, integer, (picks, count), True))
        sizes.append(("statistics", statistics, compute, (more, count), True))
        if coefficients is not None:
            more = COEFFICIENTS + picks + (spec.more_coefficients if moments else 0)
            sizes.append(("coefficients", coefficients, compute, (more, count), True))
    elif candidates is not None:
        more = candidates.shape[-1] if candidates.dim() else 0
        sizes.append(("candidates", candidates, integer, (count, more), True))
        picks = picks + more
    for name, y in of_rows.items():
        if y is not None:
            # One number for all rows, where the logits are in hand and it is no weight in a sum over the rows.
            one = y.dim() == 0 and not weight and operator != "sums"
            sizes.append((name, y, compute, () if one else (count,), name == "top_q"))
    for name, x, dtype, shape, contiguous in sizes:
        if x.dtype is not dtype or x.shape != shape or x.device != device or (contiguous and not x.is_contiguous()):
            raise _wrong(operator, name, x, dtype, shape, contiguous, device)
    sources = len(hidden) + len(weight) + (bias is not None)
    if (spec.needed or (weight and operator == "backward")) and len(spec.needed) != sources:
        raise ValueError(f"{operator}: spec must say which of {sources} gradients it needs, got {spec.needed}")

    kind, name, known = operator.rstrip("_"), spec.epilogue, backend.epilogues
    if kind == "sums":
        kind = "sums over rows" if spec.over_rows else "sums over classes"
    takes = known.find(kind, name)
    if takes is None:
        names = [repr(x) for x in ("", *known.rows, *known.classes, *known.pairs) if known.find(kind, x) is not None]
        raise ValueError(f"{operator}: no epilogue named {name!r}; there are {', '.join(names)}")
    if len(params) != takes:
        raise ValueError(f"{operator}: {name!r} takes {takes} params, got {len(params)}")
    over_classes = name in known.classes
    if spec.top_k < 1 and (spec.top_q or (over_classes and kind == "forward")):
        raise ValueError(f"{operator}: {name or 'top_q'!r} needs top_k >= 1, got {spec.top_k}")
    if over_classes and (picks < 1 or (kind == "terms" and picks > 1)):
        raise ValueError(f"{operator}: {name!r} needs the top class among the picks, got {picks} picks")
    return backend


def _add_second(
    operator: str,
    sizes: list[Any],
    rows: Rows,
    spec: Spec,
    storage: torch.dtype,
    compute: torch.dtype,
    shape: tuple[Any, Any],
) -> None:
    """What the tensors of a second row must be."""
    teacher, (count, classes), of_logits = rows.teacher, shape, spec.epilogue != SOFT_TARGETS.name
    if len(teacher) > 3 or (len(teacher) > 1) != rows.is_linear or (rows.is_linear and not of_logits):
        raise ValueError(f"{operator}: teacher must be logits, or hidden states, weight and bias, got {len(teacher)}")
    if rows.is_linear:
        features = teacher[0].shape[-1] if teacher[0].dim() else 0
        shapes: tuple[tuple[Any, ...], ...] = ((count, features), (classes, features), (classes,))
        for i, (x, of_part) in enumerate(zip(teacher, shapes, strict=False)):
            sizes.append((f"teacher[{i}]", x, storage, of_part, False))
        return
    (second,) = teacher
    # Targets are no logits: half precision would round them.
    sizes.append(("teacher[0]", second, storage if of_logits else compute, shape, False))
    if second.dim() == 2 and second.stride(1) != 1 and classes > 1:
        raise ValueError(f"{operator}: teacher must have rows of unit stride, got strides {second.stride()}")


def _no_backend(operator: str, impl: str, device: torch.device) -> ValueError:
    known = [repr(name) for name, x in BACKENDS.items() if x.runs_on == device.type and x.unavailable() is None]
    return ValueError(f"{operator}: impl must be one of {', '.join(known)} on a {device.type} device, got {impl!r}")


def _wrong(
    operator: str,
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: tuple[Any, ...],
    contiguous: bool,
    device: torch.device,
) -> Exception:
    kind = TypeError if x.dtype is not dtype else ValueError
    return kind(
        f"{operator}: {name} must be {'contiguous, ' if contiguous else ''}{dtype} of shape {shape} on {device}, "
        f"got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
    )


def _check_scale(gradient: Tensor, factor: Tensor, impl: str) -> Backend:
    dtypes, device = _DTYPES.get(gradient.dtype), gradient.device
    if dtypes is None:
        raise TypeError(f"scale_: gradient must be one of {', '.join(map(str, DTYPES))}, got {gradient.dtype}")
    if factor.dtype is not dtypes[1] or factor.dim() or factor.device != device:
        raise _wrong("scale_", "factor", factor, dtypes[1], (), False, device)
    backend = BACKENDS.get(impl)
    if backend is None or (backend.runs_on != device.type and device.type != "meta"):
        raise _no_backend("scale_", impl, device)
    return backend
