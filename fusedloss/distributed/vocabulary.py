"""Vocabulary-parallel losses: each rank of a process group has the logits of some of the classes.

The statistics of the parts of a row merge exactly. Each rank's pass makes those of its own classes, one collective
brings them together, and every rank goes on with the statistics of whole rows: the loss comes out alike on all of them,
and the gradient pass of a rank needs nothing from the others.

The passes know nothing of this. On a rank that has not got a row's target the statistics pass takes the rank's first
class for it, which is put right around it; the others take -1 for a class that is not here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..checks import IGNORED, check_int, is_dtensor
from ..definition.projection import Projection
from ..definition.rows import Job, Rows, Source, Spec
from ..definition.statistics import (
    MAX,
    MEAN_CE,
    MOMENTS,
    STATISTICS,
    SUM_EXP,
    TARGET_LOGIT,
    Picks,
    Q,
    neutral,
    of_target,
)
from . import batch, collectives


@dataclass(frozen=True)
class VocabularyShards:
    """The number of classes of each rank of a process group, in the order of the ranks, for `group` of the losses.

    With a process group in its place, the ranks exchange these numbers in each call, by a collective that the host
    waits for. ``VocabularyShards.gather(group, classes)`` does this once.

    Args:
        group: the process group; this rank must be in it.
        sizes: classes of each rank, 0 or more.

    Raises:
        TypeError, ValueError: the group or its sizes are not valid.
    """

    name: str
    rank: int
    sizes: tuple[int, ...]

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        batch.check_group(group)
        sizes = tuple(check_int("each of sizes", size, 0) for size in sizes)
        if len(sizes) != group.size() or not any(sizes):
            raise ValueError(f"sizes must be of the {group.size()} ranks of the group, one class at least, got {sizes}")
        object.__setattr__(self, "name", collectives.name_of(group))
        object.__setattr__(self, "rank", group.rank())
        object.__setattr__(self, "sizes", sizes)

    @classmethod
    def gather(cls, group: Any, classes: int, device: torch.device | str = "cpu") -> VocabularyShards:
        """From the number of classes on this rank, told by each. `device`: one on which the group communicates."""
        batch.check_group(group)
        return cls(group, batch.meet(group, classes, torch.device(device), {}).rows)

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
        own = self.own
        here = (index >= own.start) & (index < own.stop)
        return torch.where(here, index - own.start, -1), here

    def weight(self, weight: Tensor | None) -> Tensor | None:
        """Those of this rank's classes."""
        return None if weight is None else weight[self.own].contiguous()

    def gather_parts(self, part: Tensor) -> Tensor:
        """(R, ...): what each rank has. Not differentiable."""
        return collectives.gather(part.contiguous(), len(self.sizes), self.name)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks, in their order: the same bits on all of them. Not differentiable."""
        return self.gather_parts(part).sum(0)


def shards_of(group: object, input: Source) -> VocabularyShards | None:
    """What a loss was given for `group`."""
    if group is None:
        return None
    transforms.refuse("group")
    if not isinstance(group, VocabularyShards):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a process group has the ranks tell each other their classes, which torch.compile cannot do; make "
                "fusedloss.VocabularyShards.gather(group, classes) beforehand, and pass it as group"
            )
        return VocabularyShards.gather(group, input.shape[-1], input.device)
    return group


def check_own(shards: VocabularyShards, input: Source) -> None:
    """Raises ValueError where this rank has another number of classes than the shards say."""
    classes = input.shape[-1]
    if classes != shards.sizes[shards.rank]:
        raise ValueError(
            f"group says that rank {shards.rank} has a part of {shards.sizes} classes, but input has {classes}"
        )


def check_ranks(
    shards: VocabularyShards,
    name: str,
    input: Source,
    target: Tensor,
    params: Sequence[object],
    candidates: Tensor | None,
    more: object,
    options: Mapping[str, Any],
) -> None:
    """Raises ValueError on every rank where they disagree, if FUSEDLOSS_CHECK_RANKS asks for it: the host waits."""
    asked = os.environ.get("FUSEDLOSS_CHECK_RANKS") or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"FUSEDLOSS_CHECK_RANKS must be 0 or 1, got {asked!r}")
    if asked == "0" or torch.compiler.is_compiling():
        return
    hidden, form = (input.hidden, input.form) if isinstance(input, Projection) else ([], None)
    same: dict[str, object] = {
        "the loss": name,
        "the sizes of the shards": shards.sizes,
        "the shape of the targets": tuple(target.shape),
        "the dtype of the logits": input.dtype,
        "how the logits are made": form,
        "whether there are gradients": torch.is_grad_enabled(),
        "whether the hidden states require grad": any(x.requires_grad for x in hidden),
        "the kind of the loss": more,
        "the parameters of the loss": tuple(map(_told, params)),
        "candidates": _told(candidates),
    }
    own = ("group", "inplace_backward", "impl")
    same |= {option: _told(value) for option, value in options.items() if option not in own}
    same["the targets"] = _told(target)
    batch.meet(collectives.group_named(shards.name), shards.sizes[shards.rank], input.device, same)


def _told(value: object) -> object:
    """What ranks compare of an argument: of a tensor its values, or their checksum where there are many."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Tensor):
        return value
    if is_dtensor(value) or value.layout is not torch.strided or value.is_nested:
        return type(value)  # which the loss refuses
    values = value.detach().cpu().resolve_neg().reshape(-1).contiguous()
    told = values.tolist() if len(values) <= 8 else zlib.crc32(values.view(torch.uint8).numpy().tobytes())
    return told, tuple(value.shape), value.dtype, value.requires_grad


