"""The supervised contrastive loss beside its peers, as N and D grow."""

from supcon_suite import measure


def test_supcon_loss(benchmark, supcon_case):
    measure(benchmark, supcon_case)
