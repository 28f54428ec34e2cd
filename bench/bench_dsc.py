"""The dice family: DSC of every class against the rest, of the target alone and of sums over the rows; dice loss."""

from suite import declared, measure

import fusedloss as fl


def test_one_vs_rest(benchmark, case):
    measure(benchmark, case, declared(fl.dsc_loss))


def test_target(benchmark, case):
    measure(benchmark, case, declared(fl.dsc_loss, form="target"))


def test_classes(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.dsc_loss, level="class"))


def test_set(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.dsc_loss, level="set"))


def test_dice(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.dice_loss))
