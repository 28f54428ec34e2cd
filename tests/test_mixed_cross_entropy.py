"""Mixed cross-entropy and its schedule."""

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


def _case(name, own, **more):
    return Case(name, fl.mixed_cross_entropy, oracle.mixed_cross_entropy, own, cancelling=_at_the_picks, **more)


def _candidates(*shape):
    def arguments(n, v, generator):
        return {"alpha": 0.25, "candidates": torch.randint(v, (n, *shape), generator=generator)}

    return arguments


#: For `test_fuzz.py`; `picks` are `top_k`, or so many candidates.
DRAWN = {"mixed_cross_entropy": {"alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "picks": ["top 1", "top 2", 0, 1, 3]}}
drawn = _case


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        _case("top 1", {"alpha": 0.25}),
        _case("top 2", {"alpha": 0.25, "top_k": 2}, least_classes=2, large=True),
        _case("alpha of each row", lambda n, v, g: {"alpha": quarters(n, g, 0, 1)}),
        _case("candidate", _candidates(), large=True),
        _case("3 candidates", _candidates(3)),
    ]
    CERTAIN: ClassVar = [
        _case(f"alpha={alpha}-top_k={top_k}", {"alpha": alpha, "top_k": top_k})
        for alpha in (0.0, 0.25, 0.5)
        for top_k in (1, 2)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.34234958, 2.18651298, 1.38629436]),
        ({"label_smoothing": 0.1}, [0.50484958, 2.22401298, 1.38629436]),
    ],
    ids=["", "smoothing"],
)
def test_known_values(options, expected, impl, example):
    loss = fl.mixed_cross_entropy(*example, alpha=0.25, reduction="none", impl=impl, **options)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


# columns of equal largest logits, the target, and which classes are the first and second prediction
TIES = [
    ([1, 3], 0, (1, 3)),
    ([1, 3], 3, (1, 3)),
    ([0, 1], 2, (0, 1)),
    ([15, 16, 17], 2, (15, 16)),  # over the end of a vector of 16
    ([2047, 2048], 5, (2047, 2048)),  # of a block
    ([8191, 8192], 5, (8191, 8192)),  # of a chunk
    ([100, 9000], 9000, (100, 9000)),
    ([4000, 8100, 8999], 0, (4000, 8100)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("columns", "target", "picks"), TIES, ids=str)
def test_ties_go_to_the_lowest_index(columns, target, picks, top_k, dtype, impl, generator):
    z = torch.randn(1, 9001, generator=generator, dtype=torch.float64).to(dtype)
    z[0, columns] = 8.0
    target, picks = torch.tensor([target]), torch.tensor([picks[:top_k]])
    own = {"alpha": 0.5, "reduction": "none"}
    ours = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, top_k=top_k, impl=impl, **own), z)
    given = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, candidates=picks, impl=impl, **own), z)
    assert_same_bits(ours, given)
    truth = with_gradient(
        lambda x: oracle.loss(oracle.mixed_cross_entropy, x, target, candidates=picks, **own), z.double()
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=tolerance, atol=tolerance * 1e-2)
    assert fl.cross_entropy(z, target, return_stats=True, impl=impl)[1].argmax == picks[0, 0]


def test_all_logits_equal(impl):
    z = torch.zeros(2, 5000)
    for top_k, predicted in ((1, [0]), (2, [0, 1])):
        _, gradient = with_gradient(
            lambda x, k=top_k: fl.mixed_cross_entropy(
                x, torch.tensor([7, 0]), alpha=0.5, top_k=k, reduction="sum", impl=impl
            ),
            z,
        )
        expected = torch.full((2, 5000), 1 / 5000)
        expected[[0, 1], [7, 0]] -= 0.5
        expected[:, predicted] -= 0.5 / top_k
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("candidates", "why"),
    [
        ([[5, 5, 9]], "one twice"),
        ([[3, 8, 3]], "the target, twice"),
        ([[3, 3, 3]], "the target alone"),
        ([[0, 18, 18]], "first and last class"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["", "smoothing"])
def test_candidates_that_meet(candidates, why, options, impl, generator):
    z, _ = logits_and_targets(1, 19, generator)
    target, candidates = torch.tensor([3]), torch.tensor(candidates)
    own = {"alpha": 0.5, "candidates": candidates, **options}
    ours = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, impl=impl, **own), z)
    truth = with_gradient(lambda x: oracle.loss(oracle.mixed_cross_entropy, x, target, **own), z)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-15)


