"""What a model is fused with, and its forward since then."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...distributed import fsdp
from ._loss import Loss, LossPass
from ._model import ATTRIBUTE, loss_of, replace_forward, replace_head, restore_forwards
from ._stand_ins import finished
from ._trainer import smoothing_of_trainer, trainer_collects_logits


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
        under_way = LossPass(head, way, self.loss, unit, kwargs.get("num_items_in_batch"), lessons)
        outputs = under_way.run(type(model).forward, model, *args, **kwargs)
        if under_way.calls == 0:
            loss_of(model, outputs, kwargs)
            raise RuntimeError(
                f"{type(model).__name__} computed its loss by itself: not by torch.nn.functional.cross_entropy of what "
                "its output layer gives; unfuse it"
            )
        return finished(outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        copied = object.__new__(Fusion)
        memo[id(self)] = copied
        # The arguments stay the caller's, who may be changing them.
        head, handle = copy.deepcopy((self.head, self.handle), memo)
        copied.__dict__.update(self.__dict__, head=head, handle=handle)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a fused model cannot be pickled; unfuse it first, or save it with save_pretrained")


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
                warnings.warn(f"{name} is fused, but in training without labels", stacklevel=2)
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
