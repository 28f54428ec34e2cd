"""The implementations of the passes, by name, and which of them a call runs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_choice
from . import buffer_pool, cpu, cuda, triton
from .base import Backend

#: By name, all but "reference", which is plain PyTorch and needs none.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (cpu.Cpu(), triton.Triton("triton", False), cuda.Cuda(), triton.Triton("triton_fused", True))
}

#: Of linear forms alone: kernels make the logits too, on the chip.
PRODUCT_IMPLS = tuple(name for name, backend in BACKENDS.items() if backend.makes_logits)
LINEAR_IMPLS = ("reference", *BACKENDS)
IMPLS = tuple(name for name in LINEAR_IMPLS if name not in PRODUCT_IMPLS)


def unavailable(impl: str, device: torch.device | None = None) -> str | None:
    """Return why the implementation cannot run on this machine, or for tensors on `device`; None if it can."""
    return BACKENDS[impl].unavailable(device) if impl in BACKENDS else None


def named_by(impl: str | None) -> str:
    """Return what an implementation is named by, where it is: the argument, or the environment without one."""
    return "FUSEDLOSS_IMPL" if impl is None and os.environ.get("FUSEDLOSS_IMPL") else "impl"


def resolve(impl: str | None, device: torch.device, linear: bool = False) -> str:
    """Return the implementation to use on `device`: the named one or an error; without a name the fastest one ready.

    FUSEDLOSS_IMPL names one for the devices and forms that it is for; elsewhere nothing is named.
    """
    source = "impl"
    if impl is None:
        source, impl = "FUSEDLOSS_IMPL", os.environ.get("FUSEDLOSS_IMPL") or None
        if impl is not None:
            check_choice("FUSEDLOSS_IMPL", impl, LINEAR_IMPLS)
            runs_on = BACKENDS[impl].runs_on if impl in BACKENDS else device.type
            if runs_on != device.type or (impl not in IMPLS and not linear):
                impl = None
    if impl is None:
        # Interpreted kernels are for tests: on a CPU nobody gets them without asking.
        fastest = "cpu" if device.type == "cpu" else "triton"
        return fastest if BACKENDS[fastest].unavailable(device) is None else "reference"
    check_choice("impl", impl, LINEAR_IMPLS)
    if impl not in IMPLS and not linear:
        raise ValueError(f"impl={impl!r} is for linear forms; losses of logits take one of {', '.join(IMPLS)}")
    reason = unavailable(impl, device)
    if reason is not None:
        raise RuntimeError(f"{source}={impl!r} cannot run: {reason}")
    return impl


def new_buffer(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of `like` that the caller writes next, in whatever way is cheapest there."""
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    dtype = dtype or like.dtype
    if math.prod(shape) * dtype.itemsize < buffer_pool.SMALL:
        return like.new_empty(shape, dtype=dtype)
    return cpu.new_memory(shape, dtype)
