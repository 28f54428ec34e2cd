"""Losses of one's own: those of the package written by hand, published ones that it has not, and what they may ask."""

import math
import weakref
from functools import partial, wraps
from typing import ClassVar

import oracle
import pytest
import torch
import torch.utils.checkpoint
from row_suite import Case, RowLossSuite, logits_and_targets
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import one_hot

import fusedloss as fl
from fusedloss.engine import chunks, dense, functions

# --- losses as a user writes them ---


def focal(gamma):
    return lambda s: s.q**gamma * s.ce


def dual_focal(gamma):
    """Tao et al. 2023: -(1 - p_t + p_j)^gamma log p_t, p_j the largest probability below p_t."""
    return lambda s: (s.q + (-s.below_ce).exp()) ** gamma * s.ce


def mixed(alpha):
    return lambda s: (1 - alpha) * s.ce + alpha * s.candidate_ce.mean(-1)


def dice(smooth):
    # 1 - (2 p y + smooth) / (p^2 + y + smooth), without what cancels in it
    return lambda p, q, y: torch.where(y, q * q / (p * p + 1 + smooth), p * p / (p * p + smooth))


# --- all that row losses must do ---


def _flex(by_hand, *names, **fixed):
    """A loss of `by_hand`, whose arguments these are."""

    def loss(input, target, **options):
        own = {name: options.pop(name) for name in names}
        return fl.flex_loss(input, target, by_hand(**own), **fixed, **options)

    return loss


_focal = _flex(focal, "gamma")
_dual_focal = _flex(dual_focal, "gamma", statistics=("below",))
_mixed = _flex(mixed, "alpha")
_mixed_top = _flex(lambda alpha: lambda s: (1 - alpha) * s.ce + alpha * s.top_ce, "alpha", statistics=("top",))
_dice = _flex(lambda alpha, smooth: dice(smooth), "alpha", "smooth", over="classes")


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


CANDIDATES = torch.tensor([[3, 3], [0, 39], [5, 7], [1, 2], [30, 0], [9, 8]])


def _twin(built_in, by_hand, **own):
    return built_in, partial(fl.flex_loss, loss_fn=by_hand, **own)


_SMOOTHING = partial(fl.cross_entropy, label_smoothing=0.1)


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        Case("focal by hand", _focal, oracle.focal, {"gamma": 2.0}, PASSES),
        Case(
            "dual focal", _dual_focal, oracle.dual_focal, {"gamma": 5.0}, PASSES,
            large=True, cancelling=_terms_of_dual_focal,
        ),
        Case(
            "mixed by hand", _mixed, oracle.mixed_cross_entropy,
            lambda n, v, g: {"alpha": 0.25, "candidates": torch.randint(v, (n, 2), generator=g)},
            PASSES, cancelling=_at_the_picks,
        ),
        Case(
            "dice over classes", _dice, oracle.dsc, {"alpha": 0, "smooth": 0.5}, (),
            infinite=False, cancelling=oracle.dsc_terms,
        ),
    ]  # fmt: skip
    CERTAIN: ClassVar = [
        Case("focal by hand", _focal, oracle.focal, {"gamma": 2.0}),
        Case("mixed by hand", _mixed_top, oracle.mixed_cross_entropy, {"alpha": 0.25}),
    ]
    KNOWN: ClassVar = [(_dual_focal, {"gamma": 5}, [0.00620198, 2.69893779, 0.32897415])]
    #: A loss of the package, and the same by hand.
    TWINS: ClassVar = {
        "cross-entropy by its parts": _twin(fl.cross_entropy, lambda s: s.lse - s.target_logit),
        "smoothing": _twin(_SMOOTHING, lambda s: 0.9 * s.ce + 0.1 * s.mean_ce, statistics=("mean",)),
        "smoothing by the mean logit": _twin(
            _SMOOTHING, lambda s: 0.9 * s.ce + 0.1 * (s.lse - s.mean_logit), statistics=("mean",)
        ),
        "z-loss": _twin(partial(fl.cross_entropy, z_loss=0.01), lambda s: s.ce + 0.01 * s.lse**2),
        "focal": _twin(partial(fl.focal_loss, gamma=2.5, z_loss=0.25), focal(2.5), z_loss=0.25),
        "mixed, top 2": _twin(
            partial(fl.mixed_cross_entropy, alpha=0.25, top_k=2),
            lambda s: 0.75 * s.ce + 0.125 * (s.top_ce + s.second_ce),
            statistics=("second", "top"),
        ),
        "mixed, candidates": _twin(
            partial(fl.mixed_cross_entropy, alpha=0.25, candidates=CANDIDATES), mixed(0.25), candidates=CANDIDATES
        ),
        "a margin of logits": (
            lambda z, t, impl: fl.flex_loss(
                z, t, lambda s: (s.top_logit - s.target_logit).relu(), statistics=("top",), impl=impl
            ),
            lambda z, t, impl: (z.amax(-1) - oracle.at(z, t.clamp(min=0)))[t >= 0].mean(),
        ),
        "DSC of the target": _twin(
            partial(fl.dsc_loss, alpha=0.5, form="target"),
            lambda s: 1 - (2 * s.q**0.5 * s.p + 1) / ((s.q**0.5 * s.p) ** 2 + 2),
        ),
        "dice": _twin(fl.dice_loss, dice(1.0), over="classes"),
    }


