"""What a backend is: it runs passes over rows, and knows neither autograd nor operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checks import IGNORED
from ..definition.rows import Job, Rows, Spec
from ..definition.statistics import COEFFICIENTS, A, Q, U

#: The kinds of epilogue, as the extensions number them.
ROWS, CLASSES, PAIRS = range(3)


@dataclass(frozen=True)
class Epilogues:
    """The compiled epilogues of a backend, each with the number of its parameters."""

    rows: Mapping[str, int]
    classes: Mapping[str, int]
    pairs: Mapping[str, int]
    """Those over the classes of two rows."""
    sums: Mapping[str, int]
    """Those over the classes whose sums over the rows are a loss's; there they lack the last of their parameters."""

    @cached_property
    def numbers(self) -> dict[str, tuple[int, int]]:
        """The place of each among those of its kind, and the number of that; -1 of none, ""."""
        kinds = (self.rows, self.classes, self.pairs)
        return {"": (-1, ROWS)} | {name: (i, kind) for kind, names in enumerate(kinds) for i, name in enumerate(names)}

    @cached_property
    def numbers_in_sums(self) -> dict[str, tuple[int, int]]:
        """Inside of a sum over the rows."""
        return {name: (i, CLASSES) for i, name in enumerate(self.sums)}

    @staticmethod
    def of(extension: Any) -> Epilogues:
        """Return those of an extension module, or none without one."""
        return Epilogues(*(({}, {}, {}, {}) if extension is None else extension.epilogues()))

    def find(self, kind: str, name: str) -> int | None:
        """Return the parameters of an epilogue that a kind of job takes; None if there is none.

        Coefficients that PyTorch made are those of no epilogue, "".
        """
        if name == "" and kind in ("forward", "backward"):
            return 0
        if kind == "terms":
            return self.classes[name] if name in self.sums else None
        if kind == "sums over rows":
            return self.sums.get(name)
        over_classes = self.classes.get(name, self.pairs.get(name))
        return over_classes if kind == "sums over classes" else self.rows.get(name, over_classes)


class Backend:
    """The passes of one implementation. A job's tensors have been checked; `epilogues` says which it may name."""

    name: str
    runs_on: str = "cpu"
    """The type of device whose tensors it takes."""
    makes_logits = False
    """Whether its passes make the logits of hidden states themselves, and store none."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Return why it cannot run on this machine, or for tensors on `device`; None if it can."""
        raise NotImplementedError

    @property
    def epilogues(self) -> Epilogues:
        raise NotImplementedError

    def count(self, target: Tensor) -> int:
        """Return how many targets, which the host may read, are not ignored."""
        return int((target != IGNORED).count_nonzero())

    def forward(self, job: Job) -> None:
        """The statistics pass and, with an epilogue, its loss and coefficients."""
        raise NotImplementedError

    def backward(self, job: Job) -> None:
        """The gradient pass."""
        raise NotImplementedError

    def one_read(self, rows: Rows) -> bool:
        """Tell whether making the gradient of such logits with the loss saves time.

        Where it does not, the gradient would only be held for longer.
        """
        return False

    def with_gradient(self, job: Job) -> None:
        """Both, into the job's `grad`; a backend that has them of one read of the logits overrides it."""
        grad, job.grad = job.grad, None
        self.forward(job)
        job.grad = grad
        self.backward(job)

    def sums(self, job: Job) -> Tensor:
        """The sums of a class term, over the rows or over the classes."""
        raise NotImplementedError

    def terms(self, job: Job) -> None:
        """Losses and coefficients of a class term, from statistics in hand."""
        raise NotImplementedError

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply a gradient by a 0-d factor, which the host does not read."""
        gradient.mul_(factor)

    def units_(
        self, job: Job, largest_weight: Tensor | None, norms: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divide each row's upstream gradient by a power of two, its unit, so that its gradient fills float16's range.

        A gradient that is made with the loss comes before the loss scale, and has small token weights, class weights or
        focal factors in it already: in float16 it would underflow.

        Each of T sums has factors of magnitudes up to its norm, times the units. Its scale, a power of two by which
        they are divided, is raised to what float16 needs. Return the units (N,), the units over the scales (T, N), and
        the scales before over those now (T,).
        """
        assert job.coefficients is not None
        upstream, sizes = job.upstream, job.coefficients.abs()
        if is_over_classes(self, job.spec):
            # Beside the target and the top class p df/dp is below 64 times the class weight, in all of float32's range.
            scalars = job.rows.scalars
            main = 1 if scalars is None else scalars[0]
            bound = sizes[:COEFFICIENTS].sum(0) + 64 * main * (1 if largest_weight is None else largest_weight)
        else:
            sizes[A] *= job.statistics[Q]  # the most that the probability of another class can be
            if largest_weight is not None:
                sizes[U] *= largest_weight
            bound = sizes.sum(0)
        if upstream is not None:
            bound *= upstream.abs()
        # The bound over its unit lies between 2^14 and 2^15. A row that is not finite must not decide for the others.
        unit = _power_of_two(bound * 2.0**-14).clamp_(min=2.0**-78).nan_to_num_(posinf=2.0**-14)
        job.upstream = 1 / unit if upstream is None else upstream / unit
        before = scales.clone()
        needed = _power_of_two(norms * (unit.amax() * 2.0**-14)).clamp_(min=2.0**-114)
        torch.maximum(before, needed, out=scales)
        return unit, unit / scales[:, None], before / scales

    def new_gradient(self, logits: Tensor) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)


def is_over_classes(backend: Backend, spec: Spec) -> bool:
    """Tell whether the epilogue is a class term: its gradient has another form than that of a row."""
    return spec.epilogue in backend.epilogues.classes or spec.epilogue in backend.epilogues.pairs


def _power_of_two(x: Tensor) -> Tensor:
    """Round positive float32 numbers down to powers of two, and what is not finite to infinity."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)
