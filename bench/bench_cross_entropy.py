"""Cross-entropy, plain and with label smoothing."""

from suite import declared, measure

import fusedloss as fl


def test_cross_entropy(benchmark, case):
    measure(benchmark, case, declared(fl.cross_entropy), same={})


def test_growth(benchmark, growth_case):
    measure(benchmark, growth_case, declared(fl.cross_entropy), same={})


def test_label_smoothing(benchmark, variant_case):
    smoothed = {"label_smoothing": 0.1}
    measure(benchmark, variant_case, declared(fl.cross_entropy, **smoothed), same=smoothed)
