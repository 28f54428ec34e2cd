"""How much memory a process of an example holds."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path


def resident_mib(field: str) -> float:
    """Return VmRSS, what this process holds now, or VmHWM, the most that it held; NaN where the system is not Linux.

    Not getrusage: its maximum is the parent's, where that one was larger at the fork.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return math.nan
