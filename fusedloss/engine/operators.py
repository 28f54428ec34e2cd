"""Every operator of the package: its schema and what it does to shapes and dtypes (the fakes).

``row_statistics``  the statistics pass alone, for a loss that is PyTorch code
``row_loss``        the statistics pass and a compiled epilogue: losses, and the coefficients of their gradient
``row_loss_gradient``    the same, and the gradient of their ``row_weight``-weighted sum as a new tensor;
                    ``row_loss_gradient_`` in the logits' own memory
``row_gradient``    the gradient pass into a new tensor; ``row_gradient_`` into the logits' own memory
``scale_``          a gradient times a 0-d factor, which the host does not read
``class_sums``      the sums over the rows of each class's error and agreement, (2, V) in float64, from statistics with
                    the top class. ``top_q``: its 1 - p, where the logits are not those of all classes
``class_terms``     losses and coefficients of the rows, as of ``row_loss``, from the same statistics. With dL/d error
                    for weight and dL/d agreement of the row's target for a last parameter, their gradient is that of
                    a loss L of those sums
``term_sums``       from the same statistics, the sums over the classes of each row's terms f and of p df/dp, (2, N) in
                    float64, without the target and the top class
``product_row_...`` the row operators of logits that a kernel makes and never stores; ``product_row_gradient_`` writes
                    the gradient by the products, before the softcap
``gather``          what each rank of a process group, by its name, has of a tensor, (R, ...)
``sum_over_ranks``  the sum of what they have
``linear_...``      the same of hidden states and a weight, (N, D) and (V, D), whose logits are made a chunk at a time:
                    ``linear_row_loss`` also gives the gradients of its ``row_weight``-weighted sum by hidden states,
                    weight and bias, as ``needed`` asks; ``linear_gradient`` those for other upstream gradients, from
                    logits made once more. ``of_top``: of ``linear_row_statistics``, also 1 - p of the top class

Targets are classes, or IGNORED. `params` are the epilogue's parameters, 0-d or (N,). `common` (3,) holds what every
loss has: the factors of its own term, of the smoothing term sum_j w_j (-log p_j) and of the z-loss lse^2; without it
these are (1, 0, 0). `mean`: whether there is a smoothing term.

Tensors of rows lie one after the other: ``statistics`` (6 + K, N) holds max, sum_exp (of exp(z - max)), q, ce,
target logit, mean_ce and the logits of the K picks; ``index`` (K, N) the picks' classes, -1 for none; ``coefficients``
(3 + K, N) what the gradient pass needs: dL/dz_j = a p_j - u w_j - sum_k b_k [j == index_k], with the gradient at the
target given as it is. K counts the top_k largest, then `below`, then the candidates.

Backends register kernels of the row operators with :func:`register`; PyTorch's dispatcher picks the device, ``impl``
the backend there. The linear operators are made of row operators and need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype
from .contracts import COEFFICIENTS as COEFFICIENTS
from .contracts import STATISTICS as STATISTICS
from .contracts import Contract, Epilogues

MAX, SUM_EXP, Q, CE, TARGET_LOGIT, MEAN_CE = range(STATISTICS)
A, U, TARGET_GRADIENT = range(COEFFICIENTS)

_library = torch.library.Library("fusedloss", "DEF")

_library.define(
    "row_statistics(Tensor logits, Tensor target, Tensor? weight, Tensor? candidates, int top_k, bool below, "
    "bool mean, str impl) -> (Tensor statistics, Tensor index)"
)
_library.define(
    "row_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? candidates, Tensor[] params, Tensor? common, "
    "str epilogue, bool mean, int top_k, str impl) "
    "-> (Tensor loss, Tensor statistics, Tensor index, Tensor coefficients)"
)
_LOSS_GRADIENT_ARGUMENTS = (
    "Tensor target, Tensor? weight, Tensor? candidates, Tensor[] params, Tensor? common, Tensor? row_weight, "
    "str epilogue, bool mean, int top_k, str impl"
)
_library.define(
    f"row_loss_gradient(Tensor logits, {_LOSS_GRADIENT_ARGUMENTS}) "
    "-> (Tensor loss, Tensor statistics, Tensor index, Tensor coefficients, Tensor gradient)"
)
_library.define(
    f"row_loss_gradient_(Tensor(a!) logits, {_LOSS_GRADIENT_ARGUMENTS}) "
    "-> (Tensor loss, Tensor statistics, Tensor index, Tensor coefficients)"
)
_GRADIENT_ARGUMENTS = (
    "Tensor target, Tensor? weight, Tensor statistics, Tensor index, Tensor coefficients, Tensor? grad_output, "
    "Tensor[] params, str epilogue, str impl"
)
_library.define(f"row_gradient(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor")
_library.define(f"row_gradient_(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()")
_library.define("scale_(Tensor(a!) gradient, Tensor factor, str impl) -> ()")
_library.define(
    "class_sums(Tensor logits, Tensor target, Tensor? row_weight, Tensor statistics, Tensor index, Tensor[] params, "
    "str epilogue, Tensor? top_q, str impl) -> Tensor"
)
_library.define(
    "class_terms(Tensor logits, Tensor target, Tensor weight, Tensor statistics, Tensor index, Tensor[] params, "
    "str epilogue, str impl) -> (Tensor loss, Tensor coefficients)"
)

_TERM_SUMS_ARGUMENTS = "Tensor target, Tensor? weight, Tensor statistics, Tensor index, Tensor[] params, str epilogue"
_library.define(f"term_sums(Tensor logits, {_TERM_SUMS_ARGUMENTS}, str impl) -> Tensor")

_library.define("gather(Tensor part, int ranks, str group) -> Tensor")
_library.define("sum_over_ranks(Tensor part, str group) -> Tensor")

_LINEAR = "Tensor hidden, Tensor linear_weight, Tensor? linear_bias"
_PRODUCT = f"{_LINEAR}, float softcap, bool mask_target"
_library.define(
    f"product_row_statistics({_PRODUCT}, Tensor target, Tensor? weight, Tensor? candidates, int top_k, "
    "bool below, bool mean, str impl) -> (Tensor statistics, Tensor index)"
)
_library.define(
    f"product_row_loss({_PRODUCT}, Tensor target, Tensor? weight, Tensor? candidates, Tensor[] params, Tensor? common, "
    "str epilogue, bool mean, int top_k, str impl) "
    "-> (Tensor loss, Tensor statistics, Tensor index, Tensor coefficients)"
)
_library.define(f"product_term_sums({_PRODUCT}, {_TERM_SUMS_ARGUMENTS}, str impl) -> Tensor")
_library.define(f"product_row_gradient_(Tensor(a!) gradient, {_PRODUCT}, {_GRADIENT_ARGUMENTS}) -> ()")
_FORM = (
    "float softcap, int budget, bool drop_ignored, bool mask_target, str group, int row_parts, int most_rows, str impl"
)
_library.define(
    f"linear_row_statistics({_LINEAR}, Tensor target, Tensor? weight, Tensor? candidates, int top_k, bool below, "
    f"bool mean, bool of_top, {_FORM}) -> (Tensor statistics, Tensor index, Tensor top_q)"
)
_library.define(
    f"linear_row_loss({_LINEAR}, Tensor target, Tensor? weight, Tensor? candidates, Tensor[] params, Tensor? common, "
    f"Tensor? row_weight, int[] needed, str epilogue, bool mean, int top_k, {_FORM}) "
    "-> (Tensor loss, Tensor statistics, Tensor index, Tensor coefficients, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(f"linear_term_sums({_LINEAR}, {_TERM_SUMS_ARGUMENTS}, {_FORM}) -> Tensor")
_library.define(
    f"linear_gradient({_LINEAR}, Tensor target, Tensor? weight, Tensor statistics, Tensor index, Tensor coefficients, "
    f"Tensor? grad_output, Tensor[] params, int[] needed, str epilogue, {_FORM}) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)

row_statistics = torch.ops.fusedloss.row_statistics.default
row_loss = torch.ops.fusedloss.row_loss.default
row_loss_gradient = torch.ops.fusedloss.row_loss_gradient.default
row_loss_gradient_ = torch.ops.fusedloss.row_loss_gradient_.default
row_gradient = torch.ops.fusedloss.row_gradient.default
row_gradient_ = torch.ops.fusedloss.row_gradient_.default
scale_ = torch.ops.fusedloss.scale_.default
class_sums = torch.ops.fusedloss.class_sums.default
class_terms = torch.ops.fusedloss.class_terms.default
term_sums = torch.ops.fusedloss.term_sums.default
gather = torch.ops.fusedloss.gather.default
sum_over_ranks = torch.ops.fusedloss.sum_over_ranks.default
product_row_statistics = torch.ops.fusedloss.product_row_statistics.default
product_row_loss = torch.ops.fusedloss.product_row_loss.default
product_term_sums = torch.ops.fusedloss.product_term_sums.default
product_row_gradient_ = torch.ops.fusedloss.product_row_gradient_.default
linear_row_statistics = torch.ops.fusedloss.linear_row_statistics.default
linear_row_loss = torch.ops.fusedloss.linear_row_loss.default
linear_term_sums = torch.ops.fusedloss.linear_term_sums.default
linear_gradient = torch.ops.fusedloss.linear_gradient.default

_kernels: dict[tuple[str, str, str], Callable[..., Any]] = {}
_epilogues: dict[str, Callable[[], Epilogues]] = {}


def register(device: str, impl: str, epilogues: Callable[[], Epilogues], **kernels: Callable[..., Any]) -> None:
    """Registers a backend's kernels, by operator, under a dispatch key ("CPU", "CUDA"). They take no ``impl``.

    A kernel is called with arguments that keep the operator's contract. `epilogues` gives those that the backend has.
    """
    _epilogues[impl] = epilogues
    for name, kernel in kernels.items():
        first = not any(key[:2] == (name, device) for key in _kernels)
        _kernels[name, device, impl] = kernel
        if first:
            _library.impl(name, _by_impl(name, device), device)


def register_for_every_device(**kernels: Callable[..., Any]) -> None:
    """Registers operators that are made of others; they do take ``impl``."""
    for name, kernel in kernels.items():
        # As of every operator here, autograd must not look inside: an exported graph calls them with gradients on.
        _library.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")


def checked(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel behind its contract, for an operator made of others. These check the epilogue."""
    contract = Contract(name)

    def call(*arguments: Any) -> Any:
        contract.check(arguments)
        return kernel(*arguments)

    return call


