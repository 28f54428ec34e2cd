"""The loss of a fused model in its two forms, and the forward pass that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedloss

from ...distributed import fsdp
from .._losses import OF_THE_MODEL, check_arguments, current, forms
from ._model import restore_forwards
from ._stand_ins import Logits, Pass, RowLogits, product_dtype
from ._teacher import Lesson, Teacher

_OF_THE_TEACHER = frozenset(("teacher", "teacher_input", "teacher_weight", "teacher_bias", "teacher_softcap"))
_LINEAR_ONLY = frozenset(("budget", "drop_ignored"))
_OF_TEACHERS = (fusedloss.distillation_loss, fusedloss.linear_distillation_loss)


class Loss(NamedTuple):
    """A loss in its two forms, and whether evaluation takes that of the logits."""

    row: Callable[..., Any]
    linear: Callable[..., Any]
    arguments: dict[str, Any]
    eval_logits: bool = True
    teacher: Teacher | None = None

    @staticmethod
    def of(
        loss: str | Callable[..., Any], arguments: dict[str, Any], eval_logits: bool, teacher: Teacher | None
    ) -> Loss:
        row, linear = forms(loss, distillation_loss=_OF_TEACHERS)
        if teacher is None and row in _OF_TEACHERS:
            raise TypeError("distillation needs a teacher: fuse(model, 'distillation', teacher=...)")
        if teacher is not None and row not in _OF_TEACHERS:
            raise TypeError(f"teacher is for distillation, got one with {row.__name__}")
        check_arguments(linear, arguments, OF_THE_MODEL | _OF_THE_TEACHER | {"inplace_backward"})
        return Loss(row, linear, arguments, eval_logits, teacher)

    @property
    def is_the_models(self) -> bool:
        """Whether it is what the model computes by itself."""
        return self.row is fusedloss.cross_entropy and not self.arguments.keys() - _LINEAR_ONLY - {"impl"}

    @property
    def as_probe(self) -> Loss:
        """One that a probe can compare: a divergence of models that are almost the same is nothing but rounding."""
        if self.teacher is None:
            return self
        kept = {name: value for name, value in self.arguments.items() if name in (*_LINEAR_ONLY, "impl")}
        return self._replace(arguments={**kept, "hard_weight": 1.0})

    def release(self) -> None:
        """Give the teacher its own forward back. Another model that has this teacher takes it again."""
        if self.teacher is not None:
            restore_forwards(self.teacher.model)


@dataclass(eq=False)
class LossPass(Pass):
    """A forward pass of a fused model, which computes its loss in this `unit` of FSDP2."""

    loss: Loss
    unit: nn.Module | None
    normalizer: Any
    lessons: list[Lesson] | None
    calls: int = 0

    def cross_entropy(
        self,
        logits: Logits | RowLogits,
        target: Tensor,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        **others: Any,
    ) -> Tensor:
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"the model calls cross_entropy with {name}, which the fused loss does not take over")
        if label_smoothing:
            raise ValueError(f"the model smooths its labels by {label_smoothing}; pass label_smoothing to fuse instead")
        if logits.dim() != 2:
            raise ValueError(f"the model calls cross_entropy with {logits.dim()} dimensions instead of (tokens, V)")
        lesson = None if self.lessons is None else self._lesson(self.lessons, target)
        self.calls += 1
        options = {"target": target, "ignore_index": ignore_index, "reduction": reduction}
        if reduction == "mean":
            options["normalizer"] = self.normalizer
        options |= current(self.loss.arguments)
        if isinstance(logits, RowLogits):
            if lesson is not None:
                options["teacher"] = lesson.built(self.head.weight.dtype).to(logits.dtype)  # type: ignore[arg-type]
            of_row = {name: value for name, value in options.items() if name not in _LINEAR_ONLY}
            return self.loss.row(logits.as_subclass(Tensor), **of_row)

        def linear() -> Tensor:
            hidden, bias = logits.scaled()
            taught = {} if lesson is None else lesson.arguments(product_dtype(hidden[0]))
            layer = {"linear_bias": bias, "softcap": logits.softcap}
            return self.loss.linear(hidden, logits.weight, **layer, **taught, **options)

        return linear() if self.unit is None else fsdp.after_forward(self.unit, linear)

    def _lesson(self, lessons: list[Lesson], target: Tensor) -> Lesson:
        """Return the teacher's part in this call of cross_entropy."""
        if self.calls >= len(lessons):
            raise ValueError(
                f"the teacher computes {len(lessons)} losses by torch.nn.functional.cross_entropy of what its output "
                "layer gives, but the model more"
            )
        lesson = lessons[self.calls]
        same = target.shape == lesson.target.shape
        if same and self.way == "row":  # as the probe is: a look at each step would hold a GPU up
            same = torch.equal(target, lesson.target)
        if not same:
            raise ValueError(
                "the teacher's loss is of other targets than the model's; both must shift and flatten labels alike"
            )
        return lesson
