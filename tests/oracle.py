"""What results are held against: the losses as their papers give them, and how far from them a result may be.

Dense PyTorch, meant for float64, differentiable by autograd; and the same in 250 digits with mpmath for the rows where
float64 is not enough. Nothing here comes from the package.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import torch
from torch import Tensor

# --- the formulas, of one probability or a tensor of them ---


def _focal(p: Any, log_p: Any, gamma: Any) -> Any:
    return -((1 - p) ** gamma) * log_p


def _tversky(p: Any, y: Any, alpha: Any, beta: Any, smooth: float) -> Any:
    return 1 - (p * y + smooth) / (p * y + alpha * p * (1 - y) + beta * (1 - p) * y + smooth)


def _dice(u: Any, y: Any, smooth: float, squared: bool) -> Any:
    return 1 - (2 * u * y + smooth) / ((u * u if squared else u) + y + smooth)


# --- the losses of logits z (N, V) with targets t (N,): one for each row (N,), or one for each class (N, V) ---


def log_probabilities(z: Tensor) -> Tensor:
    # p = 1 whatever the logit of a single class: nothing to differentiate, least of all (1 - p)^gamma at 0
    return (z.detach() if z.shape[-1] == 1 else z).log_softmax(-1)


def at(values: Tensor, index: Tensor) -> Tensor:
    """values[i, index[i]]"""
    return values.gather(-1, index[:, None])[:, 0]


def largest(z: Tensor, k: int) -> Tensor:
    """(N, k) classes of the largest logits, the lower one first on ties."""
    return torch.sort(z.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    return -at(log_probabilities(z), t)


def focal(z: Tensor, t: Tensor, gamma: float | Tensor = 2.0) -> Tensor:
    log_p = at(log_probabilities(z), t)
    return _focal(log_p.exp(), log_p, gamma)


def mixed_cross_entropy(
    z: Tensor, t: Tensor, alpha: float | Tensor, top_k: int = 1, candidates: Tensor | None = None
) -> Tensor:
    log_p = log_probabilities(z)
    predicted = largest(z, top_k) if candidates is None else candidates
    return -((1 - alpha) * at(log_p, t) + alpha * log_p.gather(-1, predicted).mean(-1))


def dsc(z: Tensor, t: Tensor, **own: Any) -> Tensor:
    return dsc_of_probabilities(log_probabilities(z).exp(), t, **own)


def dsc_of_probabilities(p, t, alpha=0.01, smooth=1.0, squared=True, form="one_vs_rest", detach_weight=False) -> Tensor:
    if isinstance(alpha, Tensor) and alpha.dim():
        alpha = alpha[:, None]
    factor = (1 - p) ** alpha
    u = (factor.detach() if detach_weight else factor) * p
    if form == "target":
        return _dice(at(u, t), 1.0, smooth, squared)
    return _dice(u, torch.nn.functional.one_hot(t, p.shape[-1]), smooth, squared)


def tversky(z: Tensor, t: Tensor, **own: Any) -> Tensor:
    return tversky_of_probabilities(log_probabilities(z).exp(), t, **own)


def tversky_of_probabilities(p, t, alpha=0.6, beta=None, smooth=1.0, form="one_vs_rest") -> Tensor:
    beta = 1 - alpha if beta is None else beta
    if form == "target":
        return _tversky(at(p, t), 1.0, 0.0, beta, smooth)
    alpha, beta = (x[:, None] if isinstance(x, Tensor) and x.dim() else x for x in (alpha, beta))
    return _tversky(p, torch.nn.functional.one_hot(t, p.shape[-1]), alpha, beta, smooth)


def cancelling(of_probabilities: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of dL/dz_j = p_j (g_j - sum_k p_k g_k), the size of what cancels there, g = dL/dp."""

    def terms(z: Tensor, t: Tensor, own: dict[str, Any]) -> Tensor:
        p = log_probabilities(z).exp().requires_grad_()
        (g,) = torch.autograd.grad(of_probabilities(p, t, **own).sum(), p)
        with torch.no_grad():
            return p * (g.abs() + (p * g.abs()).sum(-1, keepdim=True))

    return terms


dsc_terms = cancelling(dsc_of_probabilities)
tversky_terms = cancelling(tversky_of_probabilities)


# --- the losses of sums over rows: one for each class (V,), or one number ---


