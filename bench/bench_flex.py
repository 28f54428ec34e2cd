"""A loss of one's own, over the rows and over the classes."""

from suite import declared, measure

import fusedloss as fl


def test_rows(benchmark, case):
    measure(benchmark, case, declared(fl.flex_loss))


def test_classes(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.flex_loss, over="classes"))
