"""Stand-ins for hidden states and logits in a forward pass with labels, and the passes under way.

A stand-in refuses by name whatever it does not know. The pass computes what torch.nn.functional.linear and
torch.nn.functional.cross_entropy of stand-ins are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.output_layer import described
from ...engine.project import autocast


@dataclass(eq=False)
class Pass:
    """A forward pass with labels, whose cross-entropies are computed by a method of the subclass.

    The `head`, its output layer, gives stand-ins if the `way` is "linear", and logits if it is "row".
    """

    head: nn.Module
    way: str

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a model's forward; until it returns, this is the pass under way."""
        _THREAD.passes.append(self)
        try:
            return forward(*args, **kwargs)
        finally:
            _THREAD.passes.pop()

    def product(self, input: Hidden, weight: Tensor, bias: Tensor | None = None) -> Logits:
        """Take the place of torch.nn.functional.linear."""
        return Logits([input.hidden], [weight], len(weight), bias)


class _Thread(threading.local):
    """The passes under way in this thread, the innermost last: two threads may run one model at a time."""

    def __init__(self) -> None:
        # a list, since torch.compile of torch 2.11 cannot set attributes here
        self.passes: list[Pass] = []


_THREAD = _Thread()


def under_way() -> Any:
    """Return the innermost pass of this thread, or None."""
    return _THREAD.passes[-1] if _THREAD.passes else None


class _NoTensor:
    """Stands where a tensor is expected, and refuses by name whatever its class does not define."""

    @classmethod
    def refusal(cls, what: str, of: str = "the logits") -> AttributeError:
        """Return an AttributeError, since a name that is not there may be asked for to know that."""
        return AttributeError(f"{what!r} of {of} is not understood by the fused loss")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise cls.refusal(getattr(function, "__name__", repr(function)))

    def __getattr__(self, name: str) -> Any:
        raise self.refusal(name)

    def __getitem__(self, index: Any) -> Any:
        raise self.refusal(f"[{index}]")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self.refusal("assignment to elements")

    def __eq__(self, other: object) -> bool:
        raise self.refusal("==")

    def __bool__(self) -> bool:
        raise self.refusal("bool")


