"""A loss of one's own, over the rows and over the classes."""

from dataclasses import replace

from suite import declared, measure

import fusedloss as fl


def brier(s):
    return s.power - 2 * s.p + 1


def test_rows(benchmark, case):
    measure(benchmark, case, declared(fl.flex_loss))


def test_classes(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.flex_loss, over="classes"))


def test_power(benchmark, both_case):
    """The Brier score of the test before, by a statistic of the rows."""
    arguments = {"loss_fn": brier, "statistics": ("power",)}
    over_classes = declared(fl.flex_loss, over="classes")
    measure(benchmark, both_case, replace(over_classes, arguments=arguments, over_classes=False))
