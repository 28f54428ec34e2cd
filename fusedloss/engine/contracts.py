"""What the operators' arguments must be, checked before a kernel takes addresses, sizes and strides from them.

The public functions hand over what they have prepared. The operators are public too, as ``torch.ops.fusedloss``, where
a wrong dtype, size or stride would be a read of other memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES, compute_dtype

STATISTICS = 6
COEFFICIENTS = 3


class Epilogues(NamedTuple):
    """The compiled epilogues of a backend, each with the number of its parameters."""

    rows: Mapping[str, int]
    classes: Mapping[str, int]
    sums: Mapping[str, int]
    """Those over the classes whose sums over the rows are a loss's; there they lack the last of their parameters."""

    @staticmethod
    def of(extension: Any) -> Epilogues:
        """Return those of an extension module, or none without one."""
        return Epilogues(*(({}, {}, {}) if extension is None else extension.epilogues()))


#: By operator, the epilogues that it takes. "" has none: a gradient of coefficients that PyTorch made.
_TAKES: dict[str, Callable[[Epilogues], Mapping[str, int]]] = {
    "loss": lambda x: {**x.rows, **x.classes},
    "gradient": lambda x: {"": 0, **x.rows, **x.classes},
    "class_sums": lambda x: x.sums,
    "class_terms": lambda x: {name: x.classes[name] for name in x.sums},
    "term_sums": lambda x: x.classes,
}

# How dtypes follow from that of logits or hidden states.
_STORAGE, _COMPUTE, _INDEX = range(3)

_DTYPES = {dtype: (dtype, compute_dtype(dtype), torch.int64) for dtype in DTYPES}


class _Argument(NamedTuple):
    dtype: int
    shape: Callable[[Any, Any, Any, Any], tuple[Any, ...]]
    """Of N rows, V classes, K picks and D features."""
    contiguous: bool = True


_ARGUMENTS = {
    "gradient": _Argument(_STORAGE, lambda n, v, k, d: (n, v), False),
    "linear_weight": _Argument(_STORAGE, lambda n, v, k, d: (v, d), False),
    "linear_bias": _Argument(_STORAGE, lambda n, v, k, d: (v,), False),
    "target": _Argument(_INDEX, lambda n, v, k, d: (n,)),
    "weight": _Argument(_COMPUTE, lambda n, v, k, d: (v,)),
    "candidates": _Argument(_INDEX, lambda n, v, k, d: (n, k)),
    "row_weight": _Argument(_COMPUTE, lambda n, v, k, d: (n,), False),
    "grad_output": _Argument(_COMPUTE, lambda n, v, k, d: (n,), False),
    "statistics": _Argument(_COMPUTE, lambda n, v, k, d: (STATISTICS + k, n)),
    "index": _Argument(_INDEX, lambda n, v, k, d: (k, n)),
    "coefficients": _Argument(_COMPUTE, lambda n, v, k, d: (COEFFICIENTS + k, n)),
    "common": _Argument(_COMPUTE, lambda n, v, k, d: (3,)),
    "top_q": _Argument(_COMPUTE, lambda n, v, k, d: (n,)),
}