def dsc_over_rows(p, t, level, row_weight=None, alpha=0.01, smooth=1.0, squared=True, detach_weight=False) -> Tensor:
    """Of the probabilities of rows (N, V)."""
    y = torch.nn.functional.one_hot(t, p.shape[-1]).to(p.dtype)
    factor = (1 - p) ** (alpha[:, None] if isinstance(alpha, Tensor) and alpha.dim() else alpha)
    u = (factor.detach() if detach_weight else factor) * p
    both, sizes = _level_sums(level, row_weight, u * y, (u * u if squared else u) + y)
    return 1 - (2 * both + smooth) / (sizes + smooth)


def tversky_over_rows(p, t, level, row_weight=None, alpha=0.6, beta=None, smooth=1.0) -> Tensor:
    y = torch.nn.functional.one_hot(t, p.shape[-1]).to(p.dtype)
    beta = 1 - alpha if beta is None else beta
    alpha, beta = (x[:, None] if isinstance(x, Tensor) and x.dim() else x for x in (alpha, beta))
    true, errors = _level_sums(level, row_weight, p * y, alpha * p * (1 - y) + beta * (1 - p) * y)
    return 1 - (true + smooth) / (true + errors + smooth)


def level_loss(
    over_rows, z, target, *, level, ignore_index=-100, weight=None, token_weight=None, reduction="mean", **own
) -> Tensor:
    """The loss of logits (N, V) at a level above the rows; `over_rows` is one of the two functions above."""
    kept = target.ne(ignore_index).nonzero()[:, 0]
    own = {k: v[kept] if isinstance(v, Tensor) and v.dim() else v for k, v in own.items()}
    row_weight = None if token_weight is None else token_weight[kept]
    p = log_probabilities(z[kept]).exp()
    losses = over_rows(p, target[kept].long(), level, row_weight, **own) + 0 * z[kept].sum()  # attached, whatever p is
    if weight is not None:
        losses = losses * weight
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _level_sums(level: str, row_weight: Tensor | None, *terms: Tensor) -> list[Tensor]:
    weighted = [x if row_weight is None else x * row_weight[:, None] for x in terms]
    return [x.sum(0) if level == "class" else x.sum() for x in weighted]


def dual_focal(z: Tensor, t: Tensor, gamma: float) -> Tensor:
    log_p = log_probabilities(z)
    p = log_p.exp()
    lower = torch.where(z < at(z, t)[:, None], p, 0)
    below = at(lower, largest(lower, 1)[:, 0])
    return -((1 - at(p, t) + below) ** gamma) * at(log_p, t)


#: Divergences from a teacher's row, with the shares of the mixtures.
BETAS = {"forward_kl": None, "reverse_kl": None, "tv": None, "jsd": 0.3, "skew_kl": 0.1, "skew_reverse_kl": 0.2}


def divergence(log_y: Tensor, log_p: Tensor, name: str = "forward_kl", beta: Any = None) -> Tensor:
    """(N,) of the log-probabilities (N, K) of a teacher and a student, which may be those of some classes alone."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a, b = log_a.exp(), log_b.exp()
        return (torch.where(a == 0, 0, a * (log_a - log_b)) - a + b).sum(-1)

    if name == "forward_kl":
        return kl(log_y, log_p)
    if name == "reverse_kl":
        return kl(log_p, log_y)
    if name == "tv":
        return (log_p.exp() - log_y.exp()).abs().sum(-1) / 2
    share = 1 - beta if name == "skew_reverse_kl" else beta
    log_m = (share * log_y.exp() + (1 - share) * log_p.exp()).log()
    if name == "jsd":
        return beta * kl(log_y, log_m) + (1 - beta) * kl(log_p, log_m)
    return kl(log_y if name == "skew_kl" else log_p, log_m)


def supervised_contrastive(x, y, temperature, positives="out", normalize=True, contrast=None, **pairs) -> Tensor:
    """(N,) from the whole matrix of similarities, an anchor at a time; `pairs` are those of `positive_pairs`."""
    positive, itself = positive_pairs(x, y, contrast, **pairs)
    others = x if contrast is None else contrast
    if normalize:
        x, others = (v / v.square().sum(1, keepdim=True).sqrt() for v in (x, others))
    rows = []
    for row, same, own in zip(x @ others.t() / temperature, positive, itself, strict=True):
        keep = ~own
        if not same.any():
            rows.append(row.sum() * 0 if len(row) else row.sum())
        elif positives == "out":
            rows.append((row[keep].logsumexp(0) - row[same]).mean())
        else:
            rows.append(row[keep].logsumexp(0) - row[same].logsumexp(0) + same.sum().to(row.dtype).log())
    return torch.stack(rows) if rows else x.sum(1)


def positive_pairs(
    x, y, contrast=None, contrast_labels=None, self_index=None, contrast_includes_batch=False, positive_mask=None
) -> tuple[Tensor, Tensor]:
    """Which of the others are an anchor's positives, and which is the anchor itself, (N, M) each."""
    labels, others = (y, x) if contrast is None else (contrast_labels, contrast)
    positive = torch.zeros(len(x), len(others), dtype=torch.bool)
    itself = torch.zeros_like(positive)
    for i in range(len(x)):
        own = i if contrast is None or contrast_includes_batch else -1 if self_index is None else int(self_index[i])
        for j in range(len(others)):
            itself[i, j] = j == own
            same = labels[j] == y[i] if positive_mask is None else positive_mask[i, j]
            positive[i, j] = bool(same) and j != own
    return positive, itself