# --- tensors of one's own in the loss ---


@pytest.mark.parametrize("over", ["rows", "classes"])
def test_a_learnable_parameter(over, impl, generator):
    """Its gradient is right, also where rows are ignored, and of the second order."""
    z, target = logits_and_targets(6, 9, generator)
    target[[1, 4]] = -100
    leaves = (z.requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True))
    kept = target != -100

    def ours(x, e):
        def of_classes(p, q, positive):
            return torch.where(positive, q**e * p, 0)

        return fl.flex_loss(x, target, focal(e) if over == "rows" else of_classes, over=over, impl=impl)

    def formula(x, e):
        p = oracle.at(x.softmax(-1)[kept], target[kept])
        return ((1 - p) ** e * (-p.log() if over == "rows" else p)).mean()

    result, truth = (torch.autograd.grad(f(*leaves), leaves) for f in (ours, formula))
    torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)


# --- what a loss is given ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loss_is_called_once_with_rows(dtype, impl, generator):
    """Those of ignored rows hold harmless values: a loss is finite there, and so is every gradient that it gives."""
    z, target = logits_and_targets(6, 19, generator, dtype)
    target[[0, 3]] = -100
    z[0] = torch.nan
    seen = []
    options = {"statistics": ("top", "second", "below", "mean"), "candidates": target.clamp(min=0).reshape(2, 3, 1)}
    of_rows = target.int().reshape(2, 3)
    fl.flex_loss(z.reshape(2, 3, 19), of_rows, lambda s: seen.append(s) or s.ce, impl=impl, **options)
    (s,) = seen
    tensors = {name: value for name, value in vars(s).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 18
    for name, value in tensors.items():
        assert value.shape == ((6, 1) if "candidate" in name else (6,)), name
        ignored = value[[0, 3]]
        if not value.is_floating_point():
            assert value.dtype == torch.int64
            assert ((ignored >= -1) & (ignored < 19)).all(), name  # it may index a tensor of classes
        else:
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # Below a target there may be none.
            assert not ignored.isnan().any() if "below" in name else ignored.isfinite().all(), name
    assert torch.equal(s.target[target >= 0], target[target >= 0])


MISSING = [
    (field, f"statistics=\\('{statistic}',\\)")
    for statistic in fl.definition.statistics.OPTIONAL
    for field in fl.definition.statistics.OPTIONAL[statistic]
] + [("candidate_logit", "candidates="), ("candidate_ce", "candidates="), ("variance", "no statistic named 'variance'")]


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize(("field", "advice"), MISSING, ids=[field for field, _ in MISSING])
def test_a_statistic_that_was_not_asked_for(field, advice, options, impl, generator):
    """What to add is in the error; that other options happen to compute the statistic too makes no difference."""
    z, target = logits_and_targets(6, 19, generator)
    with pytest.raises(AttributeError, match=advice):
        fl.flex_loss(z, target, lambda s: getattr(s, field), impl=impl, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
def test_a_loss_of_another_dtype(dtype, impl):
    z, target = torch.full((3, 4), 50.0), torch.tensor([0, -100, 2])
    loss = fl.flex_loss(z, target, lambda s: (40000 * s.ce).to(dtype), reduction="sum", impl=impl)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 if dtype == torch.bool else 2 * 40000 * math.log(4), rel=1e-3)
    with pytest.raises(TypeError, match=r"must give real losses, got torch\.complex64"):
        fl.flex_loss(z, target, lambda s: s.ce * 1j, impl=impl)


@pytest.mark.parametrize(
    ("result", "over", "message"),
    [
        (lambda s: s.ce.mean(), "rows", r"rows, of shape \(6,\), got \(\)"),
        (lambda s: s.ce[:, None], "rows", r"rows, of shape \(6,\), got \(6, 1\)"),
        (lambda s: None, "rows", r"rows, of shape \(6,\), got NoneType"),
        (lambda p, q, positive: (p * q).sum(-1), "classes", r"\(6, 19\).*got"),
        (lambda p, q, positive: 1.0, "classes", r"\(6, 19\).*got float"),
    ],
)
def test_a_loss_of_another_shape(result, over, message, impl, generator):
    with pytest.raises(ValueError, match=message):
        fl.flex_loss(*logits_and_targets(6, 19, generator), result, over=over, impl=impl)


def test_terms_of_classes_run_on_a_few_rows_at_a_time(monkeypatch, generator):
    z, target = logits_and_targets(7, 100, generator, torch.float32)
    target[2] = -100
    leaves = (z.requires_grad_(), torch.rand(7, generator=generator).requires_grad_())
    upstream, results = torch.randn(7, generator=generator), []
    for budget in (dense.DENSE_BYTES, 2 * 100 * 4):
        monkeypatch.setattr(dense, "DENSE_BYTES", budget)
        loss = fl.dsc_loss(z, target, alpha=leaves[1], reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, upstream)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_gpu_gets_more_rows_at_a_time():
    """With as few as a CPU's caches hold, the host would start operators more slowly than the GPU runs them."""
    assert [dense._step(32000, torch.device(kind)) for kind in ("cpu", "cuda")] == [16, 262]


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


@pytest.mark.covering(1)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", ["plain", "smoothing", "others", "normalizer"])
@pytest.mark.parametrize("classes", [1, 2, 19, 300])
def test_a_sum_over_the_classes_is_that_of_the_rows(classes, options, reduction, compiled_impl, generator, monkeypatch):
    """It has a way of its own, on which the gradient is made with it."""
    monkeypatch.setattr(dense, "DENSE_BYTES", 3 * 300 * 4)
    z, target = logits_and_targets(11, classes, generator)
    z[3] += 12 * torch.eye(classes, dtype=torch.float64)[(target[3] + 1) % classes]  # sure, and wrong
    target[[2, 10]] = -100
    z[2] = torch.nan
    z.requires_grad_()
    own = {"over": "classes", "impl": compiled_impl, **_in_all_ways(11, classes, generator)[options]}
    normalizer = {"normalizer": own.pop("normalizer", 9.0)} if reduction == "mean" else {}
    own.pop("normalizer", None)
    loss = fl.flex_loss(z, target, _poly, reduction=reduction, **own, **normalizer)
    token_weight = own.pop("token_weight", 1)
    rows = fl.flex_loss(z, target, _poly, reduction="none", **own) * token_weight
    expected = rows.sum() / normalizer.get("normalizer", 1)
    torch.testing.assert_close(loss, expected)
    for factor in (1.0, -0.7):
        upstream = torch.tensor(factor, dtype=torch.float64)
        got, right = (torch.autograd.grad(x, z, upstream, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-15)
        assert (got[[2, 10]] == 0).all()


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


@pytest.mark.compile
@pytest.mark.covering(1)
@pytest.mark.parametrize("compiled", [False, True])
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

    ours = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
    sources = (z, weight) if of_logits else (weight,)
    results = (ours(compiled_impl), loss("reference"))
    gradients = [torch.autograd.grad(x, sources, retain_graph=True) for x in results]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)


def test_a_constant_has_no_gradient_and_probabilities_may_be_written(compiled_impl, generator):
    z, target = logits_and_targets(6, 19, generator)
    options = {"over": "classes", "impl": compiled_impl}
    loss = fl.flex_loss(z.requires_grad_(), target, lambda p, q, y: y.to(p.dtype), **options)
    assert torch.equal(loss.detach(), torch.ones((), dtype=torch.float64))
    assert (torch.autograd.grad(loss, z)[0] == 0).all()
    losses = [fl.flex_loss(z, target, f, **options) for f in (lambda p, q, y: p.mul_(q), lambda p, q, y: p * q)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in losses))


