"""What the logits of an output layer are: products of its weight, and of what LoRA adds to it, and its bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: Layers whose forward looks up inputs, so that the weight is all that an output layer can share with them.
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)

#: Module and name of the class whose forward adds products to those of a layer. PEFT is never imported.
_LORA = ("peft.tuners.lora.layer", "Linear")


def is_lora(layer: object) -> bool:
    """Tell whether a module is PEFT's LoRA of a linear layer, with the forward of that."""
    for kind in type(layer).__mro__:
        if kind.__name__ == _LORA[1] and kind.__module__ == _LORA[0]:
            return type(layer).forward is kind.forward  # type: ignore[attr-defined]
    return False


def products(layer: Any, input: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return hidden states and weights whose products sum to the logits of `input`, and the bias.

    The first pair is the layer's own. Each active adapter adds one in the dtype of the layer's weight, as autocast
    would, with its lora_A, dropout and scaling in the hidden states.
    """
    if not is_lora(layer):
        return [input], [layer.weight], getattr(layer, "bias", None)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    hidden, weight, bias = products(layer.base_layer, input)
    dtype = weight[0].dtype
    for name in _adapters(layer):
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        reduced = down(layer.lora_dropout[name](input.to(down.weight.dtype)))
        hidden.append((reduced * scaling).to(dtype))
        weight.append(up.weight.to(dtype))
        if up.bias is not None:
            own = (up.bias * scaling).to(dtype)
            bias = own if bias is None else bias + own
    return hidden, weight, bias


def beside_products(layer: nn.Module) -> str | None:
    """Return what changes the logits of an output layer beside its :func:`products` and bias, or None."""
    kind = type(layer)
    if isinstance(layer, _LOOKUPS):
        # Pruning and the old weight_norm make the weight in a hook before the forward.
        return _hooks(layer) if "weight" in layer.__dict__ and layer._forward_pre_hooks else None
    own = layer.__dict__.get("forward")
    # Who took a forward of theirs away may have left the class's own in its place.
    if own is not None and not (getattr(own, "__func__", None) is kind.forward and own.__self__ is layer):
        return "a forward that was put on the instance"
    if kind.forward is nn.Linear.forward:
        return _hooks(layer)
    if is_lora(layer):
        return _hooks(layer) or beside_lora(layer)
    # A module without a forward does nothing but hold the weight.
    return None if kind.forward is nn.Module.forward else "a forward of its own"


def beside_lora(layer: Any) -> str | None:
    """Return which part of a layer with adapters is more than a product, and what it is, or None."""
    parts = {"base_layer": layer.base_layer}
    for name in _adapters(layer):
        if name in layer.lora_variant:
            return f"the adapter {name!r}, which is no plain LoRA but a {type(layer.lora_variant[name]).__name__}"
        parts[f"lora_B[{name!r}]"] = layer.lora_B[name]
    for name, part in parts.items():
        what = beside_products(part)
        if what is not None:
            return f"a {described(part)} as its {name}, which has {what}"
    return None


def described(layer: object) -> str:
    """Return the full name of a module's class."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _adapters(layer: Any) -> list[str]:
    """Return which adapters add to the base layer's logits: none while they are disabled or merged into its weight."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _hooks(layer: nn.Module) -> str | None:
    """Return the first hook around a layer's forward, but for torch.distributed's, which move tensors."""
    pre, post, backward_pre, backward = (
        layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    )  # fmt: skip
    if pre or post or backward_pre or backward:
        for hook in (*pre.values(), *post.values(), *backward_pre.values(), *backward.values()):
            if not str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
                return f"the hook {hook!r}"
    return None
