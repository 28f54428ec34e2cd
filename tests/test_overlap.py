"""Losses of overlap at the levels of classes and of the set, whatever the loss."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle import assert_as_accurate_as
from products import Operators
from row_losses import LEVELED
from row_suite import (
    HALVES,
    Runs,
    assert_same_bits,
    cast,
    certain_rows,
    class_weights,
    compute_dtype,
    each_dtype,
    layouts,
    logits_and_targets,
    quarters,
    with_gradient,
)
from torch import Tensor

import fusedloss as fl

LEVELS = ["class", "set"]
IGNORED = 1

Own = Callable[[int, torch.Generator], dict[str, Any]]


class Case(NamedTuple):
    loss: Callable[..., Any]
    over_rows: Callable[..., Tensor]
    own: Own


def _case(loss: Callable[..., Any], over_rows: Callable[..., Tensor], **own: Any) -> Case:
    return Case(loss, over_rows, lambda rows, generator: dict(own))


CASES = {
    "dsc": _case(fl.dsc_loss, oracle.dsc_over_rows),
    "dsc linear": _case(fl.dsc_loss, oracle.dsc_over_rows, alpha=1.0, squared=False, smooth=0.5),
    "dsc detached": _case(fl.dsc_loss, oracle.dsc_over_rows, alpha=0.5, detach_weight=True),
    "dsc alpha of each row": Case(fl.dsc_loss, oracle.dsc_over_rows, lambda n, g: {"alpha": quarters(n, g, 0, 2)}),
    "dice": _case(fl.dice_loss, partial(oracle.dsc_over_rows, alpha=0.0)),
}
#: The losses that have levels, by the names of their epilogues and of their oracles.
FEW = {loss.func.__name__.removesuffix("_loss"): loss.func for loss in LEVELED}
CASES |= {name: _case(loss, getattr(oracle, f"{name}_over_rows")) for name, loss in FEW.items() if name not in CASES}
SMOOTH_CASES = [name for name in CASES if name != "dsc detached"]  # whose gradient is a derivative

each_case = pytest.mark.parametrize("name", CASES)
each_of_few = pytest.mark.parametrize("name", FEW)
each_level = pytest.mark.parametrize("level", LEVELS)

#: Rows and classes, with what each is there for.
SHAPES = {
    (1, 1): "one class: p = 1, nothing to learn",
    (7, 2): "less than a vector of any type",
    (40, 129): "a tail of one column",
    (5000, 9): "several groups of rows, which add up apart",
    (6, 2048): "one whole block of columns",
    (11, 2049): "a block of one column; whole and part groups of rows",
    (3, 8193): "a chunk of one column; so few rows that threads share one",
    (9, 20001): "several chunks and an odd end",
}


@dataclass
class Problem(Runs):
    """A case with data, as the package and as the oracle take it."""

    case: Case
    z: Tensor
    target: Tensor
    options: dict[str, Any]

    @staticmethod
    def make(name, level, shape, generator, dtype=torch.float64, plain=False) -> "Problem":
        rows, classes = shape
        z, target = logits_and_targets(rows, classes, generator, dtype)
        options = {"level": level, **CASES[name].own(rows, generator)}
        if level == "class":
            options["reduction"] = "none"
        if not plain:
            options |= {"ignore_index": IGNORED, "token_weight": quarters(rows, generator, 0, 3)}
            target[1::3] = IGNORED
            if level == "class":
                options["weight"] = class_weights(classes, generator)
        return Problem(CASES[name], z, target, options)

    def upstream(self, generator: torch.Generator) -> Tensor:
        """Random, of the loss or of the classes' losses; it is exact in float32."""
        shape = self.z.shape[-1:] if self.options.get("reduction") == "none" else ()
        return torch.randn(shape, generator=generator).double()

    def loss(self, z: Tensor, impl: str, **options: Any) -> Any:
        return self.case.loss(z, self.target, impl=impl, **cast(self.options, compute_dtype(z.dtype)) | options)

    def formula(self, z: Tensor, **options: Any) -> Tensor:
        return oracle.level_loss(self.case.over_rows, z, self.target, **cast(self.options, z.dtype) | options)

    def scale(self, upstream: Tensor) -> Tensor:
        """Of dL/dz_j = p_j (g_j - sum_k p_k g_k), the size of what cancels there, g = dL/dp of each row's share."""
        own = {k: v for k, v in self.options.items() if k not in ("ignore_index", "reduction")}
        weight, token_weight, level = own.pop("weight", 1.0), own.pop("token_weight", None), own.pop("level")
        ignored = self.target == self.options.get("ignore_index", -100)
        p = oracle.log_probabilities(self.z.double()).exp().requires_grad_()
        kept = (~ignored).to(p.dtype) * (1.0 if token_weight is None else token_weight)
        losses = self.case.over_rows(p, self.target.masked_fill(ignored, 0), level, kept, **own) * weight
        (g,) = torch.autograd.grad(losses, p, upstream)
        with torch.no_grad():
            return p * (g.abs() + (p * g.abs()).sum(-1, keepdim=True))

    def check(self, loss: Tensor, gradient: Tensor, upstream: Tensor) -> None:
        """Holds a loss and its gradient for `upstream` to the tolerance rule."""
        dtype = self.z.dtype
        assert loss.dtype == compute_dtype(dtype)
        assert gradient.dtype == dtype
        truth, slope = self.truth(upstream)
        eager, eager_slope = self.truth(upstream, loss.dtype)
        ulps = {torch.float64: 5000, torch.float32: 16}.get(dtype, 1)
        if dtype == torch.float64:  # the formula itself cancels: 1 - (1 - loss)
            torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-15)
        else:
            assert_as_accurate_as(loss, eager, truth, 4)
        assert_as_accurate_as(gradient, eager_slope.to(dtype), slope, ulps, slope.abs() + self.scale(upstream))


