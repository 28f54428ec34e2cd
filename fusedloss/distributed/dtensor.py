"""What this rank has of a DTensor, and how its placements divide the classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .. import transforms
from ..checks import is_dtensor
from . import collectives
from .vocabulary import VocabularyShards

_PLAIN = (Tensor, Parameter, type(None))


def local_part(name: str, x: Any, dim: int) -> tuple[Tensor, VocabularyShards | None]:
    """What this rank has of a DTensor whose dimension `dim` is the classes, and how they are divided, None if not."""
    transforms.refuse("a DTensor")
    where = f"{name} is a DTensor with placements {tuple(x.placements)}"
    divided = [axis for axis, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not divided:
        return x.to_local(grad_placements=x.placements), None
    placement = x.placements[divided[0]]
    # A subclass of Shard lays the parts out in another order.
    if len(divided) > 1 or type(placement).__name__ != "Shard" or placement.dim != dim % x.dim():
        raise ValueError(
            f"{where}; the losses take replicated ones, and those that one dimension of the mesh shards on the classes"
        )
    group = x.device_mesh.get_group(divided[0])
    size, ranks = x.shape[dim], group.size()
    most = -(-size // ranks)
    sizes = [max(0, min(most, size - rank * most)) for rank in range(ranks)]
    return x.to_local(grad_placements=x.placements), VocabularyShards(group, sizes)


def local_logits(input: Any, group: Any) -> tuple[Tensor, Any]:
    """What this rank has of logits that are a DTensor, and how their classes are divided."""
    if group is not None:
        raise ValueError(f"group is for tensors of this rank, and a DTensor names its own, got {group!r}")
    return local_part("input", input, -1)


def local_second_row(name: str, second: Any, input: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What this rank has of a second row of logits and of the first, whose group goes into the options.

    Beside a DTensor the second is one that is placed alike, or whole on every rank.
    """
    if not is_dtensor(second):
        if not is_dtensor(input):
            return second, input
        input, shards = local_logits(input, options.get("group"))
        if shards is None:
            return second, input
        options["group"] = shards
        return second[..., shards.own], input
    first = (input.device_mesh, input.placements) if is_dtensor(input) else None
    if first != (second.device_mesh, second.placements) and (first or not _is_replicated(second)):
        where = f"has placements {tuple(input.placements)}" if first else "is a tensor of this rank"
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(second.placements)}, but input {where}; place {name} as input "
            f"is, or pass {name}.full_tensor()"
        )
    second, _ = local_part(name, second, -1)
    if first:
        input, options["group"] = local_logits(input, options.get("group"))
    return second, input


def _is_replicated(x: Any) -> bool:
    return all(placement.is_replicate() for placement in x.placements)


def local_rows(target: Any) -> Tensor:
    """The target, which every rank must have whole."""
    if not is_dtensor(target):
        return target
    if not _is_replicated(target):
        raise ValueError(f"target is a DTensor with placements {tuple(target.placements)}; it must be replicated")
    return target.to_local()


def local_projection(
    hidden: list[Any],
    weight: list[Any],
    bias: Any,
    group: Any,
    sequence_parallel: Any,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> tuple[list[Any], list[Any], Any, Any, Any]:
    """Of DTensors, what this rank has, with the group that they say. Others pass through."""
    of_hidden, of_weight, of_bias = names
    every = (*hidden, *weight) if bias is None else (*hidden, *weight, bias)
    # Beneath a transform there may be one, too.
    plain = not transforms.active()
    for x in every:
        plain = plain and type(x) in _PLAIN
    if plain or not any(map(is_dtensor, every)):
        return hidden, weight, bias, group, sequence_parallel
    if not all(map(is_dtensor, every)):
        of_each = [of_hidden] * len(hidden) + [of_weight] * len(weight) + [of_bias]
        kinds = ", ".join(f"{name} a {type(x).__name__}" for name, x in zip(of_each, every, strict=False))
        raise ValueError(
            f"{of_hidden}, {of_weight} and {of_bias} must all be DTensors or all be tensors of this rank, got {kinds}. "
            "A weight that FSDP has sharded is whole within the forward of its unit alone: use a Linear* module of "
            "fusedloss.nn there, or one whose layer is a unit itself. A weight that is sharded on the classes goes "
            "with an input that is replicated on the same mesh, or pass to_local() of both and group="
        )
    if group is not None:
        raise ValueError(f"group is for tensors of this rank, and DTensors name their own, got {group!r}")
    mesh, placements = weight[0].device_mesh, hidden[0].placements
    if any(x.device_mesh != mesh for x in every):
        raise ValueError(f"{of_hidden}, {of_weight} and {of_bias} must be DTensors on the same mesh")
    local = [local_part(of_weight, w, 0) for w in weight]
    shards = local[0][1]
    if bias is not None:
        bias, bias_shards = local_part(of_bias, bias, 0)
        if bias_shards != shards:
            raise ValueError(f"{of_bias} must be placed as {of_weight} is")
    for h, (_, its_shards) in zip(hidden, local, strict=True):
        if its_shards != shards or h.placements != placements:
            raise ValueError("of an adapter, lora_B must be placed as linear_weight is, and lora_A's output as input")
    by_rows = [placement.is_shard(0) for placement in placements]
    if shards is not None and any(by_rows):
        if collectives.name_of(mesh.get_group(by_rows.index(True))) != shards.name:
            raise ValueError(f"{of_hidden} is sharded over another dimension of the mesh than {of_weight}")
        sequence_parallel = True
    if not all(p.is_replicate() or rows for p, rows in zip(placements, by_rows, strict=True)) or (
        any(by_rows) and (shards is None or sum(by_rows) > 1 or len(hidden[0]) % len(shards.sizes))
    ):
        raise ValueError(
            f"{of_hidden} is a DTensor with placements {tuple(placements)}; it must be replicated, or sharded evenly "
            f"on its first dimension where {of_weight} is sharded on the classes"
        )
    own = [h.to_local(grad_placements=placements) for h in hidden]
    return own, [w for w, _ in local], bias, shards, sequence_parallel
