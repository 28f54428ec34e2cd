"""The Triton kernels: the shared suite on the cases that differ in them, and what is theirs alone.

Where there is no GPU, Triton's interpreter runs them on CPU tensors, in small blocks (launch.INTERPRETED_TILES): of the
suite's shapes, most cross blocks and some the spans of four blocks. On a GPU the tests of test_gpu.py take over.
"""

import subprocess
import sys
from collections import Counter
from functools import partial
from typing import ClassVar

import pytest
import test_linear
import torch
from kernel_suite import KernelSuite, check_operators
from oracle import assert_as_accurate_as
from row_losses import computed
from row_suite import (
    DTYPES,
    Problem,
    RowLossSuite,
    assert_same_bits,
    cast,
    class_weights,
    compute_dtype,
    layouts,
    logits_and_targets,
    modules_of_losses,
    with_gradient,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedloss as fl
from fusedloss import backends
from fusedloss.backends import triton
from fusedloss.definition.projection import Form, Projection, dense_logits
from fusedloss.definition.rows import Rows, Spec
from fusedloss.engine import operators as ops
from fusedloss.engine.dispatch import row_loss
from fusedloss.losses.supcon import LOG_SUM_EXP

if backends.unavailable("triton", torch.device("cpu")) is not None:
    pytest.skip(f"triton: {backends.unavailable('triton', torch.device('cpu'))}", allow_module_level=True)

from fusedloss.triton_kernels import launch, scale

BLOCK, SPAN = launch.tile(300, 4).block, launch.SPAN * launch.tile(300, 4).block

SUITES = {name: module.TestRowLoss for name, module in modules_of_losses().items()}
CASES = {f"{loss} {case}": case for loss, suite in SUITES.items() for case in suite.CASES}


@pytest.fixture
def impl() -> str:
    return "triton"


@pytest.fixture
def compiled_impl() -> str:
    return "triton"


@pytest.mark.covering(1)
class TestRowLoss(RowLossSuite):
    """All of the suite, on one case for each way through the kernels."""

    CASES: ClassVar = [
        CASES["cross_entropy cross_entropy"],
        CASES["mixed_cross_entropy top 2"],
        CASES["dsc one-vs-rest"],
        CASES["flex dual focal"],
    ]
    CERTAIN: ClassVar = [case for suite in SUITES.values() for case in suite.CERTAIN[1::4]]

    # Too slow for the interpreter; `--triton` runs them.
    test_gradcheck = None
    test_long_rows = None
    test_inplace_backward_gives_the_same_bits = None


@pytest.mark.covering(1)
class TestKernels(KernelSuite):
    EVERY_CASE = CASES
    SUMS: ClassVar = [(5, 9), (70, 9), (20, BLOCK + 1)]
    SCALE_PROGRAMS: ClassVar = (scale, "PROGRAMS")


@pytest.mark.parametrize("case", TestRowLoss.CASES, ids=str)
def test_long_rows(case, generator):
    problem = Problem.make(case, (2, 8193), generator, torch.float32, "everything")
    upstream = problem.upstream(generator)
    problem.check(*problem.run("triton", upstream), upstream)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TestRowLoss.CASES, ids=str)
def test_inplace_backward_gives_the_same_bits(case, dtype, generator):
    problem = Problem.make(case, (6, BLOCK + 1), generator, dtype, "everything")
    upstream = problem.upstream(generator)
    fresh = problem.run("triton", upstream)
    for name, z in layouts(problem.z):
        if z.stride(1) == 1:
            loss, gradient = problem.run("triton", upstream, z, inplace_backward=True)
            assert gradient.data_ptr() == z.data_ptr(), name
            assert_same_bits((loss, gradient), fresh, about=name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case not in TestRowLoss.CASES])
def test_every_other_case(name, dtype, generator):
    """The epilogues, with all of their parameters; rows in one block, and in three."""
    for shape in ((7, 3), (5, 2 * BLOCK + 1)):
        problem = Problem.make(CASES[name], shape, generator, dtype, "everything")
        upstream = problem.upstream(generator)
        problem.check(*problem.run("triton", upstream), upstream)


