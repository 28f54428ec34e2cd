"""A teacher, which runs beside the model that learns its predictions and gives what it would make logits of."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...checks import is_dtensor
from ...distributed import fsdp
from ._model import ATTRIBUTE, check_model, is_replaced, output_layer, replace_head, restore_forwards
from ._stand_ins import Hidden, Logits, Pass

#: Inputs of a model that a teacher cannot share, and those that it does without.
_NOT_SHARED = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")
_NOT_FOR_TEACHERS = {"num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


class Lesson(NamedTuple):
    """What a teacher would have computed a cross-entropy of."""

    logits: Any
    """Logits, or a tensor of them."""
    target: Tensor

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return those of a distillation whose products are of this dtype."""
        hidden, bias = self.logits.scaled()
        if len(hidden) > 1:
            raise ValueError("the teacher has LoRA on its output layer, whose products do not add up here; merge it")
        tensors = {"teacher_input": hidden[0], "teacher_weight": self.logits.weight[0], "teacher_bias": bias}
        cast = {name: None if x is None else x.detach().to(dtype) for name, x in tensors.items()}
        return {**cast, "teacher_softcap": self.logits.softcap}

    def built(self, dtype: torch.dtype) -> Tensor:
        """Return the teacher's logits, as the loss of its hidden states would make them."""
        if isinstance(self.logits, Tensor):
            return self.logits.as_subclass(Tensor).to(dtype)
        hidden, weight, bias, cap = self.arguments(dtype).values()
        logits = F.linear(hidden, weight, bias)
        return logits if cap is None else cap * (logits / cap).tanh()


@dataclass(eq=False)
class _TeachersPass(Pass):
    """A forward pass of a teacher, which keeps its logits and computes no loss."""

    sharded: bool
    lessons: list[Lesson]
    weight: Tensor | None = None
    """Of a sharded teacher's output layer, as it was within the forward."""

    def product(self, input: Hidden, weight: Tensor, bias: Tensor | None = None) -> Logits:
        if self.sharded:  # FSDP2 frees both before the loss
            self.weight = weight
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return super().product(input, weight, bias)

    def cross_entropy(self, logits: Logits | Tensor, target: Tensor, **_: Any) -> Tensor:
        self.lessons.append(Lesson(logits, target))
        return torch.zeros((), device=target.device)


class Teacher:
    """A model whose predictions another one learns."""

    def __init__(self, model: Any, student: PreTrainedModel) -> None:
        check_model(model, "teacher", "pass")
        name = type(model).__name__
        if model is student:
            raise ValueError(f"this {name} cannot be its own teacher; pass a copy of it, as copy.deepcopy makes")
        if ATTRIBUTE in model.__dict__:
            raise ValueError(f"the teacher, a {name}, is fused with a loss itself; unfuse it")
        output_layer(model, f"the teacher, a {name},")
        self.model: PreTrainedModel = model
        cached = "use_cache" in inspect.signature(type(model).forward).parameters
        #: Of its forward, beside the inputs of the student.
        self.options = {"use_cache": False} if cached else {}

    def lessons(self, head: Any, inputs: Mapping[str, Any], way: str = "linear") -> list[Lesson]:
        """Run the teacher on the inputs of a model that has this output layer."""
        teacher, own = self.model, self.model.get_output_embeddings()
        who = f"the teacher, a {type(teacher).__name__},"
        classes, device = _classes(own), own.weight.device
        if classes != _classes(head):
            raise ValueError(f"{who} has {classes} classes, but the model {_classes(head)}; both need one vocabulary")
        # What FSDP2 has offloaded is on another device than the products.
        if device != head.weight.device and not (is_dtensor(own.weight) or is_dtensor(head.weight)):
            raise ValueError(f"{who} is on {device}, but the model on {head.weight.device}; move it: teacher.to(...)")
        fsdp.check_whole(own.weight, f"the output layer's weight of {who}", "Shard the teacher by fully_shard")
        for name in _NOT_SHARED:
            if inputs.get(name) is not None:
                raise ValueError(f"the model gets {name}, which a teacher cannot share; pass tokens")
        shared = {k: v for k, v in inputs.items() if v is not None and k not in _NOT_FOR_TEACHERS}
        if not is_replaced(own):  # by another model that has let this teacher go, or as another output layer
            restore_forwards(teacher)  # that may have the one before within it
            replace_head(own)
        if teacher.training:
            teacher.eval()
        under_way = _TeachersPass(own, way, fsdp.has_units(teacher), [])
        with torch.no_grad():
            under_way.run(teacher, **shared, **self.options)
        if under_way.weight is own.weight:  # FSDP2 keeps it unsharded, as that of a root: the copies can go
            for lesson in under_way.lessons:
                lesson.logits.weight[0] = under_way.weight
        return under_way.lessons


def _classes(head: Any) -> int:
    return getattr(head, "out_features", None) or len(head.weight)
