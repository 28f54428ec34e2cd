"""Calibration errors: hand-made rows, torchmetrics, and what the statistics of every form of a loss give."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torchmetrics.functional.classification import multiclass_calibration_error

import fusedloss as fl

NORMS = ("l1", "max")


def stats_of(confidence: list[float], right: list[bool]) -> tuple[fl.RowStats, torch.Tensor]:
    """Rows of these largest probabilities; class 7 is predicted, rightly or not."""
    log_prob = torch.tensor(confidence, dtype=torch.float64).log()
    argmax = torch.full(log_prob.shape, 7)
    nothing = torch.full_like(log_prob, torch.nan)  # of the other columns nothing is read
    return fl.RowStats(nothing, nothing, argmax, log_prob), torch.where(torch.tensor(right), 7, 3)


def test_bins_of_hand_made_rows():
    stats, target = stats_of([0.55, 0.65, 0.9, 0.95, 1.0, 0.7], [True, False, True, True, False, True])
    bins = fl.calibration_bins(stats, target, bins=4)
    assert bins.rows.tolist() == [0, 0, 3, 3] and bins.rows.dtype == torch.int64
    assert bins.confidence[:2].isnan().all() and bins.accuracy[:2].isnan().all()
    torch.testing.assert_close(bins.confidence[2:], torch.tensor([1.9 / 3, 2.85 / 3]).double())
    torch.testing.assert_close(bins.accuracy[2:], torch.tensor([2 / 3, 2 / 3]).double())
    gaps = (2 / 3 - 1.9 / 3, 2.85 / 3 - 2 / 3)
    assert fl.calibration_error(stats, target, bins=4).item() == pytest.approx(sum(gaps) / 2)
    assert fl.calibration_error(stats, target, bins=4, norm="max").item() == pytest.approx(gaps[1])


def test_a_bin_has_its_upper_edge_and_not_its_lower():
    stats, target = stats_of([0.25, 0.5, 0.5000001, 0.75, 1.0], [True] * 5)
    assert fl.calibration_bins(stats, target, bins=4).rows.tolist() == [1, 1, 2, 1]
    assert fl.calibration_bins(stats, target, bins=1).rows.tolist() == [5]


def test_one_bin_is_the_gap_of_the_means():
    stats, target = stats_of([0.5, 0.9, 0.7, 0.3], [True, True, False, True])
    for norm in NORMS:
        assert fl.calibration_error(stats, target, bins=1, norm=norm).item() == pytest.approx(0.75 - 0.6)


def test_calibrated_rows_have_no_error():
    stats, target = stats_of([0.8] * 10 + [0.5] * 4, [True] * 8 + [False] * 2 + [True, False] * 2)
    for norm in NORMS:
        assert fl.calibration_error(stats, target, norm=norm).item() == pytest.approx(0, abs=1e-15)


def by_loop(p: torch.Tensor, target: torch.Tensor, bins: int) -> dict[str, float]:
    """Guo et al. 2017 word by word, for probabilities p (N, V)."""
    gaps, counts = [], []
    for b in range(1, bins + 1):
        rows = [i for i in range(len(p)) if (b - 1) / bins < p[i].max() <= b / bins]
        if rows:
            accuracy = sum(bool(p[i].argmax() == target[i]) for i in rows) / len(rows)
            gaps.append(abs(accuracy - sum(p[i].max() for i in rows) / len(rows)))
            counts.append(len(rows))
    return {"l1": float(sum(g * n for g, n in zip(gaps, counts, strict=True)) / sum(counts)), "max": float(max(gaps))}


def logits_and_targets(rows: int, classes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all confidences, though not of 1; about as often right as not."""
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 3
    z = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.where(
        torch.rand(rows, generator=generator) < 0.5,
        z.argmax(1),
        torch.randint(classes, (rows,), generator=generator),
    )
    return z, target


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("rows", "classes", "bins"), [(1, 2, 15), (300, 2, 10), (500, 7, 15), (200, 40, 4), (9, 5, 100)]
)
def test_against_torchmetrics_and_a_plain_loop(impl, rows, classes, bins, norm, generator):
    z, target = logits_and_targets(rows, classes, generator)
    _, stats = fl.focal_loss(z, target, gamma=3.0, return_stats=True, impl=impl)
    error = fl.calibration_error(stats, target, bins=bins, norm=norm)
    assert error.dim() == 0 and error.dtype == torch.float64
    theirs = multiclass_calibration_error(z.softmax(1), target, classes, n_bins=bins, norm=norm)
    assert error.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs is in float32
    assert error.item() == pytest.approx(by_loop(z.softmax(1), target, bins)[norm], rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
def test_ignored_rows_are_left_out(impl, ignore_index, norm, generator):
    z, target = logits_and_targets(120, 6, generator)
    target[::5] = ignore_index
    kept = target != ignore_index
    _, stats = fl.cross_entropy(z, target, ignore_index=ignore_index, return_stats=True, impl=impl)
    error = fl.calibration_error(stats, target, norm=norm)
    theirs = multiclass_calibration_error(z.softmax(1), target, 6, n_bins=15, norm=norm, ignore_index=ignore_index)
    assert error.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert error.item() == pytest.approx(by_loop(z.softmax(1)[kept], target[kept], 15)[norm], rel=1e-12)
    assert fl.calibration_bins(stats, target).rows.sum() == kept.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_of_no_row_it_is_nan(norm):
    z = torch.randn(3, 5)
    for rows, target in ((0, torch.empty(0, dtype=torch.int64)), (3, torch.full((3,), -100))):
        _, stats = fl.cross_entropy(z[:rows], target, return_stats=True)
        assert fl.calibration_error(stats, target, norm=norm).isnan()
        assert not fl.calibration_bins(stats, target).rows.any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_of_nan_is_not_hidden(impl, norm, generator):
    z, target = logits_and_targets(50, 6, generator)
    z[20, 3] = torch.nan
    _, stats = fl.cross_entropy(z, target, return_stats=True, impl=impl)
    assert fl.calibration_error(stats, target, norm=norm).isnan()
    assert fl.calibration_bins(stats, target).rows.sum() == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_batches(dtype, generator):
    z, target = logits_and_targets(120, 6, generator)
    z = z.to(dtype)
    whole, stats = fl.cross_entropy(z, target, return_stats=True)
    error = fl.calibration_error(stats, target)
    assert error.dtype == whole.dtype == torch.float32
    folded = target.reshape(4, 30).int()
    _, of_folded = fl.cross_entropy(z.reshape(4, 30, 6), folded, return_stats=True)
    assert torch.equal(fl.calibration_error(of_folded, folded), error)
    batches = [fl.cross_entropy(a, b, return_stats=True)[1] for a, b in zip(z.split(50), target.split(50), strict=True)]
    joined = fl.RowStats(*map(torch.cat, zip(*batches, strict=True)))
    assert torch.equal(fl.calibration_error(joined, target), error)


def test_a_linear_form_gives_the_same(generator):
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (60, 12))
    target = torch.randint(12, (60,), generator=generator)
    _, stats = fl.linear_focal_loss(hidden, weight, target, gamma=2.0, return_stats=True)
    _, of_logits = fl.focal_loss(hidden @ weight.t(), target, return_stats=True)
    for norm in NORMS:
        errors = [fl.calibration_error(s, target, norm=norm).item() for s in (stats, of_logits)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_the_host_reads_nothing(norm):
    """A fake tensor has no values to read: to look at one raises."""
    with FakeTensorMode():
        floats, argmax = torch.empty(6), torch.empty(6, dtype=torch.int64)
        error = fl.calibration_error(fl.RowStats(floats, floats, argmax, floats), argmax, norm=norm)
        assert error.shape == ()
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            error.item()


@pytest.mark.compile
def test_it_compiles_without_a_break(generator):
    z, target = logits_and_targets(40, 6, generator)
    _, stats = fl.cross_entropy(z, target, return_stats=True)
    compiled = torch.compile(fl.calibration_error, fullgraph=True, backend="eager")
    assert torch.equal(compiled(stats, target), fl.calibration_error(stats, target))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"stats": torch.zeros(4)},
            TypeError,
            "stats must be the RowStats of a loss with return_stats=True, got Tensor",
        ),
        ({"target": [0, 1, 2, 3]}, TypeError, "target must be a tensor of class indices, got list"),
        ({"target": torch.zeros(4)}, TypeError, "target must hold indices of .*int64, .*got torch.float32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape of stats.argmax, \(4,\), got \(3,\)"),
        (
            {"target": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            "target is on meta, but stats.argmax",
        ),
        ({"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        ({"bins": 2.0}, TypeError, r"bins must be an int, got 2\.0"),
        ({"bins": True}, TypeError, "bins must be an int, got True"),
        ({"norm": "l2"}, ValueError, "norm must be one of 'l1', 'max', got 'l2'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    stats, target = stats_of([0.5, 0.6, 0.7, 0.8], [True] * 4)
    arguments = {"stats": stats, "target": target, **change}
    with pytest.raises(error, match=message):
        fl.calibration_error(**arguments)


def test_columns_that_do_not_fit_are_refused():
    stats, target = stats_of([0.5, 0.6], [True] * 2)
    with pytest.raises(ValueError, match=r"stats.argmax_log_prob, \(1,\), got \(2,\)"):
        fl.calibration_bins(stats._replace(argmax_log_prob=stats.argmax_log_prob[:1]), target)


def test_a_confident_model_that_is_wrong_half_the_time():
    z = torch.tensor([[50.0, 0.0]] * 10)
    target = torch.arange(10) % 2
    _, stats = fl.cross_entropy(z, target, return_stats=True)
    assert math.isclose(fl.calibration_error(stats, target).item(), 0.5)
    assert fl.calibration_bins(stats, target).rows[-1] == 10
