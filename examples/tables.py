"""What the examples' tables share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard deviation, of which one value has none; the deviation goes without the sign of the mean."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean
