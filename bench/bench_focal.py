"""Focal loss."""

from suite import declared, measure

import fusedloss as fl


def test_focal(benchmark, case):
    measure(benchmark, case, declared(fl.focal_loss))
