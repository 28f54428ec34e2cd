"""Checks of arguments: a clear error, with the offending value in it, before any work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import transforms

if TYPE_CHECKING:
    from .definition.projection import Projection

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
DIVISORS = (1e-30, 1e30)
"""The least and the largest number to divide by, whose inverse is a number in float32 too."""
BEYOND = 2.0**128 - 2.0**103
"""From here on a number is infinite in float32. It is refused of float64 logits too."""
PLAIN: tuple[type, ...] = (int, float)
"""The numbers that are left as they are: torch.compile takes one of NumPy's for an array."""
IGNORED = -100
"""The target of an ignored row behind the public functions, whatever the caller's own number is."""
_NOT_IGNORED = 1 - 2**63
"""Stands there for a target of -100 where the caller's own is another number, so that it is out of range."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of `dtype` are computed, and that of losses and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def may_read(x: Tensor, stall: bool = False) -> bool:
    """Tell whether the host may look at the values of `x`.

    On a GPU that would stall the stream, so that it may with `stall` only. While a graph is traced (torch.compile,
    torch.export, make_fx, FakeTensorMode) there are no values, or they are only an example. Under a function transform
    they are those of transforms.values.
    """
    if torch.compiler.is_compiling():
        return False
    if transforms.is_wrapped(x):
        x = transforms.values(x)
    readable = stall or x.device.type == "cpu"
    return readable and not isinstance(x, FakeTensor) and torch._C._len_torch_dispatch_stack() == 0


def has_autocast(device: str) -> bool:
    """Tell whether a type of device has autocast: "meta" has none, and PyTorch raises where it is asked for its own.

    While a graph is compiled the answer is taken to be yes for all others, since torch 2.11 cannot trace the question.
    """
    return device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Any:
    """`value` must be a finite real number with low <= value <= high (low < value with `above`).

    Returns an int or a float unchanged and any other number as a float, so that none is computed in a dtype of NumPy's.
    """
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf  # a rational number beyond all floats, whatever its sign
    if not (low < number if above else low <= number) or not number <= high:
        raise ValueError(f"{name} must be {_range(low, high, above)}, got {value!r}")
    if abs(number) >= BEYOND:
        raise ValueError(f"{name} must be finite in float32, got {value!r}")
    return value if type(value) in PLAIN else number


def is_zero(value: object) -> bool:
    """Whether `value` is the number 0 of any type. A symbolic number would become a constant if it were compared."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(value == 0)


