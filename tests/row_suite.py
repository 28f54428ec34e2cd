"""What every row loss must do, whatever it computes. A loss's test file derives from it and lists its cases."""

import importlib
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import oracle
import pytest
import torch
from oracle import assert_as_accurate_as
from row_losses import computed
from torch import Tensor
from torch.nn.functional import one_hot

import fusedloss as fl
from fusedloss.losses import _registry

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A public loss with arguments of its own, and what it should be."""

    name: str
    loss: Callable[..., Any]
    base: Callable[..., Tensor]
    #: Arguments of both; or a function (rows, classes, generator) -> arguments.
    own: Arguments | Callable[[int, int, torch.Generator], Arguments] = field(default_factory=dict)
    kernels: tuple[str, ...] = ("forward", "backward")
    least_classes: int = 1
    smoothing: bool = True
    weighted_mean: bool = False
    #: Whether it runs on the largest vocabularies too: one case for each way through the kernels.
    large: bool = False
    #: Whether the gradient is the derivative of the loss: not so where a factor is detached.
    derivative: bool = True
    #: Whether the loss of a target without probability is infinite.
    infinite: bool = True
    #: (z, t, own) -> (N, V), the size of the loss's own terms that cancel in its gradient.
    cancelling: Callable[..., Tensor] | None = None
    #: Whether the loss is of p itself. Where one class takes all, gradients are then right to the largest of the row,
    #: not each for itself, and autograd's, which are the reference's, to the largest of all.
    of_probabilities: bool = False

    def __str__(self) -> str:
        return self.name

    def arguments(self, rows: int, classes: int, generator: torch.Generator) -> Arguments:
        return self.own(rows, classes, generator) if callable(self.own) else dict(self.own)


#: Shared options by name: (case, classes, generator) -> arguments of the public loss and of the oracle.
OPTIONS: dict[str, Callable[[Case, int, torch.Generator], Arguments]] = {
    "plain": lambda case, v, g: {},
    "weight": lambda case, v, g: {"weight": class_weights(v, g)},
    "z_loss": lambda case, v, g: {"z_loss": 0.01},
    "smoothing": lambda case, v, g: {"label_smoothing": 0.125},
    "smoothing over others": lambda case, v, g: {"label_smoothing": 0.125, "smoothing_over": "others"},
    "everything": lambda case, v, g: {
        "weight": class_weights(v, g),
        "z_loss": 0.01,
        "ignore_index": v // 2 if v > 1 else -1,
        **({"label_smoothing": 0.125} if case.smoothing else {}),
    },
}

#: Rows and classes, with what each is there for.
SHAPES = {
    (7, 1): "one class: p_t = 1, nothing to learn",
    (7, 2): "the least choice; less than a vector of any type",
    (7, 3): "an odd few, as in natural language inference",
    (7, 127): "whole vectors and a tail one short of a vector",
    (7, 128): "whole vectors alone",
    (7, 129): "a tail of one column",
    (6, 1000): "half a block",
    (6, 2048): "one whole block",
    (6, 2049): "a block of one column",
}
LONG = {
    (5, 8191): "one chunk, not whole",
    (3, 8193): "a chunk of one column; so few rows that threads share one",
    (4, 32000): "a translation vocabulary; a thread folds several chunks",
    (3, 50257): "a vocabulary that divides by nothing; threads share a row",
    (1, 262144): "one row, 32 whole chunks",
    (2, 151936): "fewer rows than twice the threads; part of a chunk at the end",
    (3, 128256): "an odd number of rows",
}
FEW = [(7, 3), (7, 129), (5, 2049), (3, 8193)]

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]


def class_weights(classes: int, generator: torch.Generator) -> Tensor:
    return torch.rand(classes, generator=generator).add(0.5).double()


def quarters(rows: int, generator: torch.Generator, low: int, high: int) -> Tensor:
    """Random multiples of 1/4 in [low, high], which are the same numbers in every dtype."""
    return torch.randint(low * 4, high * 4 + 1, (rows,), generator=generator).double() / 4


def logits_and_targets(rows: int, classes: int, generator: Any, dtype: Any = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits over some 15 units, every second target with a probability that is not small."""
    z = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    z[torch.arange(0, rows, 2), target[::2]] += math.log(classes)
    return z.to(dtype), target


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of losses, and of upstream gradients of losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def of_rows(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments, with the function applied to those that hold a value for each row."""
    return {k: function(v) if isinstance(v, Tensor) and v.dim() else v for k, v in arguments.items()}


def with_gradient(function: Callable[[Tensor], Tensor], z: Tensor, upstream: Any = None) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `z` for the upstream gradient (all ones by default)."""
    z = z.detach().requires_grad_() if z.grad_fn is None else z
    loss = function(z)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, z, upstream)
    return loss.detach(), gradient


