"""The linear forms: the same losses and gradients as the row forms on logits that were stored."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as, assert_rows_as_accurate_as, assert_same_gradients
from products import Products
from row_losses import takes
from row_suite import compute_dtype
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import fusedloss as fl
from fusedloss.losses import _registry

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import memory

ROWS, FEATURES, CLASSES = 37, 19, 131
IGNORED = -1


def _poly(s: fl.Statistics) -> Tensor:
    return s.ce + 0.5 * s.q + 0.1 * s.top_ce + 0.01 * s.mean_ce


class Pair(NamedTuple):
    linear: Callable[..., Any]
    row: Callable[..., Any]


def _pair(name: str, **own: Any) -> Pair:
    return Pair(partial(getattr(fl, f"linear_{name}"), **own), partial(getattr(fl, name), **own))


LOSSES = {
    "cross_entropy": _pair("cross_entropy"),
    "focal": _pair("focal_loss", gamma=1.5),
    "mixed": _pair("mixed_cross_entropy", alpha=0.3),
    "mixed top 2": _pair("mixed_cross_entropy", alpha=0.3, top_k=2),
    "dsc one-vs-rest": _pair("dsc_loss", alpha=0.5),
    "dsc target": _pair("dsc_loss", alpha=0.5, form="target"),
    "flex": _pair("flex_loss", loss_fn=_poly, statistics=("top", "mean")),
}
NAMED = {pair.row.func for pair in LOSSES.values()}
LOSSES |= {
    name: _pair(name, **loss.examples[0].arguments)
    for name, loss in _registry.LOSSES.items()
    if loss.linear is not None and loss.row not in NAMED
}
each_loss = pytest.mark.parametrize("name", LOSSES)


class Data(NamedTuple):
    """What the losses take; `sources` are hidden states, weight and bias."""

    sources: tuple[Tensor, ...]
    target: Tensor
    token_weight: Tensor
    class_weight: Tensor

    @staticmethod
    def make(generator, dtype=torch.float64, rows=ROWS, bias=True, features=FEATURES, classes=CLASSES) -> "Data":
        hidden = torch.randn(rows, features, generator=generator, dtype=torch.float64)
        weight = torch.randn(classes, features, generator=generator, dtype=torch.float64) * 0.5
        sources = [hidden, weight]
        if bias:
            sources.append(torch.randn(classes, generator=generator, dtype=torch.float64))
        target = torch.randint(classes, (rows,), generator=generator)
        target[::5] = IGNORED
        token_weight = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.2
        class_weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.2
        return Data(tuple(x.to(dtype).requires_grad_() for x in sources), target, token_weight, class_weight)

    def options(self, name: str) -> dict[str, Any]:
        options: dict[str, Any] = {"weight": self.class_weight, "ignore_index": IGNORED, "z_loss": 1e-3}
        if takes(LOSSES[name].row, "label_smoothing"):
            options["label_smoothing"] = 0.1
        return options


def logits_of(sources: tuple[Tensor, ...], softcap: float | None = None) -> Tensor:
    z = F.linear(*sources)
    return z if softcap is None else (z / softcap).tanh() * softcap


def run_linear(loss: Callable[..., Any], sources: tuple[Tensor, ...], target: Tensor, **options: Any) -> Any:
    bias = sources[2] if len(sources) > 2 else None
    return loss(sources[0], sources[1], target=target, linear_bias=bias, **options)


def budget_for(rows: int, sources: tuple[Tensor, ...], softcap: float | None = None) -> int:
    return rows * sources[1].shape[0] * sources[1].element_size() * (1 if softcap is None else 2)


# --- equal to the row form ---


@pytest.mark.covering(2)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 10, 10 * ROWS])
@each_loss
def test_equals_the_row_form(name, chunk, softcap, reduction, generator):
    data = Data.make(generator)
    options = data.options(name) | {"reduction": reduction, "token_weight": data.token_weight, "return_stats": True}
    if reduction == "mean":
        options["normalizer"] = "token_weight"
    form = {"softcap": softcap, "budget": budget_for(chunk, data.sources, softcap)}
    got, stats = run_linear(LOSSES[name].linear, data.sources, data.target, **form, **options)
    expected, expected_stats = LOSSES[name].row(logits_of(data.sources, softcap), data.target, **options)
    torch.testing.assert_close(stats, expected_stats, equal_nan=True)
    assert_same_gradients(got, expected, data.sources, torch.rand(got.shape, generator=generator, dtype=torch.float64))


@pytest.mark.covering(1)
@pytest.mark.parametrize("drop_ignored", [True, False])
@each_loss
def test_leading_dimensions_and_stride_0_upstream(name, drop_ignored, generator):
    data = Data.make(generator, rows=36, bias=False)
    hidden, weight = data.sources
    shaped, target = hidden.reshape(4, 9, FEATURES).transpose(0, 1), data.target.reshape(4, 9).t()
    options = {"reduction": "none", "ignore_index": IGNORED}
    form = {"drop_ignored": drop_ignored, "budget": budget_for(7, data.sources)}
    loss = LOSSES[name].linear(shaped, weight, target, **form, **options)
    expected = LOSSES[name].row(shaped @ weight.t(), target, **options)
    upstream = torch.rand((), generator=generator, dtype=torch.float64).expand(9, 4)
    assert_same_gradients(loss, expected, data.sources, upstream)


@pytest.mark.covering(1)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@each_loss
def test_gradcheck(name, reduction, generator):
    data = Data.make(generator)
    sources = (data.sources[0][:5, :4], data.sources[1][:7, :4], data.sources[2][:7])
    sources = tuple(x.detach().requires_grad_() for x in sources)
    target = torch.tensor([3, 6, IGNORED, 0, 5])
    options = {"softcap": 4.0, "budget": budget_for(2, sources, 4.0), "reduction": reduction, "ignore_index": IGNORED}

    def loss(*sources):
        return run_linear(LOSSES[name].linear, sources, target, **options)

    assert torch.autograd.gradcheck(loss, sources)
    assert torch.autograd.gradgradcheck(loss, sources, fast_mode=True)


def test_no_rows(generator):
    data = Data.make(generator, bias=False)
    for name, rows in (("cross_entropy", 0), ("flex", 1), ("dsc one-vs-rest", 1)):
        hidden, weight = data.sources[0][:rows], data.sources[1]
        loss = LOSSES[name].linear(hidden, weight, data.target[:rows] * 0 + IGNORED, ignore_index=IGNORED)
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, data.sources))


def test_candidates_and_parameters_of_rows(generator):
    """Some of them are learnt; and where the weight is also the embedding's, its gradients add up."""
    data = Data.make(generator)
    gamma = torch.rand(ROWS, generator=generator, dtype=torch.float64).requires_grad_()
    token_weight = data.token_weight.requires_grad_()
    candidates = torch.randint(CLASSES, (ROWS, 2), generator=generator)
    options = {"token_weight": token_weight, "ignore_index": IGNORED}
    for pair, learnt in (
        (_pair("focal_loss", gamma=gamma), [gamma]),
        (_pair("mixed_cross_entropy", alpha=gamma.detach(), candidates=candidates), []),
        (_pair("dsc_loss", alpha=gamma.detach()), []),
    ):
        got = run_linear(pair.linear, data.sources, data.target, budget=budget_for(5, data.sources), **options)
        expected = pair.row(logits_of(data.sources), data.target, **options)
        assert_same_gradients(got, expected, (*data.sources, token_weight, *learnt))
    weight = data.sources[1]
    hidden = F.embedding(torch.randint(CLASSES, (ROWS,), generator=generator), weight)
    got = fl.linear_cross_entropy(hidden, weight, data.target, ignore_index=IGNORED)
    assert_same_gradients(got, fl.cross_entropy(hidden @ weight.t(), data.target, ignore_index=IGNORED), weight)