def test_its_epilogues_are_those_of_the_engine():
    """Each with as many parameters."""
    assert backends.BACKENDS["triton"].epilogues == backends.BACKENDS["cpu"].epilogues


# --- blocks, spans and programs ---


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "name", ["cross_entropy cross_entropy", "mixed_cross_entropy top 2", "flex dual focal", "dsc one-vs-rest"]
)
@pytest.mark.parametrize("classes", [BLOCK, BLOCK + 1, SPAN - 1, SPAN + 1, 2 * SPAN + BLOCK + 3])
def test_a_split_row_has_the_same_bits(name, classes, generator, monkeypatch):
    problem = Problem.make(CASES[name], (9, classes), generator, torch.float32, "everything")
    problem.z[1, BLOCK // 2] = problem.z[1, -1] = 20.0  # a tie between programs
    problem.z[2, 2 * name.startswith("dsc") : BLOCK] = -torch.inf  # of one-vs-rest the reference wants two classes
    problem.target[2] = classes - 1
    problem.z[4] = torch.nan
    upstream = problem.upstream(generator)
    results = []
    for programs in (2**30, 0):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        results.append(problem.run("triton", upstream))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    counted = torch.arange(9) != 4
    rows = Problem(problem.case, problem.z[counted], problem.target[counted], problem.own, problem.shared)
    rows.check(results[0][0][counted], results[0][1][counted], upstream[counted])


@pytest.mark.covering(1)
@pytest.mark.parametrize("classes", [3, BLOCK, 2 * SPAN + BLOCK + 3])
@pytest.mark.parametrize("name", ["focal_loss", "mixed_cross_entropy", "dsc_loss"])
def test_loss_and_gradient_in_one_launch(name, classes, generator, monkeypatch):
    """The bits of the two passes."""
    sources = [torch.randn(n, 8, generator=generator).requires_grad_() for n in (9, classes)]
    target = torch.randint(classes, (9,), generator=generator)
    target[4] = -100
    own = {"alpha": 0.3} if name == "mixed_cross_entropy" else {}
    launches: Counter[str] = Counter()
    run, results = triton._run, []

    def counted(kernel, *arguments, **constants):
        launches[kernel.fn.__name__] += 1
        run(kernel, *arguments, **constants)

    monkeypatch.setattr(triton, "_run", counted)
    tables = (launch.PROGRAMS, 2**30)  # whole rows; split where they can be
    for programs in (0, *tables):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        launches.clear()
        loss = getattr(fl, f"linear_{name}")(*sources, target, impl="triton", **own)
        results.append((loss, *torch.autograd.grad(loss, sources)))
        if programs == 0:
            assert launches["gradient_pass"] == (name == "dsc_loss")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("classes", [1, 2, BLOCK - 1, SPAN, SPAN + BLOCK + 5])
def test_the_largest_logits(classes, generator, monkeypatch):
    """Of the lanes of threads, the blocks and the spans: the lower class where many logits are the same, or -inf."""
    z = torch.randint(-3, 3, (64, classes), generator=generator).to(torch.bfloat16)
    z[:8] += 9.0 * (torch.rand(8, classes, generator=generator) < 0.01)
    z[8:16] = -torch.inf
    z[torch.arange(8, 16), torch.randint(classes, (8,), generator=generator)] = 1.0
    z[16:24, : classes // 2] = -torch.inf
    z[24:32, classes // 2 + 1 :] = -torch.inf
    rows = Rows.of(z, torch.randint(classes, (64,), generator=generator))
    of_target = z.gather(1, rows.target[:, None])
    expected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :2]
    expected = torch.nn.functional.pad(expected, (0, 2 - expected.shape[1]), value=-1)
    lower = torch.where(z < of_target, z, -torch.inf).float()
    below = torch.where(lower.amax(1) == -torch.inf, -1, lower.argmax(1))
    for programs in (2**30, 0):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        _, _, index, *_ = ops.forward(*rows, None, Spec("triton", top_k=2, below=True).encode())
        assert torch.equal(index, torch.stack([*expected.unbind(1), below]))


def test_ties_go_to_the_lowest_index(generator, monkeypatch):
    """In a block, and where blocks and spans merge; few long rows are split, and many are not."""
    tile, most = launch.Tile(1, 4096, 8), 2**18
    shapes = ((1, 4 * 4096), (1, 4 * 4096 + 1), (132, most), (133, most))
    assert [launch.spans(*shape, tile, 132) for shape in shapes] == [1, 2, 16, 1]
    for columns in ((3, 5), (BLOCK - 1, BLOCK), (SPAN - 1, SPAN), (7, SPAN + 2, 2 * SPAN)):
        z = torch.randn(1, 2 * SPAN + 1, generator=generator)
        z[0, list(columns)] = 8.0
        for programs in (2**30, 0):
            monkeypatch.setattr(launch, "PROGRAMS", programs)
            _, _, index, *_ = ops.forward(*Rows.of(z, torch.tensor([11])), None, Spec("triton", top_k=2).encode())
            assert tuple(index[:, 0].tolist()) == columns[:2]


# --- losses against a second row ---


DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tv", "skew_kl", "skew_reverse_kl"]
#: One class, a part of a block, and rows that are split.
WIDTHS = [1, 37, SPAN + 3]
#: What of a row is read: all of it, but where `hard_weight` is.
DISTILLATION = {
    "alone": {},
    "temperature": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "target": {"hard_weight": 0.75},
    "both": {"temperature": 0.5, "hard_weight": 2.0, "return_stats": True},
}


def two_rows(rows, classes, generator, dtype):
    """Logits of student and teacher, and targets."""
    student, target = logits_and_targets(rows, classes, generator, dtype)
    return student, logits_and_targets(rows, classes, generator, dtype)[0], target


def check_two_rows(loss, student, second, terms, monkeypatch, **inplace):
    """A loss of (logits, second row, impl=...) whole and split, by the tolerance rule. `terms` cancel in its gradient.

    The second of the rows is left out and holds NaN.
    """
    student[1] = second[1] = torch.nan
    upstream, results = torch.tensor([1.0, 2.0, -0.5, 3.0, 0.25]).double(), []
    for programs in (2**30, 0):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        z = computed(student.clone()) if programs and inplace else student
        options = inplace if programs else {}
        results.append(with_gradient(lambda x, o=options: loss(x, second, impl="triton", **o), z, upstream))
    assert_same_bits(*results)
    compute = compute_dtype(student.dtype)
    of = [(student.to(dtype), second.to(dtype)) for dtype in (compute, torch.float64)]
    (eager, eager_slope), (truth, slope) = (
        with_gradient(lambda x, y=y: loss(x, y, impl="reference"), z, upstream) for z, y in of
    )
    rows = torch.tensor([0, 2, 3, 4])
    ulps = {torch.float64: 5000, torch.float32: 32}.get(student.dtype, 1)
    value, gradient = results[0]
    assert value[1] == 0 and (gradient[1] == 0).all()
    scale = slope.abs() + terms * upstream[:, None].abs()
    assert_as_accurate_as(value[rows], eager[rows], truth[rows], 5000 if student.dtype == torch.float64 else 16)
    assert_as_accurate_as(gradient[rows], eager_slope.to(student.dtype)[rows], slope[rows], ulps, scale[rows])


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", DISTILLATION)
@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence, classes, options, dtype, generator, monkeypatch):
    student, teacher, target = two_rows(5, classes, generator, dtype)
    own = DISTILLATION[options] | {"target": target, "token_weight": torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0])}

    def loss(x, y, impl):
        result = fl.distillation_loss(
            x, y, divergence=divergence, reduction="none", impl=impl, **cast(own, compute_dtype(x.dtype))
        )
        return result[0] if isinstance(result, tuple) else result

    factor = 1 / own.get("temperature", 1.0)
    p, y = ((x.double() * factor).log_softmax(-1) for x in (student, teacher))
    terms = (p.exp() + y.exp()) * (1 + (p - y).abs()) * max(factor, 1 / factor)
    hard = own.get("hard_weight", 0.0)
    terms += hard * (student.double().softmax(-1) + torch.nn.functional.one_hot(target, classes))
    check_two_rows(loss, student, teacher, terms, monkeypatch)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "everything", "temperature"])
