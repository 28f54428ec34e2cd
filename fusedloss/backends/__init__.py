"""The implementations of the passes. Each registers its kernels for the operators under its device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from . import buffer_pool as memory
from . import cpu, cuda, triton

#: Implementations by name: what each runs on, and why it is not ready (None when it is).
IMPLS = ("reference", "cpu", "triton", "cuda")

#: Of linear forms alone: kernels make the logits too, on the chip.
PRODUCT_IMPLS = ("triton_fused",)
LINEAR_IMPLS = (*IMPLS, *PRODUCT_IMPLS)

#: Of a "mean" or "sum" these make the gradient with the loss, of one read of the logits. Others would read them twice
#: all the same, and only hold the gradient for longer.
ONE_READ_IMPLS = ("cuda",)


class Timing(NamedTuple):
    """Milliseconds of cross-entropy and its gradient on 8192 rows of so many classes."""

    classes: int
    triton: float
    cuda: float


#: What a GPU runs by default, by compute capability and dtype: "cuda" where that took less time than "triton" in the
#: timing of as many classes, or up to twice as many; "triton" where there is none, as on every GPU so far. The part
#: "rows" of `make gpu-report` has the lines to put here, with the GPU's name beside them.
TIMINGS: dict[tuple[int, int, torch.dtype], tuple[Timing, ...]] = {}


def unavailable(impl: str, device: torch.device | None = None) -> str | None:
    """Why the implementation cannot run on this machine, or for tensors on `device`; None if it can."""
    if impl == "cpu":
        if device is not None and device.type != "cpu":
            return f"it runs on CPU tensors, but the input is on {device}"
        return cpu.unavailable()
    if impl in ("triton", "triton_fused"):
        return triton.unavailable(device)
    if impl == "cuda":
        return cuda.unavailable(device)
    return None


def runs_on(impl: str) -> str | None:
    """The type of device whose tensors the implementation takes; None for any."""
    if impl in ("triton", "triton_fused"):
        return triton.RUNS_ON
    return {"cpu": "cpu", "cuda": cuda.RUNS_ON}.get(impl)


def named_by(impl: str | None) -> str:
    """What an implementation is named by, where it is: the argument, or the environment without one."""
    return "FUSEDLOSS_IMPL" if not impl and os.environ.get("FUSEDLOSS_IMPL") else "impl"


def resolve(
    impl: str | None,
    device: torch.device,
    linear: bool = False,
    dtype: torch.dtype | None = None,
    classes: int = 0,
    candidates: int = 0,
) -> str:
    """The implementation to use on `device`: the named one or an error; without a name the fastest that is ready.

    FUSEDLOSS_IMPL names one for the devices and forms that it is for; elsewhere nothing is named. The fastest on a GPU
    may depend on the logits' dtype and classes, and on the number of candidates for a target.
    """
    source = named_by(impl)
    if not impl:
        impl = os.environ.get("FUSEDLOSS_IMPL") or None
        if impl is not None:
            check_choice("FUSEDLOSS_IMPL", impl, LINEAR_IMPLS)
            if runs_on(impl) not in (None, device.type) or (impl not in IMPLS and not linear):
                impl = None
    if impl is None:
        # Interpreted kernels are for tests: on a CPU nobody gets them without asking.
        fastest = "cpu" if device.type == "cpu" else "triton"
        faster = _cuda_is_faster(device, dtype, classes) and candidates <= cuda.MAX_CANDIDATES
        if faster and unavailable("cuda", device) is None:
            fastest = "cuda"
        return fastest if unavailable(fastest, device) is None else "reference"
    check_choice("impl", impl, LINEAR_IMPLS)
    if impl not in IMPLS and not linear:
        raise ValueError(f"impl={impl!r} is for linear forms; losses of logits take one of {', '.join(IMPLS)}")
    reason = unavailable(impl, device)
    if reason is not None:
        raise RuntimeError(f"{source}={impl!r} cannot run: {reason}")
    return impl


def _cuda_is_faster(device: torch.device, dtype: torch.dtype | None, classes: int) -> bool:
    """Than Triton, as the timings say."""
    if not TIMINGS or dtype is None or device.type != "cuda":
        return False
    gpu = torch.cuda.get_device_properties(device)
    timings = TIMINGS.get((gpu.major, gpu.minor, dtype), ())
    return any(x.cuda < x.triton for x in timings if classes <= x.classes <= 2 * classes)


def has_epilogue(impl: str, name: str) -> bool:
    """Whether the implementation has this loss as a compiled epilogue."""
    if impl in ("triton", "triton_fused"):
        return triton.has_epilogue(name)
    if impl == "cuda":
        return cuda.has_epilogue(name)
    return impl == "cpu" and (name in cpu.EPILOGUES.rows or name in cpu.EPILOGUES.classes)


def new_buffer(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of `like` that the caller writes next, in whatever way is cheapest there."""
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    buffer = memory.empty(shape, dtype or like.dtype)
    cpu.advise_huge_pages(buffer)
    return buffer
