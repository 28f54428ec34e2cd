"""What every row loss must do, whatever it computes. A loss's test file derives from it and lists its cases."""

import importlib
import math
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


def logits_and_targets(
    rows: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
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


def with_gradient(
    function: Callable[[Tensor], Tensor], z: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `z` for the upstream gradient (all ones by default)."""
    z = z.detach().requires_grad_() if z.grad_fn is None else z
    loss = function(z)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, z, upstream)
    return loss.detach(), gradient


@dataclass
class Problem:
    """A case with data, as the package and as the oracle take it."""

    case: Case
    z: Tensor
    target: Tensor
    own: Arguments
    shared: Arguments

    @classmethod
    def make(
        cls,
        case: Case,
        shape: tuple[int, int],
        generator: torch.Generator,
        dtype: torch.dtype = torch.float64,
        options: str = "plain",
    ) -> "Problem":
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

    def run(
        self, impl: str, upstream: Tensor | None = None, z: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The package's loss and gradient."""
        z = self.z if z is None else z
        z = computed(z) if options.get("inplace_backward") else z
        return with_gradient(lambda x: self.loss(x, impl, **options), z, upstream)

    def truth(
        self, upstream: Tensor | None = None, dtype: torch.dtype = torch.float64, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The oracle's loss and gradient."""
        return with_gradient(lambda x: self.formula(x, **options), self.z.to(dtype), upstream)

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


def assert_same_bits(
    ours: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], rows: Any = ..., about: str = ""
) -> None:
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


# --- rows in which one class takes all ---

GAPS = [
    0,
    1,
    5,
    10,
    14,
    17,
    20,
    25,
    30,
    40,
    60,
    85,
]  # from 17 on float32 has p = 1; at 85, exp(-86.75) of the least logit is near the end of its range


def certain_rows() -> tuple[Tensor, Tensor]:
    """One logit above the others by each gap; the target is that class, or another one."""
    z = torch.tensor([-0.5, 0, -1.25, 0, -1.75], dtype=torch.float64).repeat(2 * len(GAPS), 1)
    z[:, 1] += torch.tensor(GAPS).repeat(2)
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


class RowLossSuite:
    """Tests of each `case` in CASES, some with each of some shared `options`, unless the loss has no such option."""

    CASES: ClassVar[list[Case]]
    #: Cases whose arguments are numbers, for rows in which one class takes all.
    CERTAIN: ClassVar[list[Case]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        where = getattr(metafunc.function, "where", lambda case: True)
        cases = [case for case in self.CASES if where(case)]
        if hasattr(metafunc.function, "options"):
            pairs = [
                (case, name)
                for case in cases
                for name in metafunc.function.options
                if case.smoothing or not name.startswith("smoothing")
            ]
            metafunc.parametrize("case, options", pairs, ids=[f"{case}-{name}" for case, name in pairs])
        elif "case" in metafunc.fixturenames:
            metafunc.parametrize("case", cases, ids=str)
        elif "certain" in metafunc.fixturenames:
            metafunc.parametrize("certain", self.CERTAIN, ids=str)

    # --- values and gradients ---

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_float64_equals_the_formula(self, case, shape, impl, generator):
        if shape[1] < case.least_classes:
            pytest.skip("refused: too few classes")
        problem = Problem.make(case, shape, generator, options="everything")
        upstream = problem.upstream(generator)
        problem.check(*problem.run(impl, upstream), upstream)

    @over(where=lambda case: case.large)
    @pytest.mark.parametrize("shape", LONG, ids=str)
    def test_long_rows(self, case, shape, impl, generator):
        dtype = torch.float64 if shape[1] < 2**16 else torch.float32
        problem = Problem.make(case, shape, generator, dtype, "everything")
        upstream = problem.upstream(generator)
        problem.check(*problem.run(impl, upstream), upstream)

    @pytest.mark.parametrize(
        ("dtype", "options"),
        [(torch.float32, "plain"), (torch.float32, "everything"), (torch.bfloat16, "plain"), (torch.float16, "plain")],
        ids=str,
    )
    @pytest.mark.parametrize("shape", FEW, ids=str)
    def test_as_accurate_as_eager(self, case, dtype, options, shape, impl, generator, kernel_calls):
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

    @over("plain", "everything")
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_reductions(self, case, options, reduction, impl, generator):
        problem = Problem.make(case, (7, 19), generator, options=options)
        upstream = problem.upstream(generator)[0]
        loss, gradient = problem.run(impl, upstream, reduction=reduction)
        truth, slope = problem.truth(upstream, reduction=reduction)
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-14)

    @pytest.mark.parametrize("normalizer", [12.5, torch.tensor(12.5), torch.tensor(3)], ids=repr)
    def test_normalizer_is_the_divisor_of_mean(self, case, normalizer, impl, generator):
        problem = Problem.make(case, (7, 19), generator, options="everything")
        loss, gradient = problem.run(impl, reduction="mean", normalizer=normalizer)
        truth, slope = problem.truth(reduction="sum")
        torch.testing.assert_close(loss, truth / float(normalizer), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, slope / float(normalizer), rtol=1e-11, atol=1e-15)

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
        _, slope = problem.truth(upstream)
        _, eager = problem.truth(upstream, torch.float32)
        assert_as_accurate_as(gradient, eager, slope, 16, problem.scale(slope, upstream))

    # --- derivatives ---

    @over("plain", "everything", where=lambda case: case.derivative)
    def test_gradcheck(self, case, options, impl, generator):
        problem = Problem.make(case, (3, 5), generator, options=options)
        z = problem.z.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: problem.loss(x, impl), z)
        assert torch.autograd.gradgradcheck(lambda x: problem.loss(x, impl), z)

    @over("plain", "everything")
    def test_second_derivative(self, case, options, impl, generator):
        problem = Problem.make(case, (3, 37), generator, options=options)
        direction = torch.randn(3, 37, generator=generator).double()
        upstream = problem.upstream(generator).requires_grad_()

        def second(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            z = problem.z.detach().requires_grad_()
            (first,) = torch.autograd.grad(function(z), z, upstream, create_graph=True)
            return torch.autograd.grad((first * direction).sum(), (z, upstream))

        for ours, truth in zip(second(lambda z: problem.loss(z, impl)), second(problem.formula), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)

    # --- rows that do not count ---

    @pytest.mark.parametrize(
        ("ignore_index", "dtype"),
        [
            (-100, torch.int64),
            (-1, torch.int64),  # also what says "no such class" inside
            (4, torch.int64),  # a padding index in the vocabulary
            (0, torch.int32),
            (-100, torch.int32),
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
        upstream = problem.upstream(generator)
        for reduction, given in (("none", upstream), ("mean", upstream[0])):
            loss, gradient = problem.run(impl, given, dirty, reduction=reduction)
            truth, slope = problem.truth(given, reduction=reduction)
            torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-15)
            assert not gradient[1::3].any()

    @over("plain", "everything")
    @pytest.mark.parametrize("rows", [0, 5], ids=["empty batch", "all ignored"])
    def test_nothing_to_count(self, case, options, rows, impl, generator):
        problem = Problem.make(case, (5, 19), generator, torch.float32, options)
        problem.z, problem.target = problem.z[:rows].requires_grad_(), problem.target[:rows]
        problem.own = of_rows(problem.own, lambda v: v[:rows])
        problem.target.fill_(problem.shared.get("ignore_index", -100))
        for reduction in ("none", "mean", "sum"):
            loss = problem.loss(problem.z, impl, reduction=reduction)
            assert loss.dtype == torch.float32
            assert loss.shape == ((rows,) if reduction == "none" else ())
            assert loss.requires_grad  # attached, so that a backward over it runs
            assert not loss.any()
            (gradient,) = torch.autograd.grad(loss, problem.z, torch.full_like(loss, 0.37))
            assert gradient.shape == problem.z.shape
            assert not gradient.any()

    # --- shapes and memory ---

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
    def test_any_rank(self, case, shape, impl, generator):
        flat = Problem.make(case, (torch.Size(shape).numel(), 19), generator)
        upstream = flat.upstream(generator)
        loss, gradient = flat.run(impl, upstream)
        own = of_rows(flat.own, lambda v: v.reshape((*shape, *v.shape[1:])))
        shaped = Problem(case, flat.z.reshape(*shape, 19), flat.target.reshape(shape), own, flat.shared)
        rows = (loss.reshape(shape), gradient.reshape(*shape, 19))
        assert_same_bits(shaped.run(impl, upstream.reshape(shape)), rows)
        assert shaped.loss(shaped.z, impl, reduction="sum").shape == ()

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

    def test_expanded_rows(self, case, impl, generator):
        problem = Problem.make(case, (5, 37), generator, torch.float32)
        upstream = problem.upstream(generator).float()
        row = problem.z[2].clone()
        loss, gradient = with_gradient(lambda z: problem.loss(z.expand(5, 37), impl), row, upstream)
        repeated = problem.run(impl, upstream, row.repeat(5, 1))
        assert torch.equal(loss, repeated[0])
        torch.testing.assert_close(gradient, repeated[1].sum(0))

    def test_targets_of_any_kind(self, case, impl, generator):
        problem = Problem.make(case, (6, 37), generator, torch.float32, "everything")
        upstream = problem.upstream(generator)
        target = problem.target
        one = target[:1]
        for name, other, same in (
            ("strided", torch.full((6, 3), 10**9)[:, 1].copy_(target), target),
            ("int32", target.int(), target),
            ("strided int32", torch.full((12,), 10**9, dtype=torch.int32)[::2].copy_(target), target),
            ("expanded", one.expand(6), one.repeat(6)),
        ):
            problem.target = same
            truth = problem.run(impl, upstream)
            problem.target = other
            assert_same_bits(problem.run(impl, upstream), truth, about=name)

    # --- options that change no number ---

    @over("plain", "everything")
    def test_return_stats(self, case, options, impl, generator):
        problem = Problem.make(case, (7, 137), generator, torch.float32, options)
        problem.target[3] = ignored = problem.shared.get("ignore_index", -100)
        upstream = problem.upstream(generator).float()
        bare = problem.run(impl, upstream)
        z = problem.z.requires_grad_()
        loss, stats = problem.loss(z, impl, return_stats=True)
        found = (loss, *torch.autograd.grad(loss, z, upstream))
        if impl == "triton":  # which columns a lane has depends on whether the top class is searched
            torch.testing.assert_close(found, bare, rtol=1e-6, atol=1e-8)
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
        for name, ours, right in zip(fl.RowStats._fields, stats, truth, strict=True):
            assert ours.shape == problem.target.shape, name
            assert not ours.requires_grad, name
            if name == "argmax":
                assert ours.dtype == torch.int64
                assert torch.equal(ours[kept], right[kept])
                assert (ours[~kept] < 0).all()
                assert (ours[~kept] != problem.target[~kept]).all()
            else:
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours[kept].double(), right[kept], rtol=1e-6, atol=2e-7)
                assert ours[~kept].isnan().all(), name

    @over("plain", "everything", where=lambda case: "backward" in case.kernels)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
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

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
        loss, gradient = problem.run(impl, upstream)
        if case.infinite:
            assert loss[2] == torch.inf
        else:
            truth, slope = problem.truth(upstream)
            torch.testing.assert_close(loss[2].double(), truth[2], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient[2].double(), slope[2], rtol=1e-5, atol=2e-8)  # of terms up to 0.1
        assert_same_bits((loss, gradient), before, torch.arange(6) != 2)

    @pytest.mark.parametrize("column", [0, 36, "target"], ids=str)
    def test_nan_stays_in_its_row(self, case, column, impl, generator):
        problem = Problem.make(case, (6, 37), generator, torch.float32)
        upstream = problem.upstream(generator)
        before = problem.run(impl, upstream)
        problem.z[2, problem.target[2] if column == "target" else column] = torch.nan
        loss, gradient = problem.run(impl, upstream)
        assert loss[2].isnan()
        assert gradient[2].isnan().any()
        assert_same_bits((loss, gradient), before, torch.arange(6) != 2)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
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


def modules_of_losses() -> dict[str, Any]:
    """The losses' test files, by the names of the losses' own."""
    files = dict.fromkeys(loss.row.__module__.rpartition(".")[2] for loss in _registry.LOSSES.values())
    return {file: importlib.import_module(f"test_{file}") for file in files}
