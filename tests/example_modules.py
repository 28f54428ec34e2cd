"""The modules of an example. They import each other by bare names, which are taken back afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCH = EXAMPLES.parent / "bench"


@contextlib.contextmanager
def imported(example: str, names: str) -> Iterator[SimpleNamespace]:
    """Import modules of a folder of examples, and put everything that they change back in the end."""
    modules = names.split()
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    threads, path = torch.get_num_threads(), list(sys.path)
    # Other tests leave folders there that have modules of these names.
    sys.path[:] = [str(EXAMPLES / example), *(p for p in path if not p.startswith((str(EXAMPLES), str(BENCH))))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # as the scripts would
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield SimpleNamespace(**{name: __import__(name) for name in modules})
    sys.path[:] = path
    torch.set_num_threads(threads)
    for name in modules:
        del sys.modules[name]
    sys.modules.update(before)
