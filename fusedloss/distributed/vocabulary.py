"""Vocabulary-parallel losses: each rank of a process group has the logits of some of the classes.

The statistics of the parts of a row merge exactly. Each rank's pass makes those of its own classes, one collective
brings them together, and every rank goes on with the statistics of whole rows: the loss comes out alike on all of them,
and the gradient pass of a rank needs nothing from the others.

The passes know nothing of this. On a rank that has not got a row's target the statistics pass takes the rank's first
class for it, which is put right around it; the others take -1 for a class that is not here.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import transforms
from ..checks import IGNORED, check_int, is_dtensor
from ..definition.projection import Form, Projection
from ..definition.statistics import Picks, of_target
from ..engine import budgets as chunking
from ..engine import operators as ops
from . import batch as parallel


@dataclass(frozen=True)
class VocabularyShards:
    """How many classes each rank of a process group has, in the order of the ranks; `group` of the losses takes it.

    A process group in its place makes the ranks tell each other their numbers at each call, by a collective that the
    host waits for. ``VocabularyShards.gather(group, classes)`` does so once.

    Args:
        group: the process group; this rank must be in it.
        sizes: classes of each rank, 0 or more.

    Raises:
        TypeError, ValueError: no such group, or no such sizes for it.
    """

    name: str
    rank: int
    sizes: tuple[int, ...]

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        parallel.check_group(group)
        sizes = tuple(check_int("each of sizes", size, 0) for size in sizes)
        if len(sizes) != group.size() or not any(sizes):
            raise ValueError(f"sizes must be of the {group.size()} ranks of the group, one class at least, got {sizes}")
        object.__setattr__(self, "name", _name(group))
        object.__setattr__(self, "rank", group.rank())
        object.__setattr__(self, "sizes", sizes)

    @classmethod
    def gather(cls, group: Any, classes: int, device: torch.device | str = "cpu") -> VocabularyShards:
        """From the number of classes on this rank, told by each. `device`: one on which the group communicates."""
        parallel.check_group(group)
        return cls(group, parallel.meet(group, classes, torch.device(device), {}).rows)

    @property
    def classes(self) -> int:
        """Of all ranks."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """This rank's classes among all."""
        first = sum(self.sizes[: self.rank])
        return slice(first, first + self.sizes[self.rank])

    def here(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Classes as columns of this rank, -1 for those of others, and which ones are here."""
        return columns(index, self.own.start, self.sizes[self.rank])

    def weight(self, weight: Tensor | None) -> Tensor | None:
        """Those of this rank's classes."""
        return None if weight is None else weight[self.own].contiguous()

    def gather_parts(self, part: Tensor) -> Tensor:
        """(R, ...): what each rank has. Not differentiable."""
        return ops.gather(part.contiguous(), len(self.sizes), self.name)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks, in their order: the same bits on all of them. Not differentiable."""
        return self.gather_parts(part).sum(0)


def columns(index: Tensor, first: int, classes: int) -> tuple[Tensor, Tensor]:
    """Classes as columns of so many that begin with `first`, -1 for others, and which ones are among them."""
    here = (index >= first) & (index < first + classes)
    return torch.where(here, index - first, -1), here


# Not the groups themselves: one that outlives destroy_process_group takes the process down with it at its end.
_groups: dict[str, weakref.ref[Any]] = {}


def _name(group: Any) -> str:
    """The name of a group, which it shares with no group that was destroyed, as torch.distributed's names are."""
    number = 1
    while True:
        name = group.group_name if number == 1 else f"{group.group_name}#{number}"
        if _groups.setdefault(name, weakref.ref(group))() is group:
            return str(name)
        number += 1


def group_named(name: str) -> Any:
    group = _groups[name]() if name in _groups else None
    if group is None:
        raise ValueError(f"group {name!r} is a process group that was destroyed")
    return group


def gather(part: Tensor, ranks: int, group: str) -> Tensor:
    parts = part.new_empty((ranks, *part.shape))
    dist.all_gather(list(parts.unbind()), part, group=group_named(group))
    return parts


def sum_over_ranks(part: Tensor, group: str) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, group=group_named(group))
    return total