# --- values and gradients ---


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_level
@each_case
def test_float64_equals_the_formula(name, level, shape, impl, generator):
    problem = Problem.make(name, level, shape, generator)
    upstream = problem.upstream(generator)
    problem.check(*problem.run(impl, upstream), upstream)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [(7, 3), (1500, 9), (33, 1000), (5, 2049), (6, 20001)], ids=str)
@each_level
@each_of_few
def test_as_accurate_as_eager(name, level, shape, plain, dtype, impl, generator, kernel_calls):
    problem = Problem.make(name, level, shape, generator, dtype, plain)
    upstream = problem.upstream(generator)
    loss, gradient = problem.run(impl, upstream)
    kernels = ("statistics", "sums", "terms", "backward")
    assert kernel_calls == Counter({(kernel, impl): 1 for kernel in kernels if impl != "reference"})
    problem.check(loss, gradient, upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_are_over_the_classes(reduction, impl, generator):
    problem = Problem.make("dsc", "class", (12, 19), generator)
    upstream = torch.tensor(-0.37, dtype=torch.float64)
    ours = problem.run(impl, upstream, reduction=reduction)
    torch.testing.assert_close(ours, problem.truth(upstream, reduction=reduction), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("shape", [(), (2, 3, 2)], ids=str)
def test_any_rank(shape, impl, generator):
    flat = Problem.make("dsc", "class", (torch.Size(shape).numel(), 19), generator)
    shaped = {k: v.reshape(shape) if k == "token_weight" else v for k, v in flat.options.items()}
    z, target = flat.z.reshape(*shape, 19), flat.target.reshape(shape)
    assert torch.equal(fl.dsc_loss(z, target, impl=impl, **shaped), flat.loss(flat.z, impl))
    loss, stats = fl.dsc_loss(z, target, level="set", impl=impl, return_stats=True)
    assert loss.shape == () and stats.argmax.shape == shape
    assert torch.equal(loss, fl.dsc_loss(z, target, level="set", impl=impl))
    expected = fl.dsc_loss(z, target, impl=impl, return_stats=True)[1]
    torch.testing.assert_close(tuple(stats), tuple(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("loss", "own"),
    [
        (fl.dsc_loss, {"alpha": 0.01}),
        (fl.dsc_loss, {"alpha": 0.5, "detach_weight": True, "squared": False}),
        *((loss, {"alpha": 0.25}) for loss in FEW.values()),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_one_row_has_the_losses_of_an_example(loss, own, dtype, impl):
    """One row's classes are then as accurate as those of a row loss, which is held to 250 digits where p -> 1."""
    z, target = certain_rows()
    for row, t in zip(z.to(dtype)[:, None], target[:, None], strict=True):
        ours, rows = (
            with_gradient(lambda x, t=t, v=v: loss(x, t, level=v, reduction="sum", impl=impl, **own), row)
            for v in ("class", "example")
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours[0], rows[0], rtol=24 * eps, atol=0)
        torch.testing.assert_close(ours[1], rows[1], rtol=24 * eps, atol=24 * eps * float(rows[1].abs().max()))


@pytest.mark.parametrize("classes", [9, 300])
@pytest.mark.parametrize("loss", FEW.values(), ids=FEW)
def test_a_tiny_smooth_makes_no_example_infinite(loss, classes, compiled_impl, generator):
    """Of a class without probability the inverse of the denominator is 1 / smooth, whose square is beyond float32."""
    z, target = logits_and_targets(8, classes, generator, torch.float32)
    z[:, 1] -= 60
    own = {"smooth": 1e-29, "level": "example"}
    (_, ours), (_, truth) = (
        with_gradient(lambda x, impl=impl: loss(x, target, impl=impl, **own), x)
        for x, impl in ((z, compiled_impl), (z.double(), "reference"))
    )
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


@each_level
def test_many_rows_keep_the_digits_of_float32(level, impl, generator):
    """Sums of 10^5 numbers of one sign, which in float32 one by one would lose three digits."""
    z, target = logits_and_targets(100_003, 3, generator, torch.float32)
    problem = Problem(CASES["dsc"], z, target, {"level": level})
    (loss, gradient), (truth, slope) = problem.run(impl), problem.truth()
    torch.testing.assert_close(loss.double(), truth, rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=4e-6 * float(slope.abs().max()))


# --- derivatives ---


@pytest.mark.covering(1)
@each_level
@pytest.mark.parametrize("name", SMOOTH_CASES)
@pytest.mark.parametrize("learnt", [None, (), (5,)], ids=["", "alpha", "alpha of each row"])
def test_gradcheck(name, level, learnt, impl, generator):
    problem = Problem.make(name, level, (5, 4), generator)
    leaves = [problem.z, problem.options.pop("token_weight").add(0.25)]
    names = ["token_weight"]
    if learnt is not None and name in FEW and name != "dice":
        leaves.append(0.25 + 0.5 * torch.rand(learnt, generator=generator).double())
        names.append("alpha")
    leaves = [x.requires_grad_() for x in leaves]

    def loss(x, *params):
        return problem.loss(x, impl, **dict(zip(names, params, strict=True)))

    expected = problem.formula(leaves[0], **dict(zip(names, leaves[1:], strict=True)))
    upstream = problem.upstream(generator)
    slopes = (torch.autograd.grad(x, leaves, upstream) for x in (loss(*leaves), expected))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-15)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@each_level
def test_a_learnt_alpha_of_many_rows_goes_a_few_at_a_time(level, impl, generator):
    z, target = logits_and_targets(90, 30_000, generator, torch.float32)  # 70 rows fit into the buffer
    whole, parts = (
        with_gradient(lambda x, a=a: fl.dsc_loss(x, target, alpha=a, level=level, impl=impl), z)
        for a in (0.5, torch.tensor(0.5, requires_grad=True))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-9)


@each_level
def test_only_the_token_weight_requires_grad(level, compiled_impl, generator, kernel_calls):
    problem = Problem.make("dsc", level, (9, 37), generator)
    upstream = problem.upstream(generator)
    weight = problem.options.pop("token_weight").requires_grad_()
    slopes = [
        torch.autograd.grad(function(problem.z, token_weight=weight), weight, upstream)
        for function in (partial(problem.loss, impl=compiled_impl), problem.formula)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-15)
    assert ("backward", compiled_impl) not in kernel_calls


# --- rows that do not count ---


@each_level
@each_of_few
def test_ignored_rows_are_not_looked_at(name, level, impl, generator):
    problem = Problem.make(name, level, (9, 37), generator)
    upstream = problem.upstream(generator)
    before = problem.run(impl, upstream)
    dirty = problem.z.clone()
    dirty[1], dirty[4] = torch.nan, torch.inf
    problem.options["token_weight"][1::3] = torch.nan
    after = problem.run(impl, upstream, dirty)
    assert_same_bits(after, before)
    assert not after[1][1::3].any()
    dirty[2, 5] = torch.nan
    assert problem.loss(dirty, impl).isnan().any()


@pytest.mark.covering(1)
@pytest.mark.parametrize("smooth", [1.0, 0.0])
@pytest.mark.parametrize("rows", [0, 5], ids=["empty batch", "all ignored"])
@pytest.mark.parametrize("learnt", [False, True], ids=["", "learnt alpha"])
@each_level
@each_of_few
def test_nothing_to_count(name, level, learnt, rows, smooth, impl, generator):
    z = torch.randn(rows, 19, generator=generator, requires_grad=True)
    own = {"alpha": torch.tensor(0.5, requires_grad=learnt), "smooth": smooth, "level": level}
    target = torch.full((rows,), -100)
    loss, stats = CASES[name].loss(z, target, impl=impl, return_stats=True, **own)
    assert loss.shape == () and loss.dtype == torch.float32 and stats.lse.shape == (rows,)
    assert loss.requires_grad and loss == 0
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.shape == z.shape and not gradient.any()


@each_level
def test_without_smooth(level, impl, generator):
    """Classes that no row has as target have no agreement: loss 1. Those of no probability either: nothing, 0."""
    z, target = logits_and_targets(30, 7, generator)
    z[:, 5] = -torch.inf
    target[(target == 5) | (target == 6)] = 0
    own = {"level": level, "smooth": 0.0, "reduction": "none" if level == "class" else "mean"}
    loss, gradient = with_gradient(lambda x: fl.dsc_loss(x, target, impl=impl, **own), z)
    near = torch.where(z.isinf(), -300.0, z)
    truth, slope = with_gradient(lambda x: oracle.level_loss(oracle.dsc_over_rows, x, target, **own), near)
    if level == "class":
        assert loss[6] == 1 and loss[5] == 0
        truth[5] = 0
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    others = torch.arange(7) != 5
    torch.testing.assert_close(gradient[:, others], slope[:, others], rtol=1e-10, atol=1e-15)
    assert not gradient[:, 5].any()


# --- the algebra of sums ---


@pytest.mark.covering(1)
@each_dtype
@pytest.mark.parametrize("shape", [(5000, 9), (37, 9000), (3, 25_000)], ids=str)
@each_level
@each_of_few
def test_bits_do_not_depend_on_threads(name, level, shape, dtype, compiled_impl, generator, threads):
    problem = Problem.make(name, level, shape, generator, dtype)
    upstream, results = problem.upstream(generator), []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(problem.run(compiled_impl, upstream))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_the_order_of_rows_and_of_classes_does_not_matter(impl, generator):
    problem = Problem.make("dsc", "class", (2100, 9), generator)
    upstream = problem.upstream(generator)
    loss, gradient = problem.run(impl, upstream)
    order, row_order = torch.randperm(9, generator=generator), torch.randperm(2100, generator=generator)
    place, options = order.argsort(), dict(problem.options)
    options |= {"weight": options["weight"][order], "token_weight": options["token_weight"][row_order]}
    options["ignore_index"] = int(place[IGNORED])
    permuted = Problem(problem.case, problem.z[row_order][:, order], place[problem.target][row_order], options)
    ours = permuted.run(impl, upstream[order])
    torch.testing.assert_close(ours, (loss[order], gradient[row_order][:, order]), rtol=1e-11, atol=1e-15)


# --- memory ---


@pytest.mark.covering(1)
@each_dtype
@pytest.mark.parametrize("shape", [(6, 37), (3, 8200)], ids=str)
@each_level
@each_of_few
def test_layouts_and_inplace_backward_give_the_same_bits(name, level, shape, dtype, compiled_impl, generator):
    problem = Problem.make(name, level, shape, generator, dtype)
    upstream = problem.upstream(generator)
    fresh = problem.run(compiled_impl, upstream)
    for layout, z in layouts(problem.z):
        assert_same_bits(problem.run(compiled_impl, upstream, z), fresh, about=layout)
        if z.stride(1) == 1:
            loss, gradient = problem.run(compiled_impl, upstream, z, inplace_backward=True)
            assert gradient.data_ptr() == z.data_ptr(), layout
            assert_same_bits((loss, gradient), fresh, about=layout)


def test_backward_twice(impl, generator):
    """Gives the same bits, and raises where the first was in place."""
    problem = Problem.make("dsc", "class", (9, 37), generator, torch.float32)
    upstream, z = problem.upstream(generator).float(), problem.z.requires_grad_()
    loss = problem.loss(z, impl)
    first = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, z, upstream)[0], first)
    if impl != "reference":
        loss = problem.loss(z * 1, impl, inplace_backward=True).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


VIEWS = {"aten::view", "aten::_unsafe_view", "aten::detach"}


@each_level
def test_nothing_but_the_gradient_is_as_large_as_the_logits(level, compiled_impl, generator):
    z, target = logits_and_targets(50, 300, generator, torch.float32)
    z.requires_grad_()

    def large() -> set[str]:
        return {name for name, size in seen.largest.items() if size >= z.numel()} - VIEWS

    with Operators() as seen:
        loss = fl.dsc_loss(z, target, level=level, token_weight=torch.rand(50), impl=compiled_impl)
        assert not large()
        loss.backward()
    assert large() == {"fusedloss::backward"} and seen.calls["fusedloss::backward"] == 1


@each_dtype
def test_instruction_sets_agree(dtype, instruction_set, generator):
    problem = Problem.make("dsc", "class", (23, 2100), generator, dtype)
    upstream = problem.upstream(generator)
    problem.check(*problem.run("cpu", upstream), upstream)
