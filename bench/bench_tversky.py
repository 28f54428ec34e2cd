"""Tversky loss of the classes' sums over the rows.

Row by row, on logits without a favourite, all classes have almost the same slope, and of the gradient little is left that
float32 could tell: neither the fused form nor the formula is right to the thousandth that a time here asks for.
"""

from suite import declared, measure

import fusedloss as fl


def test_classes(benchmark, variant_case):
    measure(benchmark, variant_case, declared(fl.tversky_loss, level="class"))