# --- what all the losses share ---


def smoothing_coefficients(label_smoothing: float, smoothing_over: str, classes: int) -> tuple[float, float]:
    """Of the loss, and of -log p_j of every class."""
    if smoothing_over == "all":
        return 1 - label_smoothing, label_smoothing / classes
    if classes == 1:
        return 1.0, 0.0  # no others
    share = label_smoothing / (classes - 1)
    return 1 - label_smoothing - share, share  # the target is among the V that get a share


def row_losses(base, z, t, *, weight=None, label_smoothing=0.0, smoothing_over="all", z_loss=0.0, **own) -> Tensor:
    classes = z.shape[-1]
    w = torch.ones_like(z[0]) if weight is None else weight
    main, share = smoothing_coefficients(label_smoothing, smoothing_over, classes)
    losses = base(z, t, **own)
    losses = main * ((losses * w).sum(-1) if losses.dim() == 2 else losses * w[t])
    if label_smoothing:
        losses = losses - share * (log_probabilities(z) * w).sum(-1)
    if z_loss:
        losses = losses + w[t] * z_loss * z.logsumexp(-1) ** 2
    return losses


def loss(
    base,
    z,
    target,
    *,
    ignore_index=-100,
    reduction="mean",
    normalizer=None,
    weighted_mean=False,
    weight=None,
    **options,
) -> Tensor:
    """The loss of logits (*, V); `base` is one of the functions above, `options` its own and those of row_losses."""
    flat = target.reshape(-1).long()
    kept = flat.ne(ignore_index).nonzero()[:, 0]
    losses = z.new_zeros(flat.shape)
    if kept.numel():
        for name, value in options.items():
            if isinstance(value, Tensor) and value.dim():
                rows = value.reshape(-1) if value.is_floating_point() else value.reshape(flat.numel(), -1)
                options[name] = rows[kept]
        matrix = z.reshape(-1, z.shape[-1])
        losses = losses.index_put((kept,), row_losses(base, matrix[kept], flat[kept], weight=weight, **options))
    if reduction == "none":
        return losses.reshape(target.shape)
    if reduction == "mean":
        count = weight[flat[kept]].sum() if weighted_mean and weight is not None else max(kept.numel(), 1)
        return losses.sum() / (count if normalizer is None else normalizer)
    return losses.sum()


# --- 250 digits ---

# Each takes the probabilities of a row, those held constant where a factor is detached, and the target.


def _exact_mixed_cross_entropy(p, fixed, t, alpha, top_k=1):
    top = sorted(range(len(p)), key=lambda j: -fixed[j])[:top_k]
    return -(1 - alpha) * mpmath.log(p[t]) - alpha / top_k * sum(mpmath.log(p[j]) for j in top)


def _exact_dsc(p, fixed, t, alpha=0.01, smooth=1.0, squared=True, form="one_vs_rest", detach_weight=False):
    factors = [(1 - x) ** alpha for x in (fixed if detach_weight else p)]
    classes = [t] if form == "target" else range(len(p))
    return sum(_dice(factors[j] * p[j], int(j == t), smooth, squared) for j in classes)


def _exact_tversky(p, fixed, t, alpha=0.6, beta=None, smooth=1.0, form="one_vs_rest"):
    beta = 1 - alpha if beta is None else beta
    classes = [t] if form == "target" else range(len(p))
    return sum(_tversky(p[j], int(j == t), alpha, beta, smooth) for j in classes)


_EXACT: dict[Callable[..., Tensor], Callable[..., Any]] = {
    cross_entropy: lambda p, fixed, t: -mpmath.log(p[t]),
    focal: lambda p, fixed, t, gamma=2.0: _focal(p[t], mpmath.log(p[t]), gamma),
    mixed_cross_entropy: _exact_mixed_cross_entropy,
    dsc: _exact_dsc,
    tversky: _exact_tversky,
}


