"""Batches of which each rank of a process group has a part, on torch.distributed.

The ranks' backward passes are one: collectives add up what each of them has for another's part. A loss that all of them
have counts once, so that its gradients are those of one process; or, where gradients are averaged over the ranks
afterwards, as DistributedDataParallel does, once for each rank, so that their average is.

Only collectives that every backend has and no release deprecates, and parts of any number of rows: a part is sent by a
broadcast, its gradient summed by a reduction.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import transforms

ELSEWHERE = "{} of the group raised an error in this call; see the error there"

#: In place of the number of rows, on a rank that raises.
_FAILED = -1

#: More numbers than a rank tells the others.
_COLUMNS = 64


def check_group(group: object) -> None:
    transforms.refuse("a process group")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group was given, {group!r}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group, or pass group=None"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a process group that this rank is in, such as torch.distributed.group.WORLD, got {group!r}"
        )


class Ranks(NamedTuple):
    """The ranks of a group, and how many rows of the batch each of them has."""

    group: Any
    rank: int
    rows: list[int]

    @property
    def own(self) -> slice:
        """This rank's rows in the batch."""
        first = sum(self.rows[: self.rank])
        return slice(first, first + self.rows[self.rank])


def meet(group: Any, rows: int, device: torch.device, same: dict[str, object]) -> Ranks:
    """Tells each other the number of rows. Read by the host.

    Raises ValueError on every rank where they do not agree on the values of `same`, and where one of them has called
    :func:`raises`: the next collective would hang.
    """
    own = [rows, *(zlib.crc32(repr(value).encode()) for value in same.values())]
    every = _tables(group, own, device)
    failed = [rank for rank, told in enumerate(every) if told[0] == _FAILED]
    if failed:
        raise ValueError(ELSEWHERE.format(f"ranks {failed}"))
    for column, (name, value) in enumerate(same.items(), start=1):
        others = [rank for rank, told in enumerate(every) if told[column] != own[column]]
        if others:
            raise ValueError(
                f"{name} must be the same on every rank, is {value} on rank {group.rank()}, not on {others}"
            )
    return Ranks(group, group.rank(), [told[0] for told in every])


def raises(group: object, x: object) -> None:
    """Takes part in :func:`meet` on a rank that is about to raise: the others raise, too, and do not wait for it."""
    if dist.is_available() and isinstance(group, dist.ProcessGroup) and not transforms.active():
        _tables(group, [_FAILED], x.device if isinstance(x, Tensor) else torch.device("cpu"))


def _tables(group: Any, own: list[int], device: torch.device) -> list[list[int]]:
    """What each rank has, filled up to one length: of different lengths the collective would abort."""
    mine = torch.tensor(own + [0] * (_COLUMNS - len(own)), device=device)
    tables = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(tables, mine, group=group)
    every: list[list[int]] = torch.stack(tables).tolist()
    return every


def whole(part: Tensor, ranks: Ranks) -> Tensor:
    """The parts (N_r, ...) of all ranks, one after the other. Not differentiable."""
    result = part.new_empty((sum(ranks.rows), *part.shape[1:]))
    parts = result.split(ranks.rows)
    parts[ranks.rank].copy_(part)
    pending = [
        dist.broadcast(x, group_src=rank, group=ranks.group, async_op=True) for rank, x in enumerate(parts) if len(x)
    ]
    for work in pending:
        work.wait()
    return result


def gather(part: Tensor, ranks: Ranks) -> Tensor:
    """The parts of all ranks; differentiable, once."""
    return _Gather.apply(part, ranks)


def total(x: Tensor, ranks: Ranks, count: float = 1) -> Tensor:
    """The sum over the ranks, which counts `count` times in the backward of all; differentiable, once."""
    return _Total.apply(x, ranks.group, count / len(ranks.rows))


def shared(x: Tensor, group: Any, factor: float = 1) -> Tensor:
    """What is the same on every rank. Its gradient is summed over them, times a factor; differentiable, once."""
    return _Shared.apply(x, group, factor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return whole(part, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transforms.refuse("a process group", grad)
        ranks = ctx.ranks
        parts = grad.clone(memory_format=torch.contiguous_format).split(ranks.rows)
        pending = [
            dist.reduce(x, group_dst=rank, group=ranks.group, async_op=True) for rank, x in enumerate(parts) if len(x)
        ]
        for work in pending:
            work.wait()
        return parts[ranks.rank].clone(), None  # and not the memory of all of them


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, factor: float) -> Tensor:
        ctx.group, ctx.factor = group, factor
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.group) * ctx.factor, None, None


class _Total(_Shared):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, factor: float) -> Tensor:
        ctx.group, ctx.factor = group, factor
        # An output must not be the tensor that was changed in place: torch 2.11 would compile its gradient to zero.
        return _summed(x, group).clone()


def _summed(x: Tensor, group: Any) -> Tensor:
    transforms.refuse("a process group", x)
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
