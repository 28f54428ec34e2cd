"""Counts the matrix products of linear forms."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss.backends import BACKENDS
from fusedloss.definition.rows import Rows, decode
from fusedloss.engine import chunks

_NAMES = ("aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm.out", "aten::addmm_")
_KERNELS = {"fusedloss::forward": chunks.forward, "fusedloss::backward": chunks.backward}


def inside(mode: TorchDispatchMode, function: Any, arguments: Any) -> Any:
    """Run a linear form's operator so that the mode sees what is in it; None for another function."""
    name, own = function.name(), len(Rows._fields)
    if name not in _KERNELS:  # which are opaque to a mode
        return None
    spec = decode(arguments[-1])
    with mode:
        return _KERNELS[name](Rows(*arguments[:own]), *arguments[own:-1], spec, BACKENDS[spec.impl])


class Products(TorchDispatchMode):
    """Counts matrix products, and the rows of logits, of so many classes, that they make."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.logit_rows = 0
        self._classes = classes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result = inside(self, function, arguments)
        if result is not None:
            return result
        result = function(*arguments, **(kwargs or {}))
        if function.name() in _NAMES:
            self.calls[function.name()] += 1
            if result.shape[-1] == self._classes:
                self.logit_rows += len(result)
        return result
