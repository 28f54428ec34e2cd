"""The statistics of a row of logits: all that a loss needs to know of it, and their dense PyTorch definition.

Backends write them as ``statistics`` (6 + K, N): max, sum_exp (of exp(z - max)), q, ce, target logit, mean_ce and the
logits of the K picks; ``index`` (K, N) are the picks' classes, -1 for none. K counts the top_k largest, then `below`,
then the candidates. ``coefficients`` (3 + K, N) are what a gradient pass needs:
dL/dz_j = a p_j - u w_j - sum_k b_k [j == index_k], with the gradient at the target given as it is.

The moments, where they are asked for, are three rows more: the entropy H, the excess E = sum_j p_j (z_j - max), and the
power P = sum_j p_j^2. Their gradient, where PyTorch made the coefficients, has two rows more, the slopes c and e of
p_j (c (z_j - max) + e p_j).

Against a second row, three rows come after all these: its largest logit and its sum_exp (of targets 0 and 1), and
sum_j exp((z_j - max) tau) with the temperature tau, of the softmax without it.
"""

# Annotations are evaluated here: help() of a NamedTuple would show a ForwardRef for each that is not.
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import IGNORED

MAX, SUM_EXP, Q, CE, TARGET_LOGIT, MEAN_CE = range(6)
STATISTICS = 6
A, U, TARGET_GRADIENT = range(3)
COEFFICIENTS = 3
ENTROPY, EXCESS, POWER = range(3)
MOMENTS = 3
#: Which of them a pass is asked for: a power alone costs less, and leaves the others as they may be.
POWER_ALONE, ALL_MOMENTS = 1, 2
SLOPES = 2
SECONDS = 3

#: Statistics that are computed on request, and the fields that each gives.
OPTIONAL = {
    "top": ("top_logit", "top_ce", "top_index"),
    "second": ("second_logit", "second_ce", "second_index"),
    "below": ("below_logit", "below_ce", "below_index"),
    "mean": ("mean_logit", "mean_ce"),
    "entropy": ("entropy",),
    "power": ("power",),
}


class RowStats(NamedTuple):
    """The detached statistics of each row that ``return_stats=True`` returns, in the shape of the target.

    Ignored rows are not looked at: their floats are NaN, their argmax is negative and equals no target. ``entropy``
    (in nats) is that of ``stats=("entropy",)``, and None without it.
    """

    lse: Tensor
    target_log_prob: Tensor
    argmax: Tensor
    argmax_log_prob: Tensor
    entropy: Tensor | None = None

    @staticmethod
    def cat(batches: Iterable["RowStats"]) -> "RowStats":
        """Return the statistics of several batches as those of one, with the entropy if all have it.

        Batches whose shapes differ beyond the first dimension, as of texts of other lengths, become rows (N,), and so
        do those of single targets ().
        """
        batches = list(batches)
        if not batches:
            raise ValueError("there must be at least one batch, got none")
        if len({stats.lse.shape[1:] for stats in batches}) > 1 or not all(stats.lse.dim() for stats in batches):
            batches = [RowStats._make([x if x is None else x.flatten() for x in stats]) for stats in batches]
        *columns, entropy = zip(*batches, strict=True)
        known = [x for x in entropy if x is not None]
        whole = [torch.cat(column) for column in columns]
        return RowStats(*whole, torch.cat(known) if len(known) == len(entropy) else None)  # type: ignore[call-arg]


class LogProbs(NamedTuple):
    """The result of :func:`~fusedloss.log_probs` with entropy=True, in the shape of the target; differentiable.

    ``log_prob`` is log p_t of the target t, and ``entropy`` -sum_j p_j log p_j in nats.
    """

    log_prob: Tensor
    entropy: Tensor


