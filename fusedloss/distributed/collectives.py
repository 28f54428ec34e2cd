"""Process groups by name, and the collective that is an operator, which graphs hold."""

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


# Autograd must not look inside: an exported graph calls operators with gradients on.
@torch.no_grad()
def _gather(part: Tensor, ranks: int, group: str) -> Tensor:
    parts = part.new_empty((ranks, *part.shape))
    dist.all_gather(list(parts.unbind()), part, group=group_named(group))
    return parts


def _fake_gather(part: Tensor, ranks: int, group: str) -> Tensor:
    return part.new_empty((ranks, *part.shape))


_library.impl("gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("fusedloss::gather", _fake_gather, lib=_library)

gather = torch.ops.fusedloss.gather.default
