"""The most likely classes of rows, a chunk of logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import PRODUCT_IMPLS
from ..definition.projection import Projection, dense_logits
from ..definition.rows import Rows
from ..definition.statistics import CE, MAX, SUM_EXP, Picks
from . import budgets, functions
from .options import CallOptions
from .prepare import prepare

if TYPE_CHECKING:
    from typing_extensions import Unpack


def topk_log_probs(projection: Projection, k: int, **options: Unpack[CallOptions]) -> tuple[Tensor, Tensor]:
    """Index and log-probability (*, k) of the largest logits, in their order."""
    shape = projection.shape[:-1]
    target = torch.zeros(shape, dtype=torch.int64, device=projection.device)
    call = prepare("topk_log_probs", projection, target, (), (), None, options)
    rows, spec, shards = call.rows, call.spec, call.shards
    if spec.impl in PRODUCT_IMPLS:
        raise ValueError(f"impl={spec.impl!r} finds the two largest logits at most; take another for k={k}")
    if k > call.classes:
        raise ValueError(f"k must be at most the number of classes, {call.classes}, got {k}")
    row = rows.classes * rows.hidden[0].element_size() * (2 if spec.form.softcap else 1)
    _, size = budgets.chunk_rows(len(rows.target), row, spec.form.budget or budgets.DEFAULT_BUDGET) if row else (1, 1)
    indices, values = [], []
    made = spec.form._replace(tempered=False)
    for begin in range(0, max(1, len(rows.target)), max(1, size)):
        part = slice(begin, begin + size)
        logits = dense_logits([h[part] for h in rows.hidden], rows.weight, rows.bias, made, None)
        if shards is None:
            logit, index = logits.topk(k, -1)
        else:
            own = min(k, logits.shape[-1])
            logit = logits.new_full((len(logits), k), -torch.inf)
            index = torch.full_like(logit, -1, dtype=torch.int64)
            logit[:, :own], index[:, :own] = logits.topk(own, -1)
            index = torch.where(index < 0, -1, index + shards.own.start)
            logit, index = (x.movedim(0, -2).flatten(-2) for x in map(shards.gather_parts, (logit, index)))
            logit, order = logit.topk(k, -1)
            index = index.gather(-1, order)
        top = Rows.of(logits, index[:, 0].contiguous(), scalars=rows.scalars)
        statistics, *_ = functions.merged_statistics(top, spec, Picks(), shards)
        lag = logit.to(statistics.dtype)
        if spec.form.tempered:
            assert rows.scalars is not None
            lag = lag * rows.scalars[-1]
        log_prob = lag - statistics[MAX][:, None] - statistics[SUM_EXP].log()[:, None]
        log_prob[:, 0] = -statistics[CE]
        indices.append(index)
        values.append(log_prob)
    return torch.cat(indices).view(*shape, k), torch.cat(values).view(*shape, k)
