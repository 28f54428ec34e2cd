"""The comparison of a model that is being fused with the model as it was, on a short batch."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._fusion import Fusion, loss_of

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


def compare(model: PreTrainedModel, head: nn.Module, fusion: Fusion, probe: Mapping[str, Any]) -> None:
    """Raise where the fused loss and its gradients are not those of the model as it was, or where the logits of a
    teacher are not what it makes.
    """
    teacher, results = fusion.loss.teacher, []
    fused, exact = (functools.partial(fusion.run, way, model) for way in ("linear", "row"))
    as_it_was = functools.partial(type(model).forward, model) if fusion.loss.is_the_models else exact
    try:
        if teacher is not None:
            lessons, right = (teacher.lessons(head, probe, way) for way in ("linear", "row"))
            for given, made in zip(lessons, right, strict=True):
                logits = given.built(teacher.model.dtype)
                _check_close("a logit of the teacher", logits, made.built(torch.float32), _TOLERANCE[logits.dtype])
        for forward in (as_it_was, fused):
            with untouched(model):
                results.append(_loss_and_gradients(model, head, forward, probe))
        expected, got = results
        tolerance = max(_TOLERANCE[value.dtype] for value in expected.values())
        for what, value in expected.items():
            _check_close(what, got[what], value, tolerance)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        with_teacher = "" if teacher is None else f" with a {type(teacher.model).__name__} as its teacher"
        raise ValueError(f"{type(model).__name__} cannot be fused{with_teacher}: {error}") from error


def _check_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    largest, difference = expected.abs().max().item(), (got - expected).abs().max().item()
    if not difference <= tolerance * largest:
        raise ValueError(f"{what} differs by {difference:.3g} from that without fusing, which is at most {largest:.3g}")


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
    first = [x for x in model.named_parameters() if x[1].requires_grad][:1]
    sources.update([x for x in head.named_parameters(prefix="output layer") if x[1].requires_grad] + first)
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    named = {f"the gradient of {name}": gradient for name, gradient in zip(sources, gradients, strict=True)}
    return {"the loss": loss.detach(), **named}


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in training with gradients; buffers, flags and random numbers are afterwards what they were."""
    flags = ("training", "gradient_checkpointing")
    kept = [(x, {k: v for k, v in x.__dict__.items() if k in flags}, dict(x._buffers)) for x in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    accelerators = {x.device for x in model.parameters() if x.device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cuda")
    numbers = random.getstate()
    try:
        with torch.random.fork_rng(sorted({x.index for x in accelerators}), device_type=kind), torch.enable_grad():
            model.train()
            for module, its_flags, _ in kept:
                if its_flags.get("gradient_checkpointing"):  # a reentrant one gives no gradients of chosen tensors
                    module.gradient_checkpointing = False  # type: ignore[assignment]
            yield
    finally:
        random.setstate(numbers)
        for module, its_flags, buffers in kept:
            module.__dict__.update(its_flags)
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
