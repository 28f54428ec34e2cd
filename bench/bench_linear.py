"""The linear forms: cross-entropy on every shape beside all its peers, the other losses on one, some beside it."""

import pytest
from linear_suite import BESIDE, measure
from suite import declared

import fusedloss as fl
from fusedloss.losses._registry import LOSSES

OTHERS = [loss.row for loss in LOSSES.values() if loss.linear is not None and loss.row is not fl.cross_entropy]


def test_linear_cross_entropy(benchmark, linear_case):
    measure(benchmark, linear_case, declared(fl.cross_entropy))


@pytest.mark.parametrize("loss", OTHERS, ids=lambda loss: f"linear_{loss.__name__}")
def test_linear_losses(benchmark, linear_variant_case, loss):
    measure(benchmark, linear_variant_case, declared(loss))


@pytest.mark.parametrize("example", BESIDE, ids=str)
def test_beside_cross_entropy(benchmark, linear_large_case, example):
    measure(benchmark, linear_large_case, example)