def targets_here(shards: VocabularyShards, target: Tensor) -> Tensor:
    """Targets as columns of this rank, -1 for those of others, IGNORED where the row is."""
    return shards.here(target)[0].masked_fill(target == IGNORED, IGNORED)


def rows_here(shards: VocabularyShards, rows: Rows) -> Rows:
    """What a statistics pass gets here, of rows whose targets, class weights and candidates are of all classes."""
    column = targets_here(shards, rows.target)
    column = column.masked_fill(column == -1, 0)
    candidates = rows.candidates
    if candidates is not None:
        candidates = shards.here(candidates)[0].clamp(min=0)
    return rows._replace(target=column, class_weight=shards.weight(rows.class_weight), candidates=candidates)


def differentiated_once(*gradients: Tensor | None) -> None:
    """Raises in a backward that is itself to be differentiated."""
    transforms.refuse("a process group", *gradients)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a vocabulary-parallel loss is differentiated once: its second derivative would need the logits of all "
            "ranks; compute create_graph=True on one rank's logits"
        )


def nothing_here(rows: Rows, picks: Picks) -> tuple[Tensor, Tensor]:
    """Statistics and indices of rows without a class."""
    job = Job.new(rows, Spec("", moments=picks.moments))
    statistics, index = job.statistics, job.index
    statistics.zero_()
    statistics[MAX] = -torch.inf
    statistics[STATISTICS:] = -torch.inf
    return statistics, index.fill_(-1)


