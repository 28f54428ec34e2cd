"""The releases of Triton that the kernels are compiled with: the installed one and the oldest that they must run on."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

#: What the oldest torch of the range brings. The Makefile puts it into the folder.
OLDEST = "3.6.0"
FOLDER = Path(__file__).parents[1] / "build/triton36"


def environments() -> dict[str, dict[str, str]]:
    """By release: the environment of a process that compiles with it."""
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {importlib.metadata.version("triton"): here}
    if unavailable() is None:
        path = [str(FOLDER), *filter(None, [here.get("PYTHONPATH")])]
        found[OLDEST] = here | {"PYTHONPATH": os.pathsep.join(path)}
    return found


def unavailable() -> str | None:
    """Why the oldest release is not at hand beside the installed one; None if it is."""
    if importlib.metadata.version("triton") == OLDEST:
        return f"triton {OLDEST} is the installed one"
    wheel = FOLDER / f"triton-{OLDEST}.dist-info/WHEEL"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    where = FOLDER.relative_to(FOLDER.parents[1])
    if not wheel.exists():
        log = FOLDER.with_suffix(".log")
        said = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
        reason = f"pip said: {said[-1]}" if said else f"`make {where}/installed` puts it there"
        return f"triton {OLDEST} is not in {where}; {reason}"
    if f"Tag: {python}-" not in wheel.read_text(encoding="utf-8"):
        return f"triton {OLDEST} in {where} is of another Python than this {python}; remove the folder"
    return None