@pytest.mark.parametrize("classes", WIDTHS)
def test_soft_targets(classes, options, dtype, generator, monkeypatch):
    """Of which some are 0, and none sum to 1."""
    student, _, _ = two_rows(5, classes, generator, dtype)
    target = (torch.rand(5, classes, generator=generator) - 0.25).clamp(min=0).to(compute_dtype(dtype))
    weight = class_weights(classes, generator)
    own = {
        "plain": {},
        "everything": {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01},
        "temperature": {"weight": weight, "temperature": 0.5},
    }[options] | {"token_weight": torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0]), "reduction": "none"}
    loss = lambda x, y, **o: fl.cross_entropy(x, y, **cast(own, compute_dtype(x.dtype)), **o)  # noqa: E731
    terms = 3 * (target + 0.1) + target.sum(-1, keepdim=True) * student.double().softmax(-1)
    check_two_rows(loss, student, target, 4 * terms, monkeypatch, inplace_backward=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_are_close(divergence, generator):
    """The digits of a divergence of 5e-7, and none at all of the same row."""
    teacher = 3 * torch.randn(4, 2 * SPAN + 1, generator=generator)
    student = teacher + 1e-3 * torch.randn(teacher.shape, generator=generator)
    student[0] = teacher[0]
    loss = partial(fl.distillation_loss, divergence=divergence, reduction="none")
    found, gradient = with_gradient(lambda x: loss(x, teacher, impl="triton"), student)
    expected, slope = with_gradient(lambda x: loss(x, teacher.double(), impl="reference"), student.double())
    assert found[0] == 0 and (gradient[0] == 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    error = (gradient - slope).norm(dim=-1)[1:] / slope.norm(dim=-1)[1:]
    assert (error < 1e-3).all()  # of d, which is a difference of logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_classes_and_nan_in_two_rows(divergence, dtype, generator):
    """A class that neither row has is none. One that the student alone lacks makes some losses infinite."""
    student, teacher, target = two_rows(7, BLOCK + 9, generator, dtype)
    student[:, 5] = teacher[:, 5] = -torch.inf
    teacher[1, 7:99] = student[2, BLOCK:] = -torch.inf
    student[3, :] = -torch.inf
    student[3, 2] = teacher[3, 2] = 1.0
    student[4, 8], teacher[5, BLOCK + 1] = torch.nan, torch.nan
    target[1:4], target[6] = torch.tensor([3, 2, 2]), -100
    student[6], teacher[6] = torch.nan, torch.inf
    results = []
    for impl, dtypes in (("triton", dtype), ("reference", torch.float64)):
        z, y = student.to(dtypes), teacher.to(dtypes)
        options = {"divergence": divergence, "target": target, "hard_weight": 0.5, "reduction": "none", "impl": impl}
        results.append(with_gradient(lambda x, y=y, o=options: fl.distillation_loss(x, y, **o), z))
    (found, gradient), (expected, slope) = results
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert expected[1].isinf() == (divergence == "reverse_kl") and expected[2].isinf() == (divergence == "forward_kl")
    assert found[4:6].isnan().all() and gradient[4:6].isnan().all() and (gradient[6] == 0).all()
    finite = expected.isfinite()
    rough = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.double()[finite], slope[finite], rtol=rough, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float64, "mean"), (torch.float64, "none"), (torch.float16, "mean")], ids=str
)
def test_linear_distillation(dtype, reduction, generator, kernel_calls):
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
    for impl, kind in (("triton", dtype), ("reference", torch.float64)):
        own = [x.to(kind).requires_grad_(i in (0, 1, 4)) for i, x in enumerate(sources)]
        *layers, bias, teacher_bias = own
        budget = 3 * 3 * 300 * kind.itemsize  # the logits, the softcap's tanh and the teacher's
        loss = fl.linear_distillation_loss(
            *layers, linear_bias=bias, teacher_bias=teacher_bias, budget=budget, impl=impl, **options
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (own[0], own[1], own[4]))))
    for found, right in zip(*results, strict=True):
        error = (found.double() - right).norm() / right.norm()
        assert error < (1e-12 if dtype == torch.float64 else 4e-3)
    if reduction == "mean" and dtype == torch.float64:
        assert kernel_calls == {("with_gradient", "triton"): 3, ("scale_", "triton"): 3}


