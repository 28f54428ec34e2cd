"""Counts the operators that run, and the matrix products of linear forms."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name, and notes how many elements the largest tensor has that each gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*arguments, **(kwargs or {})), function.name()
        self.calls[name] += 1
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest[name] = max([self.largest[name], *sizes])
        return result
