"""Calibration errors: hand-made rows, torchmetrics, and what the statistics of every form of a loss give."""

import builtins

import matplotlib
import pytest
import torch

import fusedloss as fl

matplotlib.use("agg")


def stats_of(confidence: list[float], right: list[bool]) -> tuple[fl.RowStats, torch.Tensor]:
    """Rows of these largest probabilities; class 7 is predicted, rightly or not."""
    log_prob = torch.tensor(confidence, dtype=torch.float64).log()
    argmax = torch.full(log_prob.shape, 7)
    nothing = torch.full_like(log_prob, torch.nan)  # of the other columns nothing is read
    return fl.RowStats(nothing, nothing, argmax, log_prob), torch.where(torch.tensor(right), 7, 3)


def test_bins_of_hand_made_rows():
    stats, target = stats_of([0.25, 0.5, 0.5000001, 0.75, 1.0], [True] * 5)
    assert fl.calibration_bins(stats, target, bins=4).rows.tolist() == [1, 1, 2, 1]  # a bin has its upper edge
    stats, target = stats_of([0.55, 0.65, 0.9, 0.95, 1.0, 0.7], [True, False, True, True, False, True])
    bins = fl.calibration_bins(stats, target, bins=4)
    assert bins.rows.tolist() == [0, 0, 3, 3] and bins.rows.dtype == torch.int64
    assert bins.confidence[:2].isnan().all() and bins.accuracy[:2].isnan().all()
    torch.testing.assert_close(bins.confidence[2:], torch.tensor([1.9 / 3, 2.85 / 3]).double())
    torch.testing.assert_close(bins.accuracy[2:], torch.tensor([2 / 3, 2 / 3]).double())
    gaps = (2 / 3 - 1.9 / 3, 2.85 / 3 - 2 / 3)
    assert fl.calibration_error(stats, target, bins=4).item() == pytest.approx(sum(gaps) / 2)
    assert fl.calibration_error(stats, target, bins=4, norm="max").item() == pytest.approx(gaps[1])


