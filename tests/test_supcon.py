"""Supervised contrastive loss: against the matrix of all pairs, chunk by chunk."""

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate_as, assert_same_gradients, positive_pairs, supervised_contrastive
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss as fl
from fusedloss.losses import supcon

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "itself": {},
    "a bank": {"bank": True},
    "as they are": {"normalize": False},
    "in": {"positives": "in"},
    "in a bank": {"positives": "in", "bank": True},
}

#: Where some of the others are the anchors themselves, and where a mask says which pairs are positives.
OWN_KINDS = {
    "batch and bank": {"bank": True, "own": "batch"},
    "batch and bank, in": {"bank": True, "own": "batch", "positives": "in"},
    "own rows": {"bank": True, "own": "rows", "normalize": False},
    "own rows, in": {"bank": True, "own": "rows", "positives": "in"},
    "mask": {"mask": True},
    "mask, in": {"mask": True, "positives": "in"},
    "mask, own rows": {"bank": True, "own": "rows", "mask": True},
}


ALL_KINDS = KINDS | OWN_KINDS


def each_kind(*names):
    return pytest.mark.parametrize("kind", [ALL_KINDS[name] for name in names or ALL_KINDS], ids=names or ALL_KINDS)


def problem(generator, kind, rows=31, dtype=torch.float64) -> Any:
    """Labels of one row and of many; options that hold the bank, which requires grad."""
    options = {name: value for name, value in kind.items() if name not in ("bank", "own", "mask")}
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    if options.get("normalize") is False:
        x = x / 2
    y = torch.randint(9, (rows,), generator=generator)
    y[::10] = 100 + torch.arange(len(y[::10]))
    if kind.get("bank"):
        options["contrast"] = torch.randn(31, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        options["contrast_labels"] = torch.randint(-2, 9, (31,), generator=generator).int()
        if kind.get("own") == "batch":
            options["contrast"] = torch.cat([x.to(dtype), options["contrast"].detach()]).requires_grad_()
            options["contrast_labels"] = torch.cat([y, options["contrast_labels"]])
            options["contrast_includes_batch"] = True
        elif kind.get("own"):
            # Some are none of the others, some the same one, and some are there with another label.
            index = options["self_index"] = torch.randint(-1, 31, (rows,), generator=generator)
            options["contrast_labels"][index[::2].clamp(min=0)] = y[::2].int()
    if kind.get("mask"):
        others = len(options.get("contrast", x))
        options["positive_mask"] = torch.rand(rows, others, generator=generator) < 0.2
        options["positive_mask"][::5] = False
        y, options["contrast_labels"] = None, None
    return x.to(dtype).requires_grad_(), y, options


def sources(x: Tensor, options: dict[str, Any]) -> list[Tensor]:
    return [v for v in (x, options.get("contrast"), options.get("temperature")) if isinstance(v, Tensor)]


def exactly(x, y, options) -> tuple[Tensor, list[Tensor]]:
    """The rows' losses in float64, and the same leaves in float64."""
    options = {n: v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
               for n, v in options.items() if n not in ("reduction", "impl")}  # fmt: skip
    x = x.detach().double().requires_grad_()
    return supervised_contrastive(x, y, **{"temperature": 0.3, **options}), sources(x, options)


def has_positives(x, y, options) -> Tensor:
    other = ("temperature", "positives", "normalize", "reduction", "impl")
    return positive_pairs(x, y, **{n: v for n, v in options.items() if n not in other})[0].any(1)


def test_known_values():
    x = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-1, 0], [0.8, -0.6]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 2])
    rows = fl.supcon_loss(x, y, reduction="none")
    expected = torch.tensor([1.12749037, 1.13184877, 2.80501062, 0.21550866, 0], dtype=torch.float64)
    torch.testing.assert_close(rows, expected, rtol=0, atol=6e-9)
    assert fl.supcon_loss(x, y, reduction="sum").item() == pytest.approx(5.27985842, abs=6e-9)
    assert fl.supcon_loss(x, y).item() == pytest.approx(1.31996460, abs=6e-9)
    assert fl.supcon_loss(x, y, reduction="mean_all").item() == pytest.approx(5.27985842 / 5, abs=6e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_equals_pytorch_metric_learning(temperature, generator):
    """Which takes the mean over the anchors that have a positive, too. It is not among the extras."""
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pip install pytorch-metric-learning")
    x, y, _ = problem(generator, {})
    theirs = losses.SupConLoss(temperature=temperature)(x, y)
    assert_same_gradients(fl.supcon_loss(x, y, temperature=temperature), theirs, x, rtol=1e-8, atol=1e-9)


@pytest.mark.covering(1)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_all"])
@each_kind()
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_the_matrix_of_all_pairs(reduction, kind, chunk, impl, generator, monkeypatch):
    """The anchor is left out of its positives and of what it is compared with, wherever it stands."""
    monkeypatch.setattr(supcon, "BUDGET", chunk * 31 * 8)  # rows of similarities held at a time
    x, y, options = problem(generator, kind)
    options["temperature"] = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    got = fl.supcon_loss(x, y, reduction=reduction, impl=impl, **options)
    rows, leaves = exactly(x, y, options)
    divisor = {"none": 1, "sum": 1, "mean": int((rows != 0).sum()), "mean_all": len(rows)}[reduction]
    expected = rows if reduction == "none" else rows.sum() / divisor
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad(got, sources(x, options), upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, leaves, upstream), rtol=1e-10, atol=1e-11)
    again = fl.supcon_loss(x, y, reduction=reduction, impl=impl, **options)
    assert torch.equal(got, again) and torch.equal(torch.autograd.grad(again, x, upstream)[0], mine[0])


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.3])
@each_kind()
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_as_accurate_as_pytorch(reduction, temperature, kind, dtype, generator):
    check_accuracy(kind, 31, dtype, temperature, reduction, generator)


