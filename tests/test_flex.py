"""Losses of one's own: those of the package written by hand, published ones that it has not, and what they may ask."""

from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, class_weights, logits_and_targets, with_gradient
from torch.nn.functional import one_hot

import fusedloss as fl
from fusedloss.engine import dense

# --- losses as a user writes them ---


def focal(gamma):
    return lambda s: s.q**gamma * s.ce


def dual_focal(gamma):
    """Tao et al. 2023: -(1 - p_t + p_j)^gamma log p_t, p_j the largest probability below p_t."""
    return lambda s: (s.q + (-s.below_ce).exp()) ** gamma * s.ce


def poly_1(epsilon):
    """Leng et al. 2022: -log p_t + epsilon (1 - p_t)."""
    return lambda s: s.ce + epsilon * s.q


def ada_focal(gamma):
    """Ghosh et al. 2022, where gamma is negative: -(1 + p_t)^|gamma| log p_t."""
    return lambda s: (2 - s.q) ** abs(gamma) * s.ce


def mixed(alpha):
    return lambda s: (1 - alpha) * s.ce + alpha * s.candidate_ce.mean(-1)


def dice(smooth):
    def loss(p, q, positive):
        # 1 - (2 p y + smooth) / (p^2 + y + smooth), without what cancels in it
        return torch.where(positive, q * q / (p * p + 1 + smooth), p * p / (p * p + smooth))

    return loss


# --- all that row losses must do ---


def _focal(input, target, *, gamma, **options):
    return fl.flex_loss(input, target, focal(gamma), **options)


def _dual_focal(input, target, *, gamma, **options):
    return fl.flex_loss(input, target, dual_focal(gamma), statistics=("below",), **options)


def _mixed(input, target, *, alpha, candidates, **options):
    return fl.flex_loss(input, target, mixed(alpha), candidates=candidates, **options)


def _mixed_top(input, target, *, alpha, **options):
    def loss(s):
        return (1 - alpha) * s.ce + alpha * s.top_ce

    return fl.flex_loss(input, target, loss, statistics=("top",), **options)


def _dice(input, target, *, alpha, smooth, **options):
    return fl.flex_loss(input, target, dice(smooth), over="classes", **options)


def _at_the_picks(z, t, own):
    candidates = own.get("candidates", torch.empty(len(t), 0, dtype=torch.int64))
    return one_hot(torch.cat([t[:, None], candidates], 1), z.shape[-1]).amax(1)


def _terms_of_dual_focal(z, t, own):
    """dL/dz_j = a p_j - b_t [t] - b_k [k], k the class below: each coefficient a sum of terms of both signs."""
    p = z.softmax(-1)
    classes = z.shape[-1]
    below = torch.where(z < oracle.at(z, t)[:, None], p, 0).max(-1)
    p_t, p_k = oracle.at(p, t), below.values
    base = 1 - p_t + p_k
    power = base ** own["gamma"]
    slope = -own["gamma"] * base ** (own["gamma"] - 1) * p_t.log()
    everywhere = p * (power + slope * p_t)[:, None]
    at_target = one_hot(t, classes) * (power + slope * p_t)[:, None]
    return everywhere + at_target + one_hot(below.indices, classes) * (slope * p_k)[:, None]


PASSES = ("statistics", "backward")


#: For `test_fuzz.py`.
DRAWN = {
    "flex focal": {"gamma": [1.0, 2.0, 5.0]},
    "flex dual focal": {"gamma": [1.0, 2.0, 5.0]},
    "flex mixed": {"alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "picks": [1, 2, 3]},
    "flex dice": {"alpha": [0], "smooth": [0.25, 1.0]},
}


def drawn(name, own):
    return next(case for case in TestRowLoss.CASES if case.name.startswith(name.removeprefix("flex ")))


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        Case("focal by hand", _focal, oracle.focal, {"gamma": 2.0}, PASSES),
        Case(
            "dual focal",
            _dual_focal,
            oracle.dual_focal,
            {"gamma": 5.0},
            PASSES,
            large=True,
            cancelling=_terms_of_dual_focal,
        ),
        Case(
            "mixed by hand",
            _mixed,
            oracle.mixed_cross_entropy,
            lambda n, v, g: {"alpha": 0.25, "candidates": torch.randint(v, (n, 2), generator=g)},
            PASSES,
            cancelling=_at_the_picks,
        ),
        Case(
            "dice over classes",
            _dice,
            oracle.dsc,
            {"alpha": 0, "smooth": 0.5},
            (),
            infinite=False,
            cancelling=oracle.dsc_terms,
        ),
    ]
    CERTAIN: ClassVar = [
        Case("focal by hand", _focal, oracle.focal, {"gamma": 2.0}),
        Case("mixed by hand", _mixed_top, oracle.mixed_cross_entropy, {"alpha": 0.25}),
    ]


