"""Losses, arguments, shapes, layouts, dtypes and logits drawn at random, on every backend against float64.

Each test prints the smallest case that it found to fail. `make fuzz` draws many; the suite a few, always the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import test_linear
import test_overlap
import test_supcon
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate_as
from row_losses import LEVELED
from row_suite import (
    DTYPES,
    Case,
    Problem,
    class_weights,
    compute_dtype,
    layouts,
    logits_and_targets,
    modules_of_losses,
    of_rows,
    quarters,
)
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.losses import supcon

READY = [name for name in ("reference", "cpu") if backends.unavailable(name) is None]
needs_triton = pytest.mark.skipif(
    backends.unavailable("triton", torch.device("cpu")) is not None, reason="Triton's interpreter is not there"
)


def one_in(share: int) -> settings:
    """That part of the cases of a test."""
    return settings(max_examples=max(5, settings.default.max_examples // share))


# --- what is drawn ---

SHARES = st.integers(0, 4).map(lambda k: k / 4)

#: The losses' test files, which say what of their arguments is drawn.
MODULES = {name: module for module in modules_of_losses().values() for name in module.DRAWN}

#: The values of each loss's arguments, the same numbers in every dtype. `picks` are `top_k`, or so many candidates.
LOSSES: dict[str, dict[str, list[Any]]] = {name: module.DRAWN[name] for name, module in MODULES.items()}
LEVELS = [loss.func.__name__ for loss in LEVELED]
#: Parameters that may be of each row.
OF_ROWS = ("gamma", "alpha", "beta")


def case_of(loss: str, own: dict[str, Any]) -> Case:
    case: Case = MODULES[loss].drawn(loss, own)
    return case


#: Logits, from ordinary ones (N, V) and targets: what a loss must be right for, or leave to their rows.
LOGITS: dict[str, Callable[[Tensor, Tensor, torch.dtype, torch.Generator], Tensor]] = {
    "ordinary": lambda z, t, d, g: z,
    "a target ahead": lambda z, t, d, g: _ahead(z, t, 70 * torch.rand(len(z), generator=g)),
    "another class ahead": lambda z, t, d, g: _ahead(z, (t + 1) % z.shape[1], 70 * torch.rand(len(z), generator=g)),
    "a target that has all": lambda z, t, d, g: _ahead(z, t, 110 + 90 * torch.rand(len(z), generator=g)),
    "a target that has nearly all": lambda z, t, d, g: _ahead(z, t, _end_of_range(d, len(z), g)),
    "wide": lambda z, t, d, g: (z / 2).round() * 128,
    "constant": lambda z, t, d, g: torch.full_like(z, float(torch.randint(-4, 5, (), generator=g)) * 2500),
    "far from 0": lambda z, t, d, g: (z * 64).round() / 64 + 1e4,
    "some of -1e4": lambda z, t, d, g: z.masked_fill(torch.rand(z.shape, generator=g) < 0.5, -1e4),
    "some of -inf": lambda z, t, d, g: z.masked_fill(_but(t, torch.rand(z.shape, generator=g) < 0.5), -torch.inf),
    "all others -inf": lambda z, t, d, g: z.masked_fill(_but(t, torch.ones_like(z, dtype=torch.bool)), -torch.inf),
    "a target of -inf": lambda z, t, d, g: _set(z, t, -torch.inf),
    "a NaN": lambda z, t, d, g: _set(z, torch.randint(z.shape[1], t.shape, generator=g), torch.nan),
    "huge": lambda z, t, d, g: z * (1e3 if d == torch.float16 else 1e30),
    "subnormal": lambda z, t, d, g: z * torch.finfo(d).tiny / 16,
}


#: Of a 1 - p that is subnormal or a sum of such, whose powers have no digits: no more than finite.
FINITE = "a target that has nearly all"


def _end_of_range(dtype: torch.dtype, rows: int, generator: torch.Generator) -> Tensor:
    return (700 if dtype == torch.float64 else 80) + 30 * torch.rand(rows, generator=generator)


def _ahead(z: Tensor, column: Tensor, gap: Tensor) -> Tensor:
    """From a gap of 17 on float32 has p = 1, and from 104 on 1 - p = 0."""
    return z.scatter(1, column[:, None], (z.amax(1) + gap)[:, None])


def _but(target: Tensor, mask: Tensor) -> Tensor:
    return mask.scatter(1, target[:, None], False)


def _set(z: Tensor, column: Tensor, value: float) -> Tensor:
    """In the first row and every fourth."""
    z = z.clone()
    z[torch.arange(0, len(z), 4), column[::4]] = value
    return z


LAYOUTS = ["contiguous", *(name for name, _ in layouts(torch.zeros(2, 2))), "expanded"]


@dataclass(frozen=True)
class Data:
    """Logits and targets; printed as it stands where a test fails."""

    rows: int
    classes: int
    logits: str
    dtype: torch.dtype
    layout: str
    shape: str
    ignore_index: int
    ignored: str
    integers: torch.dtype
    seed: int

    def make(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, V) and (N,)"""
        z, target = logits_and_targets(self.rows, self.classes, generator)
        z = LOGITS[self.logits](z, target, self.dtype, generator).to(self.dtype)
        if self.layout == "expanded":
            z, target = z[:1].expand(self.rows, -1).clone(), target[:1].expand(self.rows).clone()
        first, step = {"none": (self.rows, 1), "some": (1, 3), "all": (0, 1)}[self.ignored]
        target[first::step] = self.ignore_index
        return z, target

    def given(self, z: Tensor, target: Tensor) -> Tensor:
        """The logits as a loss gets them, anything in the rows that are ignored."""
        if self.layout == "expanded":
            return self.shaped(z[:1].expand(self.rows, -1))
        z = z.masked_fill((target == self.ignore_index)[:, None], torch.nan)
        return self.shaped(dict(layouts(z)).get(self.layout, z))

    def shaped(self, x: Tensor) -> Tensor:
        """A tensor by rows, with the leading dimensions of the case."""
        if self.shape == "scalar":
            return x[0]
        if self.shape == "flat":
            return x
        x = x.unflatten(0, (2, self.rows // 2))
        return x if self.shape == "matrix" else x.transpose(0, 1).contiguous().transpose(0, 1)

    @property
    def in_place(self) -> bool:
        """Whether the rows lie one after the other."""
        return self.layout not in ("transposed", "columns apart", "expanded") and self.shape != "transposed matrix"


@st.composite
def data(draw: st.DrawFn, least_classes: int = 1, most: int = 20_000, logits: Iterable[str] = LOGITS) -> Data:
    ends = [c + d for c in (128, 256, 1024, 2048, 4096, 8192) for d in (-1, 0, 1)]  # of blocks and chunks
    classes = draw(
        st.integers(least_classes, 70) | st.sampled_from([c for c in ends if c <= most]) | st.integers(71, most)
    )
    rows = draw(st.integers(0, max(1, min(24, 60_000 // classes))))
    shapes = ["flat"] + ["scalar"] * (rows == 1) + ["matrix", "transposed matrix"] * (rows % 2 == 0)
    return Data(
        rows=rows,
        classes=classes,
        logits=draw(st.just("ordinary") | st.sampled_from(sorted(logits))),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        shape=draw(st.sampled_from(shapes)),
        ignore_index=draw(st.sampled_from([-100, -1, 0, classes // 2, classes + 5])),
        ignored=draw(st.sampled_from(["none", "some", "all"])),
        integers=draw(st.sampled_from([torch.int64, torch.int32])),
        seed=draw(st.integers(0, 2**32)),
    )


@dataclass(frozen=True)
class Setting:
    loss: str
    own: dict[str, Any]
    of_rows: bool
    data: Data
    reduction: str
    upstream: str
    return_stats: bool
    inplace: bool
    options: dict[str, Any]


def _optional(draw: st.DrawFn, options: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Some of them."""
    return {name: draw(values) for name, values in options.items() if draw(st.booleans())}


@st.composite
def row_settings(draw: st.DrawFn, most: int = 20_000) -> Setting:
    loss = draw(st.sampled_from(sorted(LOSSES)))
    own = {name: draw(st.sampled_from(values)) for name, values in LOSSES[loss].items()}
    x = draw(data(2 if own.get("picks") == "top 2" else 1, most))
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    # A share of the loss of a class without probability is infinite; the square of a huge logit is beyond float32.
    smoothing = case_of(loss, own).smoothing and "inf" not in x.logits
    options = _optional(
        draw,
        {
            "weight": st.just(True),
            "token_weight": st.just(True),
            **({"label_smoothing": SHARES} if smoothing else {}),
            **({"smoothing_over": st.sampled_from(["all", "others"])} if smoothing else {}),
            **({"z_loss": st.sampled_from([2**-7, 0.5])} if x.logits != "huge" else {}),
            **({"normalizer": st.sampled_from([0.5, 300.0, "token_weight"])} if reduction == "mean" else {}),
        },
    )
    if options.get("normalizer") == "token_weight":
        options["token_weight"] = True
    return Setting(
        loss,
        own,
        of_rows=not loss.startswith("flex") and draw(st.booleans()),
        data=x,
        reduction=reduction,
        upstream=draw(st.sampled_from(["random", "strided", "stride 0"])),
        return_stats=draw(st.booleans()),
        inplace=x.in_place and loss != "flex dice" and draw(st.booleans()),
        options=options,
    )


@st.composite
def level_settings(draw: st.DrawFn) -> Setting:
    loss = draw(st.sampled_from(sorted(LEVELS)))
    level = draw(st.sampled_from(["class", "set"]))
    options = _optional(
        draw, {"token_weight": st.just(True), **({"weight": st.just(True)} if level == "class" else {})}
    )
    x = draw(data(logits=LOGITS.keys() - {"a NaN", "a target of -inf"}))  # which reach the whole loss
    return Setting(
        loss,
        {name: draw(st.sampled_from(values)) for name, values in LOSSES[loss].items() if name != "form"}
        | {"level": level},
        of_rows=draw(st.booleans()),
        data=x,
        reduction=draw(st.sampled_from(["none", "mean", "sum"])) if level == "class" else "mean",
        upstream=draw(st.sampled_from(["random", "strided", "stride 0"])),
        return_stats=draw(st.booleans()),
        inplace=x.in_place and draw(st.booleans()),
        options=options,
    )


# --- what it should be ---

#: Units of the last place that results may be off, beside twice what eager PyTorch is: more than in the losses' own
#: tests, among whose elements none is the worst of a million. exp(z - m) is off by |z - m| / 2, of extreme logits much.
ULPS = {torch.float64: 5000, torch.float32: 64}
EXTREME_ULPS = {torch.float64: 5000, torch.float32: 256}


class Extreme(Problem):
    """Logits that take its digits from the oracle's formula: the truth is the package's reference, in float64."""

    def formula(self, z: Tensor, **options: Any) -> Tensor:
        return self.loss(z, "reference", **options)


class ExtremeLevel(test_overlap.Problem):
    def formula(self, z: Tensor, **options: Any) -> Tensor:
        return self.loss(z, "reference", **options)


def own_of(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """The loss's own arguments, its parameters times a factor for each row where they are to be of rows."""
    own = dict(setting.own)
    for name in OF_ROWS if setting.of_rows else ():
        if own.get(name) is not None:
            own[name] = own[name] * quarters(setting.data.rows, generator, 0, 1)
    return own


def without_stats(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: loss(*arguments, return_stats=True, **options)[0]


def row_problem(setting: Setting, z: Tensor, target: Tensor, generator: torch.Generator) -> Problem:
    rows, classes = z.shape
    case, own = case_of(setting.loss, setting.own), own_of(setting, generator)
    picks = own.pop("picks", None)
    if isinstance(picks, str):
        own["top_k"] = int(picks[-1])
    elif picks is not None:
        own["candidates"] = torch.randint(classes, (rows, picks) if picks else (rows,), generator=generator)
        if "inf" in setting.data.logits:  # without probability its loss would be infinite
            own["candidates"][:] = z.argmax(-1).reshape((rows, 1) if picks else (rows,))
    shared = {k: setting.options[k] for k in ("label_smoothing", "smoothing_over", "z_loss") if k in setting.options}
    shared["ignore_index"] = setting.data.ignore_index
    if "weight" in setting.options:
        shared["weight"] = class_weights(classes, generator)
    if setting.return_stats:
        case = replace(case, loss=without_stats(case.loss))
    ordinary = setting.data.logits == "ordinary" and classes > 1 and bool((target != setting.data.ignore_index).any())
    return (Problem if ordinary else Extreme)(case, z, target, own, shared)


def random_upstream(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if kind == "stride 0":
        return torch.randn((), generator=generator).to(dtype).expand(shape)
    if kind == "strided":
        return torch.randn((*shape, 3), generator=generator).to(dtype)[..., 1]
    return torch.randn(shape, generator=generator).to(dtype)


def check(
    setting: Setting,
    impls: list[str],
    problem: Problem | test_overlap.Problem,
    shaped: Problem | test_overlap.Problem,
    upstream: Tensor,
    options: dict[str, Any],
    truth: tuple[Tensor, Tensor],
    eager: tuple[Tensor, Tensor],
    scale: tuple[Tensor, Tensor],
    of_probabilities: bool,
) -> None:
    """`shaped` is the problem with the leading dimensions of the case; the last three are of losses and gradients."""
    x, z, target = setting.data, problem.z, problem.target
    extreme = isinstance(problem, Extreme | ExtremeLevel)
    ulps = EXTREME_ULPS if extreme else ULPS
    of_gradient = scale[1]
    size = upstream.abs().max() if upstream.numel() else torch.tensor(0.0)
    if of_probabilities:
        # What cancels within g, where (1 - p)^alpha p is at its largest; and in the truth, of terms up to 1 / smooth.
        terms = {torch.float64: 4, torch.float32: 1e-4}.get(x.dtype, 1e-6)
        of_gradient = of_gradient.nan_to_num(0, 0) + terms * size
    if extreme and of_probabilities:
        # Where one class takes all, right to the largest of the row.
        of_gradient = of_gradient + truth[1].abs().amax(-1, keepdim=True)
    if extreme:
        # What is subnormal may be 0, and the sum of all others with it.
        subnormal = 4 * x.classes * torch.finfo(compute_dtype(x.dtype)).tiny
        of_gradient = of_gradient + size * subnormal / torch.finfo(x.dtype).eps
    # A NaN, or a target without probability, may leave no gradient in its row, but in the others.
    ignored = target == x.ignore_index
    held = ignored | ~(z.isnan().any(-1) | oracle.at(z, target.masked_fill(ignored, 0)).isneginf())
    for impl in impls:
        note(f"impl={impl!r}")
        given = x.given(z, target)
        inplace = setting.inplace and impl != "reference"
        loss, gradient = shaped.run(impl, upstream, given, inplace_backward=inplace, **options)
        assert loss.dtype == compute_dtype(x.dtype) and gradient.dtype == x.dtype
        assert not inplace or not z.numel() or gradient.data_ptr() == given.data_ptr()
        if x.logits == FINITE:
            assert loss.isfinite().all() and gradient.isfinite().all()
            continue
        losses = (loss.reshape(truth[0].shape), eager[0].to(loss.dtype), truth[0])
        assert_as_accurate_as(*losses, ulps[loss.dtype], scale[0])
        gradients = (gradient.reshape(z.shape), eager[1].to(x.dtype), truth[1])
        assert_as_accurate_as(*(g[held] for g in gradients), ulps.get(x.dtype, 1), of_gradient[held])


def cancelled(x: Data) -> float:
    """What the truth loses in 1 - (1 - loss) of so many classes, in float64, divided by what the result may be off."""
    return (10 + x.classes) * (1e-4 if x.dtype == torch.float64 else 1e-10)


def check_rows(setting: Setting, impls: list[str]) -> None:
    x, reduction = setting.data, setting.reduction
    generator = torch.Generator().manual_seed(x.seed)
    z, target = x.make(generator)
    problem = row_problem(setting, z, target, generator)
    kept, compute = target != x.ignore_index, compute_dtype(x.dtype)

    options: dict[str, Any] = {"reduction": reduction}
    factor = kept.double()  # of each row's loss
    if "token_weight" in setting.options:
        factor = factor * quarters(x.rows, generator, 1, 3)
        options["token_weight"] = x.shaped(factor.masked_fill(~kept, torch.nan).to(compute))
    if reduction == "mean":
        weight, normalizer = problem.shared.get("weight"), setting.options.get("normalizer")
        weighted = problem.case.weighted_mean and weight is not None
        divisor = weight[target[kept]].sum() if weighted else kept.sum()
        if normalizer is not None:
            options["normalizer"] = normalizer
            divisor = factor.sum() if normalizer == "token_weight" else normalizer
        factor = factor / divisor if divisor else factor
    shape = tuple(x.shaped(target).shape) if reduction == "none" else ()
    upstream = random_upstream(setting.upstream, shape, compute, generator)
    of_rows_ = factor * (upstream.double().reshape(-1) if reduction == "none" else upstream.double())

    def reduced(losses: Tensor) -> Tensor:
        losses = torch.where(kept, losses * factor, 0)
        return losses if reduction == "none" else losses.sum()

    truth, slope = problem.truth(of_rows_)
    eager, eager_slope = problem.truth(of_rows_, compute)
    shaped = replace(problem, target=x.shaped(target.to(x.integers)), own=of_rows(problem.own, x.shaped))
    # The slope of z_loss * lse^2, which all classes share with p_j, is a part of the target's coefficient.
    z_slope = (2 * setting.options.get("z_loss", 0.0) * z.double().logsumexp(-1) * of_rows_).abs().nan_to_num(0, 0)
    at_target = torch.zeros_like(slope).scatter_(1, target.masked_fill(~kept, 0)[:, None], 2 * z_slope[:, None])
    of_probabilities = problem.case.of_probabilities or problem.case.cancelling is not None
    check(
        setting, impls, problem, shaped, upstream, options,
        truth=(reduced(truth), slope),
        eager=(reduced(eager), eager_slope),
        scale=(reduced(truth.abs() + of_probabilities * cancelled(x)), problem.scale(slope, of_rows_) + at_target),
        of_probabilities=of_probabilities,
    )  # fmt: skip


def check_levels(setting: Setting, impls: list[str]) -> None:
    x = setting.data
    generator = torch.Generator().manual_seed(x.seed)
    z, target = x.make(generator)
    own = own_of(setting, generator) | {"ignore_index": x.ignore_index, "reduction": setting.reduction}
    if "token_weight" in setting.options:
        own["token_weight"] = quarters(x.rows, generator, 1, 3)
    by_row = of_rows(own, x.shaped)
    if "weight" in setting.options:
        own["weight"] = by_row["weight"] = class_weights(x.classes, generator)
    over_rows = getattr(oracle, f"{setting.loss.removesuffix('_loss')}_over_rows")
    loss = getattr(fl, setting.loss)
    case = test_overlap._case(without_stats(loss) if setting.return_stats else loss, over_rows)
    problem = (test_overlap.Problem if x.logits == "ordinary" and x.classes > 1 else ExtremeLevel)(case, z, target, own)
    compute = compute_dtype(x.dtype)
    shape = (x.classes,) if setting.reduction == "none" else ()
    upstream = random_upstream(setting.upstream, shape, compute, generator)
    truth = problem.truth(upstream.double())
    eager = problem.truth(upstream.double(), compute)
    shaped = replace(problem, target=x.shaped(target.to(x.integers)), options=by_row)
    of_classes = upstream.double().expand((x.classes,) * (setting.own["level"] == "class"))
    of_classes = of_classes / (x.classes if setting.own["level"] == "class" and setting.reduction == "mean" else 1)
    scale = (truth[0].abs() + cancelled(x), truth[1].abs() + problem.scale(of_classes))
    check(setting, impls, problem, shaped, upstream, {}, truth, eager, scale, of_probabilities=True)


# --- tests ---


@given(row_settings())
def test_rows(setting: Setting) -> None:
    check_rows(setting, READY)


@one_in(4)
@given(level_settings())
def test_levels(setting: Setting) -> None:
    check_levels(setting, READY)


def linear_settings(rows: int = 90, classes: int = 2100) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "loss": st.sampled_from(sorted(test_linear.LOSSES)),
        "rows": st.integers(1, rows),
        # of fewer of either, all may cancel in the sums
        "features": st.integers(8, 70),
        "classes": st.integers(10, min(classes, 300)) | st.integers(10, classes),
        "dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "chunk": st.integers(1, 100),
        "softcap": st.sampled_from([None, 4.0, 30.0]),
        "drop_ignored": st.sampled_from([None, True, False]),
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "token_weight": st.booleans(),
        "seed": st.integers(0, 2**32),
    })  # fmt: skip


def check_linear(
    impl: str, loss: str, rows: int, features: int, classes: int, dtype: torch.dtype, bias: bool, chunk: int,
    softcap: float | None, drop_ignored: bool | None, reduction: str, token_weight: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    data = test_linear.Data.make(generator, dtype, rows, bias, features, classes)
    options = {"token_weight": data.token_weight.to(compute_dtype(dtype))} if token_weight else {}
    ulps = ULPS.get(dtype, 4)
    test_linear.check_accuracy(loss, data, reduction, generator, impl, ulps, chunk, softcap, drop_ignored, **options)


@one_in(4)
@given(linear_settings())
def test_linear_forms(setting: dict[str, Any]) -> None:
    check_linear("cpu", **setting)


@one_in(4)
@given(
    kind=st.sampled_from(sorted(test_supcon.KINDS | test_supcon.OWN_KINDS)),
    rows=st.integers(20, 50),  # of so many some have the same label
    chunk=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.01, 0.07, 0.3, 2.0]),
    reduction=st.sampled_from(["none", "mean"]),
    seed=st.integers(0, 2**32),
)
def test_supcon_loss(kind, rows, chunk, dtype, temperature, reduction, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supcon, "BUDGET", chunk * rows * dtype.itemsize)
        test_supcon.check_accuracy(
            (test_supcon.KINDS | test_supcon.OWN_KINDS)[kind], rows, dtype, temperature, reduction, generator
        )


@needs_triton
@one_in(50)
@given(row_settings(most=2100))
def test_rows_in_triton(setting: Setting) -> None:
    check_rows(setting, ["triton"])


@needs_triton
@one_in(100)
@given(linear_settings(20, 150), st.sampled_from(["triton", "triton_fused"]))
def test_linear_forms_in_triton(setting: dict[str, Any], impl: str) -> None:
    check_linear(impl, **setting)