# --- rows of tensors, and gradients that are made with the loss ---


@pytest.mark.parametrize("over", ["rows", "classes"])
def test_row_tensors(over, impl, generator):
    """They go along with the rows, in a dtype that has room for them; those of ignored rows may hold anything."""
    z, target = logits_and_targets(6, 19, generator)
    target[[1, 4]] = -100
    kept = target != -100
    power = torch.rand(6, generator=generator).double().masked_fill(~kept, torch.nan).requires_grad_()
    large = torch.arange(6) + 2**60
    seen = []

    def loss_fn(s, *own):
        power, large, single = own if over == "rows" else own[2:]
        seen.extend(x.detach() for x in (power, large, single))
        single = single.flatten()[:, None] if over == "classes" else single
        return (power + single) * (s.q if over == "rows" else torch.where(own[1], own[0], 0))

    own = (power.reshape(2, 3), large.reshape(2, 3), torch.full((2, 3), 0.5))
    arguments = (z.requires_grad_().reshape(2, 3, 19), target.reshape(2, 3), loss_fn)
    loss = fl.flex_loss(*arguments, row_tensors=own, over=over, impl=impl)
    q = 1 - oracle.at(z.softmax(-1)[kept], target[kept])
    expected = ((power[kept] + 0.5) * q).mean()
    results = [torch.autograd.grad(x, (z, power)) for x in (loss, expected)]
    torch.testing.assert_close((loss, *results[0]), (expected, *results[1]), rtol=1e-11, atol=1e-14)
    assert (results[0][1][~kept] == 0).all()
    shape = (6,) if over == "rows" else (6, 1)
    assert all(x.shape == shape for x in seen) and seen[1].dtype == torch.int64 and seen[2].dtype == torch.float64
    assert torch.equal(seen[1].flatten()[kept], large[kept])


@pytest.mark.parametrize(
    ("row_tensors", "error", "message"),
    [
        (torch.ones(6), TypeError, r"row_tensors must be a sequence.*\(6,\); put it in a tuple"),
        ([torch.ones(6), torch.ones(1)], ValueError, r"row_tensors\[1\] .* target's shape \(6,\), got \(1,\)"),
        ([2.0], TypeError, r"row_tensors\[0\] must be a tensor of real numbers, got float"),
        ([torch.ones(6) * 1j], TypeError, "real numbers, got torch.complex64"),
        ([torch.ones(6, device="meta")], ValueError, r"row_tensors\[0\] is on meta, but target on cpu"),
    ],
    ids=["a tensor", "shape", "number", "complex", "device"],
)
def test_row_tensors_that_are_none(row_tensors, error, message, generator):
    with pytest.raises(error, match=message):
        fl.flex_loss(*logits_and_targets(6, 19, generator), lambda s, *own: s.ce, row_tensors=row_tensors)
    with pytest.raises(TypeError, match="per_chunk must be a bool, got 'all'"):
        fl.flex_loss(*logits_and_targets(6, 19, generator), lambda s: s.ce, per_chunk="all")


class _Linear:
    """A linear form of 23 rows in chunks of at most 5, of whose loss the calls and second products are counted."""

    def __init__(self, monkeypatch, generator, dtype=torch.float64, pairs=1, softcap=None):
        self.target = torch.randint(31, (23,), generator=generator)
        self.target[[3, 7, 22]] = -100
        self.hidden = [torch.randn(23, d, generator=generator).to(dtype).requires_grad_() for d in (8, 2)[:pairs]]
        self.weight = [torch.randn(31, d, generator=generator).to(dtype).requires_grad_() for d in (8, 2)[:pairs]]
        self.bias = torch.randn(31, generator=generator).to(dtype).requires_grad_()
        self.own = torch.rand(23, generator=generator).masked_fill(self.target < 0, torch.nan)
        self.sources = (*self.hidden, *self.weight, self.bias)
        self.calls, self.backwards = [], []
        self._options = {"budget": 5 * 31 * self.bias.element_size() * (2 if softcap else 1), "softcap": softcap}
        # Of what was called before nothing is known: all tests have the code of one function.
        monkeypatch.setattr(functions, "_WITH_OTHER_SOURCES", weakref.WeakSet())
        backward = chunks.backward
        monkeypatch.setattr(chunks, "backward", lambda *x: self.backwards.append(1) or backward(*x))

    def loss(self, loss_fn, **options):
        def counted(s, *own):
            self.calls.append(len(s.ce))
            return loss_fn(s, *own)

        several = len(self.weight) > 1
        made_of = (self.hidden, self.weight) if several else (self.hidden[0], self.weight[0])
        options = {"row_tensors": (self.own,), "linear_bias": self.bias} | self._options | options
        return fl.linear_flex_loss(*made_of, self.target, counted, **options)


