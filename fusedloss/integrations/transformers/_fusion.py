"""What a model is fused with: a loss in its two forms, the forward pass that computes it, and the forward that asks."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fusedloss

from ...distributed import fsdp
from .._losses import OF_THE_MODEL, check_arguments, current, forms
from ._model import ATTRIBUTE, replace_forward, replace_head, restore_forwards
from ._stand_ins import Pass, RowLogits, finished, product_dtype
from ._teacher import Lesson, Teacher
from ._trainer import smoothing_of_trainer, trainer_collects_logits

_OF_THE_TEACHER = {"teacher", "teacher_input", "teacher_weight", "teacher_bias", "teacher_softcap"}
_LINEAR_ONLY = {"budget", "drop_ignored"}
_OF_TEACHERS = (fusedloss.distillation_loss, fusedloss.linear_distillation_loss)


class Loss(NamedTuple):
    """A loss in its two forms, and whether evaluation takes that of the logits."""

    row: Callable[..., Any]
    linear: Callable[..., Any]
    arguments: dict[str, Any]
    eval_logits: bool = True
    teacher: Teacher | None = None

    @staticmethod
    def of(loss: str | Callable[..., Any], arguments: dict[str, Any], eval_logits: bool, teacher: Any) -> Loss:
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
        return self.row is fusedloss.cross_entropy and self.arguments.keys() <= _LINEAR_ONLY | {"impl"}

    @property
    def as_probe(self) -> Loss:
        """One that a probe can compare: a divergence of models that are almost the same is nothing but rounding."""
        if self.teacher is None:
            return self
        kept = {name: value for name, value in self.arguments.items() if name in _LINEAR_ONLY | {"impl"}}
        return self._replace(arguments={**kept, "hard_weight": 1.0})

    def release(self) -> None:
        """Give the teacher its own forward back. Another model that has this teacher takes it again."""
        if self.teacher is not None:
            restore_forwards(self.teacher.model)


@dataclass(eq=False)
class _LossPass(Pass):
    """A forward pass of a fused model, which computes its loss in this `unit` of FSDP2."""

    loss: Loss
    unit: nn.Module | None
    normalizer: Any
    lessons: list[Lesson] | None
    calls: int = 0

    def cross_entropy(self, logits: Any, target: Tensor, *, label_smoothing: float = 0.0, **options: Any) -> Tensor:
        """Compute the loss in place of torch.nn.functional.cross_entropy, whose defaults are those of the losses."""
        for name in ("weight", "size_average", "reduce"):
            if options.pop(name, None) is not None:
                raise ValueError(f"the model calls cross_entropy with {name}, which the fused loss does not take over")
        if label_smoothing:
            raise ValueError(f"the model smooths its labels by {label_smoothing}; pass label_smoothing to fuse instead")
        if logits.dim() != 2:
            raise ValueError(f"the model calls cross_entropy with {logits.dim()} dimensions instead of (tokens, V)")
        lesson = None if self.lessons is None else self._lesson(self.lessons, target)
        self.calls += 1
        if options.get("reduction", "mean") == "mean":
            options["normalizer"] = self.normalizer
        options |= {"target": target, **current(self.loss.arguments)}
        if isinstance(logits, RowLogits):
            if lesson is not None:
                options["teacher"] = lesson.built(self.head.weight.dtype).to(logits.dtype)  # type: ignore[arg-type]
            of_rows = {name: value for name, value in options.items() if name not in _LINEAR_ONLY}
            return self.loss.row(logits.as_subclass(Tensor), **of_rows)

        def linear() -> Tensor:
            hidden, bias = logits.scaled()
            taught = {} if lesson is None else lesson.arguments(product_dtype(hidden[0]))
            layer = {"linear_bias": bias, "softcap": logits.softcap}
            return self.loss.linear(hidden, logits.weight, **layer, **taught, **options)

        return linear() if self.unit is None else fsdp.after_forward(self.unit, linear)

    def _lesson(self, lessons: list[Lesson], target: Tensor) -> Lesson:
        """Return the teacher's part in this call of cross_entropy."""
        lesson = lessons[self.calls] if self.calls < len(lessons) else None
        same = lesson is not None and target.shape == lesson.target.shape
        # A look at the probe's alone: at each step it would hold a GPU up.
        if lesson is None or not same or (self.way == "row" and not torch.equal(target, lesson.target)):
            raise ValueError("the teacher's loss is of other targets than the model's; shift and flatten labels alike")
        return lesson


