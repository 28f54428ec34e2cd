"""Mixed cross-entropy and its schedule."""

from functools import partial
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, assert_same_bits, logits_and_targets, quarters, with_gradient
from torch.nn.functional import one_hot

import fusedloss as fl


def _at_the_picks(z, t, own):
    """p_j less the share of target or prediction: terms up to 1 cancel at these classes."""
    predicted = oracle.largest(z, own.get("top_k", 1)) if "candidates" not in own else own["candidates"]
    classes = torch.cat([t[:, None], predicted if predicted.dim() == 2 else predicted[:, None]], 1)
    return one_hot(classes, z.shape[-1]).amax(1)


def drawn(name, own, **more):
    return Case(name, fl.mixed_cross_entropy, oracle.mixed_cross_entropy, own, cancelling=_at_the_picks, **more)


def _candidates(*shape):
    return lambda n, v, g: {"alpha": 0.25, "candidates": torch.randint(v, (n, *shape), generator=g)}


def _learns_from_the_prediction(z, t, impl):
    return fl.cross_entropy(z, z.detach().argmax(-1).masked_fill(t < 0, -100), impl=impl)


#: For `test_fuzz.py`; `picks` are `top_k`, or so many candidates.
DRAWN = {"mixed_cross_entropy": {"alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "picks": ["top 1", "top 2", 0, 1, 3]}}

#: In three rows of seven classes: one twice, the target twice and alone, first and last class.
MEETING = torch.tensor([[5, 5, 1], [3, 3, 3], [0, 6, 6]])


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        drawn("top 1", {"alpha": 0.25}),
        drawn("top 2", {"alpha": 0.25, "top_k": 2}, least_classes=2, large=True),
        drawn("alpha of each row", lambda n, v, g: {"alpha": quarters(n, g, 0, 1)}),
        drawn("candidate", _candidates(), large=True),
        drawn("3 candidates", _candidates(3)),
    ]
    CERTAIN: ClassVar = [
        drawn(f"alpha={alpha}-top_k={top_k}", {"alpha": alpha, "top_k": top_k})
        for alpha in (0.0, 0.25, 0.5)
        for top_k in (1, 2)
    ]
    KNOWN: ClassVar = [
        (fl.mixed_cross_entropy, {"alpha": 0.25, **own}, expected)
        for own, expected in (
            ({}, [0.34234958, 2.18651298, 1.38629436]),
            ({"label_smoothing": 0.1}, [0.50484958, 2.22401298, 1.38629436]),
        )
    ]
    TWINS: ClassVar = {
        **{
            f"alpha=0 is cross-entropy, top_k={k}": (
                partial(fl.mixed_cross_entropy, alpha=0.0, top_k=k, label_smoothing=0.1),
                partial(fl.cross_entropy, label_smoothing=0.1),
            )
            for k in (1, 2)
        },
        "alpha=1 learns from the prediction": (partial(fl.mixed_cross_entropy, alpha=1.0), _learns_from_the_prediction),
    }
    LEARNT: ClassVar = [
        (fl.mixed_cross_entropy, oracle.mixed_cross_entropy, ("alpha",), {"label_smoothing": 0.1, **picks})
        for picks in ({"top_k": 1}, {"top_k": 2}, {"candidates": MEETING})
    ]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["", "smoothing"])
def test_candidates_that_meet(options, impl, generator):
    z, _ = logits_and_targets(3, 7, generator)
    target, own = torch.tensor([3, 3, 4]), {"alpha": 0.5, "candidates": MEETING, **options}
    ours = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, impl=impl, **own), z)
    truth = with_gradient(lambda x: oracle.loss(oracle.mixed_cross_entropy, x, target, **own), z)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-15)


def test_candidates_of_any_kind(impl, generator):
    """Integers of either size, any strides; in rows that are ignored anything, as an argmax of -1."""
    z, target = logits_and_targets(6, 19, generator)
    target[2] = -100
    candidates = torch.randint(19, (6, 2), generator=generator)

    def run(c):
        options = {"alpha": 0.5, "candidates": c, "reduction": "none", "impl": impl}
        return with_gradient(lambda x: fl.mixed_cross_entropy(x, target, **options), z)

    plain = run(candidates)
    candidates[2] = -1
    strided = torch.full((6, 5), 10**9)[:, 1:5:2].copy_(candidates)
    for other in (candidates.int(), candidates.t().contiguous().t(), strided):
        assert_same_bits(run(other), plain)
    assert_same_bits(run(candidates[:, 0]), run(candidates[:, :1]))


def test_a_candidate_out_of_range_is_named():
    """That number stands for -100 among targets."""
    value = 1 - 2**63
    with pytest.raises(IndexError, match=f"candidate {value} is out of range"):
        fl.mixed_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), alpha=0.5, candidates=torch.tensor([value]))


def test_a_share_of_nothing_is_nothing(impl):
    """Where alpha leaves target or prediction no share, it may be without probability: 0 * inf is 0 here."""
    z = torch.tensor([[0.0, 1.0, -torch.inf, 0.5]], dtype=torch.float64)
    masked, likely = torch.tensor([2]), torch.tensor([1])
    truth = with_gradient(lambda x: oracle.loss(oracle.cross_entropy, x, likely), z)
    for alpha, target, candidates in ((1.0, masked, likely), (0.0, likely, masked)):
        own = {"alpha": alpha, "candidates": candidates, "impl": impl}
        ours = with_gradient(lambda x, t=target, o=own: fl.mixed_cross_entropy(x, t, **o), z)
        torch.testing.assert_close(ours, truth, rtol=1e-14, atol=0)


def test_schedule():
    assert [fl.alpha_schedule(step, 100) for step in (0, 1, 50, 100, 101, 10**9)] == [0, 0.005, 0.25, 0.5, 0.5, 0.5]
    assert fl.alpha_schedule(30, 40, maximum=1.0) == 0.75
    steps, right = (0, 39, 40, 70, 100, 101), [0, 0, 0.2, 0.35, 0.5, 0.5]
    assert [fl.alpha_schedule(step, 100, warmup=40) for step in steps] == right
    assert fl.alpha_schedule(torch.tensor(steps), 100, warmup=40).tolist() == pytest.approx(right)
    assert fl.alpha_schedule(torch.tensor(-1), 100) == 0  # whose value nobody waits for
    for warmup, message in ((101, "at most total_steps, 100, got 101"), (-1, "at least 0, got -1")):
        with pytest.raises(ValueError, match=message):
            fl.alpha_schedule(0, 100, warmup=warmup)
    assert isinstance(fl.alpha_schedule(0, 100), float)
