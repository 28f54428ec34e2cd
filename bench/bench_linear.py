"""The linear forms: cross-entropy on every shape beside all its peers, the other losses on one."""

from linear_suite import measure
from suite import declared

import fusedloss as fl


def test_linear_cross_entropy(benchmark, linear_case):
    measure(benchmark, linear_case, declared(fl.cross_entropy))


def test_linear_focal_loss(benchmark, linear_variant_case):
    measure(benchmark, linear_variant_case, declared(fl.focal_loss))


def test_linear_mixed_cross_entropy(benchmark, linear_variant_case):
    measure(benchmark, linear_variant_case, declared(fl.mixed_cross_entropy))


def test_linear_dsc_loss(benchmark, linear_variant_case):
    measure(benchmark, linear_variant_case, declared(fl.dsc_loss))


def test_linear_flex_loss(benchmark, linear_variant_case):
    measure(benchmark, linear_variant_case, declared(fl.flex_loss))


def test_linear_tversky_loss(benchmark, linear_variant_case):
    measure(benchmark, linear_variant_case, declared(fl.tversky_loss))