def _poly1(s, own):
    return s.ce + own * s.q


IN_CHUNKS = {
    "plain": (_poly1, {}),
    "sum": (_poly1, {"reduction": "sum", "weight": torch.linspace(0.5, 2, 31)}),
    "all rows": (_poly1, {"drop_ignored": False, "token_weight": torch.linspace(0, 3, 23)}),
    "common terms": (_poly1, {"label_smoothing": 0.1, "z_loss": 0.01, "normalizer": torch.tensor(7.0)}),
    "temperature": (_poly1, {"temperature": 1.7}),
    "picks": (lambda s, own: s.ce + own * s.second_ce + s.mean_logit, {"statistics": ("second", "mean")}),
    "moments": (lambda s, own: s.ce - own * s.entropy, {"statistics": ("entropy",)}),
    "candidates": (
        lambda s, own: own * s.candidate_ce.sum(-1), {"candidates": torch.arange(46).reshape(23, 2) % 31}
    ),
    "one chunk": (lambda s, own: s.q * torch.arange(len(own)) / own.sum() + s.ce[:3].mean(), {"budget": 2**20}),
    "one chunk, some of it ignored": (
        lambda s, own: own * s.second_ce * torch.arange(len(own)) + s.ce[:3].mean(),
        {"budget": 2**20, "drop_ignored": False, "statistics": ("second",), "token_weight": torch.linspace(0, 3, 23)},
    ),
}  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("name", IN_CHUNKS)
def test_gradients_are_made_with_the_loss(name, pairs, softcap, dtype, monkeypatch, generator, compiled_impl):
    """Three products: the logits are not made again, the loss is called once a chunk, and the numbers are the same.

    Where all rows are of one chunk, that is so with and without `per_chunk`, and the rows are in their own order.
    """
    loss_fn, options = IN_CHUNKS[name]
    linear, results = _Linear(monkeypatch, generator, dtype, pairs, softcap), []
    impls = [(compiled_impl, False), (compiled_impl, True), ("reference", False)]
    for impl, per_chunk in impls if dtype == torch.float64 else impls[:2]:
        linear.calls.clear(), linear.backwards.clear()
        loss, stats = linear.loss(loss_fn, per_chunk=per_chunk, return_stats=True, impl=impl, **options)
        upstream = torch.tensor(-1.5, dtype=loss.dtype)
        gradients = torch.autograd.grad(loss, linear.sources, upstream, retain_graph=True)
        assert all(x.dtype == dtype for x in gradients)
        again = torch.autograd.grad(loss, linear.sources, upstream)
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
        results.append((loss, *gradients, *stats[:4]))
        if impl == "reference":
            break
        one_chunk = "budget" in options
        assert linear.calls == ([5, 5, 5, 5, 3] if per_chunk and not one_chunk else [23])
        assert len(linear.backwards) == (0 if per_chunk or one_chunk else 2)
    for x, *others in zip(*results, strict=True):
        atol = 8 * torch.finfo(dtype).eps * float(x.detach().nan_to_num().abs().amax())
        for y in others:
            torch.testing.assert_close(x, y, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("why", ["none", "row tensor", "closure", "token weight", "no grad", "fake", "logits in hand"])
def test_a_loss_in_chunks_where_all_rows_are_needed(why, monkeypatch, generator, compiled_impl):
    """Whatever else requires grad gets its gradient by a loss of all rows; so does what only operators can do."""
    linear, extra, options = _Linear(monkeypatch, generator), (), {"per_chunk": True, "impl": compiled_impl}
    loss_fn, own = _poly1, linear.own.double().nan_to_num()
    if why == "none":
        options["reduction"] = "none"
    elif why == "row tensor":
        extra = (own.requires_grad_(),)
    elif why == "closure":
        extra = (torch.tensor(0.5, dtype=torch.float64, requires_grad=True),)
        loss_fn = lambda s, own: s.ce + 2 * extra[0] * own * s.q  # noqa: E731
    elif why == "token weight":
        extra = (torch.rand(23, generator=generator).double().requires_grad_(),)
        options["token_weight"] = extra[0]
    options["row_tensors"] = (own,)
    if why == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert linear.loss(loss_fn, **options).shape == ()
        assert linear.calls == [23]
    elif why == "logits in hand":
        z = torch.nn.functional.linear(linear.hidden[0], linear.weight[0])
        fl.flex_loss(z, linear.target, lambda s: linear.calls.append(len(s.ce)) or s.ce, per_chunk=True)
        assert linear.calls == [23]
    elif why == "no grad":
        with torch.no_grad():
            ours, right = (linear.loss(loss_fn, **options | {"impl": i}) for i in (compiled_impl, "reference"))
        assert linear.calls == [23, 23]
        torch.testing.assert_close(ours, right)
    else:
        ours = torch.autograd.grad(linear.loss(loss_fn, **options).sum(), (*linear.sources, *extra))
        assert linear.calls[-1] == 23 and len(linear.backwards) == 1
        linear.calls.clear()
        linear.loss(loss_fn, **options | {"per_chunk": False, "budget": 2**20})
        assert linear.calls == [23]  # not in vain, after the first time that such a function is called
        right = torch.autograd.grad(
            linear.loss(loss_fn, **options | {"impl": "reference"}).sum(), (*linear.sources, *extra)
        )
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-13)


