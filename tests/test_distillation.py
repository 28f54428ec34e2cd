"""Losses against a second row: a teacher's divergences, and cross-entropy with targets for all the classes."""

import math
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import BETAS, assert_as_accurate_as, assert_rows_as_accurate_as
from products import Products
from torch import Tensor

import fusedloss as fl
from fusedloss.engine import chunks

INF, NAN = math.inf, math.nan
MIXTURES = [name for name, beta in BETAS.items() if beta is not None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

each_divergence = pytest.mark.parametrize("divergence", BETAS)


def dense(z: Tensor, t: Tensor, divergence: str = "forward_kl", beta: Any = None, temperature: Any = 1.0) -> Tensor:
    """As a user would write it in PyTorch, in the dtype of the logits but float32 at least."""
    log_p, log_y = ((wide(x) / temperature).log_softmax(-1) for x in (z, t))
    return oracle.divergence(log_y, log_p, divergence, beta)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def problem(generator: torch.Generator, classes: int, rows: int = 5, dtype: Any = torch.float64) -> list[Tensor]:
    return [(3 * torch.randn(rows, classes, generator=generator).double()).to(dtype) for _ in range(2)]


def differentiated(function: Any, z: Tensor, upstream: Any = 1.0) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = function(z)
    return loss.detach(), torch.autograd.grad(loss, z, torch.as_tensor(upstream).to(loss.dtype).expand(loss.shape))[0]


def check(loss: Any, formula: Any, z: Tensor, upstream: Any, given: Tensor | None = None) -> Tensor:
    """Holds a loss and its gradient to the formula's in the same dtype and in float64; returns the gradient.

    `given`: the logits as the loss gets them, where they differ in rows that are left out.
    """
    got = differentiated(loss, z if given is None else given, upstream)
    theirs, true = differentiated(formula, z, upstream), differentiated(formula, z.double(), upstream)
    assert_as_accurate_as(got[0], theirs[0], true[0], ulps=16, scale=true[0].abs() + 1)
    if z.itemsize == 2:
        assert_rows_as_accurate_as(got[1], theirs[1], true[1])
    else:
        ulps = 64 if z.dtype == torch.float64 else 8  # the truth is as coarse in float64
        assert_as_accurate_as(got[1], theirs[1], true[1], ulps, scale=true[1].abs() + 1)
    return got[1]


class TestSecondRow:
    """What any kernels compute: test files of other kernels derive."""

    #: Of whole and broken blocks of columns.
    WIDTHS = (1, 2, 37, 65, 2048, 2 * 2048 + 5)

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @each_divergence
    def test_against_the_formula(self, divergence, dtype, reduction, impl, generator, kernel_calls):
        """With temperature and a cross-entropy beside it that has none; rows that are left out are not looked at."""
        weight = torch.tensor([0.5, 1.5, 2.0, 1.0, 0.7])
        for classes in self.WIDTHS:
            z, t = problem(generator, classes, dtype=dtype)
            target = torch.tensor([0, classes - 1, -100, classes // 2, 0])
            ways = ((1.0, 0.0), (1.0, 0.5), (2.5, 0.5))
            for temperature, hard in ways if classes in (37, self.WIDTHS[-1]) else ways[2:]:
                own = {"divergence": divergence, "beta": BETAS[divergence], "temperature": temperature}
                more = {"target": target, "hard_weight": hard, "scale_by_temperature_squared": True}
                more |= {"token_weight": weight.to(wide(z).dtype), "reduction": reduction, "impl": impl}

                def formula(x, t=t, own=own, hard=hard, temperature=temperature, target=target):
                    ce = F.cross_entropy(wide(x), target, reduction="none")
                    rows = temperature**2 * dense(x, t.to(x.dtype), **own) + hard * ce
                    rows = rows.masked_fill(target == -100, 0) * weight.to(rows.dtype)
                    return rows if reduction == "none" else rows.sum()

                x, y = z.clone(), t.clone()
                x[2], y[2] = NAN, INF
                loss = partial(fl.distillation_loss, teacher=y, **own, **more)
                one = 1.0 if hard else -0.37
                upstream = torch.tensor([0.5, -1.5, 2.0, 1.0, 0.7]) if reduction == "none" else one
                assert not check(loss, formula, z, upstream, x)[2].any()
        if reduction == "none":
            assert impl == "reference" or (kernel_calls["forward", impl] and kernel_calls["backward", impl])
        elif impl in ("cpu", "cuda") and dtype != torch.float16:
            assert set(kernel_calls) == {("with_gradient", impl), ("scale_", impl)}

    @each_divergence
    def test_close_rows_keep_their_digits(self, divergence, impl, generator):
        """Where the plain form in float32 has no digit left; equal rows give 0."""
        own = {"divergence": divergence, "reduction": "none", "impl": impl}
        for classes in self.WIDTHS[1:]:
            z = math.log(classes) / 3 * torch.randn(4, classes, generator=generator)
            t = z + 1e-3 * torch.randn(4, classes, generator=generator)
            formula = partial(dense, t=t.double(), divergence=divergence, beta={"jsd": 0.5}.get(divergence, 0.1))
            found, gradient = differentiated(partial(fl.distillation_loss, teacher=t, **own), z)
            true, slope = differentiated(formula, z.double())
            torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=0)
            if divergence != "tv":  # whose slope has the sign of a difference of logits
                assert ((gradient - slope).norm(dim=-1) < 1e-3 * slope.norm(dim=-1)).all()
        for dtype in DTYPES:
            x = z.to(dtype)
            loss, gradient = differentiated(partial(fl.distillation_loss, teacher=x, temperature=1.7, **own), x)
            assert not loss.any() and not gradient.any()

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @each_divergence
    def test_masked_classes_and_nan(self, divergence, dtype, impl, generator):
        """A class that neither row has is none. One that the student alone lacks makes some losses infinite."""
        student, teacher = problem(generator, 137, 10, dtype)
        student[:, 5] = teacher[:, 5] = teacher[1, 7:99] = student[2, 100:] = student[3] = -INF
        student[3, 2] = teacher[3, 2] = 1.0
        student[4, 8] = teacher[5, 101] = student[6] = NAN
        teacher[6] = student[7, 1] = INF
        student[8] = teacher[9] = -INF
        target = torch.tensor([0, 3, 2, 2, 0, 0, -100, 0, 0, 0])
        own = {"divergence": divergence, "beta": BETAS[divergence], "target": target, "hard_weight": 0.5}
        own |= {"teacher": teacher, "reduction": "none", "impl": impl}
        found, gradient = differentiated(partial(fl.distillation_loss, **own), student)

        def formula(x):
            rows = dense(x, teacher[:4].double().clamp(min=-600), divergence, BETAS[divergence])
            return rows + 0.5 * F.cross_entropy(x, target[:4], reduction="none")

        expected, slope = differentiated(formula, student[:4].double().clamp(min=-600))
        infinite = {"forward_kl": [2, 3], "reverse_kl": [1]}.get(divergence, [])
        assert found[:4].isinf().nonzero()[:, 0].tolist() == infinite
        finite = [row for row in range(4) if row not in infinite]
        torch.testing.assert_close(found[finite].double(), expected[finite], rtol=1e-5, atol=1e-6)
        rough = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient[finite].double(), slope[finite], rtol=rough, atol=1e-6)
        assert found[6] == 0 and not gradient[6].any()
        bad = [4, 5, 7, 8, 9]
        assert found[bad].isnan().all()
        assert gradient[bad].isnan().any(-1).all() or (impl == "reference" and divergence == "tv")

    @pytest.mark.parametrize("beta", [0.01, 0.07, 0.5, 0.9])
    @pytest.mark.parametrize("divergence", MIXTURES)
    def test_shares_of_a_mixture(self, divergence, beta, impl, generator):
        """Even ones, and those that are almost one of the rows, of rows that are close, apart and far apart."""
        z = torch.randn(3, 300, generator=generator)
        t = z + torch.tensor([1e-2, 1.0, 10.0])[:, None] * torch.randn(3, 300, generator=generator)
        own: dict[str, Any] = {"divergence": divergence, "beta": beta}
        got = differentiated(lambda x: fl.distillation_loss(x, t, **own, reduction="none", impl=impl), z, torch.ones(3))
        true = differentiated(lambda x: dense(x, t.double(), **own), z.double(), torch.ones(3))
        torch.testing.assert_close(got[0].double(), true[0], rtol=1e-5, atol=0)
        assert ((got[1] - true[1]).norm(dim=1) < 2e-5 * true[1].norm(dim=1)).all()

    @each_divergence
    def test_rows_far_from_0(self, divergence, impl, generator):
        """A common offset of a row's logits is none of the loss's."""
        z, t = problem(generator, 9, dtype=torch.float32)
        own = {"divergence": divergence, "beta": BETAS[divergence], "reduction": "none", "impl": impl}
        expected = fl.distillation_loss(z.round(), t.round(), **own)
        for offset in (2.0**12, -(2.0**20)):
            torch.testing.assert_close(fl.distillation_loss(z.round() + offset, t.round(), **own), expected)
        certain = torch.tensor([[1e30, 0.0, -1e30]])
        got = fl.distillation_loss(torch.zeros(1, 3), certain, **own).item()
        limits = {"forward_kl": math.log(3), "tv": 2 / 3}
        assert got == pytest.approx(limits.get(divergence, got), rel=1e-6)
        exact = {**own, "impl": "reference"}
        for classes in (5, min(300, self.WIDTHS[-1])):
            z, t = problem(generator, classes, dtype=torch.float32)
            apart = [(x + 1e4, y) for x, y in ((z, t), (t, z), (z, z), (z - 2e4, z))]
            # The largest logits are of different classes, and the square of the log-sum-exp is infinite.
            sure = torch.zeros(1, classes).index_fill(1, torch.tensor(1), 1e30)
            apart += [(z, sure.expand_as(z)), (sure.expand_as(z), z.clamp(-1, 1))]
            for x, y in apart:
                ours, true = (
                    differentiated(lambda x, y=y, o=o: fl.distillation_loss(x, y, **o), x, torch.ones(5))
                    for x, y, o in ((x, y, own), (x.double(), y.double(), exact))
                )
                torch.testing.assert_close(ours[0].double(), true[0], rtol=1e-5, atol=1e-6)
                scale = true[0].abs()[:, None] + 1
                torch.testing.assert_close(ours[1].double() / scale, true[1] / scale, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("divergence", MIXTURES)
    def test_probabilities_too_small_to_divide_by(self, divergence, impl, generator):
        """Classes whose mixture is so small that its inverse is infinite add nothing."""
        for dtype, lags in ((torch.float32, (80, 95)), (torch.float64, (700, 720))):
            z = torch.linspace(*lags, 100, dtype=dtype).neg().repeat(2, 1)
            z[:, :70], t = 0, z + 0.1 * torch.randn(2, 100, generator=generator, dtype=dtype)
            for beta in (0.01, 0.5, 0.99):
                own: dict[str, Any] = {"divergence": divergence, "beta": beta}
                got = differentiated(partial(fl.distillation_loss, teacher=t, **own, impl=impl), z)
                true = differentiated(lambda x, o=own, t=t: dense(x[:, :70], t[:, :70], **o).mean(), z)
                torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-7)

    def test_reductions_and_weights(self, impl, generator):
        z, t = problem(generator, 11, rows=6)
        z, t = z.view(2, 3, 11), t.view(2, 3, 11)
        weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 3.0]]).double()
        target = torch.tensor([[1, 2, -100], [0, 3, 4]])
        rows = dense(z, t)
        loss = fl.distillation_loss(z, t, impl=impl)
        torch.testing.assert_close(loss, rows.mean())
        torch.testing.assert_close(
            loss, F.kl_div(*(x.log_softmax(-1).view(6, 11) for x in (z, t)), log_target=True, reduction="batchmean")
        )
        kept = (rows * weight).masked_fill(target == -100, 0)
        bad = z.clone()
        bad[0, 1], bad[0, 2] = NAN, NAN  # of weight 0, and ignored
        for reduction, expected in (("none", kept), ("sum", kept.sum()), ("mean", kept.sum() / 5)):
            x = bad.clone().requires_grad_()
            got = fl.distillation_loss(x, t, target=target, token_weight=weight, reduction=reduction, impl=impl)
            torch.testing.assert_close(got, expected)
            (gradient,) = torch.autograd.grad(got.sum(), x)
            assert gradient.isfinite().all() and not gradient[0, 1:].any()
        got = fl.distillation_loss(z, t, token_weight=weight, normalizer="token_weight", impl=impl)
        torch.testing.assert_close(got, (rows * weight).sum() / weight.sum())
        learnt = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            fl.distillation_loss(z, t, token_weight=learnt, reduction="sum", impl=impl), learnt
        )
        torch.testing.assert_close(gradient, rows)  # of the row of weight 0 too
        _, stats = fl.distillation_loss(z, t, temperature=2.0, return_stats=True, stats=("entropy",), impl=impl)
        own = fl.cross_entropy(z, z.argmax(-1), temperature=2.0, return_stats=True, stats=("entropy",))[1]
        x = z.clone().requires_grad_()
        every = fl.distillation_loss(x, t, return_stats=True, stats=("entropy",), impl=impl)[0]
        (gradient,), (expected,) = (torch.autograd.grad(y, x) for y in (every, dense(x, t).mean()))
        torch.testing.assert_close(gradient, expected)
        for name in ("lse", "argmax", "argmax_log_prob", "entropy"):
            torch.testing.assert_close(getattr(stats, name), getattr(own, name))
        assert stats.target_log_prob.isnan().all()
        # Strides of any kind, and no rows.
        torch.testing.assert_close(fl.distillation_loss(z.mT.contiguous().mT, t[..., :1].expand_as(t) + t, impl=impl),
                                   dense(z, t[..., :1] + t).mean())  # fmt: skip
        assert fl.distillation_loss(z[:0], t[:0], impl=impl) == 0

    @pytest.mark.parametrize(
        ("dtype", "reduction"), [(torch.float64, "mean"), (torch.float64, "none"), (torch.float16, "mean")], ids=str
    )
    def test_linear_distillation(self, dtype, reduction, compiled_impl, generator, kernel_calls):
        """Gradients in the place of the student's logits; hidden sizes that differ."""
        shapes = (9, 16), (300, 16), (9, 24), (300, 24), (300,), (300,)
        sources = [(torch.randn(shape, generator=generator) / 2).to(dtype) for shape in shapes]
        target = torch.randint(300, (9,), generator=generator)
        target[4] = -100
        options = {
            "divergence": "jsd", "target": target, "hard_weight": 0.5, "temperature": 2.0, "softcap": 4.0,
            "teacher_softcap": 5.0, "scale_by_temperature_squared": True, "reduction": reduction,
        }  # fmt: skip
        results = []
        for of, kind in ((compiled_impl, dtype), ("reference", torch.float64)):
            own = [x.to(kind).requires_grad_(i in (0, 1, 4)) for i, x in enumerate(sources)]
            *layers, bias, teacher_bias = own
            budget = 3 * 3 * 300 * kind.itemsize  # the logits, the softcap's tanh and the teacher's
            loss = fl.linear_distillation_loss(
                *layers, linear_bias=bias, teacher_bias=teacher_bias, budget=budget, impl=of, **options
            )
            results.append((loss, *torch.autograd.grad(loss.sum(), (own[0], own[1], own[4]))))
        for found, right in zip(*results, strict=True):
            assert (found.double() - right).norm() < (1e-12 if dtype == torch.float64 else 4e-3) * right.norm()
        if reduction == "mean" and dtype == torch.float64:
            # The row that is ignored has no logits, nor a gradient.
            calls = {"with_gradient": 3, "forward": 1, "scale_": 3}
            assert kernel_calls == {(name, compiled_impl): count for name, count in calls.items()}

    # --- targets for all the classes ---

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    def test_soft_targets(self, dtype, impl, generator, kernel_calls):
        """As torch's, whatever their sums."""
        for classes in self.WIDTHS:
            z, _ = problem(generator, classes, dtype=dtype)
            y = (torch.rand(5, classes, generator=generator) - 0.2).clamp(min=0).to(dtype)
            weight = torch.rand(classes, generator=generator)
            for own in ({}, {"label_smoothing": 0.1}, {"weight": weight, "label_smoothing": 0.2}):
                for reduction in ("mean", "none"):

                    def of(function, x, y=y, own=own, reduction=reduction, **options):
                        cast = {k: v.to(wide(x).dtype) if isinstance(v, Tensor) else v for k, v in own.items()}
                        return function(x, y.to(x.dtype), reduction=reduction, **cast, **options)

                    upstream = torch.linspace(0.5, 2, 5) if reduction == "none" else 1.0
                    formula = partial(of, lambda x, y, **options: F.cross_entropy(wide(x), wide(y), **options))
                    check(partial(of, fl.cross_entropy, impl=impl), formula, z, upstream)
        assert impl == "reference" or kernel_calls["forward", impl]

    def test_soft_targets_of_other_kinds(self, impl, generator):
        """Float32 for half precision, masked classes, z-loss, rows left out, the gradient in place, as a module."""
        z, _ = problem(generator, 20)
        y = torch.rand(5, 20, generator=generator).double()
        half = z.bfloat16()
        torch.testing.assert_close(
            fl.cross_entropy(half, y.float(), impl=impl), F.cross_entropy(half.float(), y.float()), rtol=1e-5, atol=1e-6
        )
        z[0, 3], y[0, 3] = -INF, 0
        weight = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0]).double()
        expected = F.cross_entropy(z.clamp(min=-1e9), y, reduction="none") + 0.1 * z.logsumexp(-1).square()
        x = z.clone()
        x[1] = NAN
        got = fl.cross_entropy(x, y, z_loss=0.1, token_weight=weight, reduction="none", impl=impl)
        torch.testing.assert_close(got, expected * weight)
        for wrong in ((z, y.index_fill(1, torch.tensor(0), NAN)), (z.index_fill(1, torch.tensor(0), NAN), y)):
            assert fl.cross_entropy(*wrong, reduction="none", impl=impl).isnan().all()
        module = fl.nn.CrossEntropyLoss(impl=impl)
        torch.testing.assert_close(module(z[1:], y[1:]), F.cross_entropy(z[1:], y[1:]))
        loss = partial(fl.cross_entropy, target=y[1:], z_loss=0.1, label_smoothing=0.1, impl=impl)
        assert torch.autograd.gradcheck(loss, z[1:].clone().requires_grad_(), fast_mode=True)
        if impl == "reference":
            return
        loss = partial(fl.cross_entropy, target=y, z_loss=0.1, impl=impl)
        in_place = differentiated(lambda x: loss(x * 1, inplace_backward=True), z)
        torch.testing.assert_close(in_place, differentiated(loss, z))