class Contract:
    """What the arguments of an operator must be. A check takes one to three microseconds."""

    def __init__(self, operator: str) -> None:
        names = [argument.name for argument in getattr(torch.ops.fusedloss, operator).default._schema.arguments]
        at = {name: i for i, name in enumerate(names)}
        arguments = dict(_ARGUMENTS)
        if operator.startswith("product"):  # whose kernels read the bias themselves
            arguments["linear_bias"] = arguments["linear_bias"]._replace(contiguous=True)
        self._tensors = [(i, name, *arguments[name]) for name, i in at.items() if name in arguments]
        self._operator, self._writes = operator, operator.endswith("_")
        self._hidden, self._parts = at.get("hidden"), at.get("row_parts")
        self._source = names[self._hidden or 0]
        self._index, self._candidates = at.get("index"), at.get("candidates")
        self._params, self._epilogue = at.get("params"), at.get("epilogue")
        self._top_k = at.get("top_k")
        kind = operator.removeprefix("product_").removeprefix("linear_").removeprefix("row_").rstrip("_")
        self._takes = _TAKES.get("loss" if kind == "loss_gradient" else kind, lambda epilogues: {})

    def check(self, arguments: Sequence[Any], several_devices: bool = True) -> None:
        """Check the tensors and the numbers. `several_devices`: whether the tensors may be on more than one."""
        if self._operator == "scale_":
            return self._check_scale(*arguments[:2])
        source = arguments[self._hidden or 0]
        dtypes = _DTYPES.get(source.dtype)
        if dtypes is None:
            raise TypeError(
                f"{self._operator}: {self._source} must be one of {', '.join(map(str, DTYPES))}, got {source.dtype}"
            )
        if source.dim() != 2:
            raise ValueError(
                f"{self._operator}: {self._source} must have two dimensions, got shape {tuple(source.shape)}"
            )
        rows, classes = source.shape
        features = picks = 0
        if self._hidden is None:
            self._check_rows("logits", source)
        else:
            features, classes = classes, _size(arguments[self._hidden + 1], 0)
            if self._parts is not None:
                rows = rows * arguments[self._parts]
        if self._index is not None:
            picks = _size(arguments[self._index], 0)
        elif self._candidates is not None and arguments[self._candidates] is not None:
            picks = _size(arguments[self._candidates], -1)
        for i, name, dtype, shape, contiguous in self._tensors:
            x = arguments[i]
            if x is not None and (
                x.dtype is not dtypes[dtype]
                or x.shape != shape(rows, classes, picks, features)
                or (contiguous and not x.is_contiguous())
                or (several_devices and x.device != source.device)
            ):
                raise self._error(name, x, dtypes[dtype], shape(rows, classes, picks, features), source, contiguous)
        if self._hidden == 1:
            self._check_rows("gradient", arguments[0])
        if self._params is not None:
            for i, x in enumerate(arguments[self._params]):
                if (
                    x.dtype is not dtypes[_COMPUTE]
                    or (x.dim() and x.shape != (rows,))
                    or (several_devices and x.device != source.device)
                ):
                    raise self._error(f"params[{i}]", x, dtypes[_COMPUTE], (rows,) if x.dim() else (), source)
        if self._top_k is not None and not 0 <= arguments[self._top_k] <= 2:
            raise ValueError(f"{self._operator}: top_k must be 0, 1 or 2, got {arguments[self._top_k]}")

    def known(self, epilogues: Epilogues) -> dict[str, tuple[int, bool]]:
        """Return the epilogues that the operator takes: (number of parameters, whether it is over the classes)."""
        return {name: (count, name in epilogues.classes) for name, count in self._takes(epilogues).items()}

    def check_epilogue(self, arguments: Sequence[Any], known: Mapping[str, tuple[int, bool]]) -> None:
        """Check its name, the number of its parameters, and that there are the picks that it looks at."""
        if self._epilogue is None or self._params is None:
            return
        name, params = arguments[self._epilogue], len(arguments[self._params])
        if name not in known:
            raise ValueError(f"{self._operator}: no epilogue named {name!r}; there are {', '.join(map(repr, known))}")
        count, over_classes = known[name]
        if params != count:
            raise ValueError(f"{self._operator}: {name!r} takes {count} params, got {params}")
        if not over_classes:
            return
        if self._top_k is not None and arguments[self._top_k] < 1:
            raise ValueError(f"{self._operator}: {name!r} needs top_k >= 1, got {arguments[self._top_k]}")
        if self._index is not None:
            picks = _size(arguments[self._index], 0)
            if picks < 1 or (picks > 1 and self._operator == "class_terms"):
                raise ValueError(f"{self._operator}: {name!r} needs an index with the top class, got {picks} picks")

    def _check_rows(self, name: str, x: Tensor) -> None:
        """Check the layout of a matrix (N, V), of which kernels take the stride between rows."""
        row, column = x.stride()
        if column != 1 and x.shape[1] > 1:
            raise ValueError(f"{self._operator}: {name} must have rows of unit stride, got strides {x.stride()}")
        if self._writes and row < x.shape[1] and x.shape[0] > 1:
            raise ValueError(f"{self._operator}: {name} must have rows that do not overlap, got strides {x.stride()}")

    def _check_scale(self, gradient: Tensor, factor: Tensor) -> None:
        dtypes = _DTYPES.get(gradient.dtype)
        if dtypes is None:
            raise TypeError(f"scale_: gradient must be one of {', '.join(map(str, DTYPES))}, got {gradient.dtype}")
        if factor.dtype is not dtypes[_COMPUTE] or factor.dim() or factor.device != gradient.device:
            raise self._error("factor", factor, dtypes[_COMPUTE], (), gradient)

    def _error(
        self, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[Any, ...], source: Tensor, contiguous: bool = False
    ) -> Exception:
        kind = TypeError if x.dtype is not dtype else ValueError
        return kind(
            f"{self._operator}: {name} must be {'contiguous, ' if contiguous else ''}{dtype} of shape {shape} on "
            f"{source.device}, got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
        )


def _size(x: Tensor, dim: int) -> Any:
    return x.shape[dim] if x.dim() else 0