def check_bool(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def check_names(function: str, options: Mapping[str, object], known: Any) -> None:
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_int(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> int:
    """`value` as an int: one of Python or of NumPy, in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = value if isinstance(value, int) else int(value)  # a symbolic one stays symbolic
    if not low <= number <= high:
        raise ValueError(f"{name} must be {_range(low, high)}, got {value!r}")
    return number


def check_ignored(value: object) -> int:
    """The target value of ignored rows, which targets of int64 must be able to hold."""
    return check_int("ignore_index", value, -(2**63), 2**63 - 1)


def check_parameter(name: str, value: Any, target: Tensor, options: Mapping[str, Any], high: float = math.inf) -> Any:
    """A loss parameter: a number, a 0-d tensor, or one value for each target, within [0, high]. Returns it.

    Those of rows that the loss's options ignore may be anything.
    """
    if not isinstance(value, Tensor):
        return check_number(name, value, 0, high)
    check_local(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {value.dtype}")
    if value.dim() and value.shape != target.shape:
        raise ValueError(
            f"{name} must be a number, a 0-d tensor or of the target's shape {tuple(target.shape)}, "
            f"got shape {tuple(value.shape)}"
        )
    if may_read(value) and value.numel():
        values = value.detach()
        if value.dim() and may_read(target) and not is_dtensor(target):
            index = normalized_targets(target, check_ignored(options.get("ignore_index", IGNORED)))
            values = values.masked_fill(index == IGNORED, 0)
        values = transforms.values(values)
        smallest, largest = (float(x) for x in torch.aminmax(values))
        if not (smallest >= 0 and largest <= high):
            raise ValueError(f"{name} must be {_range(0, high)}, got values from {smallest} to {largest}")
        if largest >= BEYOND:
            raise ValueError(f"{name} must be finite in float32, got values from {smallest} to {largest}")
    return value


def _range(low: float, high: float, above: bool = False) -> str:
    if high < math.inf:
        return f"between {low:g} and {high:g}"
    return f"{'greater than' if above else 'at least'} {low:g}"


def is_dtensor(x: object) -> bool:
    if type(x) is Tensor and (torch.compiler.is_compiling() or not transforms.is_wrapped(x)):
        return False
    # By its name, since importing the class would import half of torch.distributed.
    return isinstance(x, Tensor) and type(transforms.values(x)).__name__ == "DTensor"


def check_dense(name: str, value: Tensor) -> None:
    """Raises for tensors whose numbers do not lie in memory by strides, as those of sparse and nested ones."""
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got a {kind}")


def check_local(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:  # a call less
        check_dense(name, value)
    if is_dtensor(value):
        raise ValueError(
            f"{name} is a DTensor, and the loss takes the tensors of one process; pass the whole tensor, "
            f"{name}.full_tensor()"
        )


def check_device(name: str, value: Any, other: Any, of: str = "input") -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {of} on {other.device}")


def check_like(name: str, value: Any, other: Any, of: str) -> None:
    """Require the shape and the device of another argument, whose name is `of`."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must be of the {of}'s shape {tuple(other.shape)}, got {tuple(value.shape)}")
    check_device(name, value, other, of)


def check_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")


def check_dtype(name: str, value: Tensor | Projection) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def check_readable(linear_weight: Tensor) -> None:
    """Raises for tensors made of others, as quantized ones are: kernels cannot read them, whatever dtype they name."""
    kind = type(linear_weight)
    if hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.distributed"):
        raise TypeError(
            f"linear_weight must be a plain tensor, got a {kind.__module__}.{kind.__qualname__}, as for a quantized "
            "weight; dequantize it, or pass impl='reference', which computes all logits by operators of its own"
        )


def check_input(input: Any) -> None:
    if not isinstance(input, Tensor) and not hasattr(input, "hidden"):  # of a Projection
        raise TypeError(f"input must be a tensor of logits, got {type(input).__name__}")
    if isinstance(input, Tensor):
        check_dense("input", input)
    check_dtype("input", input)
    check_classes(len(input.shape), input)


def check_logits(input: Any, target: object) -> None:
    # A call less where nothing is wrong.
    wrong = isinstance(input, Tensor) and (input.layout is not torch.strided or input.is_nested)
    if wrong or getattr(input, "dtype", None) not in DTYPES or len(input.shape) < 1:
        check_input(input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of class indices, got {type(target).__name__}")
    if target.layout is not torch.strided or target.is_nested:
        check_dense("target", target)
    if target.dtype not in INDEX_DTYPES:
        check_index_dtype("target", target)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the input's shape without its last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, but input on {input.device}")


def check_second_row(name: str, second: Any, input: Tensor | Projection) -> None:
    """A teacher's logits, or targets, of the input's shape; they get no gradient."""
    check_input(input)
    if not isinstance(second, Tensor) and not hasattr(second, "hidden"):
        raise TypeError(f"{name} must be a tensor, got {type(second).__name__}")
    if isinstance(second, Tensor):
        check_dense(name, second)
    if not second.dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating point dtype, got {second.dtype}")
    check_like(name, second, input, "input")
    parts = [second] if isinstance(second, Tensor) else [*second.hidden, *second.weight, second.bias]
    if True in [x is not None and x.requires_grad for x in parts]:
        raise ValueError(f"{name} requires grad, but gets no gradient here; pass {name}.detach()")


def check_index_dtype(name: str, index: Tensor) -> None:
    if index.dtype not in INDEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INDEX_DTYPES)
        raise TypeError(f"{name} must hold indices of one of the dtypes {names}, got {index.dtype}")


def check_classes(classes: int, input: Tensor | Projection) -> None:
    if classes < 1:
        raise ValueError(f"input must be (*, V) with at least one class, got shape {tuple(input.shape)}")


def check_weight(weight: Any, input: Tensor | Projection, classes: int) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        check_floating("weight", weight)
    check_local("weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"weight must be ({classes},), one a class, got shape {tuple(weight.shape)}")
    if weight.device != input.device:
        check_device("weight", weight, input)
    if weight.requires_grad:
        raise ValueError("weight requires grad, but class weights are not differentiated; detach them")


def check_no_leaf(input: Tensor) -> None:
    """Refuse logits for an in-place gradient that would overwrite a leaf, as PyTorch refuses in-place work on one."""
    if torch.is_grad_enabled() and input.requires_grad and (input.is_leaf or _is_memory_of_a_leaf(input)):
        raise RuntimeError(
            f"inplace_backward would overwrite a leaf that requires grad with its gradient: the input of shape "
            f"{tuple(input.shape)} is the leaf itself, a view of it or its memory, handed through by an identity; "
            "pass computed logits (input * 1 is a copy), or drop inplace_backward"
        )


def _is_memory_of_a_leaf(x: Tensor) -> bool:
    """Walk from x to the leaves that it is made of, as far as each step has one input: no other step is an identity."""
    if x._base is not None and x._base.is_leaf and x._base.requires_grad:
        return True
    memory, node = x.untyped_storage()._cdata, x.grad_fn
    while node is not None:
        inputs: list[Any] = [function for function, _ in node.next_functions if function is not None]
        leaves = [function.variable for function in inputs if type(function).__name__ == "AccumulateGrad"]
        if any(leaf.untyped_storage()._cdata == memory for leaf in leaves):
            return True
        node = inputs[0] if len(inputs) == 1 else None
    return False


def check_candidates(candidates: object, target: Tensor) -> None:
    """Candidate classes: (*) or (*, k) beside a target (*)."""
    if not isinstance(candidates, Tensor):
        raise TypeError(f"candidates must be a tensor of class indices, got {type(candidates).__name__}")
    check_local("candidates", candidates)
    check_index_dtype("candidates", candidates)
    if candidates.shape != target.shape and (
        candidates.dim() != target.dim() + 1 or candidates.shape[:-1] != target.shape or candidates.shape[-1] < 1
    ):
        raise ValueError(
            f"candidates must be of the target's shape {tuple(target.shape)}, or that and k >= 1 candidates each, "
            f"got shape {tuple(candidates.shape)}"
        )
    if candidates.device != target.device:
        check_device("candidates", candidates, target, "target")


def normalized_targets(target: Tensor, ignored: int) -> Tensor:
    """Return int64 targets in which IGNORED stands for the caller's number, which goes no further."""
    target = target.to(torch.int64)  # in which any other number has room
    if ignored == IGNORED:
        return target
    return target.masked_fill(target == IGNORED, _NOT_IGNORED).masked_fill(target == ignored, IGNORED)


def check_indices(target: Tensor, candidates: Tensor | None, classes: int) -> None:
    """Raise IndexError for the first of them outside [0, classes), IGNORED targets aside. CPU tensors only."""
    for name, index in (("target", target), ("candidate", candidates)):
        if index is not None:
            index = transforms.values(index)
            bad = (index < 0) | (index >= classes)
            if name == "target":
                bad = bad & (index != IGNORED)
            if bool(bad.any()):
                raise_index_error(name, int(index[bad][0]), classes)


def raise_index_error(name: str, value: int, classes: int) -> None:
    value = IGNORED if name == "target" and value == _NOT_IGNORED else value
    ignored = ", and not ignore_index" if name == "target" else ""
    raise IndexError(f"{name} {value} is out of range for {classes} classes{ignored}")


def check_token_weight(token_weight: object, target: Tensor) -> None:
    if not isinstance(token_weight, Tensor) or not token_weight.is_floating_point():
        check_floating("token_weight", token_weight)
        return
    if type(token_weight) is not Tensor or token_weight.layout is not torch.strided or token_weight.is_nested:
        check_local("token_weight", token_weight)
    if token_weight.shape != target.shape or token_weight.device != target.device:
        check_like("token_weight", token_weight, target, "target")


def check_temperature(temperature: Any, input: Tensor | Projection) -> Any:
    if not isinstance(temperature, Tensor):
        return check_number("temperature", temperature, *DIVISORS)
    check_local("temperature", temperature)
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be a number or a floating point tensor, got {temperature.dtype}")
    _check_divisor("temperature", temperature)
    if temperature.device.type != "cpu":
        check_device("temperature", temperature, input)
    softcap = 0 if isinstance(input, Tensor) else input.form.softcap
    if temperature.requires_grad and softcap:
        raise ValueError(
            f"a temperature that requires grad takes its gradient from that of the hidden states, which softcap="
            f"{softcap} stands before; compute the logits and use the row form"
        )
    return temperature


def _check_divisor(name: str, divisor: Tensor, or_zero: bool = False) -> None:
    """Raise ValueError for a tensor that a loss cannot be divided by; with `or_zero` a 0 passes."""
    if divisor.dim():
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(divisor.shape)}")
    values = transforms.values(divisor)
    if may_read(values):
        for number in values.detach().flatten().tolist():  # under vmap there are several
            if number != 0 or not or_zero:
                check_number(name, number, *DIVISORS)


def check_stats(stats: object, return_stats: bool) -> None:
    if isinstance(stats, str) or not isinstance(stats, Sequence):
        raise TypeError(f"stats must be a sequence of names, got {stats!r}")
    for name in stats:
        check_choice("stats", name, ("entropy",))
    if not return_stats:
        raise ValueError(
            f"stats says what return_stats=True returns beside the usual; return_stats is off, got {stats!r}"
        )


def check_normalizer(normalizer: object, reduction: str, token_weight: object) -> None:
    if reduction != "mean":
        raise ValueError(f"normalizer replaces the divisor of reduction='mean', got reduction={reduction!r}")
    if isinstance(normalizer, str):
        if normalizer != "token_weight":
            raise ValueError(f"normalizer must be a number, a 0-d tensor or 'token_weight', got {normalizer!r}")
        if token_weight is None:
            raise ValueError("normalizer='token_weight' needs a token_weight")
        return
    if isinstance(normalizer, Tensor):
        check_local("normalizer", normalizer)
        _check_divisor("normalizer", normalizer, or_zero=True)  # a count of no targets
    elif not is_zero(normalizer):
        check_number("normalizer", normalizer, *DIVISORS)