def test_second_derivatives_of_a_loss_in_chunks(monkeypatch, generator, compiled_impl):
    linear = _Linear(monkeypatch, generator)
    linear.own, tau = linear.own.double(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(*sources):
        linear.hidden, linear.weight, linear.bias = sources[:1], sources[1:2], sources[2]
        return linear.loss(_poly1, per_chunk=True, temperature=sources[3], impl=compiled_impl)

    loss(*linear.sources, tau)
    assert max(linear.calls) == 5
    assert torch.autograd.gradcheck(loss, (*linear.sources, tau), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (*linear.sources, tau), fast_mode=True)
    assert len(linear.calls) % 5 != 0  # by the reference, of all rows, too
    constant = linear.loss(lambda s, own: torch.full_like(own, 2.0), per_chunk=True, impl=compiled_impl)
    assert constant == 2 and all((x == 0).all() for x in torch.autograd.grad(constant, linear.sources[:2]))


def test_a_loss_in_chunks_under_checkpointing_and_batched_gradients(monkeypatch, generator, compiled_impl):
    linear = _Linear(monkeypatch, generator)
    loss = linear.loss(_poly1, per_chunk=True, impl=compiled_impl)
    right = torch.autograd.grad(loss, linear.sources, retain_graph=True)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, linear.sources, upstream, is_grads_batched=True)
    torch.testing.assert_close([x[1] for x in batched], [-2 * x for x in right])
    function = lambda: linear.loss(_poly1, per_chunk=True, impl=compiled_impl)  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(function, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, linear.sources), right)


