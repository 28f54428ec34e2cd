"""Memory of large gradients and of chunks of logits on a CPU, kept from one step to the next.

New memory comes from the system page by page, each zeroed on the first touch, which costs more than the arithmetic of
a gradient, and the C library gives large blocks back as soon as they are freed. So the blocks that were freed last are
kept for the next, as torch does on a GPU. ``FUSEDLOSS_KEEP_BYTES`` says how large a block may be for that (1 GiB; 0
keeps nothing).
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils import deterministic

#: Below this, in bytes, the C library's own memory does as well.
SMALL = 4 * 2**20
KEPT_BYTES = 2**30
_HUGE_PAGE = 2 * 2**20

#: A linear form's chunk and the sum of its weight's gradients.
_MOST_BLOCKS = 2

# The blocks that no tensor uses, the last one last. Taking one out and putting one in are single steps, so that threads
# need no lock, which a forked child might inherit locked.
_kept: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised and contiguous, at least SMALL; its memory comes back here when the last tensor on it is gone."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    block = _take(size) if size <= _limit() else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    view = memoryview(block)  # lives as long as the tensors on it
    weakref.finalize(view, _keep, block).atexit = False
    tensor = torch.frombuffer(view, dtype=dtype, count=count).view(shape)
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(torch.nan)  # as torch.empty does
    return tensor


def _limit() -> int:
    text = os.environ.get("FUSEDLOSS_KEEP_BYTES", "")
    try:
        limit = int(text) if text else KEPT_BYTES
    except ValueError:
        limit = -1
    if limit < 0:
        raise ValueError(f"FUSEDLOSS_KEEP_BYTES must be a number of bytes, at least 0, got {text!r}")
    return limit


def _take(size: int) -> mmap.mmap | None:
    with suppress(IndexError):  # another thread took the last
        for _ in range(len(_kept)):
            block = _kept.pop()
            if len(block) // 4 <= size <= len(block):  # a small tensor must not hold a large block
                return block
            _kept.insert(0, block)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    try:
        return mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch has the words for it
        return None


def _keep(block: mmap.mmap) -> None:
    _kept[:] = [*_kept[1 - _MOST_BLOCKS :], block]