def merge(
    shards: VocabularyShards, rows: Rows, statistics: Tensor, index: Tensor, picks: Picks, top_q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics and pick indices of whole rows from those of this rank's classes. One collective.

    `rows` and `picks` are of all ranks; `statistics` and `index` may have fewer of the largest logits where this rank
    has fewer classes. `top_q`: 1 - p of the top class, by the classes here and then by all.
    """
    target, weight, candidates = rows.target, rows.class_weight, rows.candidates
    own = shards.own.start
    top_k = picks.top_k
    has = min(top_k, shards.sizes[shards.rank])
    here = shards.here(target)[1]
    integer = torch.int64 if statistics.dtype == torch.float64 else torch.int32
    after = STATISTICS + index.shape[0]
    split = (5, top_k, top_k, index.shape[0] - has, int(top_q is not None), MOMENTS if picks.moments else 0)
    parts = statistics.new_zeros((sum(split), statistics.shape[1]))
    parts[0] = statistics[MAX].masked_fill(statistics[SUM_EXP] == 0, -torch.inf)  # no finite logit here
    parts[1] = statistics[SUM_EXP]
    parts[2] = statistics[SUM_EXP] * torch.where(here, statistics[Q], 1)
    parts[3] = statistics[TARGET_LOGIT].masked_fill(~here, -torch.inf)
    if picks.mean:
        parts[4] = statistics[MEAN_CE] * shards.sizes[shards.rank]
    _, top, top_index, candidate, but_top, moments = parts.split(split)
    top.fill_(-torch.inf)[:has] = statistics[STATISTICS:][:has]
    # A rank without a finite logit has none of the probability.
    moments.copy_(statistics[after:].masked_fill(statistics[SUM_EXP] == 0, 0))
    numbers = torch.full_like(top_index, -1, dtype=integer)
    numbers[:has] = torch.where(index[:has] < 0, -1, index[:has] + own)
    top_index.copy_(numbers.view(statistics.dtype))
    if candidates is not None:
        candidate.copy_(statistics[STATISTICS + has : after].masked_fill(~shards.here(candidates.t())[1], -torch.inf))
    if top_q is not None:
        but_top.copy_(statistics[SUM_EXP] * top_q)

    fixed, top, top_index, candidate, but_top, moments = shards.gather_parts(parts).split(split, 1)
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
    chosen, chosen_index = largest_of(top, numbers, top_k)
    columns, numbers_of = [shift, total, q, ce, target_logit, mean_ce, *chosen], [*chosen_index]
    if candidates is not None:
        columns.extend(candidate.amax(0))
        numbers_of.extend(candidates.t())
    if top_q is not None:
        others = torch.where(numbers[:, 0] == chosen_index[0], but_top[:, 0], sums) * (m - shift).exp()
        top_q = torch.where(total == 0, 1, others.sum(0) / total)
    if picks.moments:
        columns.extend(_merged_moments(moments, sums, m - shift, outside))
    values = neutral(index.shape[0] - has + top_k, picks.moments)
    merged = torch.stack([x.masked_fill(ignored, value) for x, value in zip(columns, values, strict=True)])
    return merged, torch.stack(numbers_of) if numbers_of else target.new_empty((0, len(target))), top_q


def _merged_moments(moments: Tensor, sums: Tensor, lag: Tensor, outside: Tensor) -> tuple[Tensor, ...]:
    """Entropy, excess and power of whole rows from those of the ranks (R, 3, N), which share out the probability.

    The entropy is that of the shares s, sum_r s_r (-log s_r), plus the mean of the ranks' own. No term cancels.
    """
    entropy, excess, power = moments.unbind(1)
    parts = sums * lag.exp()
    total = parts.sum(0)
    others = torch.stack([torch.cat([parts[:r], parts[r + 1 :]]).sum(0) for r in range(len(parts))])
    share, some = parts / total, parts > 0
    own = torch.where(some, parts, 1)
    information = torch.where(others < own, (others / own).log1p(), total.log() - own.log())
    lag = torch.where(some, lag, 0)
    columns = (
        (share * (information + entropy)).sum(0),
        (share * (excess + lag)).sum(0),
        (share * share * power).sum(0),
    )
    return tuple(column.masked_fill(outside, torch.nan) for column in columns)


def largest_of(logit: Tensor, index: Tensor, top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """The `top_k` largest (R, K, N), of equal ones the lowest index, which comes first."""
    logit, index = logit.flatten(0, 1), index.flatten(0, 1).to(torch.int64)
    order = logit.sort(dim=0, descending=True, stable=True).indices
    # A rank of fewer classes has holes, which are less than the least.
    order = order.gather(0, (index.gather(0, order) < 0).to(torch.int8).sort(dim=0, stable=True).indices)[:top_k]
    return list(logit.gather(0, order)), list(index.gather(0, order))
