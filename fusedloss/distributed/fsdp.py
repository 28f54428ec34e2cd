"""Linear forms of an output layer that FSDP2 has made a unit of its own.

The weight of a unit is whole only within a forward of the unit. The hooks of that forward gather the weight before it,
free it afterwards, and do the same around the backward, where they also reduce the gradient over the ranks. A linear
form reads the weight without the layer's forward, so it runs as a forward of the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_unit(module: nn.Module) -> bool:
    """Return whether `module` was passed to torch.distributed.fsdp.fully_shard.

    Its methods tell it, since importing FSDPModule would import half of torch.distributed.
    """
    return hasattr(type(module), "unshard") and hasattr(type(module), "set_requires_gradient_sync")


def has_units(model: nn.Module) -> bool:
    """Return whether a model or a part of it was passed to torch.distributed.fsdp.fully_shard."""
    return any(map(is_unit, model.modules()))


def unit_below(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    """Return the innermost unit that holds `layer`, or None if that is the model itself or if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    units = [module for module in model.modules() if module is not model and is_unit(module)]
    return next((unit for unit in reversed(units) if any(module is layer for module in unit.modules())), None)


def as_forward(unit: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call a unit that runs `function` in place of its own forward.

    All hooks of FSDP2 run as for logits: `hidden` is cast, and the gradients are reduced when that of `hidden` is made.
    """
    own = unit.__dict__.get("forward")

    def restore() -> None:
        unit.__dict__.pop("forward", None)
        if own is not None:
            unit.forward = own

    def forward(hidden: Tensor) -> Any:
        restore()  # the function may look at the layer
        return function(hidden)

    unit.forward = forward
    try:
        return unit(hidden)
    finally:
        restore()


def after_forward(unit: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """Gather the weight of a unit for `function`, after a forward of the unit that did not compute anything with it.

    That forward has told FSDP2 when to reduce the gradients. This one gathers the weight, here and before the backward
    of the result. It is no second call of the module: several modules may be one unit, and FSDP2 would then wait for
    the others.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    results: list[Tensor] = []

    def forward() -> Tensor:
        results.append(function())
        return results[0]

    unit._fusedloss_forward = forward  # type: ignore[assignment]
    try:
        register_fsdp_forward_method(unit, "_fusedloss_forward")
        unit._fusedloss_forward()  # type: ignore[operator]
    finally:
        del unit._fusedloss_forward
    # What FSDP2 returns has the output_dtype of the policy, which is meant for logits.
    return results[0]


#: What helps where a weight is not whole.
_REMEDY = "Leave the output layer to the outermost unit of FSDP1, shard by fully_shard, or use the row form"


def check_whole(weight: Tensor, name: str = "linear_weight", remedy: str = _REMEDY) -> None:
    """Raise where the weight of an output layer is what FSDP1 or DeepSpeed ZeRO-3 has left of it."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or torch.compiler.is_compiling():
        return
    try:
        freed = weight.numel() > 0 and weight.untyped_storage().size() == 0
    except NotImplementedError:  # a tensor of torch.func has no storage, and is never freed
        freed = False
    if freed or weight.dim() == 1:
        raise ValueError(
            f"{name} is what is left of a weight after the forward of its layer, with shape "
            f"{tuple(weight.shape)} and {'no elements in memory' if freed else 'no rows'}: FSDP1 and DeepSpeed ZeRO-3 "
            f"free it then. {remedy}"
        )