# --- values ---


def test_known_values_of_dual_focal(impl, example):
    loss = fl.flex_loss(*example, dual_focal(5), statistics=("below",), reduction="none", impl=impl)
    expected = torch.tensor([0.00620198, 2.69893779, 0.32897415], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=0, atol=5e-9)


CANDIDATES = torch.tensor([[3, 3], [0, 130], [5, 7], [1, 2], [100, 0], [9, 8]])

#: A loss of the package, and the same by hand.
TWINS = {
    "cross-entropy": (lambda z, t, **o: fl.cross_entropy(z, t, **o), lambda s: s.ce, {}),
    "cross-entropy by its parts": (
        lambda z, t, **o: fl.cross_entropy(z, t, **o),
        lambda s: s.lse - s.target_logit,
        {},
    ),
    "label smoothing": (
        lambda z, t, **o: fl.cross_entropy(z, t, label_smoothing=0.1, **o),
        lambda s: 0.9 * s.ce + 0.1 * s.mean_ce,
        {"statistics": ("mean",)},
    ),
    "label smoothing by the mean logit": (
        lambda z, t, **o: fl.cross_entropy(z, t, label_smoothing=0.1, **o),
        lambda s: 0.9 * s.ce + 0.1 * (s.lse - s.mean_logit),
        {"statistics": ("mean",)},
    ),
    "z-loss": (lambda z, t, **o: fl.cross_entropy(z, t, z_loss=0.01, **o), lambda s: s.ce + 0.01 * s.lse**2, {}),
    "focal": (lambda z, t, **o: fl.focal_loss(z, t, gamma=2.5, **o), focal(2.5), {}),
    "mixed, top 1": (
        lambda z, t, **o: fl.mixed_cross_entropy(z, t, alpha=0.25, **o),
        lambda s: 0.75 * s.ce + 0.25 * s.top_ce,
        {"statistics": ("top",)},
    ),
    "mixed, top 2": (
        lambda z, t, **o: fl.mixed_cross_entropy(z, t, alpha=0.25, top_k=2, **o),
        lambda s: 0.75 * s.ce + 0.125 * (s.top_ce + s.second_ce),
        {"statistics": ("second", "top")},
    ),
    "mixed, candidates": (
        lambda z, t, **o: fl.mixed_cross_entropy(z, t, alpha=0.25, candidates=CANDIDATES, **o),
        mixed(0.25),
        {"candidates": CANDIDATES},
    ),
    "DSC of the target": (
        lambda z, t, **o: fl.dsc_loss(z, t, alpha=0.5, form="target", **o),
        lambda s: 1 - (2 * s.q**0.5 * s.p + 1) / ((s.q**0.5 * s.p) ** 2 + 2),
        {},
    ),
    "dice": (lambda z, t, **o: fl.dice_loss(z, t, **o), dice(1.0), {"over": "classes"}),
}


@pytest.mark.parametrize("options", [{}, {"weight": True, "ignore_index": 5, "z_loss": 0.25}], ids=["", "shared"])
@pytest.mark.parametrize("name", TWINS)
def test_losses_equal_their_flex_form(name, options, impl, generator):
    built_in, by_hand, own = TWINS[name]
    z, target = logits_and_targets(6, 131, generator)
    target[3] = options.get("ignore_index", 0)
    options = dict(options, reduction="none", impl=impl)
    if options.get("weight"):
        if "mean" in own.get("statistics", ()) or name == "z-loss":
            pytest.skip("by hand, weights are for the whole row, and the z-loss is there already")
        options["weight"] = class_weights(131, generator)
    upstream = torch.randn(6, generator=generator)
    expected = with_gradient(lambda x: built_in(x, target, **options), z, upstream)
    result = with_gradient(lambda x: fl.flex_loss(x, target, by_hand, **own, **options), z, upstream)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-14)