# --- accuracy ---


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_loss
def test_as_accurate_as_pytorch(name, reduction, dtype, generator):
    check_accuracy(name, Data.make(generator, dtype, rows=60), reduction, generator)


def check_accuracy(
    name, data, reduction, generator, impl=None, ulps=4, chunk=30, softcap=None, drop_ignored=None, **more
) -> None:
    """Against float64, beside the row form on the logits of F.linear in the same dtype."""
    exact = tuple(x.detach().double().requires_grad_() for x in data.sources)
    upstream = torch.rand(data.target.shape if reduction == "none" else (), generator=generator)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": IGNORED, **more}
    form = {"budget": budget_for(chunk, data.sources, softcap), "softcap": softcap, "drop_ignored": drop_ignored}

    def gradients(loss, sources):
        return [loss, *torch.autograd.grad(loss, sources, upstream.to(loss.dtype))]

    loss = run_linear(LOSSES[name].linear, data.sources, data.target, impl=impl, **form, **options)
    got = gradients(loss, data.sources)
    eager, truth = (
        gradients(LOSSES[name].row(logits_of(x, softcap), data.target, impl="reference", **options), x)
        for x in (data.sources, exact)
    )
    assert got[0].dtype == compute_dtype(data.sources[0].dtype)
    for mine, theirs, true in zip(got, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        # sums of products: an error is one of their size, whatever cancels in the single element
        scale = true.abs().max().expand_as(true)
        worst = (theirs.double() - true).abs().max().expand_as(true)
        assert_as_accurate_as(mine, true.to(theirs.dtype) + worst.to(theirs.dtype), true, ulps, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_over_many_chunks(dtype, generator):
    """Trap: summed in half precision over chunks, it loses digits with each of them."""
    rows, features, classes = 2048, 64, 512
    hidden = torch.randn(rows, features, generator=generator).to(dtype)
    weight = torch.randn(classes, features, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)

    def error(budget):
        loss = fl.linear_cross_entropy(hidden, weight, target, reduction="sum", budget=budget)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.dtype == dtype
        return float((gradient.double() - truth).norm())

    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(fl.cross_entropy(hidden.double() @ exact.t(), target, reduction="sum"), exact)
    row = classes * 2
    assert error(rows // 64 * row) <= 1.0001 * error(rows * row)


def test_mean_over_many_rows_in_fp16(generator):
    """1 / N and p / N are subnormal in fp16; the gradients wait for a loss scale in float32."""
    hidden = torch.randn(70_000, 4, generator=generator).half().requires_grad_()
    weight = torch.randn(7, 4, generator=generator).half().requires_grad_()
    target = torch.randint(7, (70_000,), generator=generator)
    scale = 2.0**16
    loss = fl.linear_cross_entropy(hidden, weight, target, budget=2**18)
    got = torch.autograd.grad(loss * scale, (hidden, weight))
    exact = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    truth = torch.autograd.grad(fl.cross_entropy(logits_of(exact), target) * scale, exact)
    for mine, true in zip(got, truth, strict=True):
        assert mine.dtype == torch.float16
        assert (mine.double() - true).abs().max() < 2e-3 * true.abs().max()


# --- float16: gradients that are stored before the loss scale comes ---


def _spread(count: int, generator: torch.Generator) -> Tensor:
    """Factors from 2^-20 to 1, both among them."""
    factors = torch.exp2(-20 * torch.rand(count, generator=generator))
    factors[:4] = torch.tensor([1.0, 2.0**-20, 0.0, 2.0**-10])
    return factors[torch.randperm(count, generator=generator)]


def _small_factors(generator: torch.Generator) -> dict[str, tuple[str, dict[str, Any]]]:
    """What brings small factors into a row's gradient, by name: the loss and its arguments."""
    rows, classes = _spread(ROWS, generator), _spread(CLASSES, generator)
    tokens = {"token_weight": rows}
    return {
        "token_weight": ("cross_entropy", tokens),
        "token_weight and mean": ("cross_entropy", {**tokens, "reduction": "mean", "normalizer": "token_weight"}),
        "token_weight and softcap": ("cross_entropy", {**tokens, "softcap": 30.0}),
        "token_weight, ignored rows not dropped": ("cross_entropy", {**tokens, "drop_ignored": False}),
        "class weights": ("cross_entropy", {"weight": classes, "reduction": "mean"}),
        "smoothing": ("cross_entropy", {**tokens, "label_smoothing": 1e-5}),
        "smoothing and class weights": ("cross_entropy", {"weight": classes, "label_smoothing": 1e-3}),
        "z_loss": ("cross_entropy", {**tokens, "z_loss": 1e-6}),
        "focal": ("focal_loss", {"gamma": 6.0}),
        "focal of rows": ("focal_loss", {"gamma": 9 * torch.rand(ROWS, generator=generator)}),
        "mixed": ("mixed_cross_entropy", {"alpha": rows}),
        "mixed with candidates": (
            "mixed_cross_entropy",
            {**tokens, "alpha": 0.3, "candidates": torch.randint(CLASSES, (ROWS, 3), generator=generator)},
        ),
        "dsc target": ("dsc_loss", {**tokens, "alpha": 0.5, "form": "target"}),
        "dsc one-vs-rest": ("dsc_loss", {**tokens, "alpha": 0.5}),
        "dsc, steep": ("dsc_loss", {**tokens, "alpha": 30.0, "smooth": 1e-9, "squared": False}),
        "dsc with class weights": ("dsc_loss", {"weight": classes, "smooth": 1e-5}),
        "statistics": ("flex_loss", {**tokens, "loss_fn": _poly, "statistics": ("top", "mean")}),
        "none": ("cross_entropy", {**tokens, "reduction": "none"}),
    }


SMALL_FACTORS = tuple(_small_factors(torch.Generator()))
#: One of each way through the kernels.
SMALL_FACTORS_OF_KERNELS = (
    "token_weight and softcap", "class weights", "mixed with candidates", "dsc one-vs-rest", "statistics",
)  # fmt: skip
FORM_OPTIONS = ("softcap", "drop_ignored")


def float16_data(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states, weight and bias whose logits float16 has exactly, and targets of which many are certain."""
    hidden = torch.randint(-2, 3, (ROWS, FEATURES), generator=generator) / 2
    weight = torch.randint(-4, 5, (CLASSES, FEATURES), generator=generator) / 4
    bias = torch.randint(-4, 5, (CLASSES,), generator=generator) / 4
    sources = tuple(x.half().requires_grad_() for x in (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias)
    assert torch.equal(logits, logits.half().float())
    target = torch.where(torch.rand(ROWS, generator=generator) < 0.5, logits.argmax(-1), torch.arange(ROWS))
    target[::9] = IGNORED
    return sources, target


def check_small_factors(name, generator, impl=None, chunk=13, device="cpu", dtype=torch.float16) -> None:
    """Every row of each gradient beside that of the row form, with a loss scale that float16 has room for."""
    function, options = _small_factors(generator)[name]
    sources, target = float16_data(generator)
    sources, target = tuple(x.detach().to(device, dtype).requires_grad_() for x in sources), target.to(device)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    options = {"reduction": "sum", "ignore_index": IGNORED, **options}
    form = {k: v for k, v in options.items() if k in FORM_OPTIONS}
    options = {k: v for k, v in options.items() if k not in FORM_OPTIONS}
    softcap = form.get("softcap")
    scale = 2.0**11

    def of_row(sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        loss = getattr(fl, function)(logits_of(sources, softcap), target, impl="reference", **options)
        return torch.autograd.grad((loss * scale).sum(), sources)

    loss = run_linear(
        getattr(fl, f"linear_{function}"), sources, target, impl=impl,
        budget=budget_for(chunk, sources, softcap), **form, **options,
    )  # fmt: skip
    got = torch.autograd.grad((loss * scale).sum(), sources)
    truth = of_row(tuple(x.detach().double().requires_grad_() for x in sources))
    # The bias beside the weight, as of a hidden state that is 1: where a lone number cancels, theirs is right by luck.
    (got_hidden, *mine), (hidden, *theirs), (true_hidden, *true) = got, of_row(sources), truth
    assert_rows_as_accurate_as(got_hidden, hidden, true_hidden)
    assert_rows_as_accurate_as(*(torch.column_stack(pair) for pair in (mine, theirs, true)))


@pytest.mark.covering(1)
@pytest.mark.parametrize("chunk", [13, 10 * ROWS])
@pytest.mark.parametrize("name", SMALL_FACTORS)
def test_small_factors_in_float16(name, chunk, generator):
    """Trap: a gradient that is stored in float16 with a row's small factor in it, and without the loss scale."""
    check_small_factors(name, generator, chunk=chunk)


def test_small_factors_under_float16_autocast(generator):
    halves, target = float16_data(generator)
    sources = [x.detach().float().requires_grad_() for x in halves]
    criterion = fl.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, reduction="sum", ignore_index=IGNORED)
    criterion.linear.weight, criterion.linear.bias = (torch.nn.Parameter(x.detach()) for x in sources[1:])
    token_weight = _spread(ROWS, generator)
    with torch.autocast("cpu", torch.float16):
        loss = criterion(sources[0], target, token_weight=token_weight)
    (loss * 2.0**11).backward()
    exact, theirs = ([x.detach().to(dtype).requires_grad_() for x in halves] for dtype in (torch.double, torch.half))
    options = {"token_weight": token_weight, "reduction": "sum", "ignore_index": IGNORED, "impl": "reference"}
    got = (sources[0].grad, criterion.linear.weight.grad, criterion.linear.bias.grad)
    rows, truth = (
        torch.autograd.grad(fl.cross_entropy(logits_of(x), target, **options) * 2.0**11, x) for x in (theirs, exact)
    )
    for mine, row, true in zip(got, rows, truth, strict=True):
        assert mine is not None and mine.dtype == torch.float32
        assert_rows_as_accurate_as(mine, row, true)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_row_that_is_not_finite_spoils_no_other_in_float16(value, generator):
    sources, target = float16_data(generator)
    token_weight = torch.full((ROWS,), 2.0**-17)
    token_weight[1] = value
    assert target[1] != IGNORED
    options = {"token_weight": token_weight, "reduction": "sum", "ignore_index": IGNORED}
    linear = run_linear(fl.linear_cross_entropy, sources, target, **options)
    row = fl.cross_entropy(logits_of(sources), target, **options)
    got, expected = (torch.autograd.grad(loss * 2.0**11, sources) for loss in (linear, row))
    for mine, true in zip(got, expected, strict=True):
        assert torch.equal(mine.isfinite(), true.isfinite())
    others = torch.arange(ROWS) != 1
    torch.testing.assert_close(got[0][others], expected[0][others], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_hidden_states_of_ignored_rows_may_hold_anything_where_they_are_dropped(impl, softcap, generator):
    """As a layer gives them that attends to nothing: also in a backward that is differentiated, and in transforms."""
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (3, 7))
    target, spoilt = torch.tensor([1, -100, 2]), hidden.clone()
    spoilt[1] = torch.nan

    def loss(h, w):
        return fl.linear_cross_entropy(h, w, target, softcap=softcap, drop_ignored=True, impl=impl)

    right = torch.func.grad(loss, argnums=(0, 1))(hidden, weight)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(spoilt, weight), right)
    sources = spoilt.requires_grad_(), weight.requires_grad_()
    for create_graph in (False, True):
        torch.testing.assert_close(torch.autograd.grad(loss(*sources), sources, create_graph=create_graph), right)


# --- what is computed ---


@pytest.fixture
def products() -> Iterator[Products]:
    with Products(CLASSES) as mode:
        yield mode


@pytest.mark.parametrize("needs", range(8))
def test_only_what_requires_grad_is_computed(needs, generator, products):
    data = Data.make(generator)
    for k, source in enumerate(data.sources):
        source.requires_grad_(bool(needs >> k & 1))
    loss = run_linear(fl.linear_cross_entropy, data.sources, data.target, ignore_index=IGNORED)
    assert loss.requires_grad == bool(needs)
    if needs:
        torch.autograd.grad(loss, [x for x in data.sources if x.requires_grad])
    assert products.calls.total() == 1 + (needs & 1) + (needs >> 1 & 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_three_products_for_mean_and_four_for_none(dtype, generator, products):
    data = Data.make(generator, dtype, bias=False)
    for reduction, gradients, count in (("mean", True, 3), ("sum", True, 3), ("none", True, 4), ("mean", False, 1)):
        products.calls.clear()
        options = {"reduction": reduction, "ignore_index": IGNORED}
        with torch.set_grad_enabled(gradients):
            loss = run_linear(fl.linear_focal_loss, data.sources, data.target, **options)
        if gradients:
            torch.autograd.grad(loss.sum(), data.sources)
        assert products.calls.total() == count


def test_ignored_rows_take_no_product(generator, products):
    data = Data.make(generator)
    assert (data.target != IGNORED).sum() == 29
    chunks = [({}, 29), *[({"budget": budget_for(rows, data.sources)}, 29) for rows in (1, 4, 30)]]
    for form, rows in (({"drop_ignored": False}, ROWS), *chunks):
        products.logit_rows = 0
        run_linear(fl.linear_cross_entropy, data.sources, data.target, ignore_index=IGNORED, **form)
        assert products.logit_rows == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice(dtype, generator):
    """Trap: a saved gradient that is scaled in place is wrong the second time."""
    data = Data.make(generator, dtype)
    loss = run_linear(fl.linear_cross_entropy, data.sources, data.target, ignore_index=IGNORED)
    first, second = (torch.autograd.grad(loss * x, data.sources, retain_graph=True) for x in (3, 5))
    third = torch.autograd.grad(loss * 3, data.sources)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, a * 5 / 3, **({"rtol": 2e-3, "atol": 1e-6} if dtype == torch.float16 else {}))
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, data.sources)


@pytest.mark.parametrize("token_weight", [False, True])
def test_autocast(token_weight, generator):
    data = Data.make(generator, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        options: dict[str, Any] = {"token_weight": data.token_weight} if token_weight else {}
        got = run_linear(fl.linear_cross_entropy, data.sources, data.target, ignore_index=IGNORED, **options)
        expected = fl.cross_entropy(F.linear(*data.sources), data.target, ignore_index=IGNORED, **options)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(*(torch.autograd.grad(x, data.sources) for x in (got, expected)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.01 * float(theirs.abs().max()))


def test_peak_memory_keeps_to_the_budget(generator):
    """Beside the gradients; the logits would take half a gigabyte."""
    classes, budget = 131_072, 64 * 2**20
    hidden, weight = (torch.randn(n, 32, generator=generator, requires_grad=True) for n in (1024, classes))
    target = torch.randint(classes, (1024,), generator=generator)

    def step(rows=1024):
        loss = fl.linear_cross_entropy(hidden[:rows], weight, target[:rows], budget=budget)
        return torch.autograd.grad(loss, (hidden, weight))

    step(8)
    peak = memory.peak_memory(step)
    assert peak is None or peak - weight.nbytes - hidden.nbytes < 1.2 * budget


# --- refused ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 5)}, ValueError, "D = 5 features, but linear_weight 4"),
        ({"linear_weight": torch.zeros(4)}, ValueError, r"linear_weight \(V, D\)"),
        (
            {"linear_weight": torch.zeros(7, 4).double()},
            ValueError,
            "linear_weight is torch.float64, but input torch.float32",
        ),
        ({"linear_weight": torch.zeros(7, 4, device="meta")}, ValueError, "linear_weight is on meta"),
        ({"linear_bias": torch.zeros(6)}, ValueError, r"linear_bias must be \(7,\)"),
        ({"linear_weight": torch.zeros(7, 4).to(torch.int8)}, TypeError, "linear_weight must be .*, got torch.int8"),
        ({"input": torch.zeros(3, 4).int()}, TypeError, "input must be .*, got torch.int32"),
        (
            {"linear_weight": TwoTensor(torch.zeros(7, 4), torch.zeros(7, 4))},
            TypeError,
            "linear_weight must be a plain tensor, got a torch.testing._internal.two_tensor.TwoTensor",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
        ({"budget": 27}, ValueError, "budget of 27 bytes is too small for one row of logits, 28 bytes"),
        ({"inplace_backward": True}, TypeError, "linear_cross_entropy"),
        ({"token_weight": torch.ones(2)}, ValueError, r"token_weight must be of the target's shape \(3,\)"),
        ({"normalizer": "token_weight"}, ValueError, "needs a token_weight"),
    ],
    ids=str,
)
def test_refused(change, error, message):
    arguments = {"input": torch.zeros(3, 4), "linear_weight": torch.zeros(7, 4), "target": torch.tensor([0, 6, 1])}
    with pytest.raises(error, match=message):
        fl.linear_cross_entropy(**(arguments | change))


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias"])
def test_numbers_of_quantized_tensors_are_not_their_values(name):
    """Autocast casts what is given to it."""
    arguments = {"input": torch.ones(3, 4), "linear_weight": torch.ones(7, 4), "linear_bias": torch.ones(7)}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        arguments[name] = torch.ones(arguments[name].shape).to(dtype)
        with torch.autocast("cpu"), pytest.raises(TypeError, match=f"{name} must be .*, got {dtype}"):
            fl.linear_cross_entropy(target=torch.tensor([0, 6, 1]), **arguments)


def test_losses_over_classes_in_pytorch_are_refused():
    hidden, weight, target = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="over the classes needs a compiled epilogue"):
        fl.linear_flex_loss(hidden, weight, target, lambda p, q, positive: p, over="classes")


def test_budget_of_the_environment(monkeypatch):
    arguments = (torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 6, 1]))
    monkeypatch.setenv("FUSEDLOSS_LINEAR_BUDGET", "27")
    with pytest.raises(ValueError, match=r"27 bytes \(FUSEDLOSS_LINEAR_BUDGET\)"):
        fl.linear_cross_entropy(*arguments)
    monkeypatch.setenv("FUSEDLOSS_LINEAR_BUDGET", "much")
    with pytest.raises(ValueError, match="'much'"):
        fl.linear_cross_entropy(*arguments)
    assert fl.linear_cross_entropy(*arguments, budget=28) == pytest.approx(float(torch.tensor(7.0).log()))
    assert os.environ["FUSEDLOSS_LINEAR_BUDGET"] == "much"