class Statistics:
    """The argument of a loss function: differentiable (N,) tensors in float32 (float64 for float64 logits).

    With z the logits of a row, p = softmax(z) and t its target:

    ``ce``            -log p_t, accurate for p_t near 1
    ``q``             1 - p_t, accurate for p_t near 1
    ``lse``           log sum_j exp z_j
    ``target_logit``  z_t
    ``target``        t (int64)

    and on request (``statistics=("top", ...)``):

    ``top_*``         of the largest logit, the lowest index on ties: ``top_logit``, ``top_ce`` (-log of its
                      probability), ``top_index``
    ``second_*``      of the second largest, likewise
    ``below_*``       of the largest logit strictly below z_t; -inf, +inf and -1 where there is none
    ``mean_*``        ``mean_logit`` (1/V) sum_j w_j z_j and ``mean_ce`` (1/V) sum_j w_j (-log p_j), w the class weights
    ``entropy``       -sum_j p_j log p_j in nats, to the digits of the logits however small it is
    ``power``         sum_j p_j^2

    and where ``candidates`` were given, ``candidate_logit`` and ``candidate_ce``, (N, k).
    """

    ce: Tensor
    q: Tensor
    lse: Tensor
    target_logit: Tensor
    target: Tensor
    top_logit: Tensor
    top_ce: Tensor
    top_index: Tensor
    second_logit: Tensor
    second_ce: Tensor
    second_index: Tensor
    below_logit: Tensor
    below_ce: Tensor
    below_index: Tensor
    mean_logit: Tensor
    mean_ce: Tensor
    entropy: Tensor
    power: Tensor
    candidate_logit: Tensor
    candidate_ce: Tensor

    def __init__(self, **fields: Tensor) -> None:
        self._names = tuple(fields)
        for name, value in fields.items():
            setattr(self, name, value)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Statistics":
        """Those in floating point, each as the function makes it of what it is."""
        fields = {name: getattr(self, name) for name in self._names}
        return Statistics(**{name: function(x) if x.is_floating_point() else x for name, x in fields.items()})

    def has(self, name: str) -> bool:
        """Tell whether a statistic of that name is here."""
        return name in self._names

    def only(self, statistics: tuple[str, ...]) -> "Statistics":
        """Without the optional ones that are not named, which may be here for other reasons."""
        hidden = {field for name, fields in OPTIONAL.items() if name not in statistics for field in fields}
        # By names of its own: the compiler of torch 2.11 does not go through __dict__.
        return Statistics(**{name: getattr(self, name) for name in self._names if name not in hidden})

    def __getattr__(self, name: str) -> Tensor:
        for statistic, fields in OPTIONAL.items():
            if name in fields:
                raise AttributeError(f"{name} is computed on request: pass statistics=({statistic!r},)")
        if name.startswith("candidate_"):
            raise AttributeError(f"{name} needs candidates=...")
        raise AttributeError(f"no statistic named {name!r}")

    @property
    def p(self) -> Tensor:
        """p_t, accurate for p_t near 0."""
        return (-self.ce).exp()


class Picks(NamedTuple):
    """What a pass is to find beside the target's statistics: classes, in the order of the picks, and sums."""

    top_k: int = 0
    below: bool = False
    mean: bool = False
    moments: int = 0

    @staticmethod
    def of(statistics: tuple[str, ...]) -> "Picks":
        top_k = 2 if "second" in statistics else 1 if "top" in statistics else 0
        moments = ALL_MOMENTS if "entropy" in statistics else POWER_ALONE if "power" in statistics else 0
        return Picks(top_k, "below" in statistics, "mean" in statistics, moments)

    @property
    def names(self) -> tuple[str, ...]:
        return ("top", "second")[: self.top_k] + (("below",) if self.below else ())


class Columns(NamedTuple):
    """The differentiable columns of statistics that a pass gives: (N,) each, picks (K, N), moments (2 or 0, N)."""

    ce: Tensor
    q: Tensor
    lse: Tensor
    target_logit: Tensor
    mean_ce: Tensor
    pick_logit: Tensor
    pick_ce: Tensor
    moments: Tensor
    """Entropy and power."""


class Targets(NamedTuple):
    """The targets of rows as indices that are safe to use, and the rows that have none."""

    safe: Tensor
    """(N,) within [0, V): the target, or 0 where the row is ignored or invalid."""
    ignored: Tensor
    invalid: Tensor
    """Out of range. On a CPU such a target raises before; on a GPU its row is NaN, because a look would stall."""

    @staticmethod
    def of(target: Tensor, classes: int) -> "Targets":
        ignored = target == IGNORED
        invalid = ((target < 0) | (target >= classes)) & ~ignored
        return Targets(target.masked_fill(ignored | invalid, 0), ignored, invalid)


def assemble(columns: Columns, target: Tensor, index: Tensor, picks: Picks, weight: Tensor | None) -> Statistics:
    """Names the columns as a loss function knows them."""
    fields = {name: getattr(columns, name) for name in ("ce", "q", "lse", "target_logit")}
    fields["target"] = target
    for k, name in enumerate(picks.names):
        fields[f"{name}_logit"] = columns.pick_logit[k]
        fields[f"{name}_ce"] = columns.pick_ce[k]
        fields[f"{name}_index"] = index[k]
    if picks.mean:
        fields["mean_ce"] = columns.mean_ce
        scale = 1 if weight is None else weight.mean()
        fields["mean_logit"] = scale * columns.lse - columns.mean_ce
    if picks.moments:
        entropy, fields["power"] = columns.moments
        if picks.moments == ALL_MOMENTS:
            fields["entropy"] = entropy
    first_candidate = len(picks.names)
    if index.shape[0] > first_candidate:
        fields["candidate_logit"] = columns.pick_logit[first_candidate:].t()
        fields["candidate_ce"] = columns.pick_ce[first_candidate:].t()
    return Statistics(**fields)