class Fusion:
    """What a model is fused with."""

    loss: Loss

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        #: Of the arguments of the model's forward.
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.head = head
        replace_forward(model, _fused_forward(type(model).forward).__get__(model))
        replace_head(head)
        self.handle = model.register_forward_pre_hook(_refuse_call, with_kwargs=True)
        setattr(model, ATTRIBUTE, self)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model's forward by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def run(self, way: str, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model's own forward, with this loss."""
        head: Any = model.get_output_embeddings()
        if head is not self.head:  # exchanged or wrapped, by PEFT for example
            restore_forwards(self.head)
            replace_head(head)
            self.head = head
        unit, lessons, teacher = fsdp.unit_below(model, head), None, self.loss.teacher
        if teacher is not None:  # before the model has anything to keep for its backward
            lessons = teacher.lessons(head, self.inputs(args, kwargs))
        under_way = _LossPass(head, way, self.loss, unit, kwargs.get("num_items_in_batch"), lessons)
        outputs = under_way.run(type(model).forward, model, *args, **kwargs)
        if under_way.calls == 0:
            loss_of(model, outputs, kwargs)
            raise RuntimeError(
                f"{type(model).__name__} computed its loss by itself: not by torch.nn.functional.cross_entropy of what "
                "its output layer gives; unfuse it"
            )
        return finished(outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        copied = memo[id(self)] = object.__new__(Fusion)
        # The arguments stay the caller's, who may be changing them.
        head, handle = copy.deepcopy((self.head, self.handle), memo)
        copied.__dict__.update(self.__dict__, head=head, handle=handle)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a fused model cannot be pickled; unfuse it first, or save it with save_pretrained")


def loss_of(model: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss among the outputs of a model."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        given = " and ".join(inputs)
        raise ValueError(f"{type(model).__name__} computes no loss from {given} alone; fuse it with more as probe=...")
    return loss


def _fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a fused model, in place of its own."""

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        fusion, name = self.__dict__.get(ATTRIBUTE), type(self).__name__
        if fusion is None:  # unfused, while a wrapper still holds this function
            return original(self, *args, **kwargs)
        if fusion.inputs(args, kwargs).get("labels") is None:
            smoothing = smoothing_of_trainer(own_loss=True)
            if smoothing is not None:
                raise ValueError(
                    f"{name} is fused, but label_smoothing_factor={smoothing} makes the Trainer compute its own "
                    f"cross-entropy; set it to 0 and pass label_smoothing={smoothing} to fuse, or unfuse the model"
                )
            if self.training:
                warnings.warn(
                    f"{name} is fused, but in training without labels: it stores its logits, and the fused loss takes "
                    "no part; pass labels to the model",
                    stacklevel=2,
                )
            return original(self, *args, **kwargs)
        linear = self.training or not fusion.loss.eval_logits
        if linear and not self.training and trainer_collects_logits():
            raise ValueError(
                f"{name} is fused with eval_logits=False, but the Trainer collects logits; fuse with eval_logits=True, "
                "or leave out compute_metrics, or set prediction_loss_only=True"
            )
        return fusion.run("linear" if linear else "row", self, *args, **kwargs)

    forward.of_fuse = forward  # type: ignore[attr-defined]
    # Trainer reads the signature; accelerate unwraps a forward as far as it can.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def _refuse_call(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    # Its replicas share the forward of the model that they are of.
    if getattr(model, "_is_replica", False):
        raise RuntimeError("a fused model does not run under torch.nn.DataParallel; use DistributedDataParallel")
    fusion = model.__dict__.get(ATTRIBUTE)
    # The forward that TRL puts around that of the model: it projects the hidden states by itself.
    if fusion is not None and kwargs.get("fused_lm_head") and not fusion.loss.is_the_models:
        raise ValueError(
            f"{type(model).__name__} is fused with {fusion.loss.row.__name__}, but this trainer of TRL computes a loss "
            "of its own from the hidden states; unfuse the model, or give a subclass of SFTTrainer the compute_loss of "
            "transformers.Trainer"
        )
