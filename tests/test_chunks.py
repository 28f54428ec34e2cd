"""Logits that are a sum of products, h_0 W_0^T + h_1 W_1^T + b, which chunks make: as adapters of a layer need them."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as
from products import Products
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.checks import IGNORED, compute_dtype
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Rows, Spec
from fusedloss.definition.statistics import Picks
from fusedloss.engine import chunks, functions
from fusedloss.engine.functions import Reduction
from fusedloss.losses.focal import FOCAL

if backends.unavailable("cpu") is not None:
    pytest.skip(str(backends.unavailable("cpu")), allow_module_level=True)

ROWS, CLASSES, FEATURES = 11, 23, (6, 3)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Which of h_0, h_1, W_0, W_1 and b require grad: all; an adapter's, of a frozen layer; the layer's; hidden states'.
NEEDED = [(1, 1, 1, 1, 1), (1, 1, 0, 1, 0), (0, 0, 1, 0, 1), (1, 0, 0, 0, 0)]
each_needed = pytest.mark.parametrize("needed", NEEDED, ids=str)


def make_rows(needed: Sequence[int], dtype: torch.dtype) -> Rows:
    generator = torch.Generator().manual_seed(3)
    shapes = [*((ROWS, d) for d in FEATURES), *((CLASSES, d) for d in FEATURES), (CLASSES,)]
    sources = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for x, need in zip(sources, needed, strict=True):
        x.requires_grad_(bool(need))
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[[2, 3, 7]] = IGNORED
    compute = compute_dtype(dtype)
    return Rows(
        hidden=sources[:2],
        weight=sources[2:4],
        bias=sources[4],
        teacher=[],
        target=target,
        class_weight=torch.linspace(0.5, 2, CLASSES, dtype=compute),
        candidates=None,
        params=[torch.tensor(1.5, dtype=compute)],
        scalars=torch.tensor([0.9, 0.1 / CLASSES, 0.01, 1.0], dtype=compute),
    )


def spec_of(form: Form, needed: Sequence[int] = ()) -> Spec:
    made = tuple(map(bool, needed))
    return Spec("cpu", FOCAL.name, mean=True, smooths=True, z_loss=True, form=form, needed=made)


def logits_of(sources: Sequence[Tensor], softcap: float) -> Tensor:
    h0, h1, w0, w1, b = sources
    z = torch.addmm(F.linear(h0, w0, b), h1, w1.t())
    return softcap * (z / softcap).tanh() if softcap else z


def dense(rows: Rows, sources: Sequence[Tensor], softcap: float) -> Tensor:
    """Row losses by the public function, of logits in hand."""
    return fl.focal_loss(
        logits_of(sources, softcap), rows.target, gamma=1.5, weight=rows.class_weight, label_smoothing=0.1,
        z_loss=0.01, reduction="none", impl="reference",
    )  # fmt: skip


def gradients(loss: Tensor, sources: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in sources if x.requires_grad], upstream)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("with_the_loss", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, ROWS])
@each_needed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_products(dtype, needed, chunk, softcap, with_the_loss, drop_ignored):
    """The loss and the gradients are those of the dense formula, made with the loss of a sum or by a backward."""
    rows = make_rows(needed, dtype)
    budget = chunk * CLASSES * dtype.itemsize * (2 if softcap else 1)
    form = Form(softcap=softcap, budget=budget, drop_ignored=drop_ignored)
    row_weight = torch.linspace(0.5, 1.5, ROWS, dtype=compute_dtype(dtype))
    reduction = Reduction(row_weight, 7.0) if with_the_loss else None
    spec = spec_of(form, needed if with_the_loss else ())
    upstream = None if with_the_loss else row_weight

    def reduced(sources):
        losses = dense(rows, sources, softcap)
        return gradients((losses * row_weight / 7).sum() if with_the_loss else losses, sources, upstream)

    got = gradients(functions.loss(rows, spec, FOCAL, False, reduction)[0], rows.sources, upstream)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in rows.sources]
    truth, eager = reduced(exact), reduced(rows.sources)
    for mine, theirs, true in zip(got, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)
            continue
        # Of sums of products an error is one of their size, whatever cancels in the single element.
        scale = true.abs().max().expand_as(true)
        worst = (theirs.double() - true).abs().max().expand_as(true)
        assert_as_accurate_as(mine, true.to(theirs.dtype) + worst.to(theirs.dtype), true, 4, scale)


@pytest.mark.parametrize("chunk", [4, ROWS])
def test_statistics_and_second_derivatives_of_sums_of_products(chunk):
    rows = make_rows(NEEDED[0], torch.float64)
    form = Form(softcap=3.0, budget=chunk * CLASSES * 8 * 2)

    def twice(losses):
        first = torch.autograd.grad(losses.sum(), rows.sources, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), rows.sources))

    loss = functions.loss(rows, spec_of(form), FOCAL, False, None)[0]
    torch.testing.assert_close(twice(loss), twice(dense(rows, rows.sources, 3.0)))
    picks = Picks(2, False, True)
    columns, index = functions.row_statistics(rows, Spec("cpu", form=form), picks, False, None)
    kept = rows.target != IGNORED
    z = logits_of(rows.sources, 3.0)[kept]
    assert torch.equal(index.t()[kept], z.topk(2).indices)
    mean_ce = -(z.log_softmax(-1) * rows.class_weight).mean(-1)
    mine = (columns.lse * 2 + columns.mean_ce + columns.pick_ce[1]).masked_fill(~kept, 0).sum()
    theirs = (z.logsumexp(-1) * 2 + mean_ce - z.log_softmax(-1).topk(2).values[:, 1]).sum()
    torch.testing.assert_close(gradients(mine, rows.sources), gradients(theirs, rows.sources))


@pytest.mark.parametrize("with_the_loss", [True, False])
@each_needed
def test_a_pair_that_needs_no_gradient_costs_no_product(needed, with_the_loss):
    rows = make_rows(needed, torch.float32)
    spec = spec_of(Form(budget=2**20), needed if with_the_loss else ())
    reduction = Reduction(None, None) if with_the_loss else None
    with Products(CLASSES) as products:
        losses = functions.loss(rows, spec, FOCAL, False, reduction)[0]
        gradients(losses.sum(), rows.sources)
    # Two make the logits, once more for a backward: a chunk does not outlive its forward pass.
    assert products.calls.total() == (2 if with_the_loss else 4) + sum(needed[:4])


@pytest.mark.parametrize("cached", [1, 2 * CLASSES * 8, 2**30], ids=["rows", "two rows", "all"])
def test_products_of_few_columns_go_through_rows_that_stay_in_the_cache(cached, monkeypatch):
    monkeypatch.setattr(chunks.budgets, "CACHED", cached)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows = make_rows(NEEDED[0], torch.float64)
    spec = spec_of(Form(budget=5 * CLASSES * 8), NEEDED[0])
    loss = functions.loss(rows, spec, FOCAL, False, Reduction(None, None))[0]
    with Products(CLASSES) as products:
        got = gradients(functions.loss(rows, spec, FOCAL, False, Reduction(None, None))[0], rows.sources)
    torch.testing.assert_close(got, gradients(dense(rows, rows.sources, 0.0).sum(), rows.sources))
    assert all(x.is_contiguous() for x in got) and loss == got[0]
    blocks = {1: 11, 2 * CLASSES * 8: 3 + 2 + 1, 2**30: 3}[cached]  # of chunks of 4, 4 and 3 rows
    assert products.calls.total() == 3 * 4 + 2 * blocks


@pytest.mark.parametrize(("needed", "features"), [(NEEDED[0], sum(FEATURES)), (NEEDED[1], 3), (NEEDED[3], 0)], ids=str)
def test_a_budget_counts_the_weights_whose_gradient_is_summed(needed, features, monkeypatch):
    rows = make_rows(needed, torch.float32)
    meta = rows.with_sources([x.to("meta") for x in rows.sources])
    asked = []
    monkeypatch.setattr(chunks.budgets, "default_budget", lambda *values: asked.append(values[3:]) or 2**20)
    chunks._Chunks(meta, spec_of(Form(), needed), backends.BACKENDS["cpu"], ROWS)
    assert asked == [(CLASSES * features, features > 0)]
