"""How much memory a call needs for the while: the kernel's own mark of the most that was resident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that `call` had resident at its peak beyond those before it; None where the kernel does not tell.

    Large tensors come from the kernel and go back to it one by one, so that earlier calls do not matter.
    """
    try:
        before = _resident("VmRSS")
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
