"""Hidden states whose rows are divided over the ranks of a group that has the classes divided too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..checks import check_bool
from . import batch
from .collectives import group_named
from .vocabulary import VocabularyShards


def sum_in_place(x: Tensor, group: str) -> Any:
    """Over the ranks; what to wait for."""
    return dist.all_reduce(x, group=group_named(group), async_op=True)


def row_parts(sequence_parallel: object, group: Any) -> int:
    """Over how many ranks the rows of the hidden states are divided."""
    check_bool(sequence_parallel=sequence_parallel)
    if not sequence_parallel:
        return 1
    if group is None:
        raise ValueError("sequence_parallel=True is for the ranks of a group, but group is None")
    if not isinstance(group, VocabularyShards):
        batch.check_group(group)
        return group.size()
    if not all(group.sizes):
        raise ValueError(f"sequence_parallel=True needs a class on each rank, but their numbers are {group.sizes}")
    return len(group.sizes)


def _owners(rows: slice, part: int) -> Iterator[tuple[int, slice, slice]]:
    """The ranks that have some of these rows, `part` being on each: which of `rows`, and which of theirs."""
    for rank in range(rows.start // part, -(-rows.stop // part)):
        begin, end = max(rows.start, rank * part), min(rows.stop, (rank + 1) * part)
        yield rank, slice(begin - rows.start, end - rows.start), slice(begin - rank * part, end - rank * part)


def fetch_rows(own: Tensor, rows: slice, buffer: Tensor, group: str) -> Tensor:
    """Rows of which each rank has an equal part, into the buffer, which then begins with them."""
    ranks, pending = group_named(group), []
    for rank, where, which in _owners(rows, len(own)):
        if rank == ranks.rank():
            buffer[where] = own[which]
        pending.append(dist.broadcast(buffer[where], group_src=rank, group=ranks, async_op=True))
    for work in pending:
        work.wait()
    return buffer


def send_rows(gradient: Tensor, rows: slice, own: Tensor, group: str) -> list[Callable[[], None]]:
    """The sum over the ranks of such rows, to those that have them; what to call for it to have arrived in `own`."""
    ranks = group_named(group)

    def send(rank: int, where: slice, which: slice) -> Callable[[], None]:
        work = dist.reduce(gradient[where], group_dst=rank, group=ranks, async_op=True)

        def arrive() -> None:
            work.wait()
            if rank == ranks.rank():
                own[which] = gradient[where]

        return arrive

    return [send(*owner) for owner in _owners(rows, len(own))]