@pytest.mark.parametrize("name", ["forward_kl", "soft_targets"])
def test_sums_of_two_rows_over_some_of_the_classes(name, generator):
    """Of ignored rows nothing, and of the others what the whole rows have."""
    student, teacher, target = two_rows(5, SPAN + 9, generator, torch.float32)
    target[2] = -100
    params, cut = [torch.tensor(0.5)] * (2 if name == "soft_targets" else 1), SPAN + 2
    rows = Rows.of(student, target, params=params)._replace(teacher=[teacher])
    results = []
    for impl in ("triton", "cpu"):
        spec = Spec(impl, name).encode()
        _, statistics, index, *_ = ops.forward(*rows, None, spec)
        parts = [
            rows._replace(hidden=[student[:, part]], teacher=[teacher[:, part]], target=target.clamp(max=-1))
            for part in (slice(cut), slice(cut, None))
        ]
        results.append(sum(ops.sums(*part, statistics, index, None, None, spec) for part in parts))
        assert results[-1].shape == (3, 5) and (results[-1][:, 2] == 0).all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_kernels_that_make_logits_have_no_second_row(generator):
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(9, 8, generator=generator)
    with pytest.raises(ValueError, match="impl='triton_fused' has no losses against a second row"):
        fl.linear_distillation_loss(hidden, weight, hidden, weight, impl="triton_fused")


