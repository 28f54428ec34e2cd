"""What the examples' tables share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Student's t: of 1, 2, ... degrees of freedom, the value that 2.5 % lie above.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def faster(what: str, ours: str, other: str, ratio: float) -> str:
    """Which of the two is faster, in words. `ratio`: the other's time over ours."""
    if abs(ratio - 1) < 0.02:
        return f"{what}: {ours} and {other} are equally fast, within 2 %"
    if ratio < 1:
        ours, other, ratio = other, ours, 1 / ratio
    return f"{what}: {ours} is {ratio:.2f} times as fast as {other}"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard deviation, of which one value has none; the deviation goes without the sign of the mean."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def interval(values: Sequence[float], form: str = "+.1f") -> str:
    """The 95 % interval of the mean, which one value has none of; beyond eleven values a little too wide."""
    if len(values) < 2:
        return ""
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean - half:{form}} to {mean + half:{form}}"