class Runs:
    """What a problem makes of its logits `z`, by its `loss` and its `formula`."""

    def run(self, impl: str, upstream: Any = None, z: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """The package's loss and gradient."""
        z = self.z if z is None else z
        z = computed(z) if options.get("inplace_backward") else z
        return with_gradient(lambda x: self.loss(x, impl, **options), z, upstream)

    def truth(self, upstream: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
        """The oracle's loss and gradient."""
        return with_gradient(lambda x: self.formula(x, **options), self.z.to(dtype), upstream)


@dataclass
class Problem(Runs):
    """A case with data, as the package and as the oracle take it."""

    case: Case
    z: Tensor
    target: Tensor
    own: Arguments
    shared: Arguments

    @classmethod
    def make(cls, case: Case, shape: Any, generator: Any, dtype: Any = torch.float64, options: str = "plain") -> Any:
        rows, classes = shape
        z, target = logits_and_targets(rows, classes, generator, dtype)
        shared = OPTIONS[options](case, classes, generator)
        if "ignore_index" in shared and rows > 1:
            target[rows // 2] = shared["ignore_index"]
        return cls(case, z, target, case.arguments(rows, classes, generator), shared)

    def upstream(self, generator: torch.Generator) -> Tensor:
        """A random upstream gradient of the rows' losses; it is exact in float32."""
        return torch.randn(self.target.shape, generator=generator).double()

    def loss(self, z: Tensor, impl: str, **options: Any) -> Any:
        """The package's; of each row if not told otherwise."""
        arguments = cast({**self.own, **self.shared}, compute_dtype(z.dtype)) | {"reduction": "none"} | options
        return self.case.loss(z, self.target, impl=impl, **arguments)

    def formula(self, z: Tensor, **options: Any) -> Tensor:
        """The oracle's, in the dtype of `z`."""
        arguments = cast({**self.own, **self.shared}, z.dtype) | {"reduction": "none"} | options
        return oracle.loss(self.case.base, z, self.target, weighted_mean=self.case.weighted_mean, **arguments)

    def scale(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        """Of the terms that sum to the true gradient of the rows' losses, (N, V)."""
        classes = self.z.shape[-1]
        t = self.target.masked_fill(self.target == self.shared.get("ignore_index", -100), 0)
        eps, over = self.shared.get("label_smoothing", 0.0), self.shared.get("smoothing_over", "all")
        _, share = oracle.smoothing_coefficients(eps, over, classes)
        terms = share * self.shared.get("weight", torch.ones(classes).double()).repeat(len(t), 1)
        if share or "z_loss" in self.shared:
            terms += one_hot(t, classes)
        if self.case.cancelling is not None:
            terms += self.case.cancelling(self.z.double(), t, self.own)
        return gradient.abs() + terms * upstream.abs()[:, None]

    def check(self, loss: Tensor, gradient: Tensor, upstream: Tensor, loss_ulps: int = 4) -> None:
        """Holds losses of the rows and their gradient for `upstream` to the tolerance rule."""
        dtype = self.z.dtype
        assert loss.dtype == compute_dtype(dtype)
        assert gradient.dtype == dtype
        truth, slope = self.truth(upstream)
        eager, eager_slope = self.truth(upstream, loss.dtype)
        # float64: 1e-12 is what remains of it where the formula takes 1 - p_t for p_t near 1.
        # float32: exp(z - m) is off by |z - m| / 2 ulps. Half types: the rounding at the end.
        ulps = {torch.float64: 5000, torch.float32: 16}.get(dtype, 1)
        assert_as_accurate_as(loss, eager, truth, 5000 if dtype == torch.float64 else loss_ulps)
        assert_as_accurate_as(gradient, eager_slope.to(dtype), slope, ulps, self.scale(slope, upstream))


def assert_same_bits(ours: Any, others: Any, rows: Any = ..., about: str = "") -> None:
    """Of losses and gradients."""
    assert torch.equal(ours[0][rows], others[0][rows]), f"losses differ: {about}"
    assert torch.equal(ours[1][rows], others[1][rows]), f"gradients differ: {about}"


def layouts(z: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `z` (N, V), laid out in every other way."""
    rows, classes = z.shape
    yield "transposed", z.t().contiguous().t()
    yield "columns apart", z.new_empty(rows, 2 * classes)[:, ::2].copy_(z)
    yield "rows apart", z.new_empty(rows, classes + 5)[:, 2 : 2 + classes].copy_(z)
    yield "every second row", z.new_empty(2 * rows, classes)[1::2].copy_(z)
    yield "misaligned", z.new_empty(rows * classes + 1)[1:].view(rows, classes).copy_(z)


def far_apart_rows(values: Tensor, stride: int) -> Tensor:
    """`values` (N, V) as rows `stride` elements apart in memory that is reserved but, all between, never used."""
    rows, classes = values.shape
    count = (rows - 1) * stride + classes
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, count * values.element_size(), flags=flags)
    flat = torch.frombuffer(memory, dtype=values.dtype, count=count)
    return flat.as_strided((rows, classes), (stride, 1)).copy_(values)


# --- rows in which one class takes all ---

#: From 17 on float32 has p = 1; at 85, exp(-86.75) of the least logit is near the end of its range.
GAPS = torch.tensor([0, 1, 5, 10, 14, 17, 20, 25, 30, 40, 60, 85])


def certain_rows() -> tuple[Tensor, Tensor]:
    """One logit above the others by each gap; the target is that class, or another one."""
    z = torch.tensor([-0.5, 0, -1.25, 0, -1.75], dtype=torch.float64).repeat(2 * len(GAPS), 1)
    z[:, 1] += GAPS.repeat(2)
    return z, torch.tensor([1, 3]).repeat_interleave(len(GAPS))


_certain_losses: dict[tuple[Any, str], tuple[Tensor, Tensor]] = {}


def certain_losses(case: Case) -> tuple[Tensor, Tensor]:
    """Losses and gradients of those rows, right to float64; kept, since each dtype and implementation asks."""
    key = (case.base, repr(sorted(case.own.items())))
    if key not in _certain_losses:
        _certain_losses[key] = oracle.exact(case.base, *certain_rows(), **case.own)
    return _certain_losses[key]


def over(*options: str, where: Callable[[Case], Any] = lambda case: True) -> Callable[[Any], Any]:
    """Runs a test with each of these shared options, and with the cases that have what it is about."""

    def mark(test: Any) -> Any:
        test.where = where
        if options:
            test.options = options
        return test

    return mark


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class RowLossSuite:
    """Tests of each `case` in CASES, some with each of some shared `options`, unless the loss has no such option."""

    CASES: ClassVar[list[Case]]
    #: Cases whose arguments are numbers, for rows in which one class takes all.
    CERTAIN: ClassVar[list[Case]]
    #: Losses of the example's rows, to eight digits: the loss, its arguments, the values.
    KNOWN: ClassVar[list[tuple[Callable[..., Any], Arguments, list[float]]]] = []
    #: Two functions of logits, targets and shared options that are the same loss, by name.
    TWINS: ClassVar[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {}
    #: A loss, its formula, the names of parameters that may be learnt, and other arguments.
    LEARNT: ClassVar[list[tuple[Callable[..., Any], Callable[..., Tensor], tuple[str, ...], Arguments]]] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        where, names = (getattr(metafunc.function, x, None) for x in ("where", "options"))
        cases = [case for case in self.CASES if where is None or where(case)]
        if names is not None:
            pairs = []
            for i, case in enumerate(cases):
                allowed = [name for name in names if case.smoothing or not name.startswith("smoothing")]
                # Each case and each of the options once, where there are more of the others.
                for j, name in enumerate(allowed):
                    marks = () if i % len(allowed) == j % len(cases) else pytest.mark.exhaustive
                    pairs.append(pytest.param(case, name, marks=marks, id=f"{case}-{name}"))
            metafunc.parametrize("case, options", pairs)
        for name, values in (("case", cases), ("certain", self.CERTAIN)):
            if name in metafunc.fixturenames and names is None:
                metafunc.parametrize(name, values, ids=str)
        if "known" in metafunc.fixturenames:
            metafunc.parametrize("known", self.KNOWN, ids=lambda known: str(known[1]))
        if "twin" in metafunc.fixturenames:
            metafunc.parametrize("twin", self.TWINS.values(), ids=self.TWINS.keys())
        if "learnt" in metafunc.fixturenames:
            metafunc.parametrize("learnt", self.LEARNT, ids=lambda learnt: f"{learnt[2]} {learnt[3]}")

    # --- values and gradients ---

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_float64_equals_the_formula(self, case, shape, impl, generator):
        if shape[1] < case.least_classes:
            pytest.skip("refused: too few classes")
        problem = Problem.make(case, shape, generator, options="everything")
        upstream = problem.upstream(generator)
        problem.check(*problem.run(impl, upstream), upstream)

    @pytest.mark.covering(1)
    @over(where=lambda case: case.large)
    @pytest.mark.parametrize("shape", LONG, ids=str)
    def test_long_rows(self, case, shape, impl, generator):
        dtype = torch.float64 if shape[1] < 2**16 else torch.float32
        problem = Problem.make(case, shape, generator, dtype, "everything")
        upstream = problem.upstream(generator)
        problem.check(*problem.run(impl, upstream), upstream)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(
        ("dtype", "options"),
        [(torch.float32, "plain"), (torch.float32, "everything"), (torch.bfloat16, "plain"), (torch.float16, "plain")],
        ids=str,
    )
    @pytest.mark.parametrize("shape", FEW, ids=str)
    def test_as_accurate_as_eager(self, case, shape, dtype, options, impl, generator, kernel_calls):
        problem = Problem.make(case, shape, generator, dtype, options)
        upstream = problem.upstream(generator)
        loss, gradient = problem.run(impl, upstream)
        assert kernel_calls == Counter((name, impl) for name in case.kernels if impl != "reference")
        # Triton's exp is exp2 of a rounded product: off by |z - m| / 2 ulps where that of the others is not.
        problem.check(loss, gradient, upstream, loss_ulps=8 if impl == "triton" else 4)

    @over("weight", "z_loss", "smoothing", "smoothing over others")
    def test_every_shared_option(self, case, options, impl, generator):
        problem = Problem.make(case, (7, 19), generator, options=options)
        upstream = problem.upstream(generator)
        problem.check(*problem.run(impl, upstream), upstream)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("normalizer", ["sum", None, 12.5, torch.tensor(12.5), torch.tensor(3)], ids=repr)
    def test_reductions(self, case, normalizer, impl, generator):
        """The sum, the mean, and the mean over a divisor that is given."""
        problem = Problem.make(case, (7, 19), generator, options="everything")
        upstream = problem.upstream(generator)[0]
        options = {"reduction": "sum"} if normalizer == "sum" else {"reduction": "mean", "normalizer": normalizer}
        ours, truth = problem.run(impl, upstream, **options), problem.truth(upstream, **options)
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-14)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("reduction", ["none", "none of a strided vector", "none of a scalar", "mean", "sum"])
    def test_upstream_gradient(self, case, reduction, impl, generator):
        problem = Problem.make(case, (7, 129), generator, torch.float32, "everything")
        given = {
            "none": torch.randn(7, generator=generator),
            "none of a strided vector": torch.randn(7, 3, generator=generator)[:, 1],
            "none of a scalar": torch.randn((), generator=generator).expand(7),  # as sum() hands it on: stride 0
        }.get(reduction, torch.randn((), generator=generator))
        divisor = 1.0
        if reduction == "mean":
            counted = problem.target[problem.target != problem.shared["ignore_index"]]
            divisor = problem.shared["weight"][counted].sum() if case.weighted_mean else len(counted)
        upstream = (given.double() / divisor).expand(7)
        _, gradient = problem.run(impl, given, reduction=reduction.split()[0])
        (_, slope), (_, eager) = problem.truth(upstream), problem.truth(upstream, torch.float32)
        assert_as_accurate_as(gradient, eager, slope, 16, problem.scale(slope, upstream))

    def test_known_values(self, known, impl, example):
        loss, own, expected = known
        result = loss(*example, reduction="none", impl=impl, **own)
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)

    def test_losses_that_are_the_same(self, twin, impl, generator):
        z, target = logits_and_targets(6, 40, generator)
        target[3] = -100
        ours, same = (with_gradient(lambda x, f=f: f(x, target, impl=impl), z) for f in twin)
        torch.testing.assert_close(ours, same, rtol=1e-11, atol=1e-15)

    # --- derivatives ---

    @over("plain", "everything", where=lambda case: case.derivative)
    def test_gradcheck(self, case, options, impl, generator):
        problem = Problem.make(case, (3, 5), generator, options=options)
        z = problem.z.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: problem.loss(x, impl), z)
        assert torch.autograd.gradgradcheck(lambda x: problem.loss(x, impl), z, fast_mode=True)

    @pytest.mark.parametrize("shape", [(), (3,)], ids=["0-d", "of each row"])
    def test_parameters_are_differentiable(self, learnt, shape, impl, generator):
        loss, base, names, options = learnt
        z, target = logits_and_targets(3, 7, generator)
        target[1] = -100
        params = [0.2 + 0.6 * torch.rand(shape, generator=generator).double() for _ in names]
        leaves = [x.requires_grad_() for x in (z, *params)]
        options = {"weight": class_weights(7, generator), "z_loss": 0.01, "reduction": "none", **options}

        def ours(x, *params):
            return loss(x, target, impl=impl, **dict(zip(names, params, strict=True)), **options)

        upstream = torch.randn(3, generator=generator).double()
        expected = oracle.loss(base, z, target, **dict(zip(names, params, strict=True)), **options)
        truth = torch.autograd.grad(expected, leaves, upstream, materialize_grads=True)
        result = torch.autograd.grad(ours(*leaves), leaves, upstream, materialize_grads=True)
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-14)
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)

    # --- rows that do not count ---

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(
        ("ignore_index", "dtype"),
        [
            (-100, torch.int64),
            (-1, torch.int64),  # also what says "no such class" inside
            (4, torch.int64),  # a padding index in the vocabulary
            (0, torch.int32),
            (500, torch.int64),  # beyond the vocabulary
        ],
        ids=str,
    )
    def test_ignored_rows(self, case, ignore_index, dtype, impl, generator):
        problem = Problem.make(case, (7, 19), generator)
        problem.shared["ignore_index"] = ignore_index
        problem.target[problem.target == ignore_index] += 1
        problem.target[1::3] = ignore_index
        problem.target = problem.target.to(dtype)
        dirty = problem.z.clone()
        dirty[1] = torch.nan  # an ignored row is not looked at
        dirty[4] = torch.inf
        token_weight = torch.ones(7).double().index_fill_(0, torch.tensor([1, 4]), torch.nan)
        upstream = problem.upstream(generator)
        for reduction, given in (("none", upstream), ("mean", upstream[0])):
            ours = problem.run(impl, given, dirty, reduction=reduction, token_weight=token_weight)
            torch.testing.assert_close(ours, problem.truth(given, reduction=reduction), rtol=1e-11, atol=1e-15)
            assert not ours[1][1::3].any()
        argmax = problem.loss(dirty, impl, return_stats=True)[1].argmax[1::3]
        assert (argmax < 0).all() and (argmax != ignore_index).all()

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("shape", [(0,), (3, 0), (5,)], ids=["empty batch", "empty rows", "all ignored"])
    @over("plain", "everything")
    def test_nothing_to_count(self, case, options, shape, impl, generator):
        rows = math.prod(shape)
        problem = Problem.make(case, (5, 19), generator, torch.float32, options)
        problem.z = problem.z[:rows].fill_(torch.nan).view(*shape, 19).requires_grad_()
        problem.target = problem.target[:rows].fill_(problem.shared.get("ignore_index", -100)).view(shape)
        problem.own = of_rows(problem.own, lambda v: v[:rows].view(*shape, *v.shape[1:]))
        for reduction in ("none", "mean", "sum"):
            loss, stats = problem.loss(problem.z, impl, reduction=reduction, return_stats=True)
            assert loss.dtype == torch.float32 and loss.shape == (shape if reduction == "none" else ())
            assert loss.requires_grad and not loss.any()  # attached, so that a backward over it runs
            assert stats.lse.shape == shape and stats.lse.isnan().all() and (stats.argmax < 0).all()
            (gradient,) = torch.autograd.grad(loss, problem.z, torch.full_like(loss, 0.37))
            assert gradient.shape == problem.z.shape and not gradient.any()

    def test_no_rows_have_any_layout(self, case, impl, generator):
        """Without an element every tensor is contiguous, whatever its strides."""
        problem = Problem.make(case, (2, 19), generator)
        problem.target, problem.own = problem.target[:0], of_rows(problem.own, lambda v: v[:0])
        for name, z in layouts(problem.z):
            loss, gradient = problem.run(impl, z=z[:0])
            assert loss.shape == (0,) and gradient.shape == (0, 19), name

    # --- shapes and memory ---

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
    def test_any_rank(self, case, shape, impl, generator):
        flat = Problem.make(case, (torch.Size(shape).numel(), 19), generator)
        upstream = flat.upstream(generator)
        loss, gradient = flat.run(impl, upstream)
        own = of_rows(flat.own, lambda v: v.reshape((*shape, *v.shape[1:])))
        shaped = Problem(case, flat.z.reshape(*shape, 19), flat.target.reshape(shape), own, flat.shared)
        rows = (loss.reshape(shape), gradient.reshape(*shape, 19))
        assert_same_bits(shaped.run(impl, upstream.reshape(shape)), rows)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((6, 37), torch.float32), ((6, 37), torch.bfloat16), ((3, 8200), torch.bfloat16)],  # the last: shared rows
        ids=str,
    )
    def test_any_strides(self, case, shape, dtype, impl, generator):
        problem = Problem.make(case, shape, generator, dtype, "everything")
        upstream = problem.upstream(generator)
        contiguous = problem.run(impl, upstream)
        for name, z in layouts(problem.z):
            assert_same_bits(problem.run(impl, upstream, z), contiguous, about=name)
        problem.z = problem.z[2].expand(*shape)
        copied = problem.run(impl, upstream, problem.z.clone())
        assert_same_bits(problem.run(impl, upstream), copied, about="expanded")

    @over(where=lambda case: case.large)
    def test_targets_of_any_kind(self, case, impl, generator):
        problem = Problem.make(case, (6, 37), generator, torch.float32, "everything")
        upstream = problem.upstream(generator)
        target = problem.target
        one = target[:1]
        for name, other, same in (
            ("strided", torch.full((6, 3), 10**9)[:, 1].copy_(target), target),
            ("strided int32", torch.full((12,), 10**9, dtype=torch.int32)[::2].copy_(target), target),
            ("expanded", one.expand(6), one.repeat(6)),
        ):
            problem.target = same
            truth = problem.run(impl, upstream)
            problem.target = other
            assert_same_bits(problem.run(impl, upstream), truth, about=name)

    @pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs anonymous mappings")
    @over(where=lambda case: case.large)
    def test_offsets_beyond_32_bits(self, case, compiled_impl, generator):
        """row * stride in 32 bits, signed or not, which wraps to memory that belongs to another row or to no one."""
        problem = Problem.make(case, (3, 300), generator, torch.bfloat16)
        upstream = problem.upstream(generator)
        far = far_apart_rows(problem.z, 2**31 + 5)
        expected = problem.run(compiled_impl, upstream)
        assert_same_bits(problem.run(compiled_impl, upstream, far), expected)
        loss, gradient = problem.run(compiled_impl, upstream, far, inplace_backward=True)
        assert gradient.data_ptr() == far.data_ptr()
        assert_same_bits((loss, gradient), expected)

    # --- options that change no number ---

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @over("plain", "everything")
    def test_return_stats(self, case, options, dtype, impl, generator):
        problem = Problem.make(case, (7, 137), generator, dtype, options)
        problem.target[3] = ignored = problem.shared.get("ignore_index", -100)
        upstream = problem.upstream(generator).float()
        bare = problem.run(impl, upstream)
        z = problem.z.requires_grad_()
        loss, stats = problem.loss(z, impl, return_stats=True)
        found = (loss, *torch.autograd.grad(loss, z, upstream))
        if impl == "triton":  # which columns a lane has depends on whether the top class is searched
            torch.testing.assert_close(found, bare, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-8)
        else:
            assert_same_bits(found, bare)

        kept = problem.target != ignored
        log_p = z.detach().double().log_softmax(-1)
        truth = fl.RowStats(
            lse=z.detach().double().logsumexp(-1),
            target_log_prob=oracle.at(log_p, problem.target.masked_fill(~kept, 0)),
            argmax=log_p.argmax(-1),
            argmax_log_prob=log_p.amax(-1),
        )
        assert stats.entropy is None
        for name, ours, right in list(zip(fl.RowStats._fields, stats, truth, strict=True))[:-1]:
            assert ours.shape == problem.target.shape and not ours.requires_grad, name
            if name == "argmax":
                assert ours.dtype == torch.int64 and torch.equal(ours[kept], right[kept])
                assert (ours[~kept] < 0).all() and (ours[~kept] != problem.target[~kept]).all()
            else:
                assert ours.dtype == torch.float32 and ours[~kept].isnan().all(), name
                torch.testing.assert_close(ours[kept].double(), right[kept], rtol=1e-6, atol=2e-7)

        again, stats = problem.loss(z, impl, return_stats=True, stats=("entropy",))
        torch.testing.assert_close(again, loss, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
        assert stats.entropy.shape == problem.target.shape and not stats.entropy.requires_grad
        assert stats.entropy[~kept].isnan().all()
        torch.testing.assert_close(
            stats.entropy[kept].double(), -(log_p.exp() * log_p).sum(-1)[kept], rtol=2e-6, atol=2e-7
        )

    @pytest.mark.covering(1)
    @over(where=lambda case: "backward" in case.kernels)
    @pytest.mark.parametrize("options", ["plain", "everything"])
    @each_dtype
    @pytest.mark.parametrize("shape", [(6, 37), (3, 8200)], ids=str)  # the second: threads share a row
    def test_inplace_backward_gives_the_same_bits(self, case, options, shape, dtype, compiled_impl, generator):
        problem = Problem.make(case, shape, generator, dtype, options)
        upstream = problem.upstream(generator)
        fresh = problem.run(compiled_impl, upstream)
        for name, z in layouts(problem.z):
            if z.stride(1) != 1:
                continue
            memory = torch.empty(0, dtype=dtype).set_(z.untyped_storage())
            untouched = int(memory.isnan().sum())
            loss, gradient = problem.run(compiled_impl, upstream, z, inplace_backward=True)
            assert gradient.data_ptr() == z.data_ptr(), name
            assert_same_bits((loss, gradient), fresh, about=name)
            assert int(memory.isnan().sum()) == untouched, name  # what lies between the rows

    # --- numbers at the edge ---

    def test_common_offset_changes_no_bit(self, case, impl, generator):
        problem = Problem.make(case, (6, 1000), generator, torch.float32)
        problem.z = problem.z.mul(512).round().div(512)  # so that adding 10^4 does not round
        upstream = problem.upstream(generator)
        truth = problem.run(impl, upstream)
        for offset in (1e4, -1e4):
            assert_same_bits(problem.run(impl, upstream, problem.z + offset), truth, about=str(offset))

    @pytest.mark.covering(1)
    @each_dtype
    def test_masked_vocabulary(self, case, dtype, impl, generator):
        problem = Problem.make(case, (6, 2100), generator, dtype)
        j = torch.arange(2100)
        masked = [
            j < 2060,  # the first block of columns
            j >= 100,  # the last block, and most of the first
            j % 2 == 0,
            (j < 8) | (j > 10),  # all but three
            j == 7,
            j < 0,  # none
        ]
        problem.z[torch.stack(masked)] = -torch.inf
        problem.target = torch.tensor([2061, 3, 77, 8, 1500, 2])
        if "candidates" in problem.own:
            shape = problem.own["candidates"].shape
            problem.own["candidates"] = oracle.largest(problem.z, shape[1:].numel()).reshape(shape)
        upstream = problem.upstream(generator)
        loss, gradient = problem.run(impl, upstream)
        assert not gradient[problem.z.isneginf()].any()
        problem.check(loss, gradient, upstream)

    def test_target_without_probability(self, case, impl, generator):
        problem = Problem.make(case, (6, 37), generator, torch.float32)
        upstream = problem.upstream(generator)
        before = problem.run(impl, upstream)
        problem.z[2, problem.target[2]] = -torch.inf
        problem.z[4] = -torch.inf  # there is no softmax of such a row
        loss, gradient = problem.run(impl, upstream)
        assert not loss[4] < 0
        if case.infinite:
            assert loss[2] == torch.inf
        else:
            truth, slope = problem.truth(upstream)
            torch.testing.assert_close(loss[2].double(), truth[2], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient[2].double(), slope[2], rtol=1e-5, atol=2e-8)  # of terms up to 0.1
        assert_same_bits((loss, gradient), before, torch.tensor([0, 1, 3, 5]))

    # A quiet NaN may carry any payload; arithmetic on the bits of floats can lose those with low bits set.
    @pytest.mark.covering(1)
    @pytest.mark.parametrize(
        ("classes", "column", "bits"),
        [(37, 0, 0x7FC00000), (37, "target", -0x400000), (2084, 2083, 0x7FFFFFFF), (2084, "target", -0x3FFEDD)],
        ids=str,
    )
    def test_nan_stays_in_its_row(self, case, classes, column, bits, impl, generator):
        problem = Problem.make(case, (6, classes), generator, torch.float32)
        upstream = problem.upstream(generator)
        if column != 0 and classes > 2048:  # in a block behind one that an online softmax may have to skip
            problem.z[2, :2048], problem.target[2] = -torch.inf, 2060
        before = problem.run(impl, upstream)
        column = int(problem.target[2]) if column == "target" else column
        problem.z.view(torch.int32)[2, column] = bits
        assert problem.z.isnan().sum() == 1
        loss, gradient = problem.run(impl, upstream)
        assert loss[2].isnan() and gradient[2].isnan().any()
        assert_same_bits((loss, gradient), before, torch.arange(6) != 2)

    @pytest.mark.covering(1)
    @each_dtype
    def test_one_class_takes_all(self, certain, dtype, impl, generator):
        z, target = certain_rows()
        problem = Problem(certain, z.to(dtype), target, certain.own, {})
        upstream = problem.upstream(generator)
        loss, gradient = problem.run(impl, upstream)
        truth, slope = certain_losses(certain)
        slope = slope * upstream[:, None]
        scale = problem.scale(slope, upstream)
        if certain.of_probabilities:
            scale = slope.abs().amax() if impl == "reference" else slope.abs().amax(-1, keepdim=True)
        assert_as_accurate_as(loss, truth, truth, 24)
        ulps = 32 if impl.startswith("triton") else 24  # exp(z - m) is off by |z - m| / 2 ulps, up to 62 apart
        assert_as_accurate_as(gradient, slope, slope, 1 if dtype in HALVES else ulps, scale)

    @pytest.mark.covering(1)
    @each_dtype
    def test_beyond_the_range_of_exp(self, certain, dtype, impl):
        """Where one class has all of the probability, nothing is left to move, and nothing is NaN."""
        z = torch.zeros(4, 5, dtype=dtype)
        z[:, 2] = torch.tensor([1e3, 5e4, 1e3, 5e4], dtype=dtype)
        target = torch.tensor([2, 2, 0, 0])
        loss, gradient = with_gradient(lambda x: certain.loss(x, target, reduction="none", impl=impl, **certain.own), z)
        truth = certain.base(z.double(), target, **certain.own)
        truth = truth.sum(-1) if truth.dim() == 2 else truth
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-30)
        assert gradient.isfinite().all()
        assert not (gradient[:2].any() and (certain.of_probabilities or truth[0] == 0))


def modules_of_losses() -> dict[str, Any]:
    """The losses' test files, by the names of the losses' own."""
    files = dict.fromkeys(loss.row.__module__.rpartition(".")[2] for loss in _registry.LOSSES.values())
    return {file: importlib.import_module(f"test_{file}") for file in files}
