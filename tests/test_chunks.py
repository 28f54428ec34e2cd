"""Logits that are a sum of products, h_0 W_0^T + h_1 W_1^T + b, which chunks make: as adapters of a layer need them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as
from products import Products
from row_suite import DTYPES, compute_dtype

import fusedloss as fl
from fusedloss import backends
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Rows, Spec
from fusedloss.engine import chunks, operators

if backends.unavailable("cpu") is not None:
    pytest.skip(str(backends.unavailable("cpu")), allow_module_level=True)

ROWS, CLASSES, FEATURES = 11, 23, (6, 3)
TARGET = torch.tensor([4, 0, -100, -100, 22, 7, 7, -100, 1, 13, 5])
OPTIONS = {"gamma": 1.5, "label_smoothing": 0.1, "z_loss": 0.01, "impl": "cpu"}

#: Which of h_0, h_1, W_0, W_1 and b require grad: all; an adapter's, of a frozen layer; the layer's; hidden states'.
NEEDED = [(1, 1, 1, 1, 1), (1, 1, 0, 1, 0), (0, 0, 1, 0, 1), (1, 0, 0, 0, 0)]
each_needed = pytest.mark.parametrize("needed", NEEDED, ids=str)


def make_sources(needed, dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [*((ROWS, d) for d in FEATURES), *((CLASSES, d) for d in FEATURES), (CLASSES,)]
    sources = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [x.requires_grad_(bool(need)) for x, need in zip(sources, needed, strict=True)]


def chunked(sources, loss=fl.linear_focal_loss, **options):
    return loss(sources[:2], sources[2:4], TARGET, linear_bias=sources[4], **OPTIONS | options)


def dense(sources, loss=fl.focal_loss, softcap=None, **options):
    """By the row form, of logits in hand."""
    h0, h1, w0, w1, b = sources
    z = torch.addmm(F.linear(h0, w0, b), h1, w1.t())
    z = softcap * (z / softcap).tanh() if softcap else z
    return loss(z, TARGET, **OPTIONS | {"impl": "reference"} | options)


def gradients(loss, sources, upstream=None):
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in sources if x.requires_grad], upstream)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, ROWS])
@each_needed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_products(dtype, needed, chunk, softcap, reduction, drop_ignored):
    """The loss and the gradients are those of the dense formula, made with the loss of a sum or by a backward."""
    sources = make_sources(needed, dtype)
    budget = chunk * CLASSES * dtype.itemsize * (2 if softcap else 1)

    def run(function, sources, **form):
        weights = torch.linspace(0.5, 2, CLASSES), torch.linspace(0.5, 1.5, ROWS)
        weight, token_weight = (x.to(compute_dtype(sources[0].dtype)) for x in weights)
        options = {"weight": weight, "token_weight": token_weight, "reduction": reduction, "softcap": softcap}
        loss = function(sources, **options, **form)
        return gradients(loss, sources, token_weight if reduction == "none" else None)

    got = run(chunked, sources, budget=budget, drop_ignored=drop_ignored)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in sources]
    truth, eager = run(dense, exact), run(dense, sources)
    for mine, theirs, true in zip(got, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)
            continue
        # Of sums of products an error is one of their size, whatever cancels in the single element.
        scale = true.abs().max().expand_as(true)
        worst = (theirs.double() - true).abs().max().expand_as(true)
        assert_as_accurate_as(mine, true.to(theirs.dtype) + worst.to(theirs.dtype), true, 4, scale)


@pytest.mark.parametrize("made", [True, False], ids=["with the loss", "by a backward"])
@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("chunk", [4, ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_hidden_states_with_themselves(dtype, chunk, drop_ignored, made):
    """The gradient is that of either factor, of one product where all rows are at hand."""
    h = make_sources((1, 0, 0, 0, 0), dtype)[0]
    target = TARGET.clamp(max=ROWS - 1)
    form = Form(budget=chunk * ROWS * dtype.itemsize, drop_ignored=drop_ignored, symmetric=True)
    row_weight = torch.linspace(0.5, 1.5, ROWS, dtype=compute_dtype(dtype))
    spec = Spec("cpu", "cross_entropy", form=form, needed=(True, False) if made else ())
    rows = Rows([h.detach()], [h.detach()], None, [], target, None, None, [], None)
    with Products(ROWS) as products:
        _, *saved, gradients = operators.forward(*rows, row_weight if made else None, spec.encode())
        if not made:
            spec = spec._replace(needed=(True, False))
            gradients = operators.backward(*rows, *saved, row_weight, spec.encode())
    if chunk == ROWS and not drop_ignored and dtype != torch.float16:
        assert products.calls.total() == (2 if made else 3)

    def by_formula(x):
        losses = F.cross_entropy((x @ x.t()).to(row_weight.dtype), target, ignore_index=-100, reduction="none")
        return torch.autograd.grad(losses @ row_weight, x)[0]

    truth, eager = by_formula(h.detach().double().requires_grad_()), by_formula(h)
    scale = truth.abs().max().expand_as(truth)
    assert_as_accurate_as(gradients[0].to(dtype), eager, truth, 4, scale)


@pytest.mark.parametrize("square", [1, 5, 11, 512])
def test_a_matrix_and_itself_transposed(square, monkeypatch):
    """In blocks, of which the last may be a single row."""
    monkeypatch.setattr(chunks, "SQUARE", square)
    for count in (0, 1, 2, 11, 513):
        if count < 513 or square == 512:
            x = torch.randn(count, count)
            expected = x + x.t()
            chunks._add_transposed_(x)
            torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_only_a_square_of_hidden_states_is_symmetric():
    h, w = torch.randn(5, 3), torch.randn(4, 3)
    rows = Rows([h], [w], None, [], torch.arange(4).repeat(2)[:5], None, None, [], None)
    with pytest.raises(ValueError, match=r"one weight of hidden's shape \(5, 3\).*of shape \(4, 3\)"):
        operators.forward(*rows, None, Spec("cpu", "cross_entropy", form=Form(symmetric=True)).encode())
    both = Spec("cpu", "cross_entropy", needed=(True, True), form=Form(symmetric=True))
    with pytest.raises(ValueError, match="without a gradient"):
        operators.forward(*rows._replace(weight=[h], target=torch.arange(5)), None, both.encode())


@pytest.mark.parametrize("chunk", [4, ROWS])
def test_statistics_and_second_derivatives_of_sums_of_products(chunk):
    sources = make_sources(NEEDED[0], torch.float64)
    form = {"softcap": 3.0, "budget": chunk * CLASSES * 8 * 2}

    def twice(losses):
        first = torch.autograd.grad(losses.sum(), sources, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), sources))

    loss, expected = chunked(sources, reduction="none", **form), dense(sources, softcap=3.0, reduction="none")
    torch.testing.assert_close(twice(loss), twice(expected))
    picks = {"statistics": ("second", "mean"), "loss_fn": lambda s: 2 * s.lse + s.mean_ce + s.second_ce}
    mine = chunked(sources, partial(_without_gamma, fl.linear_flex_loss), **picks, **form)
    theirs = dense(sources, partial(_without_gamma, fl.flex_loss), softcap=3.0, **picks)
    torch.testing.assert_close(gradients(mine, sources), gradients(theirs, sources))


def _without_gamma(loss, *arguments, gamma, **options):
    return loss(*arguments, **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@each_needed
def test_a_pair_that_needs_no_gradient_costs_no_product(needed, reduction):
    sources = make_sources(needed, torch.float32)
    with Products(CLASSES) as products:
        gradients(chunked(sources, reduction=reduction, budget=2**20).sum(), sources)
    # Two make the logits, once more for a backward: a chunk does not outlive its forward pass.
    assert products.calls.total() == (2 if reduction == "sum" else 4) + sum(needed[:4])


@pytest.mark.parametrize("cached", [1, 2 * CLASSES * 8, 2**30], ids=["rows", "two rows", "all"])
def test_products_of_few_columns_go_through_rows_that_stay_in_the_cache(cached, monkeypatch):
    monkeypatch.setattr(chunks.budgets, "CACHED", cached)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sources, options = (
        make_sources(NEEDED[0], torch.float64),
        {"reduction": "sum", "budget": 5 * CLASSES * 8, "drop_ignored": False},
    )
    with Products(CLASSES) as products:
        got = gradients(chunked(sources, **options), sources)
    torch.testing.assert_close(got, gradients(dense(sources, reduction="sum"), sources))
    assert all(x.is_contiguous() for x in got)
    blocks = {1: 11, 2 * CLASSES * 8: 3 + 2 + 1, 2**30: 3}[cached]  # of chunks of 4, 4 and 3 rows
    assert products.calls.total() == 3 * 4 + 2 * blocks


@pytest.mark.parametrize(("needed", "features"), [(NEEDED[0], sum(FEATURES)), (NEEDED[1], 3), (NEEDED[3], 0)], ids=str)
def test_a_budget_counts_the_weights_whose_gradient_is_summed(needed, features, monkeypatch):
    *pairs, bias = [x.to("meta") for x in make_sources(needed, torch.float32)]
    rows = Rows(pairs[:2], pairs[2:], bias, [], TARGET.to("meta"), None, None, [], None)
    asked = []
    monkeypatch.setattr(chunks.budgets, "default_budget", lambda *values: asked.append(values[3:]) or 2**20)
    spec = Spec("cpu", form=Form(), needed=tuple(map(bool, needed)))
    chunks._Chunks(rows, spec, backends.BACKENDS["cpu"], ROWS)
    assert asked == [(CLASSES * features, features > 0)]
