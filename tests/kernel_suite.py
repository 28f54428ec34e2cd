"""What the kernels for GPUs must do beside the losses' own suite, whoever runs them on a host: a test file derives."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import test_linear
import torch
from oracle import assert_as_accurate_as, exact_moments
from row_losses import computed
from row_suite import (
    DTYPES,
    Case,
    Problem,
    assert_same_bits,
    cast,
    compute_dtype,
    logits_and_targets,
    modules_of_losses,
    with_gradient,
)
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.definition import reference
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Job, Rows, Spec
from fusedloss.definition.statistics import ALL_MOMENTS, STATISTICS
from fusedloss.engine import operators as ops

#: The losses' own suites, and all of their cases by loss and name.
SUITES = {name: module.TestRowLoss for name, module in modules_of_losses().items()}
CASES: dict[str, Case] = {f"{loss} {case}": case for loss, suite in SUITES.items() for case in suite.CASES}

#: A case for each way through the kernels.
WAYS = ["cross_entropy cross_entropy", "mixed_cross_entropy top 2", "dsc one-vs-rest", "flex dual focal"]

#: Losses that PyTorch computes between the two passes, with class weights.
IN_PYTORCH: dict[str, Callable[..., Tensor]] = {
    "flex": partial(fl.flex_loss, loss_fn=lambda s: s.ce + s.q),
    "flex without the target": partial(fl.flex_loss, loss_fn=lambda s: s.lse),
    "flex that uses the target": lambda x, target, weight, **options: fl.flex_loss(
        x, target, lambda s: weight[s.target] * s.ce, **options
    ),
    "flex below": partial(fl.flex_loss, loss_fn=lambda s: s.below_logit.clamp(min=-9), statistics=("below",)),
    "flex classes": partial(fl.flex_loss, loss_fn=lambda p, q, positive: p * p, over="classes"),
    "focal, learnt": partial(fl.focal_loss, gamma=torch.tensor(2.0, requires_grad=True)),
    "mixed, learnt": partial(fl.mixed_cross_entropy, alpha=torch.tensor(0.5, requires_grad=True)),
    "classes, learnt": partial(fl.dsc_loss, alpha=torch.tensor(0.5, requires_grad=True)),
}

#: Losses of overlap, each with the number of its parameters.
OVERLAPS = {name.removesuffix("_over_rows"): count for name, count in backends.BACKENDS["cpu"].epilogues.sums.items()}

#: Losses of a row's moments, and the statistics that they ask for. Factors above 1 meet lags at the end of the range.
OF_MOMENTS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "entropy": (("entropy",), lambda s: 4 * s.entropy),
    "power": (("power",), lambda s: s.ce - 3 * s.power),
    "both": (("entropy", "power"), lambda s: s.q * s.entropy + 4 * s.power),
    "with picks": (
        ("entropy", "power", "top", "below"),
        lambda s: s.top_ce - 2 * s.entropy * s.power + s.below_logit.clamp(min=-9),
    ),
}

#: Losses of which statistics have the entropy too: with the top class among the picks, and by a pass of its own.
WITH_ENTROPY: dict[str, Callable[..., Any]] = {
    "cross_entropy": fl.cross_entropy,
    "top 2": partial(fl.mixed_cross_entropy, alpha=0.5, top_k=2),
    "candidates": partial(fl.mixed_cross_entropy, alpha=0.5, candidates=torch.tensor([[0, 1]] * 9)),
    "one-vs-rest": fl.dsc_loss,
    "a function": partial(fl.flex_loss, loss_fn=lambda s: s.ce + s.q),
    "a function of it": partial(fl.flex_loss, loss_fn=lambda s: s.ce + s.entropy, statistics=("entropy",)),
    "level class": partial(fl.dsc_loss, level="class"),
}

#: Losses of logits over a temperature, through every pass. Those over the rows have no loss of each.
TEMPERED: dict[str, Callable[..., Any]] = {
    "cross_entropy": fl.cross_entropy,
    "smoothing": partial(fl.cross_entropy, label_smoothing=0.1, z_loss=0.01),
    "focal": partial(fl.focal_loss, gamma=1.5),
    "top 2": partial(fl.mixed_cross_entropy, alpha=0.5, top_k=2),
    "candidates": partial(fl.mixed_cross_entropy, alpha=0.5, candidates=torch.tensor([[0, 1]] * 9)),
    "one-vs-rest": partial(fl.dsc_loss, alpha=0.5),
    "dice": fl.dice_loss,
    "level class": partial(fl.dsc_loss, alpha=0.5, level="class"),
    "level set": partial(fl.dsc_loss, level="set"),
    "statistics": partial(
        fl.flex_loss,
        loss_fn=lambda s: s.lse - s.top_logit + s.below_logit.clamp(min=-9) + s.mean_ce,
        statistics=("top", "below", "mean"),
    ),
    "moments": partial(fl.flex_loss, loss_fn=OF_MOMENTS["both"][1], statistics=("entropy", "power")),
}

#: Signalling NaN, which arithmetic makes quiet: a look leaves a trace.
SIGNALLING = {
    torch.float64: (torch.int64, 0x7FF0000000000001),
    torch.float32: (torch.int32, 0x7F800001),
    torch.bfloat16: (torch.int16, 0x7F81),
}


def statistics_and_top(rows: Rows, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, the index of the top class, and 1 - p of it."""
    spec = Spec(impl, top_k=1, top_q=True)
    _, statistics, index, *_ = ops.forward(*rows._replace(params=[]), None, spec.encode())
    return statistics[:-1], index, statistics[-1]