# --- linear forms, torch.compile ---


@pytest.mark.parametrize(("budget", "reduction"), [(300 * 4 * 3, "mean"), (None, "mean"), (300 * 4 * 3, "none")])
def test_linear_forms(reduction, budget, generator, kernel_calls):
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (7, 300))
    target = torch.randint(300, (7,), generator=generator)
    target[2] = -100
    results = []
    for impl in ("triton", "reference"):
        loss = fl.linear_focal_loss(hidden, weight, target, budget=budget, reduction=reduction, impl=impl)
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    # Of three chunks the last has the ignored row alone, which has no gradient.
    if reduction == "mean":
        used = {"with_gradient": 2, "forward": 1, "scale_": 2} if budget else {"with_gradient": 1, "scale_": 2}
    else:
        used = {"forward": 3, "backward": 2}
    assert kernel_calls == {(name, "triton"): count for name, count in used.items()}


@pytest.mark.parametrize("impl", ["triton", "triton_fused"])
@pytest.mark.parametrize("name", test_linear.SMALL_FACTORS_OF_KERNELS)
def test_small_factors_in_float16(name, impl, generator):
    test_linear.check_small_factors(name, generator, impl)


# --- products: logits that are made on the chip ---


PRODUCT_SPAN = launch.INTERPRETED_PRODUCT_TILE.block * launch.INTERPRETED_PRODUCT_TILE.span


