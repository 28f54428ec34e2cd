"""Process groups by name, and the collectives that are operators, which graphs hold."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Not the groups themselves: one that outlives destroy_process_group takes the process down with it at its end.
_groups: dict[str, weakref.ref[Any]] = {}


def name_of(group: Any) -> str:
    """The name of a group, which it shares with no group that was destroyed, as torch.distributed's names are."""
    number = 1
    while True:
        name = group.group_name if number == 1 else f"{group.group_name}#{number}"
        if _groups.setdefault(name, weakref.ref(group))() is group:
            return str(name)
        number += 1


def group_named(name: str) -> Any:
    """Return the process group of that name."""
    group = _groups[name]() if name in _groups else None
    if group is None:
        raise ValueError(f"group {name!r} is a process group that was destroyed")
    return group


_library = torch.library.Library("fusedloss", "FRAGMENT")
_library.define("gather(Tensor part, int ranks, str group) -> Tensor")
_library.define("sum_over_ranks(Tensor part, str group) -> Tensor")


def _gather(part: Tensor, ranks: int, group: str) -> Tensor:
    parts = part.new_empty((ranks, *part.shape))
    dist.all_gather(list(parts.unbind()), part, group=group_named(group))
    return parts


def _sum_over_ranks(part: Tensor, group: str) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, group=group_named(group))
    return total


def _fake_gather(part: Tensor, ranks: int, group: str) -> Tensor:
    return part.new_empty((ranks, *part.shape))


def _fake_sum_over_ranks(part: Tensor, group: str) -> Tensor:
    return torch.empty_like(part)


for _operator, _kernel, _fake in (
    ("gather", _gather, _fake_gather),
    ("sum_over_ranks", _sum_over_ranks, _fake_sum_over_ranks),
):
    # Autograd must not look inside: an exported graph calls operators with gradients on.
    _library.impl(_operator, torch.no_grad()(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedloss::{_operator}", _fake, lib=_library)

gather = torch.ops.fusedloss.gather.default
sum_over_ranks = torch.ops.fusedloss.sum_over_ranks.default