@each_divergence
def test_derivatives(divergence, compiled_impl, generator):
    z, t = problem(generator, 7, rows=3)
    own: dict[str, Any] = {"divergence": divergence, "temperature": 1.7, "target": torch.tensor([0, 3, -100])}
    own |= {"hard_weight": 0.3, "impl": compiled_impl}

    def row(z, reduction="none"):
        return fl.distillation_loss(z, t, **own, reduction=reduction)

    z.requires_grad_()
    assert torch.autograd.gradcheck(row, z) and torch.autograd.gradgradcheck(row, z, fast_mode=True)
    shapes = (3, 4), (7, 4), (7,), (3, 5), (7, 5), (7,)
    made = [torch.randn(shape, generator=generator).double() for shape in shapes]
    leaves, (teacher_input, teacher_weight, teacher_bias) = [x.requires_grad_() for x in made[:3]], made[3:]
    for reduction in ("none", "mean"):

        def linear(h, w, b, reduction=reduction):
            more = {"teacher_bias": teacher_bias, "softcap": 3.0, "teacher_softcap": 2.0, "budget": 7 * 8 * 3}
            return fl.linear_distillation_loss(
                h, w, teacher_input, teacher_weight, linear_bias=b, **more, **own, reduction=reduction
            )

        assert torch.autograd.gradcheck(linear, leaves)


