"""Hugging Face transformers: any row loss as a Trainer's, and models that train on the linear form.

A model is fused on the instance: its forward, and that of its output layer, are replaced. In a pass with labels the
output layer computes with a stand-in for the hidden states, which answers the projection with a stand-in for the
logits. That one follows what models do to logits before the loss (casts, shapes, shifts, a scale, a bias,
soft-capping), refuses whatever else, and turns torch.nn.functional.cross_entropy into the linear form. Shifts and
num_items_in_batch stay the model's own business.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss

from ..checks import check_bool, is_dtensor
from ..distributed import fsdp
from ..engine.output_layer import beside_lora, described, is_lora, products
from ._losses import OF_THE_LAYER, OF_THE_MODEL, check_arguments, current, forms

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError(
        "fusedloss.integrations.transformers needs transformers: pip install 'fusedloss[transformers]'"
    ) from error

__all__ = ["fuse", "trainer_loss", "unfuse"]

_Model = TypeVar("_Model", bound=PreTrainedModel)

#: Where a fused model keeps what it is fused with.
_ATTRIBUTE = "_fusedloss"

_OF_THE_TEACHER = frozenset(("teacher", "teacher_input", "teacher_weight", "teacher_bias", "teacher_softcap"))
#: Inputs of a model that a teacher cannot share, and those that it does without.
_NOT_SHARED = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")
_NOT_FOR_TEACHERS = frozenset(
    ("num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states")
)
_LINEAR_ONLY = frozenset(("budget", "drop_ignored"))

#: Largest difference of a probe's loss and gradients, relative to the largest element. Models cast to float32.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def trainer_loss(loss: Callable[..., Any], *, shift: bool, **arguments: Any) -> Callable[..., Tensor]:
    """Return a row loss as `compute_loss_func` of a Trainer: f(outputs, labels, num_items_in_batch=None).

    The logits are the model's; :func:`fuse` does without them. With ``num_items_in_batch``, the targets that count
    in all batches of an update, the loss is its sum over them divided by that number, so that accumulated gradients
    are those of the whole batch; without it, the mean of the batch in hand.

    Args:
        loss: :func:`fusedloss.focal_loss` or any other row loss.
        shift: True for causal language models, where the logits of a token predict the next one; False where logits and
            labels are aligned: encoder-decoder models, masked language models, token classification.
        arguments: of the loss. A callable (but for ``loss_fn``) is called at each step for its value.

    Raises TypeError and ValueError as the loss does, TypeError where there are no labels, and ValueError where the
    Trainer has a ``label_smoothing_factor`` and the loss no ``label_smoothing``: a Trainer does not hand it over.

    >>> import torch, fusedloss as fl
    >>> compute_loss_func = trainer_loss(fl.focal_loss, shift=True, gamma=2.0)  # for a Trainer
    >>> logits, labels = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
    >>> loss = compute_loss_func({"logits": logits}, labels, num_items_in_batch=16)
    """
    check_bool(shift=shift)
    check_arguments(loss, arguments, OF_THE_LAYER)
    ignored = arguments.get("ignore_index", -100)

    def compute_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise TypeError("the loss needs labels, got None")
        smoothing = _smoothing_of_trainer()
        if smoothing is not None and "label_smoothing" not in arguments:
            raise ValueError(
                f"label_smoothing_factor={smoothing} does not reach the compute_loss_func of a Trainer; set it to 0 "
                f"and pass label_smoothing={smoothing} to trainer_loss"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        labels = labels.to(logits.device)
        if shift:
            labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        return loss(logits, labels, normalizer=num_items_in_batch, **current(arguments))

    return compute_loss


def fuse(
    model: _Model,
    loss: str | Callable[..., Any] = "cross_entropy",
    *,
    probe: Mapping[str, Any] | None = None,
    eval_logits: bool = True,
    teacher: PreTrainedModel | None = None,
    **arguments: Any,
) -> _Model:
    """Make a language model of transformers train with a linear form, which never stores the logits.

    It works for causal, masked and sequence-to-sequence models that project hidden states by their output layer and
    call torch.nn.functional.cross_entropy, as their own loss functions do. Shifted labels, ``shift_labels``,
    ``num_items_in_batch`` and further terms of the loss, such as that of a router, stay as they are. A model whose
    loss takes the mean whatever ``num_items_in_batch`` is (T5, Marian) divides by it here.

    - In training with labels, ``outputs.logits`` is a placeholder, which raises when it is used.
    - In evaluation with labels the logits are computed as without fusing, and the loss is their row form;
      ``eval_logits=False`` takes the linear form there too, and a Trainer that collects logits (``compute_metrics``,
      ``predict``) raises ValueError.
    - Without labels nothing changes: in generation, or with a Trainer that removes the labels for its
      ``compute_loss_func``. In training this warns, since the caller then computes the loss.
    - A Trainer with ``label_smoothing_factor`` also removes the labels, and computes its own cross-entropy.
      That raises ValueError: pass ``label_smoothing`` here, and leave the factor at 0.
    - SFTTrainer of TRL computes its own cross-entropy from the hidden states. That raises ValueError if the
      model is fused with another loss.

    Only the instance changes: its ``forward`` and that of its output layer. state_dict, save_pretrained and
    copy.deepcopy work as before. Hooks of the output layer receive the hidden states. :func:`unfuse` undoes the change.
    Fusing a fused model replaces its loss, also within a Trainer.

    Fuse before wrapping the model (accelerate, DDP, torch.compile). PEFT may come before (fuse what
    ``get_base_model()`` returns) or after. LoRA on the output layer itself adds its products to the logits; any other
    adapter there is refused in training until it is merged. torch.nn.DataParallel and pickling are refused.
    Under torch.compile, evaluation with labels and models that call torch.nn.CrossEntropyLoss break the graph.

    "distillation" trains the model on a `teacher`'s predictions, by :func:`fusedloss.linear_distillation_loss`. In each
    pass with labels the teacher runs on the same inputs, in evaluation mode and without gradients; its logits are not
    stored either. Rows with the label -100 are skipped; ``hard_weight`` adds the cross-entropy of the others. The model
    does not contain the teacher, which is in no state_dict and is not trained. Move it to the model's device yourself.
    It may be sharded by fully_shard afterwards, as the model may.

    Args:
        loss: name of a loss, such as "focal_loss", or the function, such as :func:`fusedloss.linear_focal_loss`.
        probe: inputs of the model with labels to compare with; None makes ``input_ids`` and ``labels`` of two short
            sequences. Loss and gradients of this batch must be those of the model as it was (of the row form of its
            logits where the loss is another). This leaves no trace in the model or in the random numbers.
        eval_logits: see above.
        teacher: of "distillation", a model that takes the same inputs and has as many classes, and is neither fused nor
            sharded yet. It is put in evaluation mode.
        arguments: of the linear form, such as ``gamma``, ``label_smoothing`` or ``budget``. A callable (but for
            ``loss_fn``) is called at each step for its value, a tensor may be changed in place by the caller.

    Returns the model.

    Raises:
        TypeError: not a model of transformers; an argument that the loss does not take.
        ValueError: a model that cannot be fused, with what it does; a probe that differs or has no loss.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch, fusedloss as fl
    >>> sizes = dict(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = fuse(LlamaForCausalLM(LlamaConfig(**sizes)), fl.linear_focal_loss, gamma=2.0)
    >>> tokens = torch.randint(100, (2, 8))
    >>> model.train()(input_ids=tokens, labels=tokens).loss.backward()
    """
    _check_model(model)
    name, chosen = type(model).__name__, _Loss.of(loss, arguments, _Teacher.of(teacher, model))
    head = _output_layer(model, name)
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"the forward of {name} takes no labels")
    on_meta = next((parameter for parameter, value in model.named_parameters() if value.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"{on_meta!r} of {name} is on the meta device; load the weights of the model, then fuse it")
    if probe is None:
        probe = _probe_inputs(model, head)
    fusion = model.__dict__.get(_ATTRIBUTE)
    before = None if fusion is None else (fusion.loss, fusion.eval_logits)
    try:
        if fusion is None:
            fusion = _Fusion(model, head)
        fusion.loss, fusion.eval_logits = chosen.as_probe, eval_logits
        if chosen.teacher is not None:
            chosen.teacher.check(head, probe)
        _compare(model, head, fusion, probe)
        fusion.loss = chosen
        if chosen.teacher is not None:  # whose arguments the probe was not of
            with _untouched(model):
                fusion.run("linear", type(model).forward, model, **probe)
    except BaseException:
        if before is None:
            unfuse(model)
        else:
            fusion.loss, fusion.eval_logits = before  # type: ignore[union-attr]
            if chosen.teacher is not None:
                chosen.teacher.release()
        raise
    if before is not None and before[0].teacher is not None:
        before[0].teacher.release()
    return model


def unfuse(model: _Model) -> _Model:
    """Undo :func:`fuse` and return the model; a model that is not fused is unchanged.

    Raises TypeError for a wrapped model, as :func:`fuse` does.
    """
    _check_model(model)
    fusion = model.__dict__.pop(_ATTRIBUTE, None)
    if fusion is not None:
        fusion.handle.remove()
        if fusion.loss.teacher is not None:
            fusion.loss.teacher.release()
    for module in model.modules():  # PEFT copies output layers, with their forward
        if _is_replaced(module):
            del module.forward
    return model


def _check_model(model: Any, name: str = "model", take: str = "fuse or unfuse") -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} must be a transformers.PreTrainedModel, got {type(model).__name__}; {take} the model that it "
            "wraps (for PEFT: get_base_model())"
        )


def _output_layer(model: PreTrainedModel, who: str) -> Any:
    """Return the output layer of a model that can run a probe."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{who} has no output layer (get_output_embeddings() gives None)")
    if fsdp.has_units(model):
        raise ValueError(f"{who} is sharded by fully_shard, so that no probe can run; fuse before fully_shard")
    return head


