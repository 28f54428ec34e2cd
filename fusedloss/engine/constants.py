"""Small tensors of Python numbers, which a call would spend more time on than on its passes if it made them anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import transforms


def parameter(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number or a tensor as 0-d or flat. Integers and bools of rows keep their dtype."""
    if isinstance(value, Tensor):
        if value.dim() and not value.is_floating_point():
            return value.reshape(-1).to(device)
        return value.reshape(-1 if value.dim() else ()).to(device, dtype)
    if torch.compiler.is_compiling():
        # A factor stays a variable of the graph; a fill value would compile anew for each number.
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), float(value), dtype=dtype, device=device)  # PyTorch takes no large int


def parameters(
    params: Sequence[float | Tensor], common: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor | None]:
    """Return a loss's parameters, 0-d or flat, and what every loss has, (3,) or None; numbers are views of one tensor.

    That is kept by its values, and so must never be written to.
    """
    numbers, symbolic = list(common), torch.compiler.is_compiling()
    for x in reversed(params):
        if not isinstance(x, Tensor):
            numbers.insert(0, x)
            symbolic = symbolic or isinstance(x, torch.SymFloat)
    if symbolic:
        made = [parameter(x, dtype, device) for x in params]
        return made, torch.stack([parameter(x, dtype, device) for x in common]) if common else None
    whole, own = kept(tuple(numbers), dtype, device) if numbers else (None, ())
    made, rest = [], iter(own)
    for x in params:
        made.append(parameter(x, dtype, device) if isinstance(x, Tensor) else next(rest))
    return made, whole[-len(common) :] if common and whole is not None else None


def kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the numbers as one tensor and as 0-d ones, never to be written to."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    # A tensor that is made in a mode or a function transform belongs to it; a trace would differ from the next, which
    # finds it kept; autograd saves none of inference mode; what a CUDA graph reads has to live as long as the graph.
    if (
        torch._C._len_torch_dispatch_stack()
        or transforms.torch_func_is_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.is_inference_mode_enabled()
        or (on_gpu and torch.cuda.is_current_stream_capturing())
    ):
        return _made(numbers, dtype, device)
    # Kept by stream too: one that is forgotten may be in use on no other.
    return _kept(numbers, dtype, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)


def _made(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    if device.type == "cpu":
        whole = torch.tensor(numbers, dtype=dtype, device=device)
    else:  # to copy them would stall the stream
        whole = torch.stack([torch.full((), x, dtype=dtype, device=device) for x in numbers])
    return whole, whole.unbind()


@lru_cache(maxsize=256)
def _kept(
    numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device, _: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _made(numbers, dtype, device)
