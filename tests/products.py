"""Counts the matrix products of linear forms."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss.backends import BACKENDS
from fusedloss.definition.rows import Rows, decode
from fusedloss.engine import chunks

_NAMES = ("aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm.out", "aten::addmm_")
_KERNELS = {"fusedloss::forward": chunks.forward, "fusedloss::backward": chunks.backward}


class Products(TorchDispatchMode):
    """Counts matrix products, and the rows of logits, of so many classes, that they make."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.logit_rows = 0
        self._classes = classes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        name, own = function.name(), len(Rows._fields)
        if name in _KERNELS:  # which are opaque to a mode
            spec = decode(arguments[-1])
            with self:
                return _KERNELS[name](Rows(*arguments[:own]), *arguments[own:-1], spec, BACKENDS[spec.impl])
        result = function(*arguments, **(kwargs or {}))
        if name in _NAMES:
            self.calls[name] += 1
            if result.shape[-1] == self._classes:
                self.logit_rows += len(result)
        return result