ops.register_for_every_device(gather=gather, sum_over_ranks=sum_over_ranks)


def sum_in_place(x: Tensor, group: str) -> Any:
    """Over the ranks; what to wait for."""
    return dist.all_reduce(x, group=group_named(group), async_op=True)


def row_parts(sequence_parallel: object, group: Any) -> int:
    """Over how many ranks the rows of the hidden states are divided."""
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel must be a bool, got {sequence_parallel!r}")
    if not sequence_parallel:
        return 1
    if group is None:
        raise ValueError("sequence_parallel=True is for the ranks of a group, but group is None")
    if not isinstance(group, VocabularyShards):
        parallel.check_group(group)
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


def local_rows(target: Any) -> Tensor:
    """The target, which every rank must have whole."""
    if not is_dtensor(target):
        return target
    if not all(placement.is_replicate() for placement in target.placements):
        raise ValueError(f"target is a DTensor with placements {tuple(target.placements)}; it must be replicated")
    return target.to_local()


def local_projection(
    hidden: Any, weight: Any, bias: Any, group: Any, sequence_parallel: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Of DTensors, what this rank has, with the group that they say. Others pass through."""
    if not any(map(is_dtensor, (hidden, weight, bias))):
        return hidden, weight, bias, group, sequence_parallel
    if not is_dtensor(weight) or not is_dtensor(hidden) or (bias is not None and not is_dtensor(bias)):
        kinds = ", ".join(
            f"{name} a {type(x).__name__}"
            for name, x in (("input", hidden), ("linear_weight", weight), ("linear_bias", bias))
        )
        raise ValueError(
            f"input, linear_weight and linear_bias must all be DTensors or all be tensors of this rank, got {kinds}. "
            "A weight that FSDP has sharded is whole within the forward of its unit alone: use a Linear* module of "
            "fusedloss.nn there, or one whose layer is a unit itself. A weight that is sharded on the classes goes "
            "with an input that is replicated on the same mesh, or pass to_local() of both and group="
        )
    if group is not None:
        raise ValueError(f"group is for tensors of this rank, and DTensors name their own, got {group!r}")
    mesh = weight.device_mesh
    if hidden.device_mesh != mesh or (bias is not None and bias.device_mesh != mesh):
        raise ValueError("input, linear_weight and linear_bias must be DTensors on the same mesh")
    placements = hidden.placements
    weight, shards = local_part("linear_weight", weight, 0)
    if bias is not None:
        bias, bias_shards = local_part("linear_bias", bias, 0)
        if bias_shards != shards:
            raise ValueError("linear_bias must be placed as linear_weight is")
    by_rows = [placement.is_shard(0) for placement in placements]
    if shards is not None and any(by_rows):
        if mesh.get_group(by_rows.index(True)).group_name != shards.name:
            raise ValueError("input is sharded over another dimension of the mesh than linear_weight")
        sequence_parallel = True
    if not all(p.is_replicate() or rows for p, rows in zip(placements, by_rows, strict=True)) or (
        any(by_rows) and (shards is None or sum(by_rows) > 1 or len(hidden) % len(shards.sizes))
    ):
        raise ValueError(
            f"input is a DTensor with placements {tuple(placements)}; it must be replicated, or sharded evenly on its "
            "first dimension where linear_weight is sharded on the classes"
        )
    return hidden.to_local(grad_placements=placements), weight, bias, shards, sequence_parallel


def shards_of(group: object, input: Tensor | Projection) -> VocabularyShards | None:
    """What a loss was given for `group`, checked against the classes that this rank has."""
    classes = input.shape[-1]
    if group is None:
        return None
    transforms.refuse("group")
    if not isinstance(group, VocabularyShards):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a process group has the ranks tell each other their classes, which torch.compile cannot do; make "
                "fusedloss.VocabularyShards.gather(group, classes) beforehand, and pass it as group"
            )
        return VocabularyShards.gather(group, classes, input.device)
    if classes != group.sizes[group.rank]:
        raise ValueError(
            f"group says that rank {group.rank} has a part of {group.sizes} classes, but input has {classes}"
        )
    return group


def check_ranks(
    shards: VocabularyShards,
    name: str,
    input: Tensor | Projection,
    target: Tensor,
    params: Sequence[object],
    options: Mapping[str, Any],
) -> None:
    """Raises ValueError on every rank where they disagree, if FUSEDLOSS_CHECK_RANKS asks for it: the host waits."""
    asked = os.environ.get("FUSEDLOSS_CHECK_RANKS") or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"FUSEDLOSS_CHECK_RANKS must be 0 or 1, got {asked!r}")
    if asked == "0" or torch.compiler.is_compiling():
        return

    def told(value: object) -> object:
        return (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else value

    same: dict[str, object] = {
        "the loss": name,
        "the shape of the targets": tuple(target.shape),
        "the dtype of the logits": input.dtype,
        "whether there are gradients": torch.is_grad_enabled(),
        "the parameters of the loss": tuple(map(told, params)),
    }
    own = ("group", "inplace_backward", "impl", "return_stats")
    same |= {option: told(value) for option, value in options.items() if option not in own}
    same["the checksum of the targets"] = zlib.crc32(target.cpu().contiguous().numpy().tobytes())
    parallel.meet(group_named(shards.name), shards.sizes[shards.rank], input.device, same)


def form_for(shards: VocabularyShards, projection: Projection) -> Form:
    form = projection.form._replace(group=shards.name)
    if form.row_parts == 1:
        return form
    most, hidden = max(shards.sizes), projection.hidden
    row = most * hidden.element_size() * (2 if form.softcap else 1)
    # The ranks must agree on the chunks, and no rank knows whether the weight of another is frozen.
    budget = form.budget or chunking.default_budget(
        hidden.device, hidden.dtype, projection.shape[:-1].numel() * row, most * hidden.shape[-1], gradient=True
    )
    return form._replace(most_rows=max(1, budget // row))


def rows_here(
    shards: VocabularyShards, target: Tensor, weight: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the passes get on this rank."""
    column, here = shards.here(target)
    column = torch.where(here, column, 0).masked_fill(target == IGNORED, IGNORED)
    if candidates is not None:
        candidates = shards.here(candidates)[0].clamp(min=0)
    return column, shards.weight(weight), candidates


def differentiated_once(*gradients: Tensor | None) -> None:
    """Raises in a backward that is itself to be differentiated."""
    transforms.refuse("a process group", *gradients)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a vocabulary-parallel loss is differentiated once: its second derivative would need the logits of all "
            "ranks; compute create_graph=True on one rank's logits"
        )