def test_products_and_memory_of_the_linear_form(compiled_impl, generator):
    """With "mean" four, with "none" six; the chunks of both keep to the budget together."""
    shapes = (64, 8), (50, 8), (64, 4), (50, 4)
    h, w, th, tw = (torch.randn(shape, generator=generator) for shape in shapes)
    h.requires_grad_(), w.requires_grad_()
    for reduction, count in (("mean", 4), ("none", 6)):
        with Products(50) as products:
            loss = fl.linear_distillation_loss(h, w, th, tw, reduction=reduction, impl=compiled_impl, budget=2**20)
            loss.sum().backward()
        assert products.calls.total() == count
    budget = 20 * 50 * 4
    sizes = []
    original = chunks.new_buffer
    try:
        chunks.new_buffer = lambda like, shape, *a: sizes.append(math.prod(shape) * 4) or original(like, shape, *a)
        with torch.no_grad():
            fl.linear_distillation_loss(h, w, th, tw, impl=compiled_impl, budget=budget)
    finally:
        chunks.new_buffer = original
    assert 0 < sum(sizes) <= budget


def test_a_tensor_for_temperature(impl, generator):
    z, t = problem(generator, 11)
    own = {"divergence": "jsd", "scale_by_temperature_squared": True, "impl": impl}
    got = fl.distillation_loss(z, t, temperature=torch.tensor(2.5), **own)
    torch.testing.assert_close(got, fl.distillation_loss(z, t, temperature=2.5, **own))
    with pytest.raises(ValueError, match=r"temperature requires grad.*detach"):
        fl.distillation_loss(z, t, temperature=torch.tensor(2.5, requires_grad=True), **own)