def check_accuracy(kind, rows, dtype, temperature, reduction, generator) -> None:
    """Also where one pair has all the probability; in half precision beside the same in float32."""
    x, y, options = problem(generator, kind, rows, dtype)
    with torch.no_grad():
        x[3] = x[4]  # as near as can be, of whatever labels
    options["temperature"] = temperature
    got = fl.supcon_loss(x, y, reduction=reduction, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    losses, leaves = exactly(x, y, options)
    compute = {n: v.detach().to(got.dtype).requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
               for n, v in options.items()}  # fmt: skip
    eager_x = x.detach().to(got.dtype).requires_grad_()
    eager_rows = supervised_contrastive(eager_x, y, **compute)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    if reduction == "mean":
        positives = has_positives(x, y, options)
        upstream = positives.double() / positives.sum()
        expected, eager = (losses * upstream).sum(), (eager_rows * upstream.to(got.dtype)).sum()
        gradients = torch.autograd.grad(got, sources(x, options))
    else:
        expected, eager = losses, eager_rows
        gradients = torch.autograd.grad(got, sources(x, options), upstream.to(got.dtype))
    # log-sum-exp and mean similarity cancel where an anchor's positives are all there is to see
    size = 2 / temperature * (1 if options.get("normalize", True) else float(x.detach().double().square().sum(1).max()))
    assert_as_accurate_as(got.detach(), eager.detach(), expected.detach(), 8, torch.full_like(expected, size))
    assert torch.isfinite(got).all()
    eager_gradients = torch.autograd.grad(eager_rows, sources(eager_x, compute), upstream.to(got.dtype))
    for mine, same_dtype, truth in zip(
        gradients, eager_gradients, torch.autograd.grad(losses, leaves, upstream), strict=True
    ):
        assert mine.dtype == dtype
        assert torch.isfinite(mine).all()
        rough = same_dtype.to(dtype)
        scale = (truth.abs().amax() + 0.01 * upstream.abs().amax()) / temperature
        assert_as_accurate_as(mine, rough, truth, 64 if dtype in DTYPES[:2] else 2, torch.ones_like(truth) * scale)


@pytest.mark.covering(1)
@each_kind()
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(kind, reduction, monkeypatch, generator):
    """A batch that is in both has its gradient through the anchors and through the others, and so the second one."""
    monkeypatch.setattr(supcon, "BUDGET", 4 * 2 * 9 * 8)
    x, y, options = problem(generator, kind, rows=4)
    y = None if y is None else torch.tensor([1, 1, 2, 2])
    bank = options.pop("contrast", None)
    if bank is not None:
        bank = bank[len(bank) - 5 :].detach().requires_grad_()
        options["contrast_labels"] = None if y is None else torch.tensor([1, 1, 2, 2, 1, 2, 3, 2, 1])
        if "self_index" in options:
            options["self_index"] = torch.tensor([2, -1, 8, 2])
        if "positive_mask" in options:
            options["positive_mask"] = options["positive_mask"][:, :9]

    def loss(x, t, bank=None):
        contrast = None if bank is None else torch.cat([x, bank])
        return fl.supcon_loss(x, y, temperature=t, contrast=contrast, reduction=reduction, **options)

    inputs = (x, torch.tensor(0.4, dtype=torch.float64, requires_grad=True), *(() if bank is None else (bank,)))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_third_derivatives(positives, normalize, generator):
    x, y, options = problem(generator, {}, rows=9, dtype=torch.float64)
    options.update(positives=positives, normalize=normalize)

    def third(loss: Tensor) -> list[Tensor]:
        slopes = []
        for _ in range(3):
            slopes += torch.autograd.grad(loss, x, create_graph=True)
            loss = slopes[-1].pow(2).sum()
        return slopes

    expected = third(supervised_contrastive(x, y, 0.4, **options).mul(has_positives(x, y, {})).mean())
    torch.testing.assert_close(third(fl.supcon_loss(x, y, temperature=0.4, reduction="mean_all", **options)), expected)


@each_kind()
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_compare_with(rows, kind, impl, generator):
    """No rows, labels that are all distinct, no others: the loss is 0, attached, and so are the gradients."""
    x, y, options = problem(generator, kind, rows=rows)
    y = None if y is None else 1000 + torch.arange(rows)
    if "contrast" in options:
        size = rows if kind.get("own") == "batch" else 0
        options["contrast"] = options["contrast"][:size].detach().requires_grad_()
        options["contrast_labels"] = y if size else None if y is None else y[:0]
    if "self_index" in options:
        options["self_index"] = torch.full((rows,), -1)
    if "positive_mask" in options:
        options["positive_mask"] = torch.zeros(rows, len(options.get("contrast", x)), dtype=torch.bool)
    for reduction in supcon.REDUCTIONS:
        warns = pytest.warns(UserWarning, match="no anchor has a positive") if rows else nullcontext()
        with warns:
            loss = fl.supcon_loss(x, y, reduction=reduction, impl=impl, **options)
        assert torch.equal(loss, torch.zeros((rows,) if reduction == "none" else (), dtype=torch.float64))
        for gradient in torch.autograd.grad(loss.sum(), sources(x, options)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transformed", [False, True])
def test_the_logarithm_of_a_count_keeps_its_digits(transformed, default, generator):
    """That of an integer is in PyTorch's default dtype."""
    x, labels = torch.randn(7, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1, 2])

    def loss(x: Tensor) -> Tensor:
        return fl.supcon_loss(x, labels, positives="in", reduction="none")

    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).t() / 0.3
    s.fill_diagonal_(-torch.inf)
    same = labels == labels[:, None]
    count = (same.sum(-1) - 1).double()
    right = s.logsumexp(-1) - s.masked_fill(~same, -torch.inf).logsumexp(-1) + count.log()
    torch.set_default_dtype(default)
    try:
        found = torch.func.vmap(loss)(x[None])[0] if transformed else loss(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[:6], right[:6], rtol=1e-13, atol=1e-13)


def test_one_pair_is_certain():
    """Two rows of one label have nothing but each other: no loss, to the last digit that a difference leaves."""
    x = torch.tensor([[1.0, 2], [2, -1]], requires_grad=True)
    loss = fl.supcon_loss(x, torch.tensor([7, 7]), temperature=0.01)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.zeros(2, 2), rtol=0, atol=1e-4)


def test_lengths_out_of_the_ordinary_do_not_matter(generator):
    x, y, _ = problem(generator, {}, dtype=torch.float32)
    expected = fl.supcon_loss(x, y)
    (slope,) = torch.autograd.grad(expected, x, retain_graph=True)
    for size in (1e-30, 1e30):
        scaled = (x.detach() * size).requires_grad_()
        loss = fl.supcon_loss(scaled, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, scaled)[0] * size, slope)


@each_kind("a bank", "in")
def test_under_autocast(kind, generator):
    """Similarities are in float32: rounded to bfloat16 and divided by the temperature they would tell nothing."""
    x, y, options = problem(generator, kind, dtype=torch.float32)
    expected = fl.supcon_loss(x, y, temperature=0.05, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fl.supcon_loss(x, y, temperature=0.05, **options)
    assert_same_gradients(loss, expected, x)


# --- the anchor among the others, positives by a mask, views ---


def test_a_batch_in_front_of_a_bank_is_the_batch_alone_where_the_bank_is_empty(generator):
    """By either argument, with every gradient through both of its places."""
    x, y, _ = problem(generator, {})
    expected = fl.supcon_loss(x, y)
    for own in ({"contrast_includes_batch": True}, {"self_index": torch.arange(len(x), dtype=torch.int32)}):
        for labels in ({"labels": y, "contrast_labels": y}, {"positive_mask": y[:, None] == y}):
            got = fl.supcon_loss(x, contrast=x.clone(), **labels, **own)
            assert_same_gradients(got, expected, x)


def test_indices_of_any_integers(generator):
    """A self_index of -1 alone leaves nothing out, not the first and not the last one."""
    x, y, options = problem(generator, OWN_KINDS["batch and bank"])
    labels, y, own = options.pop("contrast_labels") % 7, y % 7, torch.arange(len(y))
    del options["contrast_includes_batch"]
    expected = fl.supcon_loss(x, y, contrast_labels=labels, self_index=own, **options)
    for dtype in (torch.int32, torch.int8, torch.uint8):
        given = {"contrast_labels": labels.to(dtype), "self_index": own.to(dtype)}
        assert torch.equal(fl.supcon_loss(x, y.to(dtype), **given, **options), expected)
    none = fl.supcon_loss(x, y, contrast_labels=labels, self_index=torch.full_like(y, -1), **options)
    torch.testing.assert_close(none, fl.supcon_loss(x, y, contrast_labels=labels, **options), rtol=1e-13, atol=0)


def sup_contrast(features, labels, mask, temperature):
    """The losses (N, views) by the steps of SupContrast's SupConLoss: views one after the other, masks of examples."""
    n, views, _ = features.shape
    mask = labels[:, None] == labels if mask is None else mask
    contrast = torch.cat(torch.unbind(torch.nn.functional.normalize(features, dim=2), dim=1))
    logits = contrast @ contrast.t() / temperature
    others = 1 - torch.eye(n * views, dtype=features.dtype)
    positive = mask.to(features.dtype).repeat(views, views) * others
    log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    count = positive.sum(1)
    losses = -(positive * log_p).sum(1) / torch.where(count == 0, 1, count)
    return losses.view(views, n).t()


@pytest.mark.parametrize("by", ["labels", "mask"])
def test_views_as_in_sup_contrast(by, generator):
    features = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (7,), generator=generator)
    mask = torch.rand(7, 7, generator=generator) < 0.4
    mask[2] = False
    given = {"labels": labels} if by == "labels" else {"positive_mask": mask}
    expected = sup_contrast(features, given.get("labels"), given.get("positive_mask"), 0.2)
    got = fl.supcon_loss(features, **given, temperature=0.2, reduction="none")
    assert_same_gradients(got, expected, features, torch.randn(7, 3, generator=generator, dtype=torch.float64))
    mean = fl.supcon_loss(features, **given, temperature=0.2)
    torch.testing.assert_close(mean, expected.sum() / expected.count_nonzero())


