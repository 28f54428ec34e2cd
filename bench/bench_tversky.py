"""Tversky loss of every class against the rest in each row, and of the classes' sums over the rows."""

from suite import declared, measure

import fusedloss as fl


def test_one_vs_rest(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.tversky_loss))


def test_classes(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.tversky_loss, level="class"))