class _Teacher(NamedTuple):
    """A model whose predictions another one learns, which runs beside it."""

    model: PreTrainedModel
    options: dict[str, Any]
    """Of its forward, beside the inputs of the other."""

    @staticmethod
    def of(teacher: Any, model: PreTrainedModel) -> _Teacher | None:
        if teacher is None:
            return None
        _check_model(teacher, "teacher", "pass")
        name = type(teacher).__name__
        if teacher is model:
            raise ValueError(f"this {name} cannot be its own teacher; pass a copy of it, as copy.deepcopy makes")
        if _ATTRIBUTE in teacher.__dict__:
            raise ValueError(f"the teacher, a {name}, is fused with a loss itself; unfuse it")
        _output_layer(teacher, f"the teacher, a {name},")
        cached = "use_cache" in inspect.signature(type(teacher).forward).parameters
        return _Teacher(teacher, {"use_cache": False} if cached else {})

    def check(self, head: nn.Module, probe: Mapping[str, Any]) -> None:
        """Raise where the logits that it learns from are not the teacher's."""
        name = type(self.model).__name__
        try:
            lessons, exact = (self.lessons(head, probe, way) for way in ("linear", "row"))
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} cannot be a teacher: {error}") from error
        for lesson, right in zip(lessons, exact, strict=True):
            logits = right.built(torch.float32)
            difference = (lesson.built(self.model.dtype) - logits).abs().max().item()
            if not difference <= _TOLERANCE.get(self.model.dtype, 5e-2) * logits.abs().max().item():
                raise ValueError(
                    f"{name} cannot be a teacher: its logits differ by {difference:.3g} from what it makes"
                )

    def lessons(self, head: Any, inputs: Mapping[str, Any], way: str = "linear") -> list[_Lesson]:
        """Run the teacher on the inputs of a model that has this output layer."""
        teacher, own = self.model, self.model.get_output_embeddings()
        who, devices = f"the teacher, a {type(teacher).__name__},", (own.weight.device, head.weight.device)
        if _classes(own) != _classes(head):
            raise ValueError(
                f"{who} has {_classes(own)} classes, but the model {_classes(head)}; both must have one vocabulary"
            )
        # What FSDP2 has offloaded is on another device than the products.
        if devices[0] != devices[1] and not (is_dtensor(own.weight) or is_dtensor(head.weight)):
            raise ValueError(f"{who} is on {devices[0]}, but the model on {devices[1]}; move it there: teacher.to(...)")
        fsdp.check_whole(own.weight, f"the output layer's weight of {who}", "Shard the teacher by fully_shard")
        for name in _NOT_SHARED:
            if inputs.get(name) is not None:
                raise ValueError(f"the model gets {name}, which a teacher cannot share; pass tokens")
        shared = {k: v for k, v in inputs.items() if v is not None and k not in _NOT_FOR_TEACHERS}
        if not _is_replaced(own):
            self.release()  # another output layer, which may have this one within it now
            _replace_forward(own, functools.partial(_head_forward, own))
        if teacher.training:
            teacher.eval()
        under_way = _TeachersPass(own, way, fsdp.has_units(teacher))
        _THREAD.passes.append(under_way)
        try:
            with torch.no_grad():
                teacher(**shared, **self.options)
        finally:
            _THREAD.passes.pop()
        lessons, under_way.lessons = under_way.lessons, []  # which refer to the pass, and would stay as long as it
        if under_way.weight is own.weight:  # FSDP2 keeps it unsharded, as that of a root: the copies can go
            for lesson in lessons:
                lesson.logits.weight[0] = under_way.weight  # type: ignore[union-attr]
        return lessons

    def release(self) -> None:
        """Give the output layer its own forward back. Another model that has this teacher takes it again."""
        for module in self.model.modules():
            if _is_replaced(module):
                del module.forward