#: Losses that the package does not have: by hand over statistics, and by hand over logits.
STRANGERS = {
    "Poly-1": (poly_1(1.5), (), lambda z, t: oracle.cross_entropy(z, t) + 1.5 * (1 - oracle.at(z.softmax(-1), t))),
    "AdaFocal": (
        ada_focal(-1.5),
        (),
        lambda z, t: (1 + oracle.at(z.softmax(-1), t)) ** 1.5 * oracle.cross_entropy(z, t),
    ),
    "FLSD-53": (
        lambda s: s.q ** torch.where(s.p < 0.2, 5.0, 3.0) * s.ce,
        (),
        lambda z, t: oracle.focal(z, t, torch.where(oracle.at(z.softmax(-1), t) < 0.2, 5.0, 3.0)),
    ),
    "dual focal": (dual_focal(3.0), ("below",), lambda z, t: oracle.dual_focal(z, t, 3.0)),
    "a margin of logits": (
        lambda s: (1 - s.target_logit + torch.where(s.top_index == s.target, s.second_logit, s.top_logit)).relu(),
        ("top", "second"),
        lambda z, t: (
            torch.nn.functional.multi_margin_loss(
                torch.stack([oracle.at(z, t), z.masked_fill(one_hot(t, z.shape[-1]).bool(), -torch.inf).amax(-1)], 1),
                torch.zeros_like(t),
                reduction="none",
            )
            * 2
        ),
    ),
    "of the normaliser alone": (lambda s: s.lse**2, (), lambda z, t: z.logsumexp(-1) ** 2),
    "of the target's logit alone": (lambda s: s.target_logit**2, (), lambda z, t: oracle.at(z, t) ** 2),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_losses_that_the_package_has_not(name, impl, generator):
    by_hand, statistics, formula = STRANGERS[name]
    z, target = logits_and_targets(12, 131, generator)
    upstream = torch.randn(12, generator=generator)
    options = {"reduction": "none", "weight": class_weights(131, generator), "label_smoothing": 0.125}
    result = with_gradient(
        lambda x: fl.flex_loss(x, target, by_hand, statistics=statistics, impl=impl, **options), z, upstream
    )
    expected = with_gradient(lambda x: oracle.loss(formula, x, target, **options), z, upstream)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-14)


# --- tensors of one's own in the loss ---


