"""Hugging Face transformers: any row loss as a Trainer's, and models that train on the linear form.

A model is fused on the instance: its forward, and that of its output layer, are replaced. In a pass with labels the
output layer computes with a stand-in for the hidden states, which answers the projection with a stand-in for the
logits. That one follows what models do to logits before the loss (casts, shapes, shifts, a scale, a bias,
soft-capping), refuses whatever else, and turns torch.nn.functional.cross_entropy into the linear form. Shifts and
num_items_in_batch stay the model's own business.
"""

# The public functions are here. Imports go down this list, never up:
# _probe      compares the fused model with the model as it was
# _fusion     has what a model is fused with: the loss, the pass that computes it, and the model's forward since then
# _teacher    runs the model whose predictions another one learns
# _model      says what models and output layers must be, and replaces their forwards
# _stand_ins  has those for hidden states and logits, and the passes under way
# _trainer    finds what a Trainer does and does not tell its model

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError(
        "fusedloss.integrations.transformers needs transformers: pip install 'fusedloss[transformers]'"
    ) from error

from ...checks import check_bool, check_index_dtype
from .._losses import OF_THE_LAYER, check_arguments, check_row_loss, current
from ._fusion import Fusion, Loss
from ._model import ATTRIBUTE, check_model, output_layer, restore_forwards
from ._probe import compare, probe_inputs, untouched
from ._stand_ins import UnbuiltLogits as UnbuiltLogits
from ._teacher import Teacher
from ._trainer import smoothing_of_trainer

__all__ = ["fuse", "trainer_loss", "unfuse"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def trainer_loss(loss: Callable[..., Any], *, shift: bool, **arguments: Any) -> Callable[..., Tensor]:
    """Return a row loss as `compute_loss_func` of a Trainer: f(outputs, labels, num_items_in_batch=None).

    The logits are the model's; :func:`fuse` does without them. With ``num_items_in_batch``, the targets that count
    in all batches of an update, the loss is its sum over them divided by that number, so that accumulated gradients
    are those of the whole batch; without it, the mean of the batch in hand. With class weights the number stays that of
    the targets, where a mean divides by their weights.

    A Trainer counts the labels other than -100, whatever ``ignore_index`` is: let a collator set ignored ones to -100.
    With ``shift=True`` a value for each target, such as those of ``token_weight``, stands beside the shifted labels.

    The Trainer keeps the labels from the model. An encoder-decoder model then needs ``decoder_input_ids`` in the batch,
    as from transformers' DataCollatorForSeq2Seq with ``model=``. The loss of a mixture model's router is not in it,
    which a warning says: :func:`fuse` keeps it.

    Args:
        loss: :func:`fusedloss.focal_loss` or any other row loss.
        shift: True for causal language models, where the logits of a token predict the next one; False where logits and
            labels are aligned: encoder-decoder models, masked language models, token classification.
        arguments: of the loss. A callable (but for ``loss_fn``) is called at each step for its value.

    Raises TypeError and ValueError as the loss does, TypeError where there are no labels, or probabilities to shift,
    and ValueError under torch.nn.DataParallel, and where the Trainer has a ``label_smoothing_factor`` and the loss no
    ``label_smoothing``: a Trainer does not hand it over.

    >>> import torch, fusedloss as fl
    >>> compute_loss_func = trainer_loss(fl.focal_loss, shift=True, gamma=2.0)  # for a Trainer
    >>> logits, labels = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
    >>> loss = compute_loss_func({"logits": logits}, labels, num_items_in_batch=16)
    """
    check_bool(shift=shift)
    check_arguments(loss, arguments, OF_THE_LAYER)
    check_row_loss(loss)

    def compute_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise TypeError("the loss needs labels, got None")
        smoothing = smoothing_of_trainer()
        if smoothing is not None and "label_smoothing" not in arguments:
            raise ValueError(
                f"label_smoothing_factor={smoothing} does not reach the compute_loss_func of a Trainer; set it to 0 "
                f"and pass label_smoothing={smoothing} to trainer_loss"
            )
        if getattr(outputs, "aux_loss", None) is not None:
            warnings.warn("the outputs have the loss of a router, which is left out here; fuse keeps it", stacklevel=2)
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim():
            raise ValueError(
                "num_items_in_batch has a number for each GPU, as under torch.nn.DataParallel, where a Trainer "
                "multiplies the loss of a compute_loss_func by their count; start a process for each GPU, as torchrun "
                "does"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        labels, now = labels.to(logits.device), current(arguments)
        if shift:
            check_index_dtype("labels", labels)  # the last dimension of others is that of the classes
            last = torch.full_like(labels[..., :1], now.get("ignore_index", -100), dtype=torch.int64)
            labels = torch.cat([labels[..., 1:], last], -1)
        return loss(logits, labels, normalizer=num_items_in_batch, **now)

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
    - In evaluation with labels the logits are computed as without fusing, and the loss is their row form, with the same
      arguments: mixed cross-entropy mixes there too. ``eval_logits=False`` takes the linear form there as well, and a
      Trainer that collects logits (``compute_metrics``, ``predict``) raises ValueError.
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
    check_model(model)
    name = type(model).__name__
    chosen = Loss.of(loss, arguments, eval_logits, None if teacher is None else Teacher(teacher, model))
    head = output_layer(model, name)
    on_meta = next((parameter for parameter, value in model.named_parameters() if value.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"{on_meta!r} of {name} is on the meta device; load the weights of the model, then fuse it")
    if probe is None:
        probe = probe_inputs(model, head)
    fusion: Any = model.__dict__.get(ATTRIBUTE)
    before = None if fusion is None else fusion.loss
    try:
        fusion = fusion or Fusion(model, head)
        fusion.loss = chosen.as_probe
        compare(model, head, fusion, probe)
        fusion.loss = chosen
        if chosen.teacher is not None:  # whose arguments the probe was not of
            with untouched(model):
                fusion.run("linear", model, **probe)
    except BaseException:
        if before is None:
            unfuse(model)
        else:
            fusion.loss = before
            chosen.release()
        raise
    if before is not None:
        before.release()
    return model


def unfuse(model: _Model) -> _Model:
    """Undo :func:`fuse` and return the model; a model that is not fused is unchanged.

    Raises TypeError for a wrapped model, as :func:`fuse` does.
    """
    check_model(model)
    fusion = model.__dict__.pop(ATTRIBUTE, None)
    if fusion is not None:
        fusion.handle.remove()
        fusion.loss.release()
    restore_forwards(model)
    return model