def _classes(head: Any) -> int:
    return getattr(head, "out_features", None) or len(head.weight)


class _Loss(NamedTuple):
    """A loss in its two forms."""

    row: Callable[..., Any]
    linear: Callable[..., Any]
    arguments: dict[str, Any]
    teacher: _Teacher | None = None

    @staticmethod
    def of(loss: str | Callable[..., Any], arguments: dict[str, Any], teacher: _Teacher | None) -> _Loss:
        of_teachers = (fusedloss.distillation_loss, fusedloss.linear_distillation_loss)
        row, linear = forms(loss, distillation_loss=of_teachers)
        taught = row is fusedloss.distillation_loss
        if taught and teacher is None:
            raise TypeError("distillation needs a teacher: fuse(model, 'distillation', teacher=...)")
        if teacher is not None and not taught:
            raise TypeError(f"teacher is for distillation, got one with {row.__name__}")
        check_arguments(linear, arguments, OF_THE_MODEL | _OF_THE_TEACHER | {"inplace_backward"})
        return _Loss(row, linear, arguments, teacher)

    @property
    def is_the_models(self) -> bool:
        """Whether it is what the model computes by itself."""
        return self.row is fusedloss.cross_entropy and not self.arguments.keys() - _LINEAR_ONLY - {"impl"}

    @property
    def as_probe(self) -> _Loss:
        """One that a probe can compare: a divergence of models that are almost the same is nothing but rounding."""
        if self.teacher is None:
            return self
        kept = {name: value for name, value in self.arguments.items() if name in (*_LINEAR_ONLY, "impl")}
        return self._replace(arguments={**kept, "hard_weight": 1.0})

    def of_logits(self, logits: Tensor, **options: Any) -> Tensor:
        own = {name: value for name, value in self.arguments.items() if name not in _LINEAR_ONLY}
        return self.row(logits, **current(own), **options)

    def of_hidden(self, hidden: list[Tensor], weight: list[Tensor], **options: Any) -> Tensor:
        return self.linear(hidden, weight, **current(self.arguments), **options)


