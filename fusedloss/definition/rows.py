"""What one call is about: the tensors of its rows, what is static about it, and what a backend writes for it.

Every function between the public losses and the kernels hands these on; the operators' schemas are made of them.
"""

# Annotations are evaluated here: the operators' schema is made of those of Rows.
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .projection import Form, Projection
from .statistics import COEFFICIENTS, MOMENTS, SECONDS, SLOPES, STATISTICS, Picks

#: Logits in hand, or a :class:`Projection` that makes them.
Source = Tensor | Projection


class Rows(NamedTuple):
    """The tensors of N rows over V classes. Dtypes: that of the logits; compute: float64 for float64, else float32."""

    hidden: list[Tensor]
    """[logits (N, V)]; or hidden states (N, D_i), whose products with the transposed `weight[i]` are summed."""
    weight: list[Tensor]
    """[] for logits; (V, D_i) each."""
    bias: Tensor | None
    """(V,), added to the products."""
    teacher: list[Tensor]
    """[]; of a loss against a second row [logits (N, V)] or [hidden states (N, E), weight (V, E)], perhaps with a
    bias (V,), in the logits' dtype; or [targets (N, V)] in compute. Nothing here has a gradient."""
    target: Tensor
    """(N,) int64: a class, IGNORED, or -1 for a class of another rank."""
    class_weight: Tensor | None
    """(V,) compute."""
    candidates: Tensor | None
    """(N, K) int64."""
    params: list[Tensor]
    """Of the epilogue, () or (N,) compute each; those of a loss function may be (N, K), and hold integers or bools."""
    scalars: Tensor | None
    """(4,) compute: the factors of the loss itself, of the smoothing term sum_j w_j (-log p_j) and of the z-loss
    lse^2, and that of the logits, 1 / temperature. None for (1, 0, 0, 1)."""

    @staticmethod
    def of(
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None = None,
        candidates: Tensor | None = None,
        params: Sequence[Tensor] = (),
        scalars: Tensor | None = None,
    ) -> "Rows":
        """Those of logits in hand."""
        return Rows([logits], [], None, [], target, class_weight, candidates, list(params), scalars)

    @property
    def logits(self) -> Tensor:
        """Those in hand, of a row form."""
        return self.hidden[0]

    @property
    def is_linear(self) -> bool:
        return len(self.weight) > 0

    @property
    def classes(self) -> int:
        return self.weight[0].shape[0] if self.weight else self.hidden[0].shape[1]

    @property
    def sources(self) -> list[Tensor]:
        """What has a gradient: hidden states, weights and bias, or the logits."""
        bias = [] if self.bias is None else [self.bias]
        return [*self.hidden, *self.weight, *bias]

    def without_factors(self, form: Form) -> "Rows":
        """With the factor of the logits alone."""
        if self.scalars is None or not form.tempered:
            return self._replace(scalars=None)
        scalars = self.scalars.clone()
        scalars[:3] = 0
        scalars[:1] = 1
        return self._replace(scalars=scalars)

    def with_sources(self, sources: Sequence[Tensor]) -> "Rows":
        hidden, pairs = len(self.hidden), len(self.hidden) + len(self.weight)
        bias = sources[pairs] if len(sources) > pairs else None
        return self._replace(hidden=list(sources[:hidden]), weight=list(sources[hidden:pairs]), bias=bias)

    def flatten(self) -> tuple[tuple[int, int, int, int], list[Tensor | None]]:
        """All tensors in one list, and how many of it each list has: what an autograd function takes."""
        hidden, weight, bias, teacher, target, class_weight, candidates, params, scalars = self
        counts = (len(hidden), len(weight), len(teacher), len(params))
        return counts, [*hidden, *weight, bias, *teacher, target, class_weight, candidates, scalars, *params]

    @staticmethod
    def unflatten(counts: tuple[int, int, int, int], flat: Sequence[Any]) -> "Rows":
        """The rows of such a list, which may be longer."""
        hidden = counts[0]
        weight = hidden + counts[1]
        teacher = weight + 1 + counts[2]
        target, class_weight, candidates, scalars = flat[teacher : teacher + 4]
        params = list(flat[teacher + 4 : teacher + 4 + counts[3]])
        sources = (list(flat[:hidden]), list(flat[hidden:weight]), flat[weight])
        of_teacher = list(flat[weight + 1 : teacher])
        return Rows(*sources, of_teacher, target, class_weight, candidates, params, scalars)


_KINDS = {list[Tensor]: "Tensor[]", Tensor: "Tensor", Tensor | None: "Tensor?"}

#: The rows in an operator's schema.
SCHEMA = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(Rows).items())


