"""Losses against a second row: a teacher's divergences, and cross-entropy with targets for all the classes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as, assert_rows_as_accurate_as
from products import Products
from torch import Tensor

import fusedloss as fl
from fusedloss.engine import chunks

INF, NAN = math.inf, math.nan
BETA = {"jsd": 0.3, "skew_kl": 0.1, "skew_reverse_kl": 0.2}
DIVERGENCES = ("forward_kl", "reverse_kl", "tv", *BETA)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return torch.where(a == 0, 0, a * (log_a - log_b)).sum(-1)


def dense(z: Tensor, t: Tensor, divergence: str = "forward_kl", beta: Any = None, temperature: Any = 1.0) -> Tensor:
    """As a user would write it in PyTorch, in the dtype of the logits but float32 at least."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    log_p, log_y = ((x.to(dtype) / temperature).log_softmax(-1) for x in (z, t))
    if divergence == "forward_kl":
        return kl(log_y, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_y)
    if divergence == "tv":
        return (log_p.exp() - log_y.exp()).abs().sum(-1) / 2
    share = 1 - beta if divergence == "skew_reverse_kl" else beta
    log_m = (share * log_y.exp() + (1 - share) * log_p.exp()).log()
    if divergence == "jsd":
        return beta * kl(log_y, log_m) + (1 - beta) * kl(log_p, log_m)
    return kl(log_y, log_m) if divergence == "skew_kl" else kl(log_p, log_m)


def problem(generator: torch.Generator, classes: int, rows: int = 5, dtype: Any = torch.float64) -> list[Tensor]:
    return [(3 * torch.randn(rows, classes, generator=generator).double()).to(dtype) for _ in range(2)]


def differentiated(function: Any, z: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = function(z)
    return loss.detach(), torch.autograd.grad(loss, z, upstream.to(loss.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_divergence
def test_against_the_formula(divergence, dtype, impl, generator, kernel_calls):
    """With temperature and a cross-entropy beside it that has none; rows that are left out are not looked at."""
    beta, upstream = BETA.get(divergence), torch.tensor([0.5, -1.5, 2.0, 1.0, 0.7]).double()
    for classes in (1, 2, 37, 2048 + 5):
        z, t = problem(generator, classes, dtype=dtype)
        target = torch.tensor([0, classes - 1, -100, classes // 2, 0])
        for temperature, hard in ((1.0, 0.0), (1.0, 0.5), (2.5, 0.5)):
            own: dict[str, Any] = {"divergence": divergence, "beta": beta, "temperature": temperature}
            more = {"target": target, "hard_weight": hard, "scale_by_temperature_squared": True, "reduction": "none"}

            def formula(x, t=t, own=own, hard=hard, temperature=temperature, target=target):
                ce = F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), target, reduction="none")
                loss = temperature**2 * dense(x, t.to(x.dtype), **own) + hard * ce
                return loss.masked_fill(target == -100, 0)

            x, y = z.clone(), t.clone()
            x[2], y[2] = NAN, INF
            got = differentiated(
                lambda x, y=y, o=own, m=more: fl.distillation_loss(x, y, **o, **m, impl=impl), x, upstream
            )
            theirs = differentiated(formula, z, upstream)
            true = differentiated(formula, z.double(), upstream)
            assert_as_accurate_as(got[0], theirs[0], true[0], ulps=16, scale=true[0].abs() + 1)
            if dtype in (torch.bfloat16, torch.float16):
                assert_rows_as_accurate_as(got[1], theirs[1], true[1])
            else:
                assert_as_accurate_as(got[1], theirs[1], true[1], ulps=8, scale=true[1].abs() + 1)
            assert not got[1][2].any()
    assert impl == "reference" or (kernel_calls[("forward", impl)] and kernel_calls[("backward", impl)])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@each_divergence
def test_gradients_made_with_the_loss(divergence, dtype, impl, generator, kernel_calls):
    """Of whole and broken blocks of columns, at 1 and at another upstream gradient; a temperature, a cross-entropy."""
    beta = BETA.get(divergence)
    for classes in (1, 37, 65, 2048, 3 * 2048 + 32, 2 * 2048 + 5):
        z, t = problem(generator, classes, dtype=dtype)
        target, weight = torch.tensor([0, classes - 1, -100, classes // 2, 0]), torch.rand(5, generator=generator)
        for temperature, hard in ((1.0, 0.0), (1.0, 0.5), (2.5, 0.5)):
            own: dict[str, Any] = {"divergence": divergence, "beta": beta, "temperature": temperature}
            tokens = weight.to(torch.promote_types(dtype, torch.float32))
            more = {"target": target, "hard_weight": hard, "token_weight": tokens, "reduction": "sum", "impl": impl}

            def formula(x, t=t, own=own, hard=hard, target=target, weight=weight):
                ce = F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), target, reduction="none")
                rows = dense(x, t.to(x.dtype), **own) + hard * ce
                return (weight.to(rows.dtype) * rows.masked_fill(target == -100, 0)).sum()

            for upstream in (torch.tensor(1.0), torch.tensor(-0.37)):
                got = differentiated(
                    lambda x, t=t, o=own, m=more: fl.distillation_loss(x, t, **o, **m),
                    z, upstream,
                )  # fmt: skip
                theirs, true = (differentiated(formula, x, upstream) for x in (z, z.double()))
                assert_as_accurate_as(got[0], theirs[0], true[0], ulps=16, scale=true[0].abs() + 1)
                if dtype == torch.bfloat16:
                    assert_rows_as_accurate_as(got[1], theirs[1], true[1])
                else:
                    assert_as_accurate_as(got[1], theirs[1], true[1], ulps=8, scale=true[1].abs() + 1)
                assert not got[1][2].any()
    assert impl != "cpu" or set(kernel_calls) == {("with_gradient", impl), ("scale_", impl)}


@each_divergence
def test_close_rows_keep_their_digits(divergence, impl, generator):
    """Where the plain form in float32 has no digit left; equal rows give 0."""
    for classes in (2, 50, 4000):
        z = math.log(classes) / 3 * torch.randn(4, classes, generator=generator)
        t = z + 1e-3 * torch.randn(4, classes, generator=generator)
        own = {"divergence": divergence, "reduction": "none", "impl": impl}
        true = dense(z.double(), t.double(), divergence, {"jsd": 0.5}.get(divergence, 0.1))
        torch.testing.assert_close(fl.distillation_loss(z, t, **own).double(), true, rtol=1e-5, atol=0)
    for dtype in DTYPES:
        loss, gradient = differentiated(
            lambda x: fl.distillation_loss(x, x.detach().clone(), **own, temperature=1.7), z.to(dtype), torch.ones(4)
        )
        assert not loss.any() and not gradient.any()


@pytest.mark.parametrize("beta", [0.01, 0.07, 0.5, 0.9])
@pytest.mark.parametrize("divergence", BETA)
def test_shares_of_a_mixture(divergence, beta, impl, generator):
    """Even ones, and those that are almost one of the rows, of rows that are close, apart and far apart."""
    z = torch.randn(3, 300, generator=generator)
    t = z + torch.tensor([1e-2, 1.0, 10.0])[:, None] * torch.randn(3, 300, generator=generator)
    own: dict[str, Any] = {"divergence": divergence, "beta": beta}
    got = differentiated(lambda x: fl.distillation_loss(x, t, **own, reduction="none", impl=impl), z, torch.ones(3))
    true = differentiated(lambda x: dense(x, t.double(), **own), z.double(), torch.ones(3))
    torch.testing.assert_close(got[0].double(), true[0], rtol=1e-5, atol=0)
    assert ((got[1] - true[1]).norm(dim=1) < 2e-5 * true[1].norm(dim=1)).all()


@each_divergence
def test_masked_classes(divergence, impl, generator):
    """One that neither row has is none; one that the teacher alone, or the student alone, has."""
    z, t = problem(generator, 9)
    z[0, 2] = t[0, 2] = z[1, 3] = t[2, 4] = -INF
    loss, gradient = differentiated(
        lambda x: fl.distillation_loss(
            x, t, divergence=divergence, beta=BETA.get(divergence), reduction="none", impl=impl
        ),
        z, torch.ones(5),
    )  # fmt: skip
    without = [torch.cat([x[0, :2], x[0, 3:]])[None] for x in (z, t)]
    true = dense(*without, divergence, BETA.get(divergence))[0]
    torch.testing.assert_close(loss[0], true)
    assert gradient[0, 2] == 0 and gradient[0].isfinite().all()
    assert (loss[1] == INF) == (divergence == "forward_kl") and (loss[2] == INF) == (divergence == "reverse_kl")
    rest = dense(z[1:3].clamp(min=-1e4), t[1:3].clamp(min=-1e4), divergence, BETA.get(divergence))
    for row in (1, 2):
        if loss[row].isfinite():
            torch.testing.assert_close(loss[row], rest[row - 1])
            assert gradient[row].isfinite().all()
    z[3, 0] = NAN
    assert fl.distillation_loss(z, t, divergence=divergence, reduction="none", impl=impl)[3].isnan()
    assert fl.distillation_loss(t, z, divergence=divergence, reduction="none", impl=impl)[3].isnan()


@each_divergence
def test_rows_far_from_0(divergence, impl, generator):
    """A common offset of a row's logits is none of the loss's."""
    z, t = problem(generator, 9, dtype=torch.float32)
    own = {"divergence": divergence, "beta": BETA.get(divergence), "reduction": "none", "impl": impl}
    expected = fl.distillation_loss(z.round(), t.round(), **own)
    for offset in (2.0**12, -(2.0**20)):
        torch.testing.assert_close(fl.distillation_loss(z.round() + offset, t.round(), **own), expected)
    certain = torch.tensor([[1e30, 0.0, -1e30]])
    got = fl.distillation_loss(torch.zeros(1, 3), certain, **own).item()
    limits = {"forward_kl": math.log(3), "tv": 2 / 3}
    assert got == pytest.approx(limits.get(divergence, got), rel=1e-6)
    exact = {**own, "impl": "reference"}
    for classes in (5, 300):
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


@pytest.mark.parametrize("divergence", BETA)
def test_probabilities_too_small_to_divide_by(divergence, impl, generator):
    """Classes whose mixture is so small that its inverse is infinite add nothing."""
    for dtype, lags in ((torch.float32, (80, 95)), (torch.float64, (700, 720))):
        z = torch.linspace(*lags, 100, dtype=dtype).neg().repeat(2, 1)
        z[:, :70], t = 0, z + 0.1 * torch.randn(2, 100, generator=generator, dtype=dtype)
        for beta in (0.01, 0.5, 0.99):
            own: dict[str, Any] = {"divergence": divergence, "beta": beta}
            got = differentiated(lambda x, o=own, t=t: fl.distillation_loss(x, t, **o, impl=impl), z, torch.ones(()))
            true = differentiated(lambda x, o=own, t=t: dense(x[:, :70], t[:, :70], **o).mean(), z, torch.ones(()))
            torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-7)


@each_divergence
def test_derivatives(divergence, compiled_impl, generator):
    z, t = problem(generator, 7, rows=3)
    own: dict[str, Any] = {"divergence": divergence, "temperature": 1.7, "target": torch.tensor([0, 3, -100])}
    own |= {"hard_weight": 0.3, "impl": compiled_impl}

    def row(z, reduction="none"):
        return fl.distillation_loss(z, t, **own, reduction=reduction)

    z.requires_grad_()
    assert torch.autograd.gradcheck(row, z) and torch.autograd.gradgradcheck(row, z)
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
    h, w, b = leaves
    student, teacher = 3 * torch.tanh(F.linear(h, w, b) / 3), 2 * torch.tanh(F.linear(*made[3:]) / 2)
    expected = fl.distillation_loss(student, teacher, **own)
    torch.testing.assert_close(linear(h, w, b, "mean"), expected)


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


def test_half_precision_linear_form(compiled_impl, generator):
    for dtype in (torch.bfloat16, torch.float16):
        shapes = (24, 16), (300, 16), (24, 8), (300, 8)
        h, w, th, tw = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
        h.requires_grad_(), w.requires_grad_()
        for divergence in ("forward_kl", "reverse_kl"):
            own = {
                "divergence": divergence,
                "impl": compiled_impl,
                "temperature": 2.0,
                "scale_by_temperature_squared": True,
            }
            loss = fl.linear_distillation_loss(h, w, th, tw, **own, budget=2 * 2 * 300 * 7)
            got = torch.autograd.grad(loss, [h, w])
            exact = [x.detach().double().requires_grad_() for x in (h, w)]
            true = 4 * dense(exact[0] @ exact[1].T, (th.double() @ tw.double().T), divergence, temperature=2.0).mean()
            for ours, theirs in zip(got, torch.autograd.grad(true, exact), strict=True):
                error = (ours.double() - theirs).norm() / theirs.norm()
                assert error < 4 * torch.finfo(dtype).eps


def test_reductions_and_weights(impl, generator):
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


def test_a_tensor_for_temperature(impl, generator):
    z, t = problem(generator, 11)
    own = {"divergence": "jsd", "scale_by_temperature_squared": True, "impl": impl}
    got = fl.distillation_loss(z, t, temperature=torch.tensor(2.5), **own)
    torch.testing.assert_close(got, fl.distillation_loss(z, t, temperature=2.5, **own))
    with pytest.raises(ValueError, match=r"temperature requires grad.*detach"):
        fl.distillation_loss(z, t, temperature=torch.tensor(2.5, requires_grad=True), **own)


@pytest.mark.compile
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_compiled(divergence, generator):
    z, t = problem(generator, 33, dtype=torch.float32)

    def loss(z, t):
        """Several in one graph, whose numbers may be variables of it."""
        own = {"temperature": 2.0, "scale_by_temperature_squared": True, "divergence": divergence}
        total = fl.distillation_loss(z, t, **own, reduction="none").sum()
        total = total + fl.cross_entropy(z, t.softmax(-1), label_smoothing=0.1)
        total = total + fl.linear_distillation_loss(z, t, t + 1, t + 0, softcap=20.0, teacher_softcap=3.0, **own)
        return total + fl.linear_cross_entropy(z, t, t.argmax(-1) % 5, softcap=30.0)

    for function in (torch.compile(loss, fullgraph=True), torch.compile(loss, fullgraph=True, dynamic=True)):
        got, expected = (differentiated(lambda x, f=f: f(x, t), z, torch.tensor(1.0)) for f in (function, loss))
        torch.testing.assert_close(got, expected)


def test_under_vmap(generator):
    z, t = problem(generator, 33)
    each = torch.func.vmap(lambda z, t: fl.distillation_loss(z, t, divergence="jsd"))(z, t)
    torch.testing.assert_close(each, dense(z, t, "jsd", 0.5))


# --- targets for all the classes ---


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_soft_targets(dtype, impl, generator, kernel_calls):
    """As torch's, whatever their sums."""
    for classes in (1, 5, 70):
        z, _ = problem(generator, classes, dtype=dtype)
        y = torch.rand(5, classes, generator=generator).to(dtype)
        w = torch.rand(classes, generator=generator).to(torch.promote_types(dtype, torch.float32))
        for own in ({}, {"label_smoothing": 0.1}, {"weight": w, "label_smoothing": 0.2}):
            for reduction in ("mean", "none"):
                upstream = torch.linspace(0.5, 2, 5).double() if reduction == "none" else torch.tensor(1.0).double()
                got = differentiated(
                    lambda x, o=own, r=reduction, y=y: fl.cross_entropy(x, y, reduction=r, impl=impl, **o), z, upstream
                )
                exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in own.items()}
                own = {
                    k: v.to(torch.promote_types(dtype, torch.float32)) if isinstance(v, Tensor) else v
                    for k, v in own.items()
                }

                def formula(x, y=y, o=own, e=exact, r=reduction):
                    kind = torch.promote_types(x.dtype, torch.float32)
                    return F.cross_entropy(x.to(kind), y.to(kind), reduction=r, **(e if kind == torch.float64 else o))

                theirs, true = differentiated(formula, z, upstream), differentiated(formula, z.double(), upstream)
                assert_as_accurate_as(got[0], theirs[0], true[0], ulps=8)
                if dtype == torch.bfloat16:
                    assert_rows_as_accurate_as(got[1], theirs[1], true[1])
                else:
                    assert_as_accurate_as(got[1], theirs[1], true[1], ulps=8, scale=true[1].abs() + 1)
    assert impl == "reference" or kernel_calls[("forward", impl)]


def test_soft_targets_of_other_kinds(impl, generator):
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
    module = fl.nn.CrossEntropyLoss(impl=impl)
    torch.testing.assert_close(module(z[1:], y[1:]), F.cross_entropy(z[1:], y[1:]))
    assert torch.autograd.gradcheck(
        lambda x: fl.cross_entropy(x, y[1:], z_loss=0.1, label_smoothing=0.1, impl=impl), z[1:].clone().requires_grad_()
    )
    if impl == "reference":
        return
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    fl.cross_entropy(logits, y, z_loss=0.1, inplace_backward=True, impl=impl).backward()
    (expected_gradient,) = torch.autograd.grad(
        fl.cross_entropy(q := z.clone().requires_grad_(), y, z_loss=0.1, impl=impl), q
    )
    torch.testing.assert_close(leaf.grad, expected_gradient)


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
