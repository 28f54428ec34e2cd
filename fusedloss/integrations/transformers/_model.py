"""A model and its output layer: what they must be, and the forwards that take the place of theirs."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...distributed import fsdp
from ...engine.output_layer import beside_lora, described, is_lora, products
from ._stand_ins import Hidden, Logits, RowLogits, under_way

#: Where a fused model keeps what it is fused with.
ATTRIBUTE = "_fusedloss"


def check_model(model: Any, name: str = "model", take: str = "fuse or unfuse") -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} must be a transformers.PreTrainedModel, got {type(model).__name__}; {take} the model that it "
            "wraps (for PEFT: get_base_model())"
        )


def output_layer(model: PreTrainedModel, who: str) -> Any:
    """Return the output layer of a model that can run a probe."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{who} has no output layer (get_output_embeddings() gives None)")
    if isinstance(head, nn.Embedding):  # as in FSMT
        raise ValueError(f"{who} has no layer that makes its logits: get_output_embeddings() gives a {described(head)}")
    if fsdp.has_units(model):
        raise ValueError(f"{who} is sharded by fully_shard, so that no probe can run; fuse before fully_shard")
    return head


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give the instance this forward, unless another than fuse has done so."""
    if "forward" in module.__dict__ and not is_replaced(module):
        raise ValueError(
            f"the forward of {type(module).__name__} is replaced already; fuse before wrapping or dispatching it"
        )
    module.forward = forward


def is_replaced(module: nn.Module) -> bool:
    """Return whether the forward of this instance is one that fuse gave it."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", getattr(forward, "func", None))
    # functools.wraps copies the attribute to what others wrap around it.
    return function is not None and getattr(function, "of_fuse", None) is function


def restore_forwards(module: nn.Module) -> None:
    """Take the forwards of fuse away from a module and its parts, among them copies that PEFT has made of the layer."""
    for part in module.modules():
        if is_replaced(part):
            del part.forward


def replace_head(head: nn.Module) -> None:
    """Make an output layer give stand-ins, or logits with the fused loss, in the passes that are of it."""
    # No method, which torch.compile cannot set. In a copy of the layer it is the copy's, as a method would be.
    replace_forward(head, functools.partial(_head_forward, head))


def _head_forward(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an output layer, which hooks of the layer surround with the hidden states as its input."""
    forward, current = type(head).forward, under_way()
    if current is None or current.head is not head:
        return forward(head, *args, **kwargs)
    if current.way == "row":
        return forward(head, *args, **kwargs).as_subclass(RowLogits)
    hidden, *others = args
    if not is_lora(head):
        return forward(head, Hidden(hidden), *others, **kwargs)
    what = f"the arguments {', '.join(kwargs)}" if kwargs else beside_lora(head)
    if what is not None:
        raise ValueError(
            f"the fused loss adds up the products of an output layer with LoRA, but the {described(head)} has {what}; "
            "merge the adapter, or leave the layer out of target_modules"
        )
    hiddens, weights, bias = products(head, hidden)
    return Logits(hiddens, weights, len(weights[0]), bias)


_head_forward.of_fuse = _head_forward  # type: ignore[attr-defined]