def nothing_here(logits: Tensor, target: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """Statistics and indices of rows without a class."""
    statistics, index = ops.new_statistics(logits, target, picks)
    statistics.zero_()
    statistics[ops.MAX] = -torch.inf
    statistics[ops.STATISTICS :] = -torch.inf
    return statistics, index.fill_(-1)


def merge(
    shards: VocabularyShards,
    statistics: Tensor,
    index: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    picks: Picks,
    top_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics and pick indices of whole rows from those of this rank's classes. One collective.

    `picks` and what precedes it are of all ranks; `statistics` and `index` may have fewer of the largest logits where
    this rank has fewer classes. `top_q`: 1 - p of the top class, by the classes here and then by all.
    """
    own = shards.own.start
    top_k = picks.top_k
    has = min(top_k, shards.sizes[shards.rank])
    here = shards.here(target)[1]
    integer = torch.int64 if statistics.dtype == torch.float64 else torch.int32
    split = (5, top_k, top_k, index.shape[0] - has, int(top_q is not None))
    parts = statistics.new_zeros((sum(split), statistics.shape[1]))
    parts[0] = statistics[ops.MAX].masked_fill(statistics[ops.SUM_EXP] == 0, -torch.inf)  # no finite logit here
    parts[1] = statistics[ops.SUM_EXP]
    parts[2] = statistics[ops.SUM_EXP] * torch.where(here, statistics[ops.Q], 1)
    parts[3] = statistics[ops.TARGET_LOGIT].masked_fill(~here, -torch.inf)
    if picks.mean:
        parts[4] = statistics[ops.MEAN_CE] * shards.sizes[shards.rank]
    _, top, top_index, candidate, but_top = parts.split(split)
    top.fill_(-torch.inf)[:has] = statistics[ops.STATISTICS :][:has]
    numbers = torch.full_like(top_index, -1, dtype=integer)
    numbers[:has] = torch.where(index[:has] < 0, -1, index[:has] + own)
    top_index.copy_(numbers.view(statistics.dtype))
    if candidates is not None:
        candidate.copy_(statistics[ops.STATISTICS :][has:].masked_fill(~shards.here(candidates.t())[1], -torch.inf))
    if top_q is not None:
        but_top.copy_(statistics[ops.SUM_EXP] * top_q)

    fixed, top, top_index, candidate, but_top = shards.gather_parts(parts).split(split, 1)
    m, sums, rest, target_logits, mean = fixed.unbind(1)
    ignored = target == IGNORED
    largest = m.amax(0)
    shift = torch.where(largest.isneginf(), 0, largest)
    target_logit = target_logits.amax(0)
    ce, q, total = of_target(shift, (rest * (m - shift).exp()).sum(0), target_logit)
    log_sum = total.log()
    mean_ce = torch.zeros_like(ce)
    if picks.mean:
        # Each term is positive: nothing cancels.
        lag = (shift - m) + (log_sum - sums.log())
        weights = [None] * len(shards.sizes) if weight is None else weight.split(list(shards.sizes))
        for rank, (size, w) in enumerate(zip(shards.sizes, weights, strict=True)):
            if size:
                part = mean[rank] + (size if w is None else w.sum()) * lag[rank]
                mean_ce = mean_ce + torch.where(m[rank].isneginf(), torch.inf, part)
        mean_ce = mean_ce / shards.classes
    outside = ~ignored & ((target < 0) | (target >= shards.classes))  # on a GPU; elsewhere it has raised
    if candidates is not None:
        outside |= ~ignored & ((candidates < 0) | (candidates >= shards.classes)).any(-1)
    ce, total = ce.masked_fill(outside, torch.nan), total.masked_fill(outside, torch.nan)

    numbers = top_index.contiguous().view(integer)
    chosen, chosen_index = _largest(top, numbers, top_k)
    columns, numbers_of = [shift, total, q, ce, target_logit, mean_ce, *chosen], [*chosen_index]
    if candidates is not None:
        columns.extend(candidate.amax(0))
        numbers_of.extend(candidates.t())
    if top_q is not None:
        others = torch.where(numbers[:, 0] == chosen_index[0], but_top[:, 0], sums) * (m - shift).exp()
        top_q = torch.where(total == 0, 1, others.sum(0) / total)
    merged = torch.stack(columns).masked_fill(ignored, 0)
    return merged, torch.stack(numbers_of) if numbers_of else target.new_empty((0, len(target))), top_q


def _largest(logit: Tensor, index: Tensor, top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """The `top_k` largest (R, K, N), of equal ones the lowest index, which comes first."""
    logit, index = logit.flatten(0, 1), index.flatten(0, 1).to(torch.int64)
    order = logit.sort(dim=0, descending=True, stable=True).indices
    # A rank of fewer classes has holes, which are less than the least.
    order = order.gather(0, (index.gather(0, order) < 0).to(torch.int8).sort(dim=0, stable=True).indices)[:top_k]
    return list(logit.gather(0, order)), list(index.gather(0, order))