class Spec(NamedTuple):
    """What is static about a call. It crosses an operator's boundary as one string."""

    impl: str
    epilogue: str = ""
    """Name of the loss among the compiled ones; "" for statistics alone, or coefficients that PyTorch made."""
    top_k: int = 0
    """How many of the largest logits are picks: 0, 1 or 2."""
    below: bool = False
    """Whether the largest logit strictly below the target's is one."""
    mean: bool = False
    """Whether there is ``mean_ce``."""
    moments: int = 0
    """Which moments there are, if any: the statistics have rows for all and, with no epilogue, the coefficients have
    their slopes."""
    smooths: bool = False
    """Whether the loss has a smoothing term, of ``mean_ce``."""
    z_loss: bool = False
    """Whether it has a z-loss."""
    top_q: bool = False
    """Whether the statistics end with a row more, 1 - p of the top class."""
    over_rows: bool = False
    """Of sums of class terms: over the rows, for each class, and not over the classes."""
    needed: tuple[bool, ...] = ()
    """Which of ``Rows.sources`` a gradient is made for; () for none."""
    form: Form = Form()
    """How a linear form makes its logits."""

    @property
    def picks(self) -> Picks:
        return Picks(self.top_k, self.below, self.mean, self.moments)

    def of_picks(self, picks: Picks, **changes: Any) -> "Spec":
        return self._replace(**picks._asdict(), **changes)

    @property
    def more_coefficients(self) -> int:
        return SLOPES if self.moments and not self.epilogue else 0

    def encode(self) -> str:
        # A compiler would trace through a cache, and warn of it.
        return _encode(self) if torch.compiler.is_compiling() else _encoded(self)


def _flags(x: tuple[bool, ...]) -> str:
    return "".join(["1" if flag else "0" for flag in x])


# By the type of a field: how it is written, and read. A symbolic number of a compiler becomes one of its own.
_WRITERS: dict[Any, Callable[[Any], Any]] = {str: str, int: int, float: float, bool: int, tuple[bool, ...]: _flags}
_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: lambda x: x == "1",
    tuple[bool, ...]: lambda x: tuple(flag == "1" for flag in x),
}
_FIELDS = [kind for name, kind in get_type_hints(Spec).items() if name != "form"] + list(get_type_hints(Form).values())
_WRITE = tuple(_WRITERS[kind] for kind in _FIELDS)
_READ = tuple(_READERS[kind] for kind in _FIELDS)
_OWN = len(Spec._fields) - 1
#: The last field, the name of a process group, may hold anything.
_SEPARATOR = "|"


def _encode(spec: Spec) -> str:
    values = (*spec[:_OWN], *spec.form)
    return _SEPARATOR.join([f"{write(value)}" for write, value in zip(_WRITE, values, strict=True)])


_encoded = lru_cache(maxsize=1024)(_encode)


@lru_cache(maxsize=1024)
def decode(text: str) -> Spec:
    """Return the spec of what ``Spec.encode`` gave."""
    parts = text.split(_SEPARATOR, len(_READ) - 1)
    spec: Spec | None = None
    with suppress(ValueError):
        values: list[Any] = [read(part) for read, part in zip(_READ, parts, strict=True)]
        spec = Spec._make([*values[:_OWN], Form._make(values[_OWN:])])
    if spec is None or _encode(spec) != text:
        raise ValueError(f"spec must be what Spec.encode() gives, {len(_READ)} fields, got {text!r}")
    return spec


@dataclass(slots=True)
class Job:
    """One call of a backend: what it reads, and the memory that it writes.

    ``forward`` writes statistics and index, with an epilogue loss and coefficients, and `grad` where it is set.
    ``backward`` reads statistics, index and coefficients, and writes `grad`. ``sums`` and ``terms`` read statistics and
    index; one returns sums in float64, the other writes loss and coefficients. Sums over the rows are (2, V): error and
    agreement of each class. Those over the classes are (2, N): the terms f and p df/dp, without those of the target and
    the top class; against a second row (3, N): f, p df/dp and p - y of all classes.
    """

    rows: Rows
    spec: Spec
    statistics: Tensor  # (6 + K, N), 3 more with moments, 3 more against a second row
    index: Tensor  # (K, N)
    loss: Tensor | None = None  # (N,)
    coefficients: Tensor | None = None  # (3 + K, N), with slopes of moments (5 + K, N)
    grad: Tensor | None = None
    """(N, V); may be the logits themselves."""
    upstream: Tensor | None = None
    """(N,), by which the gradient of each row is multiplied, or its terms in a sum over the rows."""
    top_q: Tensor | None = None
    """(N,), 1 - p of the top class where the logits are not those of all classes."""

    def weight_sum(self) -> Tensor | None:
        """The sum of the class weights in float64, where ``mean_ce`` needs one; the caller keeps it alive."""
        weight = self.rows.class_weight
        return weight.sum(dtype=torch.float64) if self.spec.mean and weight is not None else None

    @property
    def moments_of_gradient(self) -> int:
        """Of a later pass: whether there are slopes of moments, or moments before the statistics of a second row."""
        return self.spec.moments if self.rows.teacher else self.spec.more_coefficients

    @staticmethod
    def new(rows: Rows, spec: Spec) -> "Job":
        """A forward pass, with outputs to be written."""
        first, target, candidates = rows.hidden[0], rows.target, rows.candidates
        picks = spec.top_k + spec.below + (0 if candidates is None else candidates.shape[1])
        count, dtype = target.shape[0], torch.float64 if first.dtype == torch.float64 else torch.float32
        more = (MOMENTS if spec.moments else 0) + (SECONDS if rows.teacher else 0) + int(spec.top_q)
        statistics = first.new_empty((STATISTICS + picks + more, count), dtype=dtype)
        index = target.new_empty((picks, count))
        if not spec.epilogue:
            return Job(rows, spec, statistics, index)
        loss, coefficients = statistics.new_empty(count), statistics.new_empty((COEFFICIENTS + picks, count))
        return Job(rows, spec, statistics, index, loss, coefficients)