class _Fusion:
    """What a model is fused with."""

    loss: _Loss
    eval_logits: bool

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        #: Of the arguments of the model's forward.
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        _replace_forward(model, _fused_forward(type(model).forward).__get__(model))
        self.attach(head)
        self.handle = model.register_forward_pre_hook(_refuse_call, with_kwargs=True)
        setattr(model, _ATTRIBUTE, self)

    def attach(self, head: nn.Module) -> None:
        """Compute the loss of what this output layer projects, from now on."""
        before = self.__dict__.get("head")
        if before is not None and _is_replaced(before):
            del before.forward
        # No method, which torch.compile cannot set. In a copy of the layer it is the copy's, as a method would be.
        _replace_forward(head, functools.partial(_head_forward, head))
        self.head = head

    def run(self, way: str, forward: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        head: Any = model.get_output_embeddings()
        if head is not self.head:  # exchanged or wrapped, by PEFT for example
            self.attach(head)
        unit, lessons, teacher = fsdp.unit_below(model, head), None, self.loss.teacher
        if teacher is not None:  # before the model has anything to keep for its backward
            lessons = teacher.lessons(head, dict(zip(self.names, args, strict=False)) | kwargs)
        under_way = _Pass(self.loss, head, unit, way, kwargs.get("num_items_in_batch"), lessons)
        _THREAD.passes.append(under_way)
        try:
            outputs = forward(model, *args, **kwargs)
        finally:
            _THREAD.passes.pop()
        if under_way.calls == 0:
            _loss_of(model, outputs, kwargs)
            raise RuntimeError(
                f"{type(model).__name__} computed its loss by itself: not by torch.nn.functional.cross_entropy of what "
                "its output layer gives; unfuse it"
            )
        return _finished(outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fusion:
        copied = object.__new__(_Fusion)
        memo[id(self)] = copied
        # The arguments stay the caller's, who may be changing them.
        head, handle = copy.deepcopy((self.head, self.handle), memo)
        copied.__dict__.update(self.__dict__, head=head, handle=handle)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a fused model cannot be pickled; unfuse it first, or save it with save_pretrained")


@dataclass(eq=False)
class _Pass:
    """A forward pass with labels: how it computes its loss, "linear" or as the "row" form of the logits."""

    loss: _Loss
    head: nn.Module
    unit: nn.Module | None
    way: str
    normalizer: Any
    lessons: list[_Lesson] | None
    calls: int = 0

    def cross_entropy(
        self,
        logits: _Logits | _RowLogits,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """torch.nn.functional.cross_entropy, as the model calls it, with the loss in its place."""
        for name, value in (("weight", weight), ("size_average", size_average), ("reduce", reduce)):
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
        if isinstance(logits, _Logits):
            if self.unit is not None:
                return fsdp.after_forward(self.unit, lambda: logits.loss(self.loss, lesson, **options))
            return logits.loss(self.loss, lesson, **options)
        if lesson is not None:
            options["teacher"] = lesson.built(self.head.weight.dtype).to(logits.dtype)  # type: ignore[arg-type]
        return self.loss.of_logits(logits.as_subclass(Tensor), **options)

    def _lesson(self, lessons: list[_Lesson], target: Tensor) -> _Lesson:
        """The teacher's part in this call of cross_entropy."""
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


class _Lesson(NamedTuple):
    """What a teacher would have computed a cross-entropy of."""

    logits: _Logits | Tensor
    target: Tensor

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Those of a distillation whose products are of this dtype."""
        assert isinstance(self.logits, _Logits)
        hidden, bias = self.logits.scaled()
        if len(hidden) > 1:
            raise ValueError("the teacher has LoRA on its output layer, whose products do not add up here; merge it")
        tensors = {"teacher_input": hidden[0], "teacher_weight": self.logits.weight[0], "teacher_bias": bias}
        cast = {name: None if x is None else x.detach().to(dtype) for name, x in tensors.items()}
        return {**cast, "teacher_softcap": self.logits.softcap}

    def built(self, dtype: torch.dtype) -> Tensor:
        """The teacher's logits, as the loss of its hidden states would make them."""
        if isinstance(self.logits, Tensor):
            return self.logits.as_subclass(Tensor).to(dtype)
        given, cap = self.arguments(dtype), self.logits.softcap
        logits = F.linear(given["teacher_input"], given["teacher_weight"], given["teacher_bias"])
        return logits if cap is None else cap * (logits / cap).tanh()


class _TeachersPass:
    """A forward pass of a teacher, which keeps its logits and computes no loss."""

    weight: Tensor | None = None
    """Of a sharded teacher's output layer, as it was within the forward."""

    def __init__(self, head: nn.Module, way: str, sharded: bool) -> None:
        self.head, self.way, self.sharded = head, way, sharded
        self.lessons: list[_Lesson] = []

    def cross_entropy(self, logits: _Logits | Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
        self.lessons.append(_Lesson(logits, target))
        return torch.zeros((), device=target.device)


class _Thread(threading.local):
    """The passes under way in this thread, the innermost last: two threads may run one model at a time."""

    def __init__(self) -> None:
        # a list, since torch.compile of torch 2.11 cannot set attributes here
        self.passes: list[_Pass | _TeachersPass] = []


_THREAD = _Thread()


def _under_way() -> _Pass | _TeachersPass | None:
    return _THREAD.passes[-1] if _THREAD.passes else None


def _refuse_call(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    # Its replicas share the forward of the model that they are of.
    if getattr(model, "_is_replica", False):
        raise RuntimeError("a fused model does not run under torch.nn.DataParallel; use DistributedDataParallel")
    fusion = model.__dict__.get(_ATTRIBUTE)
    # The forward that TRL puts around that of the model: it projects the hidden states by itself.
    if fusion is not None and kwargs.get("fused_lm_head") and not fusion.loss.is_the_models:
        raise ValueError(
            f"{type(model).__name__} is fused with {fusion.loss.row.__name__}, but this trainer of TRL computes a loss "
            "of its own from the hidden states; unfuse the model, or give a subclass of SFTTrainer the compute_loss of "
            "transformers.Trainer"
        )


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give the instance this forward, unless another than fuse has done so."""
    if "forward" in module.__dict__ and not _is_replaced(module):
        raise ValueError(
            f"the forward of {type(module).__name__} is replaced already; fuse before wrapping or dispatching it"
        )
    module.forward = forward


def _is_replaced(module: nn.Module) -> bool:
    """Whether the forward of this instance is one that fuse gave it."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", getattr(forward, "func", None))
    # functools.wraps copies the attribute to what others wrap around it.
    return function is not None and getattr(function, "of_fuse", None) is function


def _head_forward(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an output layer, which hooks of the layer surround with the hidden states as its input."""
    forward, under_way = type(head).forward, _under_way()
    if under_way is None or under_way.head is not head:
        return forward(head, *args, **kwargs)
    if under_way.way == "row":
        return forward(head, *args, **kwargs).as_subclass(_RowLogits)
    hidden, *others = args
    if not is_lora(head):
        return forward(head, _Hidden(under_way, hidden), *others, **kwargs)
    what = f"the arguments {', '.join(kwargs)}" if kwargs else beside_lora(head)
    if what is not None:
        raise ValueError(
            f"the fused loss adds up the products of an output layer with LoRA, but the {described(head)} has {what}; "
            "merge the adapter, or leave the layer out of target_modules"
        )
    hiddens, weights, bias = products(head, hidden)
    return _Logits(under_way, hiddens, weights, len(weights[0]), bias)


_head_forward.of_fuse = _head_forward  # type: ignore[attr-defined]


def _fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    position = list(signature.parameters).index("labels")  # with self

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get(_ATTRIBUTE)
        if fusion is None:  # unfused, while a wrapper still holds this function
            return original(self, *args, **kwargs)
        name = type(self).__name__
        labels = kwargs.get("labels", args[position - 1] if len(args) >= position else None)
        if labels is None:
            smoothing = _smoothing_of_trainer(own_loss=True)
            if smoothing is not None:
                raise ValueError(
                    f"{name} is fused, but label_smoothing_factor={smoothing} makes the Trainer compute its own "
                    f"cross-entropy; set it to 0 and pass label_smoothing={smoothing} to fuse, or unfuse the model"
                )
            if self.training:
                warnings.warn(f"{name} is fused, but in training without labels", stacklevel=2)
            return original(self, *args, **kwargs)
        if self.training or fusion.eval_logits:
            return fusion.run("linear" if self.training else "row", original, self, *args, **kwargs)
        if _trainer_collects_logits():
            raise ValueError(
                f"{name} is fused with eval_logits=False, but the Trainer collects logits; fuse with eval_logits=True, "
                "or leave out compute_metrics, or set prediction_loss_only=True"
            )
        return fusion.run("linear", original, self, *args, **kwargs)

    forward.of_fuse = forward  # type: ignore[attr-defined]
    # Trainer reads the signature; accelerate unwraps a forward as far as it can.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def _method_of_trainer(name: str) -> Mapping[str, Any] | None:
    """The variables of the Trainer's method of this name that calls, if one does.

    A Trainer does not tell its model the arguments that change what is computed.
    """
    module = sys.modules.get("transformers.trainer")
    frame = None if module is None else sys._getframe(1).f_back
    while module is not None and frame is not None:
        if frame.f_code.co_name == name and isinstance(frame.f_locals.get("self"), module.Trainer):
            return frame.f_locals
        frame = frame.f_back
    return None


# torch.compile calls these two while it traces, and takes the answer for a constant.


@torch.compiler.assume_constant_result
def _smoothing_of_trainer(own_loss: bool = False) -> float | None:
    """The label_smoothing_factor of the Trainer that calls; with `own_loss` only if it computes the loss by that."""
    variables = _method_of_trainer("compute_loss")
    trainer = None if variables is None else variables["self"]
    if trainer is None or trainer.label_smoother is None or (own_loss and trainer.compute_loss_func is not None):
        return None
    return trainer.args.label_smoothing_factor


@torch.compiler.assume_constant_result
def _trainer_collects_logits() -> bool:
    # Those of compute_loss in its prediction_step; that of Seq2SeqTrainer generates, and takes the loss alone.
    variables = _method_of_trainer("compute_loss") and _method_of_trainer("prediction_step")
    return variables is not None and not variables.get("prediction_loss_only", True)


def _finished(outputs: Any) -> Any:
    """Outputs without what carries the loss."""

    def plain(value: Any) -> Any:
        if isinstance(value, _Logits):
            return UnbuiltLogits(value.shape)
        return value.as_subclass(Tensor) if isinstance(value, _RowLogits) else value

    if isinstance(outputs, Mapping):
        for name, value in list(outputs.items()):
            outputs[name] = plain(value)  # type: ignore[index]
        return outputs
    return tuple(plain(value) for value in outputs)


class _NoTensor:
    """Stands where a tensor is expected, and refuses by name whatever its class does not define."""

    @classmethod
    def refusal(cls, what: str) -> AttributeError:
        """An AttributeError, since a name that is not there may be asked for to know that."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise cls.refusal(getattr(function, "__name__", repr(function)))

    def __getattr__(self, name: str) -> Any:
        raise self.refusal(name)

    def __getitem__(self, index: Any) -> Any:
        raise self.refusal(f"[{index}]")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self.refusal("assignment to elements")

    def __eq__(self, other: object) -> bool:
        raise self.refusal("==")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise self.refusal("bool")


class _Hidden(_NoTensor):
    """Hidden states on their way into the output layer, whose product it puts off."""

    def __init__(self, under_way: _Pass | _TeachersPass, hidden: Tensor) -> None:
        self.under_way, self.hidden = under_way, hidden

    @classmethod
    def refusal(cls, what: str) -> AttributeError:
        under_way = _under_way()
        layer = "the layer" if under_way is None else f"a {described(under_way.head)}"
        return AttributeError(
            f"{what!r} of the output layer's input is not understood by the fused loss, for which {layer} must be one "
            "linear(input, weight, bias), or plain LoRA on one; merge an adapter of the layer, or leave the layer out "
            "of target_modules"
        )

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs)
        return _product(*args, **(kwargs or {}))


def _product(input: _Hidden, weight: Tensor, bias: Tensor | None = None) -> _Logits:
    under_way = input.under_way
    if isinstance(under_way, _TeachersPass) and under_way.sharded:  # FSDP2 frees both before the loss
        under_way.weight = weight
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return _Logits(under_way, [input.hidden], [weight], len(weight), bias)


class _Logits(_NoTensor):
    """z = scale * (sum_i hidden[i] @ weight[i].T + bias) or softcap * tanh(z / softcap), (*, V), of which only the loss
    is made.
    """

    # No data class, since FSDP2 takes the fields of one for outputs of the module that returns it.
    def __init__(
        self,
        under_way: _Pass | _TeachersPass,
        hidden: list[Tensor],
        weight: list[Tensor],
        classes: int,
        bias: Tensor | None,
        scale: float = 1.0,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.under_way, self.hidden, self.weight, self.classes, self.bias = under_way, hidden, weight, classes, bias
        self.scale, self.softcap = scale, softcap
        self.dtype = dtype or _product_dtype(hidden[0])

    @classmethod
    def refusal(cls, what: str, of: str = "the logits") -> AttributeError:
        return AttributeError(f"{what!r} of {of} is not understood by the fused loss")

    def loss(self, loss: _Loss, lesson: _Lesson | None, **options: Any) -> Tensor:
        hidden, bias = self.scaled()
        if lesson is not None:
            options |= lesson.arguments(_product_dtype(hidden[0]))
        return loss.of_hidden(hidden, self.weight, linear_bias=bias, softcap=self.softcap, **options)

    def scaled(self) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states and bias with the scale in them."""
        hidden, bias = self.hidden, self.bias
        if not math.isclose(self.scale, 1.0, rel_tol=1e-12):  # dividing by a cap and multiplying by it leaves almost 1
            hidden, bias = [h * self.scale for h in hidden], None if bias is None else bias * self.scale
        return hidden, bias

    def _but(self, **changed: Any) -> _Logits:
        names = ("under_way", "hidden", "weight", "classes", "bias", "scale", "softcap", "dtype")
        return _Logits(**{name: getattr(self, name) for name in names} | changed)

    # What is asked of them

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden[0].shape[:-1], self.classes))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden[0].dim()

    @property
    def ndim(self) -> int:
        return self.dim()

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    # Casts, which the loss does not need: it computes in float32, and in float64 for float64

    def float(self) -> _Logits:
        return self._but(dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> _Logits:
        to = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if to.device != self.device:
            raise self.refusal(f"to({to.device})")
        if to.dtype not in (self.dtype, torch.float32):
            raise self.refusal(f"to({to.dtype})")
        return self._but(dtype=to.dtype)

    # Shapes: those of the hidden states, as long as the classes stay together

    def contiguous(self) -> _Logits:
        return self

    def view(self, *shape: Any) -> _Logits:
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        if not shape or shape[-1] != self.shape[-1]:
            raise self.refusal(f"view{shape}", f"logits of shape {tuple(self.shape)}")
        return self._but(hidden=[h.reshape(*shape[:-1], h.shape[-1]) for h in self.hidden])

    reshape = view

    def __getitem__(self, index: Any) -> _Logits:
        parts = index if isinstance(index, tuple) else (index,)
        taken = sum(part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
        last = taken == self.dim() or any(part is Ellipsis for part in parts)
        whole = isinstance(parts[-1], slice) and parts[-1] == slice(None)
        if any(part is None for part in parts) or taken > self.dim() or (last and not whole):
            raise self.refusal(f"[{index}]", f"logits of shape {tuple(self.shape)}")
        return self._but(hidden=[h[index] for h in self.hidden])

    # Arithmetic that the linear form knows

    def __mul__(self, factor: Any) -> _Logits:
        if not _is_number(factor) or factor == 0 or (self.softcap is not None and factor < 0):
            raise self.refusal("multiplication", f"the logits and {_described(factor)}")
        softcap = None if self.softcap is None else self.softcap * factor
        return self._but(scale=self.scale * factor, softcap=softcap)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> _Logits:
        if not _is_number(divisor) or divisor == 0:
            raise self.refusal("division", f"the logits and {_described(divisor)}")
        return self * (1 / divisor)

    def __add__(self, bias: Any) -> _Logits:
        of_classes = isinstance(bias, Tensor) and bias.dim() and bias.shape[-1] == bias.numel() == self.shape[-1]
        if not of_classes or bias.dim() > self.dim() or self.softcap is not None:
            raise self.refusal("addition", f"the logits and {_described(bias)}")
        bias = bias.reshape(-1) / self.scale  # no view, which FSDP2 may free before a teacher's loss
        return self._but(bias=bias if self.bias is None else self.bias + bias)

    __radd__ = __add__

    def tanh(self) -> _Logits:
        if self.softcap is not None:
            raise self.refusal("tanh", "soft-capped logits")
        return self._but(softcap=1.0)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.cross_entropy and isinstance(args[0], _Logits):
            return args[0].under_way.cross_entropy(*args, **(kwargs or {}))
        if function is torch.tanh:
            return args[0].tanh()
        return super().__torch_function__(function, types, args, kwargs)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class UnbuiltLogits(_NoTensor):
    """The placeholder for the logits, which were never computed, in the outputs of a fused model; has their shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __repr__(self) -> str:
        return f"UnbuiltLogits(shape={tuple(self.shape)})"

    @classmethod
    def refusal(cls, what: str) -> AttributeError:
        return AttributeError(
            f"{what}: the logits of a fused model in training were never built, only their loss; call it without "
            "labels, or in evaluation with eval_logits=True, or unfuse it"
        )


class _RowLogits(Tensor):
    """Logits in evaluation: those of the model in every respect, but that their cross-entropy is the fused loss's."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        under_way = _under_way()  # None for logits that a hook has kept
        if function is F.cross_entropy and isinstance(args[0], _RowLogits) and under_way is not None:
            return under_way.cross_entropy(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def _probe_inputs(model: PreTrainedModel, head: nn.Module) -> dict[str, Tensor]:
    """Two sequences of eight tokens, one of them ignored as a label."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}; pass inputs with labels as probe=...")
    weight: Any = model.get_input_embeddings().weight
    # Some embed more tokens than they predict.
    count = min(len(weight), getattr(head, "out_features", len(weight)))
    tokens = (torch.arange(16, device=weight.device) * 7919 + 11).reshape(2, 8) % count
    labels = tokens.clone()
    labels[1, 3] = -100
    return {"input_ids": tokens, "labels": labels}


def _loss_of(model: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} computes no loss from {' and '.join(inputs)} alone; it needs further inputs, and "
            "fuse needs them as probe=..."
        )
    return loss


def _compare(model: PreTrainedModel, head: nn.Module, fusion: _Fusion, probe: Mapping[str, Any]) -> None:
    """Raises where the fused loss and its gradients are not those of the model as it was."""
    name, original = type(model).__name__, type(model).forward
    as_it_was = functools.partial(original, model)
    if not fusion.loss.is_the_models:
        as_it_was = functools.partial(fusion.run, "row", original, model)
    try:
        with _untouched(model):
            expected = _loss_and_gradients(model, head, as_it_was, probe)
        with _untouched(model):
            got = _loss_and_gradients(model, head, functools.partial(fusion.run, "linear", original, model), probe)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be fused: {error}") from error
    tolerance = max(_TOLERANCE[value.dtype] for value in expected.values())
    for what, value in expected.items():
        largest = value.abs().max().item()
        difference = (got[what] - value).abs().max().item()
        if not difference <= tolerance * largest:
            raise ValueError(
                f"{name} cannot be fused: {what} differs by {difference:.3g} from that of the model, "
                f"whose largest element is {largest:.3g}"
            )


def _loss_and_gradients(
    model: PreTrainedModel, head: nn.Module, forward: Callable[..., Any], probe: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The loss, and its gradients by the hidden states, the output layer's parameters and the model's first one."""
    sources: dict[str, Tensor] = {}

    def capture(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        if not hidden.requires_grad:  # the model is frozen, as before an adapter is added to it
            hidden = hidden.detach().requires_grad_()
        sources["hidden states"] = hidden
        return hidden, *others

    handle = head.register_forward_pre_hook(capture, prepend=True)
    try:
        outputs = forward(**probe)
    finally:
        handle.remove()
    loss = _loss_of(model, outputs, probe)
    first = next((x for x in model.named_parameters() if x[1].requires_grad), None)
    sources.update(head.named_parameters(prefix="output layer"))
    sources.update([first] if first else [])
    sources = {name: source for name, source in sources.items() if source.requires_grad}
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    named = {f"the gradient of {name}": gradient for name, gradient in zip(sources, gradients, strict=True)}
    return {"the loss": loss.detach(), **named}


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """In training with gradients; buffers, flags and random numbers are afterwards what they were."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    # A reentrant checkpoint gives no gradients of chosen tensors.
    checkpointed = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({x.device.index for x in model.parameters() if x.device.type != "cpu"})
    kind = next((x.device.type for x in model.parameters() if x.device.type != "cpu"), "cuda")
    numbers = random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
            model.train()
            for module in checkpointed:
                module.gradient_checkpointing = False  # type: ignore[assignment]
            yield
    finally:
        random.setstate(numbers)
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, before in buffers:
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