def logits_and_targets(rows, classes, generator):
    """Of all confidences, though not of 1; about as often right as not."""
    scale, noise = (torch.rand(rows, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    z = 3 * scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    other = torch.randint(classes, (rows,), generator=generator)
    return z, torch.where(noise[:, 0] < 0.5, z.argmax(1), other)


@pytest.mark.covering(1)
@pytest.mark.parametrize("norm", ["l1", "max"])
@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize(("rows", "classes", "bins"), [(2, 2, 15), (300, 7, 15), (200, 40, 4), (9, 5, 100)])
def test_against_torchmetrics(impl, rows, classes, bins, ignore_index, norm, generator):
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes long to import

    z, target = logits_and_targets(rows, classes, generator)
    target[1::5], target[0] = ignore_index, 1
    kept = target != ignore_index
    _, stats = fl.focal_loss(z, target, gamma=3.0, ignore_index=ignore_index, return_stats=True, impl=impl)
    error = fl.calibration_error(stats, target, bins=bins, norm=norm)
    assert error.dim() == 0 and error.dtype == torch.float64
    own = {"n_bins": bins, "norm": norm, "ignore_index": ignore_index}
    theirs = multiclass_calibration_error(z.softmax(1), target, classes, **own)
    assert error.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs is in float32
    assert fl.calibration_bins(stats, target).rows.sum() == kept.sum()


def test_a_row_of_nan_is_not_hidden(impl, generator):
    z, target = logits_and_targets(50, 6, generator)
    z[20, 3] = torch.nan
    _, stats = fl.cross_entropy(z, target, return_stats=True, impl=impl)
    assert all(fl.calibration_error(stats, target, norm=norm).isnan() for norm in ("l1", "max"))
    assert fl.calibration_bins(stats, target).rows.sum() == 50


def test_shapes_dtypes_and_batches(generator):
    z, target = logits_and_targets(120, 6, generator)
    z = z.bfloat16()

    def stats_of_loss(z, target):
        return fl.cross_entropy(z, target, return_stats=True)[1]

    error = fl.calibration_error(stats_of_loss(z, target), target)
    assert error.dtype == torch.float32
    folded = target.reshape(4, 30).int()
    assert torch.equal(fl.calibration_error(stats_of_loss(z.reshape(4, 30, 6), folded), folded), error)
    batches = map(stats_of_loss, z.split(50), target.split(50))
    joined = fl.RowStats.cat(batches)
    assert torch.equal(fl.calibration_error(joined, target), error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stats": torch.zeros(4)}, TypeError, "stats must be the RowStats of a loss with return_stats=True"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape of stats.argmax, \(4,\), got \(3,\)"),
        ({"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        ({"norm": "l2"}, ValueError, "norm must be one of 'l1', 'max', got 'l2'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    stats, target = stats_of([0.5, 0.6, 0.7, 0.8], [True] * 4)
    arguments = {"stats": stats, "target": target, **change}
    with pytest.raises(error, match=message):
        fl.calibration_error(**arguments)


# --- temperature scaling ---


def optimum(z, target):
    """By bisection of dL / d log(1 / tau) of the dense formula, in float64."""
    low, high = -7.0, 7.0
    for _ in range(60):
        tau = torch.tensor((low + high) / 2, dtype=torch.float64).exp()
        p = (z.double() / tau).softmax(1)
        slope = ((p * z.double()).sum(1) - z.double().gather(1, target[:, None])[:, 0]).mean()
        low, high = (tau.log().item(), high) if slope > 0 else (low, tau.log().item())
    return tau.item()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.02, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("form", ["logits", "batches", "linear", "softcap"])
def test_temperature_of_least_cross_entropy(form, scale, dtype, impl, generator, kernel_calls):
    hidden = torch.randn(400, 12, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(30, 12, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(30, generator=generator, dtype=torch.float64).to(dtype)
    z = torch.nn.functional.linear(hidden, weight, bias)
    target = torch.multinomial(z.double().softmax(1), 1, generator=generator)[:, 0]
    hidden, bias, z = scale * hidden, scale * bias, scale * z
    if form == "softcap":
        z = 50 * (z / 50).tanh()
    kept = torch.rand(400, generator=generator) < 0.9
    right = optimum(z[kept], target[kept])
    ignored = 0 if form == "batches" else -100
    target = target.masked_fill(~kept, ignored)
    if form == "batches":  # in which class 0 is ignored
        kept = target != 0
        right = optimum(z[kept], target[kept])
        fit = fl.fit_temperature(z.split(150), target.split(150), ignore_index=0, impl=impl)
    elif form == "logits":
        fit = fl.fit_temperature(z.reshape(20, 20, 30), target.reshape(20, 20), impl=impl)
    else:
        own = {"linear_weight": weight, "linear_bias": bias, "softcap": 50.0 if form == "softcap" else None}
        fit = fl.fit_temperature(hidden, target, impl=impl, **own)
    # Logits of half precision are those that a chunk has; the optimum is of those before they were rounded.
    exact = dtype == torch.float64 or (dtype == torch.float32 and form in ("logits", "batches"))
    assert fit.temperature == pytest.approx(right, rel=1e-5 if exact else 1e-2 if dtype == torch.bfloat16 else 1e-4)
    for error, tau in ((fit.error_before, 1.0), (fit.error_after, fit.temperature)):
        _, stats = fl.cross_entropy(z.double() / tau, target, ignore_index=ignored, return_stats=True)
        expected = fl.calibration_error(stats, target).item()
        assert error == pytest.approx(expected, abs=0.03 if dtype == torch.bfloat16 else 1e-4)
    assert scale == 1 or form == "softcap" or fit.error_after < fit.error_before
    passes = sum(count for (method, _), count in kernel_calls.items() if method != "statistics")
    assert passes <= 25 * (3 if form == "batches" else 1)


def test_temperature_without_an_optimum():
    """Rows that are all right are to be made surer, those that are all wrong are to know nothing."""
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    right, wrong = (fl.fit_temperature(z, torch.tensor(t)) for t in ([0, 1], [1, 0]))
    assert right.temperature < 0.05 and right.error_after < 1e-6
    assert wrong.temperature == 2.0**10 and wrong.error_after == pytest.approx(0.5, abs=1e-3)
    assert fl.fit_temperature(torch.zeros(2, 2), torch.tensor([0, 1])).temperature == 1


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.full((2,), -100)), {}, ValueError, "that counts, got 2, all of them -100"),
        (([], []), {}, ValueError, "at least one batch, got none"),
        (([torch.zeros(2, 3)], []), {}, ValueError, "as many batches, got 1 and 0"),
        ((torch.zeros(2, 3), torch.rand(2, 3)), {}, TypeError, "target must hold indices .*, got torch.float32"),
        (([torch.zeros(2, 3)], [[0, 1]]), {}, TypeError, "each target must be a tensor of class indices, got list"),
        (([torch.zeros(2, 3)], torch.zeros(2)), {}, TypeError, "tensors or two lists of them, got list and Tensor"),
        ((torch.tensor([[0, -torch.inf]]), torch.tensor([1])), {}, ValueError, "cross-entropy is not finite"),
        ((torch.zeros(2, 3), torch.zeros(2).long()), {"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        ((torch.zeros(2, 3), torch.zeros(2).long()), {"softcap": 2.0}, ValueError, "softcap need a linear_weight"),
    ],
    ids=["ignored", "nothing", "lists", "probabilities", "a list", "kinds", "infinite", "bins", "softcap"],
)  # fmt: skip
def test_temperature_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fl.fit_temperature(*arguments, **options)


# --- the diagram ---


def test_reliability_diagram(monkeypatch):
    from matplotlib import pyplot

    stats, target = stats_of([0.55, 0.65, 0.9, 0.95, 1.0, 0.7], [True, False, True, True, False, True])
    bins = fl.calibration_bins(stats, target, bins=4)
    figure, ax = pyplot.subplots()
    assert fl.plot_reliability(bins, ax) is ax
    bars = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches]
    expected = []
    for i in (2, 3):
        sure, right = bins.confidence[i].item(), bins.accuracy[i].item()
        expected += [(i / 4, 0, 0.25, right), (i / 4, right, 0.25, sure - right)]
    assert [x for bar in bars for x in bar] == pytest.approx([x for bar in expected for x in bar])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")
    pyplot.close(figure)
    with pytest.raises(TypeError, match="must be the CalibrationBins of calibration_bins, got RowStats"):
        fl.plot_reliability(stats)
    own_import = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return own_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs matplotlib; pip install fusedloss\[plot\]"):
        fl.plot_reliability(bins)