def class_sums(rows: Rows, loss: str, impl: str, row_weight: Tensor | None = None) -> Tensor:
    statistics, index, _ = statistics_and_top(rows, impl)
    spec = Spec(impl, f"{loss}_over_rows", over_rows=True)
    return ops.sums(*rows, statistics, index, row_weight, None, spec.encode())


def rows_of_moments(
    classes: int, generator: torch.Generator, dtype: torch.dtype, masked: bool = True
) -> tuple[Tensor, Tensor]:
    """Nine rows: plain ones, an ignored one, some with classes left out, with ties, and far from 0."""
    z, target = logits_and_targets(9, classes, generator, dtype)
    target[2] = -100
    z[4, ::3] = 9
    z[5] = -1.5
    z[8] += 300
    if masked:
        z[3, ::2] = z[6] = -torch.inf
        for row in (3, 6):
            z[row, target[row]] = -2.5
    return z, target


def _singled_out(z: Tensor, target: Tensor) -> Tensor:
    """(N, V), 1 at the target, the top class and that below the target, whose gradients cancel."""
    of_target = z.gather(1, target.clamp(min=0)[:, None])
    below = z.masked_fill(z >= of_target, -torch.inf).argmax(1)
    classes = torch.stack([target.clamp(min=0), z.argmax(1), below], 1)
    return torch.zeros_like(z, dtype=torch.float64).scatter(1, classes, 1)