def test_candidates_of_any_kind(impl, generator):
    """Integers of either size, any strides; in rows that are ignored too."""
    z, target = logits_and_targets(6, 19, generator)
    target[2] = -100
    candidates = torch.randint(19, (6, 2), generator=generator)

    def run(c):
        options = {"alpha": 0.5, "candidates": c, "reduction": "none", "impl": impl}
        return with_gradient(lambda x: fl.mixed_cross_entropy(x, target, **options), z)

    plain = run(candidates)
    strided = torch.full((6, 5), 10**9)[:, 1:5:2].copy_(candidates)
    for other in (candidates.int(), candidates.t().contiguous().t(), strided):
        assert_same_bits(run(other), plain)
    assert_same_bits(run(candidates[:, 0]), run(candidates[:, :1]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_alpha_0_is_cross_entropy(top_k, impl, generator):
    z, target = logits_and_targets(6, 40, generator)
    options = {"label_smoothing": 0.1, "reduction": "sum", "impl": impl}
    mixed = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, alpha=0.0, top_k=top_k, **options), z)
    torch.testing.assert_close(
        mixed, with_gradient(lambda x: fl.cross_entropy(x, target, **options), z), rtol=1e-13, atol=1e-16
    )


def test_alpha_1_learns_from_the_prediction_alone(impl, generator):
    z, target = logits_and_targets(6, 40, generator)
    options = {"reduction": "sum", "impl": impl}
    mixed = with_gradient(lambda x: fl.mixed_cross_entropy(x, target, alpha=1.0, **options), z)
    # The target's gradient is 1 - q here, to the last bit of 1.
    torch.testing.assert_close(
        mixed, with_gradient(lambda x: fl.cross_entropy(x, z.argmax(-1), **options), z), rtol=1e-13, atol=1e-15
    )


def test_a_share_of_nothing_is_nothing(impl):
    """Where alpha leaves target or prediction no share, it may be without probability: 0 * inf is 0 here."""
    z = torch.tensor([[0.0, 1.0, -torch.inf, 0.5]], dtype=torch.float64)
    masked, likely = torch.tensor([2]), torch.tensor([1])
    for alpha, target, candidates in ((1.0, masked, likely), (0.0, likely, masked)):
        loss, gradient = with_gradient(
            lambda x, a=alpha, t=target, c=candidates: fl.mixed_cross_entropy(x, t, alpha=a, candidates=c, impl=impl), z
        )
        truth = with_gradient(lambda x: oracle.loss(oracle.cross_entropy, x, likely), z)
        torch.testing.assert_close(loss, truth[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, truth[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(), (6,)], ids=["0-d", "of each row"])
@pytest.mark.parametrize(
    "picks", [{"top_k": 1}, {"top_k": 2}, {"candidates": torch.arange(12).reshape(6, 2) % 7}], ids=str
)
def test_alpha_is_differentiable(shape, picks, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    z.requires_grad_()
    target[4] = -100
    alpha = (0.2 + 0.6 * torch.rand(shape, generator=generator).double()).requires_grad_()
    options = {"reduction": "none", "label_smoothing": 0.1, **picks}

    def ours(x, a):
        return fl.mixed_cross_entropy(x, target, alpha=a, impl=impl, **options)

    upstream = torch.randn(6, generator=generator).double()
    truth = torch.autograd.grad(
        oracle.loss(oracle.mixed_cross_entropy, z, target, alpha=alpha, **options), (z, alpha), upstream
    )
    torch.testing.assert_close(torch.autograd.grad(ours(z, alpha), (z, alpha), upstream), truth, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(ours, (z, alpha))
    assert torch.autograd.gradgradcheck(ours, (z, alpha))


def test_schedule():
    assert [fl.alpha_schedule(step, 100) for step in (0, 1, 50, 100, 101, 10**9)] == [0, 0.005, 0.25, 0.5, 0.5, 0.5]
    assert fl.alpha_schedule(30, 40, maximum=1.0) == 0.75
    assert isinstance(fl.alpha_schedule(0, 100), float)


@pytest.mark.parametrize("arguments", [(-1, 100), (1, 0), (1, 100, 1.5)], ids=str)
def test_schedule_refuses(arguments):
    with pytest.raises(ValueError, match=r"got -?[\d.]+"):
        fl.alpha_schedule(*arguments)