def kernel(name: str, device: str, impl: str) -> Callable[..., Any]:
    """A backend's own, as it was registered."""
    found = _kernels.get((name, device, impl))
    if found is None:
        known = [repr(key[2]) for key in _kernels if key[:2] == (name, device)]
        raise ValueError(f"{name}: impl must be one of {', '.join(known)} on a {device}, got {impl!r}")
    return found


def _by_impl(name: str, device: str) -> Callable[..., Any]:
    contract = Contract(name)
    several_devices = device != "CPU"  # the dispatcher calls a CPU's kernels for tensors on the CPU alone
    known: dict[str, Any] = {}

    def call(*arguments: Any) -> Any:
        impl = arguments[-1]
        run = kernel(name, device, impl)
        if impl not in known:
            known[impl] = contract.known(_epilogues[impl]())
        contract.check(arguments, several_devices)
        contract.check_epilogue(arguments, known[impl])
        return run(*arguments[:-1])

    return call


def new_statistics(logits: Tensor, target: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """Statistics and pick indices to be written, for logits or for hidden states that they are made of."""
    rows = target.shape[0]
    statistics = logits.new_empty((STATISTICS + picks, rows), dtype=compute_dtype(logits.dtype))
    return statistics, target.new_empty((picks, rows))


def new_losses(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and coefficients to be written, beside such statistics."""
    size, rows = statistics.shape
    return statistics.new_empty(rows), statistics.new_empty((size - STATISTICS + COEFFICIENTS, rows))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients from the linear operators: before the loss scale is known float16 has not the range."""
    return torch.float32 if dtype == torch.float16 else dtype


def picks_of(candidates: Tensor | None, top_k: int, below: bool = False) -> int:
    return top_k + below + (0 if candidates is None else candidates.shape[1])


#: Operators of any tensor.
_OF_RANKS = ("gather", "sum_over_ranks")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake, which gets the arguments by the schema's names and takes those that it needs."""
    names = [argument.name for argument in getattr(torch.ops.fusedloss, name).default._schema.arguments]
    contract = None if name in _OF_RANKS else Contract(name)

    def register_fake(fake: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            named.update(zip(names, arguments, strict=False))
            if contract is not None:
                contract.check([named[x] for x in names])
            return fake(**named)

        torch.library.register_fake(f"fusedloss::{name}", call, lib=_library)
        return fake

    return register_fake


@_fake("row_statistics")
def _(logits, target, candidates, top_k, below, **_):  # type: ignore[no-untyped-def]
    return new_statistics(logits, target, picks_of(candidates, top_k, below))


@_fake("row_loss")
def _(logits, target, candidates, top_k, **_):  # type: ignore[no-untyped-def]
    return _fake_row_loss(logits, target, candidates, top_k)


@_fake("row_loss_gradient")
def _(logits, target, candidates, top_k, **_):  # type: ignore[no-untyped-def]
    return *_fake_row_loss(logits, target, candidates, top_k), _fake_gradient(logits)


@_fake("row_loss_gradient_")
def _(logits, target, candidates, top_k, **_):  # type: ignore[no-untyped-def]
    return _fake_row_loss(logits, target, candidates, top_k)


def _fake_row_loss(
    logits: Tensor, target: Tensor, candidates: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics, index = new_statistics(logits, target, picks_of(candidates, top_k))
    loss, coefficients = new_losses(statistics)
    return loss, statistics, index, coefficients


@_fake("product_row_statistics")
def _(hidden, target, candidates, top_k, below, **_):  # type: ignore[no-untyped-def]
    return new_statistics(hidden, target, picks_of(candidates, top_k, below))


@_fake("product_row_loss")
def _(hidden, target, candidates, top_k, **_):  # type: ignore[no-untyped-def]
    return _fake_row_loss(hidden, target, candidates, top_k)


@_fake("product_row_gradient_")
def _(**_):  # type: ignore[no-untyped-def]
    return None


@_fake("row_gradient")
def _(logits, **_):  # type: ignore[no-untyped-def]
    return _fake_gradient(logits)


def _fake_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("row_gradient_")
def _(**_):  # type: ignore[no-untyped-def]
    return None


@_fake("scale_")
def _(**_):  # type: ignore[no-untyped-def]
    return None


@_fake("class_sums")
def _(logits, **_):  # type: ignore[no-untyped-def]
    return new_class_sums(logits)


def new_class_sums(logits: Tensor) -> Tensor:
    return logits.new_empty((2, logits.shape[1]), dtype=torch.float64)


@_fake("class_terms")
def _(statistics, **_):  # type: ignore[no-untyped-def]
    return new_losses(statistics)


def new_term_sums(statistics: Tensor) -> Tensor:
    return statistics.new_empty((2, statistics.shape[1]), dtype=torch.float64)


for _name in ("term_sums", "product_term_sums", "linear_term_sums"):

    @_fake(_name)
    def _(statistics, **_):  # type: ignore[no-untyped-def]
        return new_term_sums(statistics)


@_fake("gather")
def _(part, ranks, **_):  # type: ignore[no-untyped-def]
    return part.new_empty((ranks, *part.shape))


@_fake("sum_over_ranks")
def _(part, **_):  # type: ignore[no-untyped-def]
    return torch.empty_like(part)


@_fake("linear_row_statistics")
def _(hidden, target, candidates, top_k, below, of_top, **_):  # type: ignore[no-untyped-def]
    statistics, index = new_statistics(hidden, target, picks_of(candidates, top_k, below))
    return statistics, index, statistics.new_empty(len(target) if of_top else 0)


@_fake("linear_row_loss")
def _(hidden, linear_weight, target, candidates, needed, top_k, **_):  # type: ignore[no-untyped-def]
    return *_fake_row_loss(hidden, target, candidates, top_k), *_fake_gradients(hidden, linear_weight, needed)


@_fake("linear_gradient")
def _(hidden, linear_weight, needed, **_):  # type: ignore[no-untyped-def]
    return _fake_gradients(hidden, linear_weight, needed)


def _fake_gradients(hidden: Tensor, linear_weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    whole = (hidden.shape, linear_weight.shape, linear_weight.shape[:1])
    shapes = [shape if need else (0,) for shape, need in zip(whole, needed, strict=True)]
    dtype = gradient_dtype(hidden.dtype)
    return (
        hidden.new_empty(shapes[0], dtype=dtype),
        linear_weight.new_empty(shapes[1], dtype=dtype),
        linear_weight.new_empty(shapes[2], dtype=dtype),
    )
