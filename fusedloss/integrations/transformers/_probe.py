"""The comparison of a model that is being fused with the model as it was, on a short batch."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._fusion import Fusion
from ._model import loss_of
from ._teacher import Teacher

#: Largest difference of a probe's loss and gradients, relative to the largest element. Models cast to float32.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def probe_inputs(model: PreTrainedModel, head: nn.Module) -> dict[str, Tensor]:
    """Return two sequences of eight tokens, one of them ignored as a label."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}; pass inputs with labels as probe=...")
    weight: Any = model.get_input_embeddings().weight
    # Some embed more tokens than they predict.
    count = min(len(weight), getattr(head, "out_features", len(weight)))
    tokens = (torch.arange(16, device=weight.device) * 7919 + 11).reshape(2, 8) % count
    labels = tokens.clone()
    labels[1, 3] = -100
    return {"input_ids": tokens, "labels": labels}


def check_teacher(teacher: Teacher, head: nn.Module, probe: Mapping[str, Any]) -> None:
    """Raise where the logits that a model with this output layer learns from are not the teacher's."""
    name, dtype = type(teacher.model).__name__, teacher.model.dtype
    try:
        lessons, exact = (teacher.lessons(head, probe, way) for way in ("linear", "row"))
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be a teacher: {error}") from error
    for lesson, right in zip(lessons, exact, strict=True):
        logits = right.built(torch.float32)
        difference = (lesson.built(dtype) - logits).abs().max().item()
        if not difference <= _TOLERANCE.get(dtype, 5e-2) * logits.abs().max().item():
            raise ValueError(f"{name} cannot be a teacher: its logits differ by {difference:.3g} from what it makes")


def compare(model: PreTrainedModel, head: nn.Module, fusion: Fusion, probe: Mapping[str, Any]) -> None:
    """Raise where the fused loss and its gradients are not those of the model as it was."""
    name, results = type(model).__name__, []
    fused, exact = (functools.partial(fusion.run, way, model) for way in ("linear", "row"))
    as_it_was = functools.partial(type(model).forward, model) if fusion.loss.is_the_models else exact
    try:
        for forward in (as_it_was, fused):
            with untouched(model):
                results.append(_loss_and_gradients(model, head, forward, probe))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be fused: {error}") from error
    expected, got = results
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
    """Return the loss, and its gradients by the hidden states, the output layer's parameters and the model's first
    one.
    """
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
    loss = loss_of(model, outputs, probe)
    first = next((x for x in model.named_parameters() if x[1].requires_grad), None)
    sources.update(head.named_parameters(prefix="output layer"))
    sources.update([first] if first else [])
    sources = {name: source for name, source in sources.items() if source.requires_grad}
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    named = {f"the gradient of {name}": gradient for name, gradient in zip(sources, gradients, strict=True)}
    return {"the loss": loss.detach(), **named}


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in training with gradients; buffers, flags and random numbers are afterwards what they were."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    # A reentrant checkpoint gives no gradients of chosen tensors.
    checkpointed = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    accelerators = {x.device for x in model.parameters() if x.device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cuda")
    numbers = random.getstate()
    try:
        with torch.random.fork_rng(sorted({x.index for x in accelerators}), device_type=kind), torch.enable_grad():
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
