"""Mixed cross-entropy, with the most likely token and with the two most likely."""

from suite import declared, measure

import fusedloss as fl


def test_mixed_cross_entropy(benchmark, case):
    measure(benchmark, case, declared(fl.mixed_cross_entropy))


def test_top_2(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.mixed_cross_entropy, top_k=2))
