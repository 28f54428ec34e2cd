"""The divisor of micro-batches, in one process; that of ranks is in test_parallel.py."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss as fl

TARGET = torch.tensor([[3, 0, -100, 1], [2, 2, 0, -100]])
WEIGHT = torch.tensor([0.5, 2.0, 0.25, 8.0])
TOKEN_WEIGHT = torch.tensor([[1.0, 0.5, torch.nan, 2.0], [4.0, 0.0, 1.0, torch.inf]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        ({"ignore_index": 0}, 6),
        ({"ignore_index": 2}, 6),
        ({"weight": WEIGHT}, 8 + 0.5 + 2 + 0.25 + 0.25 + 0.5),
        ({"token_weight": TOKEN_WEIGHT}, 1 + 0.5 + 2 + 4 + 0 + 1),
        ({"weight": WEIGHT, "token_weight": TOKEN_WEIGHT}, 8 + 0.25 + 4 + 1 + 0 + 0.5),
        ({"averaged": True}, 6),
    ],
)
def test_what_counts(options: dict[str, Any], expected: float) -> None:
    got = fl.normalizer(TARGET, **options)
    assert got.shape == () and got.dtype == (torch.float64 if "weight" in str(options) else torch.int64)
    assert got == expected
    parts = dict(options)
    if "token_weight" in parts:
        parts["token_weight"] = list(parts["token_weight"])
    assert torch.equal(fl.normalizer([TARGET[0].to(torch.int32), TARGET[1]], **parts), got)


def test_weights_are_summed_in_float64_and_leave_the_loss_in_float32() -> None:
    target, ones = torch.zeros(5001, dtype=torch.int64), torch.ones(5001, dtype=torch.float16, requires_grad=True)
    for weight in ({"weight": ones[:2].detach()}, {"token_weight": ones}):
        got = fl.normalizer(target, **weight)
        assert got == 5001 and got.dtype == torch.float64 and not got.requires_grad
    z = torch.randn(4, 5, requires_grad=True)
    for loss in (fl.cross_entropy, functools.partial(fl.flex_loss, loss_fn=lambda s: s.ce)):
        value = loss(z, torch.arange(4), normalizer=torch.tensor(2.0, dtype=torch.float64))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, fl.cross_entropy(z, torch.arange(4), reduction="sum") / 2)
    ignored = torch.full((4,), -100)
    n = fl.normalizer([torch.empty(0, dtype=torch.int64), ignored])
    loss = fl.cross_entropy(z, ignored, normalizer=n)
    assert n == loss == 0 and not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("kind", ["count", "weight", "token_weight"])
def test_micro_batches_make_the_mean_of_the_batch(kind: str, generator: torch.Generator) -> None:
    hidden = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    layer = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, (12,), generator=generator)
    target[[1, 2, 3, 9]] = -100
    weight = torch.rand(7, generator=generator, dtype=torch.float64) if kind == "weight" else None
    token_weight = torch.rand(12, generator=generator, dtype=torch.float64) if kind == "token_weight" else None

    def loss(rows: slice, divisor: Tensor | str | None) -> Tensor:
        tokens = None if token_weight is None else token_weight[rows]
        return fl.cross_entropy(
            hidden[rows] @ layer.t(), target[rows], weight=weight, token_weight=tokens, normalizer=divisor
        )

    whole = loss(slice(None), "token_weight" if kind == "token_weight" else None)
    parts = [slice(0, 4), slice(4, 5), slice(5, 12)]
    n = fl.normalizer(
        [target[rows] for rows in parts],
        weight=weight,
        token_weight=None if token_weight is None else [token_weight[rows] for rows in parts],
    )
    shares = [loss(rows, n) for rows in parts]
    torch.testing.assert_close(sum(shares), whole)
    (expected,) = torch.autograd.grad(whole, layer)
    got = [torch.autograd.grad(share, layer)[0] for share in shares]
    torch.testing.assert_close(sum(got), expected)


@pytest.mark.compile
def test_compiles_whole() -> None:
    compiled = torch.compile(fl.normalizer, fullgraph=True)
    assert compiled(TARGET) == 6
    assert compiled([TARGET, TARGET[0]], weight=WEIGHT) == fl.normalizer([TARGET, TARGET[0]], weight=WEIGHT)
    # Where nobody looks, as on a GPU, what has no weight makes no number.
    assert compiled([TARGET, TARGET[0] + 1], weight=WEIGHT).isnan()


X = torch.tensor([0, 1])
OTHER, TWO = X.float(), [X, X]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "target must be a tensor of class indices or a list of such, got int", {"target": 3}),
        (TypeError, "target must be a tensor of class indices or a list of such, got float", {"target": [X, 0.5]}),
        (TypeError, "target must hold indices of .*int64, .*got torch.float32", {"target": OTHER}),
        (ValueError, "target is an empty sequence; .*pass an empty tensor", {"target": []}),
        (ValueError, "one target is on meta, but the first on cpu", {"target": [X, X.to("meta")]}),
        (TypeError, "ignore_index must be an int, got 1.5", {"ignore_index": 1.5}),
        (TypeError, "averaged must be a bool, got 2", {"averaged": 2}),
        (TypeError, "weight must be a floating point tensor, got torch.int64", {"weight": X}),
        (ValueError, r"weight must be \(V,\), one a class, got shape \(1, 2\)", {"weight": torch.ones(1, 2)}),
        (ValueError, "weight is on meta, but target on cpu", {"weight": torch.ones(2, device="meta")}),
        (IndexError, "target 1 is out of range for 1 classes, and not ignore_index", {"weight": torch.ones(1)}),
        (TypeError, "token_weight must be a floating point tensor, got torch.int64", {"token_weight": X}),
        (ValueError, r"shape \(2,\), got \(3,\)", {"target": TWO, "token_weight": [OTHER, torch.ones(3)]}),
        (ValueError, "of 2 tensors, one a target, got 1", {"target": TWO, "token_weight": [OTHER]}),
        (TypeError, "must be a list as target is, .*got Tensor", {"target": TWO, "token_weight": torch.ones(2, 2)}),
        (ValueError, "torch.distributed is not initialised", {"group": "all"}),
    ],
)
def test_what_cannot_be_counted(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fl.normalizer(**{"target": X, **arguments})
