"""The most likely classes of rows, a chunk of logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import PRODUCT_IMPLS
from ..checks import compute_dtype
from ..definition import reference
from ..definition.projection import Projection, dense_logits
from ..definition.rows import Rows
from ..definition.statistics import CE, MAX, SUM_EXP, Picks
from ..distributed import vocabulary
from ..distributed.vocabulary import VocabularyShards
from . import budgets, functions
from .options import CallOptions
from .prepare import prepare

if TYPE_CHECKING:
    from typing_extensions import Unpack


def topk_log_probs(projection: Projection, k: int, **options: Unpack[CallOptions]) -> tuple[Tensor, Tensor]:
    """Index and log-probability (*, k) of the largest logits, in their order."""
    if projection.form.row_parts > 1:
        raise ValueError("the most likely classes are of hidden states that every rank has whole; gather the rows")
    shape = projection.shape[:-1]
    target = torch.zeros(shape, dtype=torch.int64, device=projection.device)
    call = prepare("topk_log_probs", projection, target, (), (), None, options, more={"k": k})
    rows, spec, shards = call.rows, call.spec, call.shards
    if spec.impl in PRODUCT_IMPLS:
        raise ValueError(f"impl={spec.impl!r} finds the two largest logits at most; take another for k={k}")
    if k > call.classes:
        raise ValueError(f"k must be at most the number of classes, {call.classes}, got {k}")
    # The ranks must agree on the chunks.
    most = rows.classes if shards is None else max(shards.sizes)
    row = most * rows.hidden[0].element_size() * (2 if spec.form.softcap else 1)
    _, size = budgets.chunk_rows(len(rows.target), row, spec.form.budget or budgets.DEFAULT_BUDGET)
    indices, values = [], []
    for hidden in zip(*[h.split(max(1, size)) for h in rows.hidden], strict=True):
        logits = dense_logits(hidden, rows.weight, rows.bias, spec.form, None)
        logit, index = logits.topk(k, -1) if shards is None else _of_all_ranks(logits, k, shards)
        lag = reference.tempered(logit.to(compute_dtype(logits.dtype)), rows, spec.form)
        if spec.impl == "reference":
            lse = reference.tempered(logits.to(lag.dtype), rows, spec.form).logsumexp(-1, keepdim=True)
            log_prob = lag - lse
        else:
            top = Rows.of(logits, index[:, 0].contiguous(), scalars=rows.scalars)
            statistics, *_ = functions.merged_statistics(top, spec, Picks(), shards)
            log_prob = lag - statistics[MAX][:, None] - statistics[SUM_EXP].log()[:, None]
            log_prob[:, 0] = (0 - statistics[CE]).masked_fill(statistics[SUM_EXP] == 0, torch.nan)
        indices.append(index)
        values.append(log_prob)
    return torch.cat(indices).view(*shape, k), torch.cat(values).view(*shape, k)


def _of_all_ranks(logits: Tensor, k: int, shards: VocabularyShards) -> tuple[Tensor, Tensor]:
    """The largest logits (N, k) and their classes, of those that the ranks have."""
    own, start = min(k, logits.shape[-1]), shards.own.start
    logit = logits.new_full((k, len(logits)), -torch.inf)
    index = logits.new_full((k, len(logits)), -1, dtype=torch.int64)
    found = logits.topk(own, -1)
    logit[:own], index[:own] = found.values.t(), found.indices.t() + start
    columns = vocabulary.largest_of(shards.gather_parts(logit), shards.gather_parts(index), k)
    values, indices = (torch.stack(x, 1) for x in columns)
    return values, indices
