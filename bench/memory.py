"""How much memory a call needs for the while: the kernel's own mark of the most that was resident."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that `call` had resident at its peak beyond those before it; None where the kernel does not tell.

    Earlier calls do not matter: what they left to the C library goes back to the kernel first, and the call takes no
    block that was kept from one of them, which would be resident before.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        before = _resident("VmRSS")
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    with patch.dict(os.environ, FUSEDLOSS_KEEP_BYTES="0"):
        call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