@pytest.mark.covering(1)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", test_linear.LOSSES)
def test_products_equal_the_row_form(name, softcap, reduction, generator, kernel_calls):
    data = test_linear.Data.make(generator, rows=9)
    budget = test_linear.budget_for(4, data.sources)
    options = data.options(name) | {"reduction": reduction, "token_weight": data.token_weight}
    got, stats = test_linear.run_linear(
        test_linear.LOSSES[name].linear, data.sources, data.target, softcap=softcap, budget=budget,
        return_stats=True, impl="triton_fused", **options,
    )  # fmt: skip
    logits = test_linear.logits_of(data.sources, softcap)
    row = test_linear.LOSSES[name].row
    expected, expected_stats = row(logits, data.target, return_stats=True, impl="reference", **options)
    upstream = torch.rand(got.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(stats, expected_stats, equal_nan=True)
    found, right = (torch.autograd.grad(loss, data.sources, upstream) for loss in (got, expected))
    torch.testing.assert_close(found, right)
    assert {impl for _, impl in kernel_calls} == {"triton_fused"}
    assert sum(kernel_calls[name, "triton_fused"] for name in ("with_gradient", "backward")) == 3


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", test_linear.LOSSES)
def test_products_are_as_accurate_as_pytorch(name, dtype, generator):
    data = test_linear.Data.make(generator, dtype, rows=20)
    test_linear.check_accuracy(name, data, "mean", generator, "triton_fused")


@pytest.mark.covering(1)
@pytest.mark.parametrize("features", [1, 64, 65])
@pytest.mark.parametrize("classes", [1, PRODUCT_SPAN, PRODUCT_SPAN + 1, 2 * PRODUCT_SPAN + 131])
@pytest.mark.parametrize("transposed", [False, True], ids=["by rows", "by columns"])
def test_products_of_every_size(transposed, classes, features, generator):
    shapes = ((6, features), (classes, features))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if transposed:
        hidden, weight = (x.t().contiguous().t() for x in (hidden, weight))
    sources = (hidden.requires_grad_(), weight.requires_grad_())
    target = torch.randint(classes, (6,), generator=generator)
    target[1], target[2] = -100, classes - 1
    candidates = torch.randint(classes, (6, 3), generator=generator)
    options = {"alpha": 0.3, "candidates": candidates, "label_smoothing": 0.1}
    got = fl.linear_mixed_cross_entropy(*sources, target, impl="triton_fused", **options)
    expected = fl.mixed_cross_entropy(hidden @ weight.t(), target, impl="reference", **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, sources), torch.autograd.grad(expected, sources))


@pytest.mark.parametrize("loss", [fl.linear_cross_entropy, fl.linear_dsc_loss], ids=lambda loss: loss.__name__)
def test_evaluation_stores_no_logits(loss, generator):
    """Not one chunk of them: the largest tensor is the statistics of the rows."""
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
            return result

    target = torch.randint(1500, (12,), generator=generator)
    with torch.no_grad(), Sizes():
        loss(hidden, weight, target, impl="triton_fused")
    assert largest < 12 * 1500 / 10


def test_a_target_out_of_range_makes_the_row_of_a_product_nan(generator, monkeypatch):
    monkeypatch.setattr(backends.triton, "check_indices", lambda *arguments: None)  # on a GPU nobody looks beforehand
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(300, 8, generator=generator)
    target = torch.randint(300, (6,), generator=generator)
    options = {"reduction": "none", "impl": "triton_fused"}
    before = fl.linear_cross_entropy(hidden, weight, target, **options)
    for value in (-1, 300, 2**32 + 1):
        target[2] = value
        loss = fl.linear_cross_entropy(hidden, weight, target, **options)
        assert loss[2].isnan()
        assert torch.equal(loss[torch.arange(6) != 2], before[torch.arange(6) != 2])