@pytest.mark.parametrize("over", ["rows", "classes"])
def test_a_learnable_parameter(over, impl, generator):
    """Its gradient is right, also where rows are ignored, and of the second order."""
    z, target = logits_and_targets(6, 9, generator)
    z.requires_grad_()
    target[[1, 4]] = -100
    exponent = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    kept = target != -100

    def ours(x, e):
        def of_classes(p, q, positive):
            return torch.where(positive, q**e * p, 0)

        return fl.flex_loss(x, target, focal(e) if over == "rows" else of_classes, over=over, impl=impl)

    def formula(x, e):
        p = oracle.at(x.softmax(-1)[kept], target[kept])
        return ((1 - p) ** e * (-p.log() if over == "rows" else p)).mean()

    result = torch.autograd.grad(ours(z, exponent), (z, exponent))
    torch.testing.assert_close(result, torch.autograd.grad(formula(z, exponent), (z, exponent)), rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(ours, (z, exponent))
    assert torch.autograd.gradgradcheck(ours, (z, exponent))


def test_a_weight_of_each_row(impl, generator):
    z, target = logits_and_targets(6, 19, generator)
    confidence = torch.rand(6, generator=generator).double().requires_grad_()
    loss = fl.flex_loss(z.requires_grad_(), target, lambda s: confidence * s.ce, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss, confidence)
    torch.testing.assert_close(gradient, oracle.cross_entropy(z, target).detach(), rtol=1e-12, atol=0)


# --- what a loss is given ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loss_is_called_once_with_rows(dtype, impl, generator):
    z, target = logits_and_targets(6, 19, generator, dtype)
    seen = []

    def loss(s):
        seen.append(s)
        return s.ce

    fl.flex_loss(z.reshape(2, 3, 19), target.int().reshape(2, 3), loss, candidates=target.reshape(2, 3, 1), impl=impl)
    (s,) = seen
    for name in ("ce", "q", "p", "lse", "target_logit"):
        assert getattr(s, name).shape == (6,)
        assert getattr(s, name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert s.candidate_ce.shape == s.candidate_logit.shape == (6, 1)
    assert torch.equal(s.target, target)
    assert s.target.dtype == torch.int64


def test_ignored_rows_hold_harmless_values(impl, generator):
    """So that a loss is finite there, and with it every gradient that it gives to tensors of one's own."""
    z, target = logits_and_targets(6, 19, generator, torch.float32)
    target[[0, 3]] = -100
    z[0] = torch.nan
    seen = []

    def loss(s):
        seen.append(s)
        return s.ce

    statistics = ("top", "second", "below", "mean")
    fl.flex_loss(z, target, loss, statistics=statistics, candidates=target.clamp(min=0), impl=impl)
    tensors = {name: value for name, value in vars(seen[0]).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 18
    for name, value in tensors.items():
        ignored = value[[0, 3]]
        if name in ("below_logit", "below_ce"):  # there may be none
            assert not ignored.isnan().any(), name
        else:
            assert ignored.isfinite().all(), name
        if not value.is_floating_point():
            assert ((ignored >= -1) & (ignored < 19)).all(), name  # it may index a tensor of classes


MISSING = [
    (field, f"statistics=\\('{statistic}',\\)")
    for statistic in ("top", "second", "below", "mean")
    for field in fl.definition.statistics.OPTIONAL[statistic]
] + [(field, "candidates=") for field in ("candidate_logit", "candidate_ce")]


@pytest.mark.parametrize(
    "options",
    [{}, {"return_stats": True}, {"label_smoothing": 0.1}],
    ids=["", "return_stats", "label_smoothing"],
)
@pytest.mark.parametrize(("field", "advice"), MISSING, ids=[field for field, _ in MISSING])
def test_a_statistic_that_was_not_asked_for(field, advice, options, impl, generator):
    """What to add is in the error; that other options happen to compute the statistic too makes no difference."""
    z, target = logits_and_targets(6, 19, generator)
    with pytest.raises(AttributeError, match=advice):
        fl.flex_loss(z, target, lambda s: getattr(s, field), impl=impl, **options)


def test_a_statistic_that_does_not_exist(impl, generator):
    with pytest.raises(AttributeError, match="no statistic named 'entropy'"):
        fl.flex_loss(*logits_and_targets(6, 19, generator), lambda s: s.entropy, impl=impl)


@pytest.mark.parametrize(
    "loss_fn",
    [lambda s: s.ce.mean(), lambda s: s.ce[:, None], lambda s: None, lambda s: 1.0],
    ids=["0-d", "2-d", "None", "1.0"],
)
def test_a_loss_of_another_shape(loss_fn, impl, generator):
    with pytest.raises(ValueError, match="a loss for each of the 6 rows, got"):
        fl.flex_loss(*logits_and_targets(6, 19, generator), loss_fn, impl=impl)


def test_terms_of_classes_run_on_a_few_rows_at_a_time(monkeypatch, generator):
    z, target = logits_and_targets(7, 100, generator, torch.float32)
    target[2] = -100
    alpha = torch.rand(7, generator=generator).requires_grad_()
    whole = fl.dsc_loss(z.requires_grad_(), target, alpha=alpha, reduction="none")
    upstream = torch.randn(7, generator=generator)
    expected = torch.autograd.grad(whole, (z, alpha), upstream)
    monkeypatch.setattr(dense, "DENSE_BYTES", 2 * 100 * 4)
    parts = fl.dsc_loss(z, target, alpha=alpha, reduction="none")
    assert torch.equal(parts, whole)
    for ours, same in zip(torch.autograd.grad(parts, (z, alpha), upstream), expected, strict=True):
        assert torch.equal(ours, same)


def _poly(p, q, positive):
    return torch.where(positive, (1 + p) * q**1.5, 0.5 * p**2 * (1 + q))


def _in_all_ways(n, v, generator):
    """Options that add terms to the rows' losses, or change what they count for."""
    weight = torch.rand(v, generator=generator, dtype=torch.float64) + 0.5
    token_weight = torch.rand(n, generator=generator, dtype=torch.float64)
    return {
        "plain": {},
        "smoothing": {"weight": weight, "label_smoothing": 0.125, "z_loss": 0.01},
        "others": {"label_smoothing": 0.125, "smoothing_over": "others", "token_weight": token_weight},
        "normalizer": {"weight": weight, "normalizer": torch.tensor(7.0), "token_weight": token_weight},
    }


@pytest.mark.parametrize("options", ["plain", "smoothing", "others", "normalizer"])
@pytest.mark.parametrize("classes", [1, 2, 19, 300])
def test_a_sum_over_the_classes_is_that_of_the_rows(classes, options, compiled_impl, generator, monkeypatch):
    """It has a way of its own, on which the gradient is made with it."""
    monkeypatch.setattr(dense, "DENSE_BYTES", 3 * 300 * 4)
    z, target = logits_and_targets(11, classes, generator)
    z[3] += 12 * torch.eye(classes, dtype=torch.float64)[(target[3] + 1) % classes]  # sure, and wrong
    target[[2, 10]] = -100
    z[2] = torch.nan
    z.requires_grad_()
    own = {"over": "classes", "impl": compiled_impl, **_in_all_ways(11, classes, generator)[options]}
    for reduction in ("mean", "sum"):
        if reduction == "sum" and "normalizer" in own:
            continue
        loss = fl.flex_loss(z, target, _poly, reduction=reduction, **own)
        alone = {k: v for k, v in own.items() if k not in ("normalizer", "token_weight")}
        rows = fl.flex_loss(z, target, _poly, reduction="none", **alone) * own.get("token_weight", 1)
        expected = rows.sum() / (1 if reduction == "sum" else own.get("normalizer", 9))
        torch.testing.assert_close(loss, expected)
        for factor in (1.0, -0.7):
            upstream = torch.tensor(factor, dtype=torch.float64)
            got, right = (torch.autograd.grad(x, z, upstream, retain_graph=True)[0] for x in (loss, expected))
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-15)
            assert (got[[2, 10]] == 0).all()


@pytest.mark.parametrize("of_rows", [False, True], ids=["one", "of rows"])
def test_a_learnt_parameter_of_a_sum_over_the_classes(of_rows, compiled_impl, generator):
    z, target = logits_and_targets(6, 19, generator)
    target[1] = -100
    z.requires_grad_()
    alpha = torch.rand((6,) if of_rows else (), generator=generator, dtype=torch.float64).requires_grad_()

    def loss(x, a, impl=compiled_impl):
        return fl.dsc_loss(x, target, alpha=a, z_loss=0.01, impl=impl)

    got, right = (torch.autograd.grad(loss(z, alpha, impl), (z, alpha)) for impl in (compiled_impl, "reference"))
    torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-15)
    (alone,) = torch.autograd.grad(loss(z.detach(), alpha), alpha)
    torch.testing.assert_close(alone, right[1])
    assert torch.autograd.gradcheck(loss, (z, alpha))
    assert torch.autograd.gradgradcheck(loss, (z, alpha))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_of_classes_are_made_once(reduction, generator, compiled_impl):
    """The rows of a sum; those of losses that anything may come from above are made once more for the gradient.

    The function is called with probabilities of the rows alone, which add up to 1.
    """
    z, target = logits_and_targets(6, 19, generator, torch.float32)
    seen = []

    def brier(p, q, positive):
        seen.append(len(p))
        torch.testing.assert_close(p.detach().sum(-1), torch.ones(len(p)))
        return torch.where(positive, q * q, p * p)

    loss = fl.flex_loss(z.requires_grad_(), target, brier, over="classes", reduction=reduction, impl=compiled_impl)
    assert sum(seen) == 6
    loss.sum().backward()
    assert sum(seen) == (6 if reduction == "mean" else 12)
    seen.clear()
    with torch.no_grad():
        fl.flex_loss(z, target, brier, over="classes", reduction=reduction, impl=compiled_impl)
    assert sum(seen) == 6


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of_logits", [True, False], ids=["logits too", "that alone"])
def test_a_loss_of_classes_may_use_a_tensor_that_requires_grad(
    of_logits, reduction, compiled, compiled_impl, generator
):
    z, target = logits_and_targets(6, 19, generator)
    weight = torch.rand(19, generator=generator, dtype=torch.float64).requires_grad_()
    hidden = 2 * weight  # not a leaf itself
    z.requires_grad_(of_logits)

    def loss(impl):
        def brier(p, q, positive):
            return torch.where(positive, q * q, p * p) * hidden

        return fl.flex_loss(z, target, brier, over="classes", reduction=reduction, impl=impl).sum()

    got, right = (
        (torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss)(compiled_impl),
        loss("reference"),
    )
    sources = (z, weight) if of_logits else (weight,)
    gradients = [torch.autograd.grad(x, sources, retain_graph=True) for x in (got, right)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)


def test_a_constant_over_the_classes_has_no_gradient(compiled_impl, generator):
    z, target = logits_and_targets(6, 19, generator)
    loss = fl.flex_loss(z.requires_grad_(), target, lambda p, q, y: y.to(p.dtype), over="classes", impl=compiled_impl)
    assert torch.equal(loss.detach(), torch.ones((), dtype=torch.float64))
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_a_loss_may_write_its_probabilities(compiled_impl, generator):
    z, target = logits_and_targets(6, 19, generator)
    z.requires_grad_()
    functions = (lambda p, q, y: p.mul_(q), lambda p, q, y: p * q)
    losses = [fl.flex_loss(z, target, function, over="classes", impl=compiled_impl) for function in functions]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in losses))