@pytest.mark.parametrize("own", ["contrast_includes_batch", "self_index"])
def test_views_in_a_bank(own, generator):
    """Of the batch and of the bank, as many or not: each is a row of its own."""
    x, y, _ = problem(generator, {}, rows=12)
    bank, bank_labels = x.detach().flip(1)[:8], y[:4]
    features, labels = x.view(6, 2, 6), torch.arange(6) // 2
    contrast, contrast_labels = torch.cat([features, bank.view(4, 2, 6)]), torch.cat([labels, bank_labels])
    index = True if own == "contrast_includes_batch" else torch.arange(12)
    of_views: Any = {own: index if index is True else index.view(6, 2), "contrast": contrast, "reduction": "none"}
    got = fl.supcon_loss(features, labels, contrast_labels=contrast_labels, **of_views)
    every, every_other = (v.repeat_interleave(2) for v in (labels, contrast_labels))
    flat: Any = {own: index, "contrast": torch.cat([x, bank]), "contrast_labels": every_other, "reduction": "none"}
    torch.testing.assert_close(got, fl.supcon_loss(x, every, **flat).view(6, 2), rtol=0, atol=0)
    by_mask = fl.supcon_loss(features, positive_mask=labels[:, None] == contrast_labels, **of_views)
    torch.testing.assert_close(by_mask, got)


