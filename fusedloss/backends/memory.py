"""Memory of large gradients on a CPU, kept from one step to the next.

New memory comes from the system page by page, each zeroed on the first touch, which costs more than the arithmetic of
a gradient, and the C library gives large blocks back as soon as they are freed. So the block of the last gradient that
was freed is kept for the next, as torch does on a GPU. ``FUSEDLOSS_KEEP_BYTES`` says how large a block may be for that
(1 GiB; 0 keeps nothing).
"""

from __future__ import annotations

import mmap
import os
import weakref

import torch
from torch import Tensor
from torch.utils import deterministic

#: Below this, in bytes, the C library's own memory does as well.
SMALL = 4 * 2**20
KEPT_BYTES = 2**30
_HUGE_PAGE = 2 * 2**20

# At most one block, which no tensor uses. Taking it out and putting one in are single steps, so that threads need no
# lock, which a forked child might inherit locked.
_kept: list[mmap.mmap] = []


def empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised, contiguous, like `logits`; its memory comes back here when the last tensor on it is gone."""
    size = logits.numel() * logits.element_size()
    block = _take(size) if SMALL <= size <= _limit() else None
    if block is None:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    view = memoryview(block)  # lives as long as the tensors on it
    weakref.finalize(view, _keep, block).atexit = False
    gradient = torch.frombuffer(view, dtype=logits.dtype, count=logits.numel()).view(logits.shape)
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        gradient.fill_(torch.nan)  # as torch.empty does
    return gradient


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
    try:
        block = _kept.pop()
    except IndexError:
        pass
    else:
        if len(block) // 4 <= size <= len(block):  # a small gradient must not hold a large block
            return block
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    try:
        return mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch has the words for it
        return None


def _keep(block: mmap.mmap) -> None:
    _kept[:] = [block]