def check_moments(classes: int, name: str, dtype: torch.dtype, terms: bool, impl: str, generator: Any) -> None:
    """Losses of them and their gradient, by the tolerance rule; `terms`: with class weights and smoothing."""
    z, target = rows_of_moments(classes, generator, dtype, masked=not terms)
    statistics, loss_fn = OF_MOMENTS[name]
    if name == "entropy" and not terms and classes > 1:
        z[7, target[7]] = -torch.inf
    upstream = torch.randn(len(target), generator=generator).double()
    options: dict[str, Any] = {"reduction": "none", "statistics": statistics}
    if terms:
        weight = torch.rand(classes, generator=generator).double().add(0.5)
        options |= {"weight": weight, "label_smoothing": 0.125}

    def run(impl: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = cast(options, compute_dtype(dtype))
        return with_gradient(lambda x: fl.flex_loss(x, target, loss_fn, impl=impl, **own), z.to(dtype), upstream)

    truth, slope = run("reference", torch.float64)
    eager, eager_slope = run("reference", compute_dtype(dtype))
    loss, gradient = run(impl, dtype)
    assert truth[2] == 0 and slope.isfinite().all()
    # p_j (a + c (z_j - m) + e p_j) - u w_j: an exponential is off by half the difference, in ulps.
    wide = z.double()
    p, lag = wide.softmax(1), (wide - wide.amax(1, keepdim=True)).masked_fill(z == -torch.inf, 0).abs()
    size = 12 * (
        p * (1 + lag + (p * lag).sum(1, keepdim=True)) + (1.5 / 8 / classes if terms else 0) + _singled_out(z, target)
    )
    scale = slope.abs() * (1 + lag) + size * upstream.abs()[:, None]
    ulps = {torch.float64: 5000, torch.float32: 16}.get(dtype, 1)
    assert_as_accurate_as(loss, eager, truth, max(ulps, 8), truth.abs() * (1 + lag.amax(1)).sqrt())
    assert_as_accurate_as(gradient, eager_slope.to(dtype), slope, ulps, scale)


def check_operators(rows: Rows, spec: Spec, generator: torch.Generator) -> None:
    """By opcheck: forward without and with gradients, backward, and that in the logits' memory."""
    count, sources = len(rows.target), rows.sources
    row_weight = torch.rand(count, generator=generator, dtype=compute_dtype(sources[0].dtype))
    torch.library.opcheck(ops.forward, (*rows, None, spec.encode()))
    needed = spec._replace(needed=(True,) * len(sources)).encode()
    for upstream in (row_weight, row_weight[0].expand(count)):
        torch.library.opcheck(ops.forward, (*rows, upstream, needed))
    _, *saved, _ = ops.forward(*rows, None, spec.encode())
    torch.library.opcheck(ops.backward, (*rows, *saved, row_weight, needed))
    if not rows.is_linear:
        own = rows._replace(hidden=[rows.logits.clone()])
        torch.library.opcheck(ops.backward_, (*own, *saved, row_weight, needed))


#: Parameters of each epilogue of a row, and of those that read a second one.
EPILOGUES = backends.BACKENDS["cpu"].epilogues
ROW_EPILOGUES: dict[str, int] = EPILOGUES.rows | EPILOGUES.classes | EPILOGUES.pairs


def job_of(
    epilogue: str, impl: str, rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Rows, Spec, Tensor]:
    """With class weights, all terms that the epilogue takes, a factor, and an ignored row; and weights of the rows."""
    z, target = logits_and_targets(rows, classes, generator, dtype)
    target[2:3] = -100
    compute = compute_dtype(dtype)
    weight, row_weight = (torch.rand(n, generator=generator).to(compute) for n in (classes, rows))
    smoothing = 0.1 if epilogue in EPILOGUES.rows else 0.0
    scalars = torch.tensor([1 - smoothing, smoothing / classes, 0.01, 1 / 0.7], dtype=compute)
    params = [torch.full((), 0.5, dtype=compute)] * ROW_EPILOGUES[epilogue]
    batch = Rows.of(z, target, weight, None, params, scalars)
    if epilogue in EPILOGUES.pairs:
        second = z.roll(1, 1).abs()
        batch = batch._replace(teacher=[second.to(compute) if epilogue == "soft_targets" else second])
    top_k = {"cross_entropy": 0, "mixed_cross_entropy": 2}.get(epilogue, 1)
    return batch, Spec(impl, epilogue, top_k, mean=smoothing != 0, form=Form(tempered=True)), row_weight


def run_job(
    rows: Rows, spec: Spec, row_weight: Tensor, one_read: bool, grad: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Loss, statistics, index, coefficients and gradient, made with the loss or by a pass of its own; in `grad`."""
    backend, job = backends.BACKENDS[spec.impl], Job.new(rows, spec)
    if not one_read:
        backend.forward(job)
    job.grad, job.upstream = backend.new_gradient(rows.logits) if grad is None else grad, row_weight
    if one_read:
        backend.with_gradient(job)
    else:
        backend.backward(job)
    return job.loss, job.statistics, job.index, job.coefficients, job.grad


def sure_and_ignored(rows, classes, generator, dtype):
    """Logits and targets, with a row that is sure and wrong and one that is ignored."""
    z, target = logits_and_targets(rows, classes, generator, dtype)
    z[1] += 12 * torch.eye(classes, dtype=dtype)[(target[1] + 1) % classes]
    target[rows // 2] = -100
    return z, target


class MomentSuite:
    """The largest logits, parts of the classes, entropy, power and a temperature, in the passes of any engine."""

    #: Of rows with moments, and with a temperature: in part of a block, in several blocks and in parts of a row.
    WIDTHS: ClassVar[list[int]] = [1, 2, 7, 70, 3000, 20001]
    #: The relative error that an entropy may have in float32 at a gap g between the largest logits: (x + y g) / 2^23.
    ENTROPY_ERROR: ClassVar[tuple[float, float]] = (4, 2)
    #: Rows and classes, of which the passes take a part.
    PARTS_OF: ClassVar[list[tuple[int, int]]] = [(5, 9), (4, 600)]
    #: Ways in which a row may be divided, by name: what is set to have it so, as monkeypatch takes it.
    DIVISIONS: ClassVar[dict[str, tuple[Any, str, Any]]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        wider = [width for width in self.WIDTHS if width > 1]
        for name, values in (("width", self.WIDTHS), ("wider", wider), ("parts_of", self.PARTS_OF)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=str)
        if "divided" in metafunc.fixturenames:
            metafunc.parametrize("division", self.DIVISIONS or ["whole"])

    @pytest.fixture
    def divided(self, division, monkeypatch) -> None:
        if self.DIVISIONS:
            monkeypatch.setattr(*self.DIVISIONS[division])

    # --- the largest logits ---

    def test_the_largest_logits(self, width, divided, impl, generator):
        """Wherever they are: the lower class where many logits are the same, or -inf."""
        z = torch.randint(-3, 3, (64, width), generator=generator).to(torch.bfloat16)
        z[:8] += 9.0 * (torch.rand(8, width, generator=generator) < 0.01)
        z[8:16] = -torch.inf
        z[torch.arange(8, 16), torch.randint(width, (8,), generator=generator)] = 1.0
        z[16:24, : width // 2] = -torch.inf
        z[24:32, width // 2 + 1 :] = -torch.inf
        rows = Rows.of(z, torch.randint(width, (64,), generator=generator))
        expected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :2]
        expected = torch.nn.functional.pad(expected, (0, 2 - expected.shape[1]), value=-1)
        lower = torch.where(z < z.gather(1, rows.target[:, None]), z, -torch.inf).float()
        below = torch.where(lower.amax(1) == -torch.inf, -1, lower.argmax(1))
        _, _, index, *_ = ops.forward(*rows, None, Spec(impl, top_k=2, below=True).encode())
        assert torch.equal(index, torch.stack([*expected.unbind(1), below]))

    # --- parts of the classes ---

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("loss", OVERLAPS)
    def test_parts_of_the_classes(self, parts_of, loss, dtype, impl, generator):
        """Of logits that are some of the classes the passes make the sums and the gradient of these."""
        count, classes = parts_of
        z, target = sure_and_ignored(count, classes, generator, dtype)
        compute = compute_dtype(dtype)
        alpha, row_weight = torch.rand(2, count, generator=generator).to(compute).unbind()
        one = torch.ones((), dtype=compute)
        own = [alpha, *[one] * (OVERLAPS[loss] - 1)]
        rows = Rows.of(z, target, torch.rand(classes, generator=generator).to(compute), params=[*own, one])
        weight = rows.class_weight
        statistics, index, top_q = statistics_and_top(rows, impl)
        over_rows = Spec(impl, f"{loss}_over_rows", over_rows=True).encode()
        one_vs_rest = Spec(impl, f"{loss}_one_vs_rest", top_k=1)
        rtol = 1e-12 if dtype == torch.float64 else 2e-6

        def passes(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            first, last, _ = part.indices(classes)

            def columns(x: Tensor) -> Tensor:
                return torch.where((x >= first) & (x < last), x - first, torch.where(x == -100, -100, -1))

            here = rows._replace(hidden=[z[:, part].contiguous()], target=columns(target), class_weight=weight[part])
            saved = (statistics, columns(index))
            (gradient,) = ops.backward(*here, *saved, coefficients, row_weight, one_vs_rest.encode())
            return (
                ops.sums(*here._replace(params=own), *saved, row_weight, top_q, over_rows),
                ops.sums(*here, *saved, None, None, one_vs_rest.encode()),
                gradient,
            )

        value, _, _, coefficients, _ = ops.forward(*rows, None, one_vs_rest.encode())
        sums, terms, gradient = passes(slice(None))
        whole = class_sums(rows._replace(params=own), loss, impl, row_weight)
        torch.testing.assert_close(sums, whole, rtol=rtol, atol=rtol * 1e-2)
        assert (terms[:, target == -100] == 0).all()
        # What is left out is of the target and the top class, whose losses are at most their weights.
        rest = value.double() - terms[0]
        singled = weight[target.clamp(min=0)] + torch.where(index[0] == target, 0, weight[index[0].clamp(min=0)])
        assert (rest >= -rtol * value).all() and (rest <= singled * (1 + rtol)).all()
        parts = [passes(part) for part in (slice(0, 1), slice(1, 1 + classes // 2), slice(1 + classes // 2, None))]
        torch.testing.assert_close(torch.cat([x for x, _, _ in parts], 1), sums, rtol=rtol, atol=rtol * 1e-2)
        torch.testing.assert_close(sum(x for _, x, _ in parts), terms, rtol=rtol, atol=rtol * 1e-2)
        torch.testing.assert_close(torch.cat([x for _, _, x in parts], 1), gradient)

    # --- moments ---

    @pytest.mark.parametrize("terms", [False, True], ids=["plain", "all terms"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", OF_MOMENTS)
    def test_moments(self, name, dtype, terms, width, divided, impl, generator):
        check_moments(width, name, dtype, terms, impl, generator)

    @pytest.mark.parametrize("factor", [1.0, 1 / 0.7], ids=["", "temperature"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("classes", [5, 700])
    def test_a_small_entropy_keeps_the_digits_of_the_logits(self, classes, dtype, factor, impl):
        """And so do the power and the gradient, wherever the largest logit is: first, last, between, the target or not.

        In float32 an exponential is off by half its exponent, in ulps.
        """
        gaps = torch.tensor([0, 1, 2, 5, 10, 14, 17, 20, 25, 30, 40, 54, 80])
        gaps = gaps[gaps * factor <= 80]
        columns = torch.arange(5) * (classes // 5)
        z = torch.full((len(gaps) * 5, classes), -torch.inf, dtype=torch.float64)
        z[:, columns] = torch.tensor([-0.5, 0, -1.25, 0, -1.75], dtype=torch.float64)
        top = columns.repeat(len(gaps))
        gap = gaps.repeat_interleave(5).double()
        z[torch.arange(len(z)), top] = gap
        target = torch.where(torch.arange(len(z)) % 2 == 0, top, columns[3])
        scalars = torch.tensor([1, 0, 0, factor], dtype=dtype)
        rows = Rows.of(z.to(dtype), target, scalars=scalars)
        spec = Spec(impl, moments=ALL_MOMENTS, form=Form(tempered=factor != 1))
        found = ops.forward(*rows, None, spec.encode())[1][STATISTICS:].double()
        factor = float(scalars[-1])
        _, excess, _ = right = exact_moments(z, factor)
        constant, by_gap = self.ENTROPY_ERROR
        bar = torch.full_like(gap, 1e-13) if dtype == torch.float64 else (constant + by_gap * gap * factor) * 2**-23
        assert ((found - right).abs() <= bar * right.abs()).all()

        def loss(x: Tensor) -> Tensor:
            options = {"statistics": ("entropy",), "temperature": 1 / factor, "reduction": "none", "impl": impl}
            return fl.flex_loss(x, target, lambda s: s.entropy, **options)

        _, gradient = with_gradient(loss, z.to(dtype))
        # dH/dz_top = f p_top E
        slope = factor * excess * (factor * z).softmax(1)[torch.arange(len(z)), top]
        of_top = gradient[torch.arange(len(z)), top].double()
        assert ((of_top - slope).abs() <= (2 * bar * slope.abs()))[gap >= 5].all()

    def test_rows_without_moments(self, impl):
        """An ignored row has those of two equal logits; one without a finite logit, or with NaN, has none."""
        z = torch.tensor([[0.5, 1.0, 2.0], [-torch.inf] * 3, [torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0]])
        rows = Rows.of(z, torch.tensor([-100, 1, 2, 1]))
        found = ops.forward(*rows, None, Spec(impl, moments=ALL_MOMENTS).encode())[1][STATISTICS:]
        torch.testing.assert_close(
            found[:, 0], torch.tensor([2.0, 1.0, 1.0]).log() * torch.tensor([1, 0, 0]) + torch.tensor([0, 0, 0.5])
        )
        assert found[:, 1:].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", WITH_ENTROPY)
    def test_statistics_with_the_entropy(self, name, reduction, dtype, wider, impl, generator):
        """The loss and its gradient are what they are without it."""
        z, target = rows_of_moments(wider, generator, dtype)
        loss = partial(WITH_ENTROPY[name], reduction="mean" if "level" in name else reduction)
        results, entropies = [], []
        for more in ({}, {"stats": ("entropy",)}):
            x = z.clone().requires_grad_()
            value, stats = loss(x, target, return_stats=True, impl=impl, **more)
            results.append((value, *stats[:4], *torch.autograd.grad(value.sum(), x)))
            entropies.append(stats.entropy)
        torch.testing.assert_close(*results, equal_nan=True)
        none, found = entropies
        assert none is None and found.isnan().tolist() == [row == 2 for row in range(9)]
        truth, eager = (
            loss(z.to(x), target, return_stats=True, impl="reference", stats=("entropy",))[1].entropy
            for x in (torch.float64, found.dtype)
        )
        lag = 1 + (z.amax(1) - z.amin(1)).double().nan_to_num(0, 0).clamp(max=30)
        assert_as_accurate_as(found, eager, truth, 5000 if dtype == torch.float64 else 16, truth.abs() * lag)

    # --- a temperature ---

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", TEMPERED)
    def test_temperature(self, name, dtype, wider, impl, generator):
        """Against the loss of logits that are divided before, in float64."""
        z, target = rows_of_moments(wider, generator, dtype, masked=False)
        z[8] -= 300
        over_rows = "level" in name
        loss = partial(TEMPERED[name], reduction="mean" if over_rows else "none")
        upstream = torch.randn(9, generator=generator).double()
        upstream = upstream[0] if over_rows else upstream

        def divided(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return with_gradient(lambda x: loss(x / 0.7, target, impl="reference"), z.to(dtype), upstream)

        (truth, slope), (eager, eager_slope) = divided(torch.float64), divided(compute_dtype(dtype))
        p = (z.double() / 0.7).softmax(1).masked_fill((target == -100)[:, None], 0)
        distance = 1 + (z.amax(1, keepdim=True) - z).double() / 0.7
        terms = p * distance + 0.1 / wider + _singled_out(z, target)
        scale = slope.abs() * distance + 8 * terms * upstream.abs().reshape(-1, 1) / (9 if over_rows else 1)
        ulps = {torch.float64: 5000, torch.float32: 16}.get(dtype, 1)
        size = truth.abs() * (1 if over_rows else distance.amax(1))
        for options in ({}, {"inplace_backward": True}):
            x = computed(z.clone()) if options else z
            got, gradient = with_gradient(
                partial(loss, target=target, temperature=0.7, impl=impl, **options), x, upstream
            )
            assert_as_accurate_as(got, eager, truth, max(ulps, 8), size)
            assert_as_accurate_as(gradient, eager_slope.to(dtype), slope, ulps, scale)

    @pytest.mark.parametrize("name", ["cross_entropy", "one-vs-rest", "level class", "moments", "linear"])
    def test_a_temperature_that_is_learnt(self, name, impl, generator):
        """Its gradient is made of those of the logits, or of the hidden states."""
        hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (9, 70))
        target = torch.randint(70, (9,), generator=generator)
        results = []
        for of in (impl, "reference"):
            temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
            h = hidden.clone().requires_grad_()
            if name == "linear":
                value = fl.linear_cross_entropy(h, weight, target, temperature=temperature, impl=of)
            else:
                value = TEMPERED[name](h @ weight.t(), target, temperature=temperature, impl=of)
            results.append((value, *torch.autograd.grad(value, (h, temperature))))
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-14)


class KernelSuite(MomentSuite):
    #: Rows and classes for sums over the rows: in one group of rows and in several, in one block of columns and in two.
    SUMS: ClassVar[list[tuple[int, int]]]
    #: The module and the name of how many programs scale a gradient at the most.
    SCALE_PROGRAMS: ClassVar[tuple[Any, str]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "summed" in metafunc.fixturenames:
            metafunc.parametrize("summed", self.SUMS, ids=str)
        super().pytest_generate_tests(metafunc)

    @pytest.fixture
    def unchecked(self, impl, monkeypatch) -> None:
        """As on a GPU, where nobody looks at the targets beforehand."""
        for module in (getattr(backends, impl), reference):
            monkeypatch.setattr(module, "check_indices", lambda *arguments: None)

    # --- a gradient times a factor ---

    @pytest.mark.parametrize("dtype", SIGNALLING, ids=str)
    def test_a_factor_of_one_leaves_the_gradient_alone(self, dtype, impl):
        kind, bits = SIGNALLING[dtype]
        untouched = torch.full((100,), bits, dtype=kind)
        for factor, alone in ((1.0, True), (0.5, False)):
            gradient = untouched.clone()
            ops.scale_(gradient.view(dtype), torch.tensor(factor, dtype=compute_dtype(dtype)), impl)
            assert torch.equal(gradient, untouched) == alone

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("programs", [1, None])
    def test_scaling(self, programs, dtype, impl, generator, monkeypatch):
        """In vectors and a rest, in several rounds of the programs, and where no vector is aligned."""
        if programs:
            monkeypatch.setattr(*self.SCALE_PROGRAMS, programs)
        factor = torch.tensor(-0.3, dtype=compute_dtype(dtype))
        for count, offset in ((0, 0), (1, 0), (5, 0), (256 * 8, 0), (5003, 0), (5003, 1)):
            memory = torch.randn(count + 2, generator=generator, dtype=torch.float64).to(dtype)
            right = memory.clone()
            right[offset : offset + count] = (right[offset : offset + count].to(factor.dtype) * factor).to(dtype)
            ops.scale_(memory[offset : offset + count], factor, impl)
            assert torch.equal(memory, right)
        with pytest.raises(ValueError, match=r"must be contiguous, got strides \(2,\)"):
            ops.scale_(memory[::2], factor, impl)

    # --- units of float16 rows ---

    @pytest.mark.parametrize("upstream", ["none", "one", "rows"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("loss", ["mixed_cross_entropy", "dsc_one_vs_rest"])
    def test_units(self, loss, weighted, upstream, impl, generator):
        """By the formula in float64: the bound of a row's gradient over its unit lies between 2^14 and 2^15."""
        count, backend = 150, backends.BACKENDS[impl]
        spread = torch.exp2(-40 * torch.rand(count, generator=generator))
        coefficients = torch.randn(5, count, generator=generator) * spread
        coefficients[:, :5] = torch.tensor([0, torch.inf, torch.nan, 1e-30, 1e30])
        q, weight = torch.rand(count, generator=generator), torch.tensor(3.0) if weighted else None
        factor = torch.randn(count, generator=generator)
        factor = {"none": None, "one": factor[:1].expand(count), "rows": factor}[upstream]
        scalars = torch.tensor([2.0, 0.0, 0.0, 1.0]) if weighted else None
        logits, target = torch.empty(count, 3, dtype=torch.float16), torch.zeros(count, dtype=torch.int64)
        job = Job(
            Rows.of(logits, target, scalars=scalars),
            Spec(impl, loss),
            torch.stack([q] * 6),
            None,
            None,
            coefficients.clone(),
            upstream=factor,
        )
        norms, scales = torch.tensor([5.0, 0.0, 2.0**15]), torch.tensor([0.0, 1.0, 2.0**-120])
        before = scales.clone()
        unit, factors, changes = backend.units_(job, weight, norms, scales)

        wide, by = coefficients.double().abs(), 1 if factor is None else factor.double()
        if loss == "dsc_one_vs_rest":
            bound = wide[:3].sum(0) + 64 * (3 * 2 if weighted else 1)
        else:
            bound = wide[0] * q + wide[1] * (3 if weighted else 1) + wide[2:].sum(0)
        share = bound * abs(by) / unit
        finite = bound.isfinite()
        assert not finite[[1, 2]].any() and (unit[[1, 2]] == 2.0**-14).all()
        small = finite & (share < 2.0**14 * (1 - 1e-6))
        assert (unit[small] == 2.0**-78).all() and small.sum() == (0 if loss == "dsc_one_vs_rest" else 2)
        assert (share[finite] < 2.0**15 * (1 + 1e-6)).all()
        assert torch.equal(job.upstream, (torch.ones(count) * by / unit).float())
        assert torch.equal(job.coefficients.nan_to_num(7), coefficients.nan_to_num(7))

        needed = torch.exp2((norms * unit.max()).double().log2().floor() - 14).clamp(min=2.0**-114)
        assert torch.equal(scales, torch.maximum(needed.float(), before))
        assert torch.equal(changes, before / scales)
        assert torch.equal(factors, unit / scales[:, None])
        for x in (unit, scales):
            assert (x.frexp().mantissa == 0.5).all()

    # --- what is out of range ---

    @pytest.mark.parametrize("value", [-1, 300, 2**31, 2**32 + 1, -(2**63)])
    @pytest.mark.parametrize("name", WAYS)
    def test_a_target_out_of_range_makes_its_row_nan(self, name, value, impl, generator, unchecked):
        problem = Problem.make(CASES[name], (6, 300), generator, torch.float32)
        upstream = problem.upstream(generator)
        before = problem.run(impl, upstream)
        problem.target[2] = value
        loss, gradient = problem.run(impl, upstream)
        assert loss[2].isnan()
        assert gradient[2].isnan().any()
        others = torch.arange(6) != 2
        assert_same_bits((loss, gradient), before, others)
        total, gradient = problem.run(impl, reduction="sum")
        assert total.isnan()
        assert gradient[2].isnan().any()
        assert gradient[others].isfinite().all()

    def test_a_target_out_of_range_has_no_class_weight(self, impl, generator, unchecked):
        """A weighted mean must not look one up."""
        z, target = logits_and_targets(6, 300, generator, torch.float32)
        target[2] = 300
        weight = torch.rand(300, generator=generator)
        loss, gradient = with_gradient(lambda x: fl.cross_entropy(x, target, weight=weight, impl=impl), z)
        assert loss.isnan()
        assert [bool(row.isfinite().all()) for row in gradient] == [True, True, False, True, True, True]

    @pytest.mark.parametrize("value", [-1, 300, 2**32 + 1])
    def test_a_candidate_out_of_range_makes_its_row_nan(self, value, impl, generator, unchecked):
        problem = Problem.make(CASES["mixed_cross_entropy 3 candidates"], (6, 300), generator, torch.float32)
        upstream = problem.upstream(generator)
        before = problem.run(impl, upstream)
        problem.own["candidates"][2, 1] = value
        loss, gradient = problem.run(impl, upstream)
        assert loss[2].isnan()
        assert_same_bits((loss, gradient), before, torch.arange(6) != 2)

    @pytest.mark.parametrize("name", IN_PYTORCH)
    def test_a_target_out_of_range_is_no_index(self, name, impl, generator, unchecked):
        """PyTorch between the passes may use a target as an index; on a GPU a wrong one would end the process."""
        z, target = logits_and_targets(6, 300, generator, torch.float32)
        target[4] = -100
        weight, upstream = torch.rand(300, generator=generator), torch.rand(6, generator=generator)

        def run() -> tuple[Tensor, Tensor]:
            loss = IN_PYTORCH[name]
            options = {"weight": weight, "reduction": "none", "impl": impl}
            return with_gradient(lambda x: loss(x, target, **options), z, upstream)

        before = run()
        for value in (-1, 300, 2**32 + 1):
            target[2] = value
            loss, gradient = run()
            assert loss[2].isnan()
            assert gradient[2].isnan().any()
            assert_same_bits((loss, gradient), before, torch.arange(6) != 2)

    @pytest.mark.parametrize("level", ["class", "set"])
    def test_a_target_out_of_range_makes_sums_over_rows_nan(self, level, impl, generator, unchecked):
        z, target = logits_and_targets(6, 300, generator, torch.float32)
        target[2] = 300
        loss, gradient = with_gradient(lambda x: fl.dsc_loss(x, target, level=level, impl=impl), z)
        assert loss.isnan()
        assert gradient.isnan().any(1).all()

    # --- sums over the rows ---

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("loss", OVERLAPS)
    def test_class_sums(self, summed, loss, dtype, impl, generator):
        """Against the engine's."""
        rows, classes = summed
        z, target = sure_and_ignored(rows, classes, generator, dtype)
        alpha = torch.rand(rows, generator=generator).to(compute_dtype(dtype))
        one = torch.ones((), dtype=alpha.dtype)
        params = [alpha, *[one] * (OVERLAPS[loss] - 1)]
        batch = Rows.of(z, target, params=params)
        for row_weight in (None, torch.rand(rows, generator=generator).to(alpha.dtype)):
            ours, engine = (class_sums(batch, loss, name, row_weight) for name in (impl, "cpu"))
            assert ours.dtype == torch.float64
            rtol = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(ours, engine, rtol=rtol, atol=rtol * 1e-2)
        if rows < 256:  # which take seconds where threads are simulated
            assert torch.equal(ours, class_sums(batch, loss, impl, row_weight))

    @pytest.mark.parametrize("level", ["class", "set"])
    def test_levels_above_the_rows(self, level, impl, generator):
        z, target = logits_and_targets(40, 131, generator, torch.float32)
        target[7] = -100
        results = [
            with_gradient(lambda x, name=name: fl.dsc_loss(x, target, alpha=0.5, level=level, impl=name), z)
            for name in (impl, "cpu")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-9)
        nothing = z[:0].requires_grad_()
        loss = fl.dsc_loss(nothing, target[:0], level=level, impl=impl)
        assert torch.equal(loss, fl.dsc_loss(nothing, target[:0], level=level, impl="cpu"))

    # --- every epilogue, in rows that are divided in every way ---

    def test_its_epilogues_are_those_of_the_engine(self, impl):
        """Each with as many parameters."""
        assert backends.BACKENDS[impl].epilogues == backends.BACKENDS["cpu"].epilogues

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_every_case(self, name, dtype, divided, impl, generator):
        """With all parameters, of few classes and of many."""
        for shape in ((7, 3), (5, 129), (3, 1030)):
            problem = Problem.make(CASES[name], shape, generator, dtype, "everything")
            upstream = problem.upstream(generator)
            problem.check(*problem.run(impl, upstream), upstream)

    # --- linear forms, operators, torch.compile ---

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("rows", [3, 7], ids=["chunks", "one chunk"])
    def test_linear_forms(self, rows, reduction, impl, generator, kernel_calls):
        """The ignored row is none of a chunk of logits, and has no gradient."""
        hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (7, 300))
        target = torch.randint(300, (7,), generator=generator)
        target[2] = -100
        results = []
        for of in (impl, "reference"):
            options = {"budget": rows * 300 * 4, "reduction": reduction, "impl": of}
            loss = fl.linear_focal_loss(hidden, weight, target, **options)
            results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
        chunks = 2 if rows == 3 else 1
        if reduction == "mean":
            used = {"with_gradient": chunks, "forward": 1, "scale_": 2}
        else:
            used = {"forward": chunks + 1, "backward": chunks}
        assert kernel_calls == {(name, impl): count for name, count in used.items()}

    @pytest.mark.parametrize("name", test_linear.SMALL_FACTORS_OF_KERNELS)
    def test_small_factors_in_float16(self, name, impl, generator):
        test_linear.check_small_factors(name, generator, impl)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("epilogue", backends.BACKENDS["cpu"].epilogues.pairs)
    def test_sums_and_gradients_of_some_of_the_classes(self, epilogue, dtype, impl, generator):
        """Of two rows, as a rank of a group takes them: from statistics of more classes, without a target here."""
        rows, spec, row_weight = job_of(epilogue, "cpu", 5, 300, dtype, generator)
        _, *saved, _ = ops.forward(*rows, None, spec.encode())
        rows.target[:2] = -1
        results = []
        for of in ("cpu", impl):
            known = spec._replace(impl=of).encode()
            sums = ops.sums(*rows, *saved[:2], None, None, known)
            results.append((sums.to(row_weight.dtype), *ops.backward(*rows, *saved, row_weight, known)))
        assert not results[1][0][:, 2].any() and not results[1][1][2].any()
        torch.testing.assert_close(*results)

    @pytest.mark.compile
    def test_compiled(self, impl, generator):
        z, target = logits_and_targets(5, 300, generator, torch.float32)

        def loss(x: Tensor) -> Tensor:
            return fl.mixed_cross_entropy(x, target, alpha=0.25, impl=impl)

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(with_gradient(compiled, z), with_gradient(loss, z))

    def test_opcheck(self, impl, generator):
        z, target = logits_and_targets(5, 21, generator, torch.float32)
        scalars = torch.tensor([0.9, 0.1 / 21, 0.01, 1 / 0.7])
        rows = Rows.of(z, target, params=[torch.tensor(0.25)], scalars=scalars)
        check_operators(rows, Spec(impl, "mixed_cross_entropy", top_k=2, mean=True, moments=ALL_MOMENTS), generator)
        torch.library.opcheck(ops.scale_, (z.clone(), torch.tensor(0.5), impl))