def test_the_mask_is_not_written_to():
    mask = torch.ones(4, 4, dtype=torch.bool)
    fl.supcon_loss(torch.eye(4), positive_mask=mask)
    assert mask.all()


# --- graphs of it ---


@pytest.mark.compile
def test_an_own_row_out_of_range_is_nan_where_nobody_may_look():
    """As on a GPU. The other rows are what they are."""
    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    bank, labels = torch.randn(9, 4), torch.arange(9) // 3

    def step(x, own):
        return fl.supcon_loss(x, y, contrast=bank, contrast_labels=labels, self_index=own, reduction="none")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(x, torch.tensor([0, 9, -1, -2, 2**40, 8]))
    expected = step(x, torch.tensor([0, -1, -1, -1, -1, 8]))
    assert got.isnan().tolist() == [False, True, False, True, True, False]
    torch.testing.assert_close(got[[0, 2, 5]], expected[[0, 2, 5]])
    assert torch.autograd.grad(got[1], x)[0][1].isnan().all()


@pytest.mark.parametrize("positives", ["out", "in"])
def test_fake_tensors(positives):
    """There are no values to look at."""
    with FakeTensorMode():
        x, own = torch.randn(8, 4, requires_grad=True), torch.arange(8)
        options = {"contrast": x * 1, "contrast_labels": own, "self_index": own, "positives": positives}
        loss = fl.supcon_loss(x, own, temperature=torch.tensor(0.3), reduction="none", **options)
        assert loss.shape == (8,) and torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("positives", ["out", "in"])
def test_a_traced_graph_has_the_same_gradient_for_more_rows(positives, generator):
    def gradient(x, y):
        return torch.autograd.grad(fl.supcon_loss(x, y, positives=positives), x)[0]

    x, y, _ = problem(generator, {}, rows=11)
    graph = make_fx(gradient, tracing_mode="symbolic")(x, y)
    x, y, _ = problem(generator, {}, rows=31)
    torch.testing.assert_close(graph(x, y), gradient(x, y))


@pytest.mark.compile
def test_exports_for_any_number_of_rows(generator):
    x, y, _ = problem(generator, {}, rows=11)
    module, rows = fl.nn.SupConLoss(positives="in"), torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (x.detach(), y), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (2, 31):
        x, y = problem(generator, {}, rows=n)[0], torch.arange(n) // 2
        torch.testing.assert_close(program.module()(x, y), module(x, y))


@pytest.mark.compile
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("gradients", ["on", "of the rows", "off"])
def test_an_exported_program_has_no_gradient_rather_than_a_part_of_it(gradients, strict, generator):
    (x, y, _), loss = problem(generator, {}, rows=11), fl.nn.SupConLoss(torch.tensor(0.3), normalize=False)
    more = {"contrast": x.detach(), "contrast_labels": y, "self_index": y % 11}
    with torch.set_grad_enabled(gradients != "off"):
        rows = x if gradients == "of the rows" else x.detach()
        program = torch.export.export(loss, (rows, y), more, strict=strict)
    for some in (program, program.run_decompositions()):
        result = some.module()(x, y, **more | {"contrast": x})
        assert torch.equal(result, loss(x, y, **more)) and not result.requires_grad