def neutral(picks: int, moments: int) -> list[float]:
    """What a pass writes of an ignored row, for a loss function to see nothing that is not finite: two equal logits."""
    log_2 = math.log(2)
    return [0.0, 2.0, 0.5, log_2, 0.0, log_2, *[0.0] * picks, *([log_2, 0.0, 0.5] if moments else [])]


def dense_columns(
    z: Tensor, target: Tensor, weight: Tensor | None, candidates: Tensor | None, picks: Picks
) -> tuple[Columns, Tensor]:
    """The definition: columns and pick indices of logits `z` (N, V) with targets (N,) in [0, V).

    Plain PyTorch, differentiable any number of times, over intermediates of the size of `z`.
    """
    m = z.detach().amax(-1)
    m = torch.where(m.isneginf(), 0, m)
    shifted = z - m[:, None]
    exp = shifted.exp()
    one_hot = torch.zeros_like(z, dtype=torch.bool).scatter(-1, target[:, None], True)
    rest = exp.masked_fill(one_hot, 0).sum(-1)
    target_logit = z.gather(-1, target[:, None])[:, 0]
    ce, q, total = of_target(m, rest, target_logit)
    log_sum = total.log()

    scaled = shifted if weight is None else shifted * weight
    scale = 1 if weight is None else weight.mean()
    mean_ce = scale * log_sum - scaled.mean(-1) if picks.mean else torch.zeros_like(ce)

    index = _pick_indices(z.detach(), target, candidates, picks)
    pick_logit = z.gather(-1, index.t().clamp(min=0)).t()
    pick_logit = torch.where(index < 0, -torch.inf, pick_logit)
    pick_ce = torch.where(index == target, ce, log_sum + (m - pick_logit))
    moments = _moments(z, m, exp) if picks.moments else z.new_empty((0, z.shape[0]))
    return Columns(ce, q, m + log_sum, target_logit, mean_ce, pick_logit, pick_ce, moments), index


def _moments(z: Tensor, m: Tensor, exp: Tensor) -> Tensor:
    """Entropy and power (2, N) from exp(z - m), m the detached maximum."""
    top = z.detach().argmax(-1, keepdim=True)
    rest, largest = exp.scatter(-1, top, 0).sum(-1), exp.gather(-1, top)[:, 0]
    total = rest + largest
    # A class without probability adds nothing; without the top class in it the sum keeps its digits.
    logits = torch.where(z.isneginf(), 0, z - m[:, None])
    log_sum = (rest / largest).log1p() + logits.gather(-1, top)[:, 0]
    power = (exp / total[:, None]).square().sum(-1)
    return torch.stack([log_sum - (exp * logits).sum(-1) / total, power])


def of_target(m: Tensor, rest: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ce, q and sum_j exp(z_j - m), from the maximum and the sum over all but the target; differentiable."""
    mine = (target_logit - m).exp()
    total = rest + mine
    # log(1 + rest/mine) keeps its digits for p_t -> 1; the guards keep the branch not taken free of NaN gradients
    near = rest < mine
    ratio = torch.where(near, rest, 0) / torch.where(near, mine, 1)
    ce = torch.where(near, ratio.log1p(), (m - target_logit) + total.log())
    # For p_t -> 0 it is the gradient of rest / total that would cancel.
    q = torch.where(near, rest / total, 1 - (-ce).exp())
    hopeless = total == 0  # no finite logit at all
    return torch.where(hopeless, torch.inf, ce), torch.where(hopeless, 1, q), total


def _pick_indices(z: Tensor, target: Tensor, candidates: Tensor | None, picks: Picks) -> Tensor:
    """(K, N) int64; of equal logits the lowest index, -1 where there is no such class."""
    columns = []
    if picks.top_k > 0:
        top = z.argmax(-1)
        columns.append(top)
        if picks.top_k > 1:
            second = z.scatter(-1, top[:, None], -torch.inf).argmax(-1)
            # where all the others are -inf too, the hole itself is the first of them
            columns.append(torch.where(second == top, (top == 0).to(top.dtype), second))
    if picks.below:
        logit = z.gather(-1, target[:, None])
        lower = torch.where(z < logit, z, -torch.inf)
        value, below = lower.max(-1)
        columns.append(torch.where(value.isneginf(), -1, below))
    if candidates is not None:
        columns.extend(candidates.t())
    if not columns:
        return target.new_empty((0, target.shape[0]))
    return torch.stack(columns)