class Hidden(_NoTensor):
    """Hidden states on their way into the output layer, whose product it puts off."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    @classmethod
    def refusal(cls, what: str, of: str = "the output layer's input") -> AttributeError:
        return AttributeError(
            f"{super().refusal(what, of)}, for which a {described(under_way().head)} must be one linear(input, weight, "
            "bias), or plain LoRA on one; merge an adapter of the layer, or leave the layer out of target_modules"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return under_way().product(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


class Logits(_NoTensor):
    """z = scale * (sum_i hidden[i] @ weight[i].T + bias) or softcap * tanh(z / softcap), (*, V), of which only the loss
    is made.
    """

    # No data class, since FSDP2 takes the fields of one for outputs of the module that returns it.
    def __init__(
        self,
        hidden: list[Tensor],
        weight: list[Tensor],
        classes: int,
        bias: Tensor | None,
        scale: float = 1.0,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.weight, self.classes, self.bias = hidden, weight, classes, bias
        self.scale, self.softcap = scale, softcap
        self.dtype = dtype or product_dtype(hidden[0])

    def scaled(self) -> tuple[list[Tensor], Tensor | None]:
        """Return hidden states and bias with the scale in them."""
        hidden, bias = self.hidden, self.bias
        if not math.isclose(self.scale, 1.0, rel_tol=1e-12):  # dividing by a cap and multiplying by it leaves almost 1
            hidden, bias = [h * self.scale for h in hidden], None if bias is None else bias * self.scale
        return hidden, bias

    def _but(self, **changed: Any) -> Logits:
        names = ("hidden", "weight", "classes", "bias", "scale", "softcap", "dtype")
        return Logits(**{name: getattr(self, name) for name in names} | changed)

    # What is asked of them

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden[0].shape[:-1], self.classes))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden[0].dim()

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    # Casts, which the loss does not need: it computes in float32, and in float64 for float64

    def float(self) -> Logits:
        return self._but(dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        to = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if to.device != self.device:
            raise self.refusal(f"to({to.device})")
        if to.dtype not in (self.dtype, torch.float32):
            raise self.refusal(f"to({to.dtype})")
        return self._but(dtype=to.dtype)

    # Shapes: those of the hidden states, as long as the classes stay together

    def contiguous(self) -> Logits:
        return self

    def view(self, *shape: Any) -> Logits:
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        if not shape or shape[-1] != self.shape[-1]:
            raise self.refusal(f"view{shape}", f"logits of shape {tuple(self.shape)}")
        return self._but(hidden=[h.reshape(*shape[:-1], h.shape[-1]) for h in self.hidden])

    reshape = view

    def __getitem__(self, index: Any) -> Logits:
        parts = index if isinstance(index, tuple) else (index,)
        taken = sum(part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
        last = taken == self.dim() or any(part is Ellipsis for part in parts)
        whole = isinstance(parts[-1], slice) and parts[-1] == slice(None)
        if any(part is None for part in parts) or taken > self.dim() or (last and not whole):
            raise self.refusal(f"[{index}]", f"logits of shape {tuple(self.shape)}")
        return self._but(hidden=[h[index] for h in self.hidden])

    # Arithmetic that the linear form knows

    def __mul__(self, factor: Any) -> Logits:
        if not _is_number(factor) or factor == 0 or (self.softcap is not None and factor < 0):
            raise self.refusal("multiplication", f"the logits and {_described(factor)}")
        softcap = None if self.softcap is None else self.softcap * factor
        return self._but(scale=self.scale * factor, softcap=softcap)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Logits:
        if not _is_number(divisor) or divisor == 0:
            raise self.refusal("division", f"the logits and {_described(divisor)}")
        return self * (1 / divisor)

    def __add__(self, bias: Any) -> Logits:
        of_classes = isinstance(bias, Tensor) and bias.dim() and bias.shape[-1] == bias.numel() == self.shape[-1]
        if not of_classes or bias.dim() > self.dim() or self.softcap is not None:
            raise self.refusal("addition", f"the logits and {_described(bias)}")
        bias = bias.reshape(-1) / self.scale  # no view, which FSDP2 may free before a teacher's loss
        return self._but(bias=bias if self.bias is None else self.bias + bias)

    __radd__ = __add__

    def tanh(self) -> Logits:
        if self.softcap is not None:
            raise self.refusal("tanh", "soft-capped logits")
        return self._but(softcap=1.0)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        current = under_way()
        if function is F.cross_entropy and isinstance(args[0], Logits) and current is not None:
            return current.cross_entropy(*args, **(kwargs or {}))
        if function is torch.tanh:
            return args[0].tanh()
        return super().__torch_function__(function, types, args, kwargs)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a product of these hidden states."""
    return autocast(hidden.new_empty(0))[0].dtype


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class RowLogits(Tensor):
    """Logits in evaluation: those of the model in every respect, but that their cross-entropy is the fused loss's."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        current = under_way()  # None for logits that a hook has kept
        if function is F.cross_entropy and isinstance(args[0], RowLogits) and current is not None:
            return current.cross_entropy(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class UnbuiltLogits(_NoTensor):
    """The placeholder for the logits, which were never computed, in the outputs of a fused model; has their shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __repr__(self) -> str:
        return f"UnbuiltLogits(shape={tuple(self.shape)})"

    @classmethod
    def refusal(cls, what: str, of: str = "the logits") -> AttributeError:
        return AttributeError(
            f"{what}: {of} of a fused model in training were never built, only their loss; call it without labels, or "
            "in evaluation with eval_logits=True, or unfuse it"
        )


def finished(outputs: Any) -> Any:
    """Return outputs without what carries the loss."""

    def plain(value: Any) -> Any:
        if isinstance(value, Logits):
            return UnbuiltLogits(value.shape)
        return value.as_subclass(Tensor) if isinstance(value, RowLogits) else value

    if isinstance(outputs, Mapping):
        for name, value in list(outputs.items()):
            outputs[name] = plain(value)  # type: ignore[index]
        return outputs
    return tuple(plain(value) for value in outputs)
