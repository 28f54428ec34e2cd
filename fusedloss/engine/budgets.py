"""How many rows of logits a linear form makes at a time, by a budget of bytes, and what else differs by device."""

from __future__ import annotations

import os

import torch

from ..checks import check_int

#: Bytes of a chunk of logits where nothing else says how many: the argument, FUSEDLOSS_LINEAR_BUDGET or a GPU's rule.
DEFAULT_BUDGET = 128 * 2**20

#: Bytes that a GPU gets at a time where a CPU gets what its caches hold. By its memory's rate it works on them for
#: about as long as the host takes to launch an operator.
GPU_BYTES = 32 * 2**20

#: The most columns of an adapter's matrix whose gradient a CPU's BLAS writes faster by columns: of 8, MKL does so in a
#: fifth of the time.
NARROW = 32

#: Bytes of a chunk for each thread that stay in its cache during a product with such a matrix, which does little else
#: than read and write the chunk.
CACHED = 2**21


def checked_budget(budget: int | None, row: int) -> int:
    """Return the bytes that were asked for, which must hold the `row` bytes of one row's logits; 0 if none were."""
    source = ""
    if budget is None:
        text = os.environ.get("FUSEDLOSS_LINEAR_BUDGET")
        if not text:
            return 0
        if not text.isdecimal():
            raise ValueError(f"FUSEDLOSS_LINEAR_BUDGET must be a number of bytes, got {text!r}")
        budget, source = int(text), " (FUSEDLOSS_LINEAR_BUDGET)"
    budget = check_int("budget", budget)
    if budget < row:
        raise ValueError(f"budget of {budget} bytes{source} is too small for one row of logits, {row} bytes")
    return budget


def at_a_time(device: torch.device, on_cpu: int) -> int:
    """Return how many bytes of intermediate results PyTorch's operators get at a time."""
    return on_cpu if device.type == "cpu" else max(on_cpu, GPU_BYTES)


def sums_in_float32(device: torch.device) -> bool:
    """Tell whether PyTorch adds products of half-precision matrices to float32 there: on NVIDIA's GPUs alone."""
    return device.type == "cuda" and torch.version.hip is None


def most_rounded(device: torch.device) -> int:
    """Return up to how many chunks the sum of half-precision gradients may be rounded after each.

    On CPUs products are not added to float32: each of a float32 sum is made twice, the second time for what its
    rounding lost. A sum that is rounded after each of n chunks has sqrt((n + 1) / 2) times the error of one product.
    """
    return 4 if device.type == "cpu" else 1


def is_narrow(x: torch.Tensor) -> bool:
    """Tell whether products with a matrix of hidden states or weights have few columns for a CPU's BLAS."""
    return x.shape[1] <= NARROW and x.device.type == "cpu" and x.element_size() >= 4


def default_budget(device: torch.device, dtype: torch.dtype, logits: int, weight: int, gradient: bool) -> int:
    """Return the bytes of a chunk where none were asked for.

    On a GPU each chunk but the last has the sum of the weight's gradient read and written, which costs as much as it is
    large. What is needed at a time, beside gradients in their own dtypes, stays below the 4 bytes an element that a sum
    in float32 takes anyway, and 128 MiB.

    Args:
        logits: bytes of all logits, with what is kept beside them.
        weight: elements of the weight.
        gradient: whether the weight's gradient is needed.
    """
    if not gradient or not sums_in_float32(device):
        return DEFAULT_BUDGET
    # One chunk has no sum; but before the loss scale is known, the gradient of a float16 weight is float32.
    room = (2 if dtype == torch.float16 else 4) * weight
    return max(DEFAULT_BUDGET, logits if logits <= room else weight)


def chunk_rows(rows: int, row: int, budget: int) -> tuple[int, int]:
    """How many chunks there are for so many rows of `row` bytes, and how many rows each has."""
    count = max(1, -(-rows // max(1, budget // row)))
    return count, -(-rows // count)