# --- bad input ---

Z, T = torch.zeros(2, 5), torch.zeros(2, 5)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "classes": (lambda: fl.distillation_loss(Z, torch.zeros(2, 6)), ValueError, r"teacher .*\(2, 5\).*\(2, 6\)"),
    "rows": (lambda: fl.distillation_loss(Z, torch.zeros(3, 5)), ValueError, r"teacher .*\(3, 5\)"),
    "dtype": (lambda: fl.distillation_loss(Z, T.double()), TypeError, r"teacher must be torch.float32.*float64"),
    "indices": (lambda: fl.distillation_loss(Z, T.long()), TypeError, r"teacher .*int64"),
    "no tensor": (lambda: fl.distillation_loss(Z, None), TypeError, r"teacher .*NoneType"),
    "device": (lambda: fl.distillation_loss(Z, T.to("meta")), ValueError, r"teacher is on meta"),
    "grad": (lambda: fl.distillation_loss(Z, T.clone().requires_grad_()), ValueError, r"teacher\.detach\(\)"),
    "divergence": (lambda: fl.distillation_loss(Z, T, divergence="kl"), ValueError, r"'forward_kl'.*got 'kl'"),
    "beta of none": (lambda: fl.distillation_loss(Z, T, beta=0.5), ValueError, r"beta is of 'jsd'.*0.5 with 'forward"),
    "beta 0": (lambda: fl.distillation_loss(Z, T, divergence="jsd", beta=0), ValueError, r"beta.*got 0 .*'forward_kl'"),
    "beta 1": (lambda: fl.distillation_loss(Z, T, divergence="skew_reverse_kl", beta=1.0), ValueError, r"'reverse_kl'"),
    "beta 2": (lambda: fl.distillation_loss(Z, T, divergence="jsd", beta=2), ValueError, r"beta must.*got 2"),
    "hard": (lambda: fl.distillation_loss(Z, T, hard_weight=0.5), ValueError, r"hard_weight.*target.*0\.5"),
    "negative": (lambda: fl.distillation_loss(Z, T, hard_weight=-1), ValueError, r"hard_weight.*-1"),
    "a square beyond float32": (
        lambda: fl.distillation_loss(Z, T, temperature=1e25, scale_by_temperature_squared=True), ValueError, "1e\\+25"
    ),
    "squared": (lambda: fl.distillation_loss(Z, T, scale_by_temperature_squared=2), TypeError, r"bool, got 2"),
    "option": (lambda: fl.distillation_loss(Z, T, weight=torch.ones(5)), TypeError, r"unexpected.*'weight'"),
    "target": (lambda: fl.distillation_loss(Z, T, target=torch.tensor([0, 5])), IndexError, r"5"),
    "linear classes": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(8, 5)),
        ValueError, r"\(2, 7\).*\(2, 8\)"),
    "linear grad": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 5).requires_grad_()),
        ValueError, r"teacher requires grad"),
    "linear input": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 6)),
        ValueError, r"teacher_input has D = 5 features, but teacher_weight 6"),
    "linear bias": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 5), teacher_bias=torch.zeros(6)),
        ValueError, r"teacher_bias must be \(7,\).*\(6,\)"),
    "linear cap": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 5), teacher_softcap=0),
        ValueError, r"teacher_softcap must be greater than 0, got 0"),
    "linear budget": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 5), budget=55),
        ValueError, r"budget of 55 bytes is too small for one row of logits, 56 bytes"),
    "triton_fused": (
        lambda: fl.linear_distillation_loss(Z, torch.zeros(7, 5), T, torch.zeros(7, 5), impl="triton_fused"),
        (ValueError, RuntimeError), r"triton_fused"),
    "soft shape": (lambda: fl.cross_entropy(Z, torch.zeros(2, 4)), ValueError, r"target .*\(2, 5\).*\(2, 4\)"),
    "soft index": (lambda: fl.cross_entropy(Z, torch.zeros(2)), TypeError, r"float32"),
    "soft grad": (lambda: fl.cross_entropy(Z, T.clone().requires_grad_()), ValueError, r"target\.detach\(\)"),
    "soft ignore_index": (lambda: fl.cross_entropy(Z, T, ignore_index=3), ValueError, r"ignore_index.*3"),
    "soft others": (lambda: fl.cross_entropy(Z, T, smoothing_over="others"), ValueError, r"smoothing_over.*'others'"),
    "soft linear": (lambda: fl.linear_cross_entropy(Z, torch.zeros(7, 5), T), ValueError, r"linear form"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        call()
