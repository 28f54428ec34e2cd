"""What a Trainer of transformers does, which it does not tell its model."""

import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch


def _method_of_trainer(name: str) -> Mapping[str, Any] | None:
    """Return the variables of the Trainer's method of this name that calls, if one does."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", ())
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_code.co_name == name and isinstance(frame.f_locals.get("self"), trainer):
            return frame.f_locals
    return None


# torch.compile calls these two while it traces, and takes the answer for a constant.


@torch.compiler.assume_constant_result
def smoothing_of_trainer(own_loss: bool = False) -> float | None:
    """Return the label_smoothing_factor of the Trainer that calls, or None if it has none.

    With `own_loss`, only that of a Trainer which computes the loss by it.
    """
    variables = _method_of_trainer("compute_loss")
    trainer = None if variables is None else variables["self"]
    if trainer is None or trainer.label_smoother is None or (own_loss and trainer.compute_loss_func is not None):
        return None
    return trainer.args.label_smoothing_factor


@torch.compiler.assume_constant_result
def trainer_collects_logits() -> bool:
    """Return whether the Trainer that calls keeps the logits of its evaluation."""
    # Those of compute_loss in its prediction_step; that of Seq2SeqTrainer generates, and takes the loss alone.
    variables = _method_of_trainer("compute_loss") and _method_of_trainer("prediction_step")
    return variables is not None and not variables.get("prediction_loss_only", True)
