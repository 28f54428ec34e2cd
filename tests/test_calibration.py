"""Calibration errors: hand-made rows, torchmetrics, and what the statistics of every form of a loss give."""

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

import fusedloss as fl


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
