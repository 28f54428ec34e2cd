"""A GPU that is not there: meta tensors stand for those on it, and what would be launched on them is counted.

Launches of Triton's kernels are counted where :func:`count_launch` stands in for the backend's own launch.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

#: Operators that launch nothing beside views, which their schemas tell.
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}


class NoGpu(TorchDispatchMode):
    """Answers matrix products itself, by the rules of CUDA; counts them, launches, and the bytes that are held."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []
        """(m, n, k) of each."""
        self.launches: Counter[str] = Counter()
        self.peak = 0
        """Of bytes beside the tensors `held`."""
        self._outside = {x.untyped_storage()._cdata for x in held}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.name()
        namespace, _, operator = name.partition("::")
        operator = operator.partition(".")[0]
        if namespace == "fusedloss":
            with self:  # what the operator is made of
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments, **kwargs)
        if namespace == "aten" and operator in ("mm", "mm_", "addmm", "addmm_"):
            result = self._product(operator, function, arguments, kwargs)
        else:
            result = function(*arguments, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        outputs = outputs or [arguments[0]]  # of what writes to it
        if operator not in NOTHING and not function.is_view and any(x.numel() for x in outputs):
            self.launches[name] += 1
        self._hold(outputs)
        return result

    def _product(self, operator: str, function: Any, arguments: Any, kwargs: Any) -> Tensor:
        """As ATen/native/cuda/Blas.cpp checks them."""
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | kwargs
        added = given["self"] if operator.startswith("addmm") else None
        a, b = (given["self"], given["mat2"]) if added is None else (given["mat1"], given["mat2"])
        out, dtype = given.get("out"), given.get("out_dtype", a.dtype)
        if operator == "addmm_":
            out = added
        shape = (a.shape[0], b.shape[1])
        assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
        assert dtype == a.dtype or (dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16))
        if out is None:
            out = a.new_empty(shape, dtype=dtype)
        assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
        if added is not None:
            assert added.dtype in (dtype, a.dtype) and torch.broadcast_shapes(added.shape, shape) == shape
            assert "out_dtype" not in given or added is out  # one of fewer dimensions takes another way there
        self.products.append((*shape, a.shape[1]))
        return out

    def _hold(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in self._outside:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))


def count_launch(kernel: Any, *_: Any, **__: Any) -> None:
    """Stands in for a launch of Triton's, within a NoGpu."""
    mode = _get_current_dispatch_mode()
    assert isinstance(mode, NoGpu)
    mode.launches[kernel.fn.__name__] += 1
