"""The passes in Triton, by their files. They know no loss: that is an epilogue, a function which a pass takes as a
constant. What a pass is made of stands above it in its file, or in a file further down:

    statistics.py   reads the logits once, keeps the rows' statistics, and runs the loss's epilogue on them
    pair_terms.py   losses over the classes of two rows: their sums over each row, and their gradient
    gradient.py     reads the logits once more and writes their gradient, which may take their place
    class_sums.py   the sums over the rows of each class's error and agreement
    class_terms.py  losses over all classes: their sums over each row, from a second look at it
    scale.py        factors of gradients that are there already
    parts.py        the statistics of a part of a row, and how they merge
    logits.py       where logits come from: out of memory, or out of products made on the chip
    common.py       what every loss has, class weights among it
    rows.py         what a program loads of its rows, and stores
    search.py       the largest logits; moments.py entropy and power
    epilogues.py    the losses
    device.py       what the interpreter lacks; launch.py what a program takes at a time

A program looks at ROWS rows, at BLOCK columns of them together. Few long rows are split: programs read a span of SPAN
blocks each, others merge. The sums of spans merge always in the same order, so that a row's sums do not depend on
whether it was split, nor on the rows beside it.

Logits are computed in float32 (float64 if they are that). Ignored rows are not read. A row whose target or candidate is
out of range has NaN for its target's logit, which makes all of it NaN, and nothing outside of the row is touched.
"""

from . import class_sums, class_terms, epilogues, gradient, launch, moments, pair_terms, scale, statistics  # noqa: F401