def exact(base: Callable[..., Tensor], z: Tensor, target: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
    """Losses (N,) and their gradient (N, V), rounded to float64 once at the end."""
    losses, gradients = [], []
    with mpmath.workdps(250):
        step = mpmath.mpf(10) ** -80
        parameters = {k: v if isinstance(v, (bool, int, str)) else mpmath.mpf(v) for k, v in own.items()}
        for row, t in zip(z.double().tolist(), target.tolist(), strict=True):
            exps = [mpmath.exp(x) for x in row]
            fixed = [e / sum(exps) for e in exps]

            def value(j: int, delta: Any, exps=exps, fixed=fixed, t=t) -> Any:
                moved = [e * mpmath.exp(delta) if k == j else e for k, e in enumerate(exps)]
                total = sum(moved)
                return _EXACT[base]([e / total for e in moved], fixed, t, **parameters)

            losses.append(float(value(0, 0)))
            gradients.append([float((value(j, step) - value(j, -step)) / (2 * step)) for j in range(len(row))])
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def exact_moments(z: Tensor, factor: float = 1.0) -> Tensor:
    """Entropy, excess and power (3, N) of softmax(factor z), rounded to float64 once at the end."""
    rows = []
    with mpmath.workdps(250):
        for row in z.double().tolist():
            lags = [mpmath.mpf(factor) * (x - mpmath.mpf(max(row))) for x in row if x != -mpmath.inf]
            exps = [mpmath.exp(x) for x in lags]
            p = [e / sum(exps) for e in exps]
            moments = -sum(x * mpmath.log(x) for x in p), sum(map(mpmath.fmul, p, lags)), sum(x * x for x in p)
            rows.append([float(x) for x in moments])
    return torch.tensor(rows, dtype=torch.float64).t()


# --- how far ---


def assert_as_accurate_as(
    result: Tensor, reference: Tensor, truth: Tensor, ulps: float, scale: Tensor | None = None
) -> None:
    """The error of `result` against `truth` may be twice that of `reference`, plus a few ulps of the result's dtype.

    `reference` is the same formula in eager PyTorch, `truth` in float64. Element by element: an ulp is one of |truth|,
    or of `scale` where terms of that size cancel. Infinities and NaN must be where the truth has them.
    """
    assert truth.dtype == torch.float64
    assert result.shape == reference.shape == truth.shape
    info = torch.finfo(result.dtype)
    compute = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32)
    # numbers below these are subnormal, and in the compute dtype may be flushed to zero
    smallest = max(info.tiny * info.eps, 4 * compute.tiny)
    scale = truth.abs() if scale is None else scale
    allowed = 2 * (reference.double() - truth).abs() + ulps * (info.eps * scale + smallest)
    error = (result.double() - truth).abs()
    same = (result.double() == truth) | (result.isnan() & truth.isnan())
    bad = ~(same | (error <= allowed))
    if bad.any():
        worst = torch.where(bad, error / allowed, 0).nan_to_num(torch.inf).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, bad.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are off, the worst at {at}: {float(result[at]):.9g}, but "
            f"the truth is {float(truth[at]):.9g} and {float(allowed[at]):.3g} is allowed "
            f"(eager PyTorch gives {float(reference[at]):.9g})"
        )


def assert_same_gradients(got: Tensor, expected: Tensor, leaves: Any, upstream: Any = None, **tolerance: float) -> None:
    """And the same values."""
    torch.testing.assert_close(got, expected, **tolerance)
    right = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, upstream), right, **tolerance)


def assert_rows_as_accurate_as(got: Tensor, theirs: Tensor, true: Tensor, ulps: float = 4) -> None:
    """Each row of a half-precision gradient (N, D), or (N,), errs at most twice as much as theirs, and a few ulps."""
    assert theirs.dtype in (torch.float16, torch.bfloat16) and theirs.isfinite().all()
    info = torch.finfo(theirs.dtype)
    got, theirs, true = (x.double().reshape(len(x), -1) for x in (got, theirs, true))
    # The last rounding: of normal numbers, and of the subnormal ones.
    rounding = (true.norm(dim=-1) + info.tiny) * info.eps / 2
    allowed = 2 * (theirs - true).norm(dim=-1) + ulps * rounding
    error = (got - true).norm(dim=-1)
    row = int((error - allowed).argmax())
    assert (error <= allowed).all(), f"row {row} errs by {error[row]} and may by {allowed[row]}"