_MEMORY = """
import resource, torch, fusedloss as fl
x, y = torch.randn(6144, 64, requires_grad=True), torch.randint(50, (6144,))
torch.autograd.grad(fl.supcon_loss(x[:64], y[:64], positives="in"), x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.autograd.grad(fl.supcon_loss(x, y, positives="in"), x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_similarities_are_not_stored():
    """144 MB of them, several times in eager PyTorch."""
    text = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True).stdout
    assert float(text) < 48, text


# --- modules ---


@each_kind("in", "own rows", "mask")
def test_module_does_as_the_function(kind, generator):
    x, y, options = problem(generator, kind)
    constructor = {name: options.pop(name) for name in ("positives", "normalize") if name in options}
    temperature = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    module = fl.nn.SupConLoss(temperature, reduction="none", **constructor)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    expected = fl.supcon_loss(x, y, temperature=temperature, reduction="none", **constructor, **options)
    upstream = torch.randn(len(x), generator=generator, dtype=torch.float64)
    assert_same_gradients(module(x, y, **options), expected, [x, temperature], upstream, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["itself", "batch and bank"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_joint_objective(reduction, name, generator):
    x, y, options = problem(generator, ALL_KINDS[name])
    logits = torch.randn(len(y), 104, generator=generator, dtype=torch.float64, requires_grad=True)
    got = fl.nn.CrossEntropySupConLoss(0.9, 0.3, reduction=reduction)(logits, x, y, **options)
    contrastive = fl.supcon_loss(x, y, temperature=0.3, reduction=reduction, **options)
    expected = 0.1 * torch.nn.functional.cross_entropy(logits, y) + 0.9 * contrastive
    assert_same_gradients(got, expected, (logits, x))


@pytest.mark.parametrize("ignored", [-100, 2])
def test_examples_without_a_label_are_no_positives(ignored, generator):
    """Of each other, in the joint objective, nor of those in a bank; in int8 their own labels have no room."""
    x, bank = (torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 4))
    y, bank_y = torch.tensor([0, ignored, 1, 1, ignored, 0, ignored]), torch.tensor([1, ignored, 0, ignored])
    logits = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    joint = fl.nn.CrossEntropySupConLoss(0.9, 0.3, ignore_index=ignored)
    classified = 0.1 * torch.nn.functional.cross_entropy(logits, y, ignore_index=ignored)
    for contrast, labels in ((None, y), (bank, bank_y)):
        options = {} if contrast is None else {"contrast": contrast}
        mask = (y[:, None] == labels) & (y != ignored)[:, None]
        expected = classified + 0.9 * fl.supcon_loss(x, temperature=0.3, positive_mask=mask, **options)
        options |= {} if contrast is None else {"contrast_labels": labels.to(torch.int8)}
        got = joint(logits, x, y.to(torch.int8), **options)
        assert_same_gradients(got, expected, (logits, x, *([] if contrast is None else [contrast])))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["contrast_includes_batch", "self_index"])
def test_examples_without_a_label_have_their_own_views_in_the_contrast_set(name, flat, generator):
    x, bank = (torch.randn(n, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    y, bank_y = torch.tensor([0, -100, 1, -100, 0]), torch.tensor([1, -100, 0])
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    contrast, labels = torch.cat([x, bank]), torch.cat([y, bank_y])
    mask = (y[:, None] == labels) & (y != -100)[:, None] | torch.eye(5, 8, dtype=torch.bool)
    options = {name: True if "batch" in name else torch.arange(10).view(5, 2).to(torch.int8)}
    contrastive = fl.supcon_loss(x, temperature=0.3, contrast=contrast, positive_mask=mask, **options)
    expected = 0.1 * torch.nn.functional.cross_entropy(logits, y) + 0.9 * contrastive
    if flat:
        contrast, labels = contrast.flatten(0, 1), labels.repeat_interleave(2)
    joint = fl.nn.CrossEntropySupConLoss(0.9, 0.3)
    options |= {"contrast": contrast, "contrast_labels": labels}
    assert_same_gradients(joint(logits, x, y, **options), expected, (logits, x, bank))
    options["contrast_labels"] = labels.masked_fill(labels == -100, 2)
    if "batch" in name:
        with pytest.raises(ValueError, match="row 2 has label -100 there and 2 in contrast_labels"):
            joint(logits, x, y, **options)


def test_modules_keep_their_state_and_show_it():
    loss = fl.nn.CrossEntropySupConLoss(temperature=torch.tensor(0.2), label_smoothing=0.1, weight=torch.ones(3))
    assert set(loss.state_dict()) == {"supcon.temperature", "cross_entropy.weight"}
    other = fl.nn.CrossEntropySupConLoss(temperature=torch.tensor(0.5), weight=torch.zeros(3))
    other.load_state_dict(loss.state_dict())
    assert other.supcon.temperature == torch.tensor(0.2)
    for text in ("lam=0.9", "temperature=0.2", "positives=out", "label_smoothing=0.1"):
        assert text in repr(loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.nn.SupConLoss(0.0), "temperature must be between 1e-30 and 1e\\+30, got 0.0"),
        (lambda: fl.nn.SupConLoss(positives="all"), "'all'"),
        (lambda: fl.nn.SupConLoss(impl="abacus"), "'abacus'"),
        (lambda: fl.nn.CrossEntropySupConLoss(1.5), "lam must be between 0 and 1, got 1.5"),
        (lambda: fl.nn.CrossEntropySupConLoss(reduction="none"), "'none'"),
        (lambda: fl.nn.CrossEntropySupConLoss(label_smoothing=2.0), "label_smoothing must be between 0 and 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_modules_refuse_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X, Y = torch.eye(3), torch.tensor([0, 0, 1])
BANK, MASK = {"contrast": X, "contrast_labels": Y}, torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a tensor, got list"),
        ({"features": X[0]}, ValueError, r"features must be \(N, D\).*\(3,\)"),
        ({"labels": Y[:2]}, ValueError, r"labels must be \(3,\).*\(2,\)"),
        ({"labels": Y.to("meta")}, ValueError, "labels is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be between 1e-30 and 1e\\+30, got 0.0"),
        ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be between 1e-30 and 1e\\+30, got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"shape \(3,\)"),
        ({"normalize": 1}, TypeError, "normalize must be a bool, got 1"),
        ({"positives": "all"}, ValueError, "'all'"),
        ({"reduction": "median"}, ValueError, "'median'"),
        ({"contrast": X}, TypeError, "contrast was given without contrast_labels"),
        ({"contrast": X[:, :2], "contrast_labels": Y}, ValueError, "contrast has D = 2 features, but features 3"),
        ({"contrast": X.double(), "contrast_labels": Y}, TypeError, "contrast is torch.float64"),
        ({"labels": None}, TypeError, "labels or positive_mask must say which pairs are positives"),
        ({"self_index": Y}, TypeError, "self_index was given without contrast"),
        (BANK | {"contrast_includes_batch": 1}, TypeError, "contrast_includes_batch must be a bool, got 1"),
        (BANK | {"contrast_includes_batch": True, "self_index": Y}, ValueError, "both say which row of contrast"),
        (BANK | {"self_index": Y.float()}, TypeError, "self_index must be int64, .* or uint8, got torch.float32"),
        (BANK | {"self_index": Y[:2]}, ValueError, r"self_index must be \(3,\), one an anchor, got shape \(2,\)"),
        (BANK | {"self_index": Y + 2}, IndexError, "self_index 3 is out of range for 3 rows of contrast"),
        ({"contrast": X[:2], "contrast_labels": Y[:2], "contrast_includes_batch": True}, ValueError, "it has 2"),
        (
            BANK | {"contrast_labels": 1 - Y, "contrast_includes_batch": True},
            ValueError,
            "row 0 has label 0 there and 1",
        ),
        ({"positive_mask": MASK}, ValueError, "positive_mask and labels both say which pairs are positives"),
        (BANK | {"labels": None, "positive_mask": MASK}, ValueError, "positive_mask and contrast_labels both say"),
        ({"labels": None, "positive_mask": X}, TypeError, "positive_mask must be bool, got torch.float32"),
        ({"labels": None, "positive_mask": MASK[:, :2]}, ValueError, r"positive_mask must be \(3, 3\)"),
        ({"features": X[None, None]}, ValueError, r"or \(N, views, D\), got shape \(1, 1, 3, 3\)"),
        ({"features": X[:, None], "labels": Y[:2]}, ValueError, r"labels must be \(3,\), one an example"),
        ({"features": X * torch.tensor([[1.0], [0], [1]])}, ValueError, "row 1 of features is zero"),
        ({"impl": "abacus"}, ValueError, "'abacus'"),
    ],
    ids=str,
)
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        fl.supcon_loss(**({"features": X, "labels": Y} | change))