def test_what_a_loss_function_hands_out(monkeypatch, generator, compiled_impl):
    """Its gradient would be lost where the gradients are made with the loss; elsewhere it has one."""
    linear, kept = _Linear(monkeypatch, generator), []

    def keeping(s, own):
        kept.append(s.lse.square())
        return s.ce

    for options in ({"budget": 2**20}, {"per_chunk": True}):
        for later in (lambda x: x.backward(), lambda x: torch.autograd.grad(x, linear.sources[:1])):
            loss = linear.loss(keeping, impl=compiled_impl, **options)
            with pytest.raises(RuntimeError, match="a loss function has handed out"):
                later(loss + kept[-1].sum())
    linear.loss(keeping, impl=compiled_impl, reduction="none")
    own = kept[-1][linear.target >= 0].sum()
    z = torch.addmm(linear.bias, linear.hidden[0], linear.weight[0].t())[linear.target >= 0]
    right = z.logsumexp(-1).square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, linear.sources) for x in (own, right)))
    z = z.detach().requires_grad_()
    loss = fl.flex_loss(z, linear.target[linear.target >= 0], lambda p, q, y: kept.append(q) or p * q, over="classes")
    with pytest.raises(RuntimeError, match=r"a loss function has handed out|a second time"):
        torch.autograd.grad(loss + kept[-1].sum(), z)


def test_a_loss_function_may_work_in_place(monkeypatch, generator, compiled_impl):
    linear = _Linear(monkeypatch, generator)
    right, *others = (
        torch.autograd.grad(
            linear.loss(lambda s, own: s.ce.clamp_(max=3.0), impl=compiled_impl, **options), linear.sources
        )
        for options in ({}, {"budget": 2**20}, {"per_chunk": True})
    )
    assert right[0].any()
    for gradients in others:
        torch.testing.assert_close(gradients, right)


def test_functions_of_one_decorator_are_told_apart(monkeypatch, generator):
    """One of another tensor says nothing of the next one."""
    linear, factor = _Linear(monkeypatch, generator), torch.tensor(2.0, requires_grad=True)

    def decorated(function):
        @wraps(function)
        def call(s):
            return function(s)

        return call

    learnt, plain = decorated(lambda s: factor * s.ce), decorated(lambda s: s.ce)
    fl.linear_flex_loss(linear.hidden[0], linear.weight[0], linear.target, learnt).backward()
    assert factor.grad is not None and functions.has_other_sources(learnt) and not functions.has_other_sources(plain)


@pytest.mark.parametrize("result", [lambda s: s.ce.mean(), lambda s: s.ce[:1], lambda s: s.ce[:, None], lambda s: 1.0])
def test_a_loss_in_chunks_of_another_shape(result, monkeypatch, generator):
    linear = _Linear(monkeypatch, generator)
    with pytest.raises(ValueError, match=r"rows, of shape \(5,\), got (\(\)|\(1,\)|\(5, 1\)|float)$"):
        linear.loss(lambda s, own: result(s), per_chunk=True)