@pytest.mark.parametrize(
    "own", [None, {"contrast_includes_batch": True}, {"self_index": torch.arange(40) - 1}], ids=str
)
def test_supervised_contrastive_loss_of_products(own, generator):
    """An anchor among the others is masked. -1 names none of them, and is no row that is ignored."""
    features, bank = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (40, 30))
    labels = torch.randint(5, (70,), generator=generator)
    sources = (features,) if own is None else (features, bank)
    results = []
    for impl in ("triton_fused", "triton", "cpu"):
        others = {} if own is None else {"contrast": torch.cat([features, bank]), "contrast_labels": labels, **own}
        loss = fl.supcon_loss(features, labels[:40], impl=impl, **others)
        results.append((loss.detach(), *torch.autograd.grad(loss, sources)))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_products_are_for_linear_forms():
    z, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="impl='triton_fused' is for linear forms; losses of logits take one of ref"):
        fl.cross_entropy(z, target, impl="triton_fused")
    with pytest.raises(ValueError, match="impl must be one of"):
        fl.nn.FocalLoss(impl="triton_fused")
    assert fl.nn.LinearFocalLoss(4, 5, impl="triton_fused").impl == "triton_fused"


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_opcheck_of_products(masked, generator):
    shapes = (5, 8), (21, 8), (21,)
    form = Form(mask_target=True) if masked else Form(2.0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    rows = Rows.of(Projection([hidden], [weight], bias, form), torch.tensor([3, 20, -100, 0, 7]))
    spec = Spec("triton_fused", "log_sum_exp" if masked else "cross_entropy", form=form)
    check_operators(rows, spec, generator)
    dsc = rows._replace(params=[torch.tensor(x) for x in (0.5, 1.0, 1.0, 1.0)])
    _, *saved, _, _ = ops.forward(*rows, None, spec._replace(epilogue="", top_k=1).encode())
    spec = spec._replace(epilogue="dsc_one_vs_rest")
    torch.library.opcheck(ops.sums, (*dsc, *saved, None, None, spec.encode()))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("impl", ["cpu", "triton", "triton_fused"])
def test_a_masked_target_under_a_softcap(impl, reduction, generator):
    """Its logit is -inf, of which the softcap's slope must not be taken."""
    sources = [torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 300)]
    target, form = torch.tensor([3, 299, -100, 0, 7]), Form(2.0, drop_ignored=False, mask_target=True)
    options = {"ignore_index": -100, "reduction": reduction, "impl": impl}
    loss = row_loss("masked", Projection(sources[:1], sources[1:], None, form), target, LOG_SUM_EXP, **options)
    expected = dense_logits(sources[:1], sources[1:], None, form, target).logsumexp(-1)[target >= 0]
    torch.testing.assert_close(loss.sum(), expected.sum())
    got, true = (torch.autograd.grad(x.sum(), sources) for x in (loss, expected))
    torch.testing.assert_close(got, true)


@pytest.mark.compile
def test_compiled(generator):
    z, target = logits_and_targets(5, 300, generator, torch.float32)

    def loss(x):
        return fl.mixed_cross_entropy(x, target, alpha=0.25, impl="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradient(compiled, z), with_gradient(loss, z))


def test_opcheck(generator):
    z, target = logits_and_targets(5, 21, generator, torch.float32)
    scalars = torch.tensor([0.9, 0.1 / 21, 0.01, 1.0])
    rows = Rows.of(z, target, params=[torch.tensor(0.25)], scalars=scalars)
    check_operators(rows, Spec("triton", "mixed_cross_entropy", top_k=2, mean=True), generator)


# --- where it runs ---


def test_an_unknown_epilogue_raises():
    rows = Rows.of(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no epilogue named 'perplexity'"):
        ops.forward(*rows, None, Spec("triton", "perplexity").encode())


OUTSIDE = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
{setup}
import torch, fusedloss as fl
z, target = torch.zeros(2, 3), torch.tensor([0, 1])
fl.cross_entropy(z, target)
print("triton" in sys.modules and sys.modules["triton"] is not None)
try:
    fl.cross_entropy(z, target, impl="triton")
except RuntimeError as error:
    print(error)
if not {setup!r}:
    from fusedloss.backends import triton
    for statement in (
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('highest')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "torch.backends.cuda.matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'",
    ):
        exec(statement)
        print(triton._precision(z), triton._precision(z.double()))
"""


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("", "it runs on GPU tensors, but the input is on cpu"),
        ("sys.modules['triton'] = None; os.environ['TRITON_INTERPRET'] = '1'", "triton is not installed"),
    ],
    ids=["", "without triton"],
)
def test_outside_of_the_interpreter(setup, reason):
    """Triton is imported when it is needed, tensors on a CPU are refused, and the precision of products is torch's.

    After the newer way of setting that, reading it the older way raises.
    """
    done = subprocess.run([sys.executable, "-c", OUTSIDE.format(setup=setup)], capture_output=True, text=True)
    imported, refused, *precisions = done.stdout.splitlines()
    assert (imported, refused) == ("False", f"impl='triton' cannot run: {reason}"), done.stderr
    if not setup:
        assert precisions == [f"{x} ieee" for x in ("ieee", "tf32", "ieee", "tf32", "ieee", "tf32")], done.stderr
    assert backends.resolve(None, torch.device("cpu")) == "cpu"  # nobody gets the interpreter without asking
