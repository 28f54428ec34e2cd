"""The Triton kernels: the shared suite on the cases that differ in them, and what is theirs alone.

Where there is no GPU, Triton's interpreter runs them on CPU tensors, in small blocks (launch.INTERPRETED_TILES): of the
suite's shapes, most cross blocks and some the spans of four blocks. On a GPU the tests of test_gpu.py take over.
"""

import subprocess
import sys
from collections import Counter
from typing import ClassVar

import pytest
import test_distillation
import test_linear
import torch
from kernel_suite import CASES, SUITES, WAYS, KernelSuite, check_operators, job_of
from products import Operators
from row_suite import Problem, RowLossSuite, far_apart_rows

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


@pytest.fixture
def impl() -> str:
    return "triton"


@pytest.fixture
def compiled_impl() -> str:
    return "triton"


@pytest.mark.covering(1)
class TestRowLoss(RowLossSuite):
    """All of the suite, on one case for each way through the kernels."""

    CASES: ClassVar = [CASES[name] for name in WAYS]
    CERTAIN: ClassVar = [case for suite in SUITES.values() for case in suite.CERTAIN[1::4]]

    # Too slow for the interpreter; `--triton` runs them.
    test_gradcheck = None
    test_long_rows = None


@pytest.mark.covering(1)
class TestKernels(KernelSuite):
    SUMS: ClassVar = [(5, 9), (70, 9), (20, BLOCK + 1)]
    WIDTHS: ClassVar = [1, 2, BLOCK - 1, SPAN, SPAN + BLOCK + 5]
    DIVISIONS: ClassVar = {"split": (launch, "PROGRAMS", 2**30), "whole": (launch, "PROGRAMS", 0)}
    SCALE_PROGRAMS: ClassVar = (scale, "PROGRAMS")


@pytest.mark.parametrize("case", TestRowLoss.CASES, ids=str)
def test_long_rows(case, generator):
    problem = Problem.make(case, (2, 8193), generator, torch.float32, "everything")
    upstream = problem.upstream(generator)
    problem.check(*problem.run("triton", upstream), upstream)


@pytest.mark.parametrize("linear", [False, True], ids=["row", "linear"])
def test_many_candidates(linear, generator):
    """More than are written out one by one: with the target among them, twice the same, of several blocks."""
    sources = [torch.randn(n, 8, generator=generator).requires_grad_() for n in (5, 2 * BLOCK + 3)]
    target = torch.randint(2 * BLOCK + 3, (5,), generator=generator)
    target[3] = -100
    candidates = torch.randint(2 * BLOCK + 3, (5, 7), generator=generator)
    candidates[:, 4], candidates[:, 5] = target.clamp(min=0), candidates[:, 6]
    results = []
    for impl in ("triton_fused" if linear else "triton", "reference"):
        options = {"alpha": 0.3, "candidates": candidates, "label_smoothing": 0.1, "impl": impl}
        if linear:
            loss = fl.linear_mixed_cross_entropy(*sources, target, **options)
        else:
            loss = fl.mixed_cross_entropy(sources[0] @ sources[1].t(), target, **options)
        results.append((loss, *torch.autograd.grad(loss, sources)))
    torch.testing.assert_close(*results)


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


def test_few_long_rows_are_split_and_many_are_not():
    tile, most = launch.Tile(1, 4096, 8), 2**18
    shapes = ((1, 4 * 4096), (1, 4 * 4096 + 1), (132, most), (133, most))
    assert [launch.spans(*shape, tile, 132) for shape in shapes] == [1, 2, 16, 1]


# --- losses against a second row ---


@pytest.mark.covering(1)
class TestSecondRow(test_distillation.TestSecondRow):
    """The shared tests of what the kernels compute."""

    WIDTHS = (1, 37, SPAN + 3)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", backends.BACKENDS["cpu"].epilogues.pairs)
def test_two_split_rows_have_the_same_bits(epilogue, dtype, generator, monkeypatch):
    rows, spec, row_weight = job_of(epilogue, "triton", 5, 2 * SPAN + 3, dtype, generator)
    results = []
    for programs in (2**30, 0):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        loss, *saved, _ = ops.forward(*rows, None, spec.encode())
        results.append((loss, *saved, *ops.backward(*rows, *saved, row_weight, spec.encode())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_kernels_that_make_logits_have_no_second_row(generator):
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(9, 8, generator=generator)
    with pytest.raises(ValueError, match="impl='triton_fused' has no losses against a second row"):
        fl.linear_distillation_loss(hidden, weight, hidden, weight, impl="triton_fused")


@pytest.mark.parametrize("name", test_linear.SMALL_FACTORS_OF_KERNELS)
def test_small_factors_in_float16_by_products(name, generator):
    test_linear.check_small_factors(name, generator, "triton_fused")


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
    chunks = -(-int((data.target != test_linear.IGNORED).sum()) // 4)
    assert sum(kernel_calls[name, "triton_fused"] for name in ("with_gradient", "backward")) == chunks


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


def test_steps_of_the_depth_beyond_32_bits(generator):
    """Of hidden states and a weight that are stored by columns, the last of which is 2^31 elements from the first."""
    sources = [torch.randn(n, 3, generator=generator) for n in (5, PRODUCT_SPAN + 1)]
    far = [far_apart_rows(x.t(), 2**30 + 5).t() for x in sources]
    target = torch.randint(PRODUCT_SPAN, (5,), generator=generator)
    losses = [
        fl.linear_cross_entropy(*pair, target, reduction="none", label_smoothing=0.1, impl="triton_fused")
        for pair in (far, sources)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("loss", [fl.linear_cross_entropy, fl.linear_dsc_loss], ids=lambda loss: loss.__name__)
def test_evaluation_stores_no_logits(loss, generator):
    """Not one chunk of them: the largest tensor is the statistics of the rows."""
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    target = torch.randint(1500, (12,), generator=generator)
    with torch.no_grad(), Operators() as seen:
        loss(hidden, weight, target, impl="triton_fused")
    assert max(seen.largest.values()) < 12 * 1500 / 10


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
    rows = Rows([hidden], [weight], bias, [], torch.tensor([3, 20, -100, 0, 7]), None, None, [], None)
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


# --- where it runs ---


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
