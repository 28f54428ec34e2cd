"""Which cases of a product of parameters are enough to have every few of their values together.

With `@pytest.mark.covering(2)` on a test, or on a class of them, `make test` runs enough of its cases to have every
pair of values on every implementation; the others are `exhaustive`. With `covering(1)` two parameters take turns. On a
class, `covering(2, test_any_strides=1)` names tests of which another number is enough.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest


def rest(cases: Sequence[tuple[str, ...]], together: int) -> list[int]:
    """Where `cases`, each a value of every parameter, have no `together` values that the cases left have not."""
    values = [set(combinations(enumerate(case), together)) for case in cases]
    missing = set().union(*values)
    used: Counter[tuple[int, str]] = Counter()
    left = list(range(len(cases)))
    while missing:
        # What brings most that is new, of these what is used least: so few are enough, and all values take turns.
        best = max(left, key=lambda i: (len(values[i] & missing), -sum(used[value] for value in enumerate(cases[i]))))
        missing -= values[best]
        used.update(enumerate(cases[best]))
        left.remove(best)
    return left


def mark(items: Sequence[pytest.Item]) -> None:
    products: dict[tuple[str, int, object], list[Any]] = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("covering")
        if marker is not None and hasattr(item, "callspec") and item.get_closest_marker("exhaustive") is None:
            parameters = item.callspec.params
            impl = parameters.get("impl", parameters.get("compiled_impl"))
            together = marker.kwargs.get(item.originalname, marker.args[0])
            products[item.nodeid.partition("[")[0], together, impl].append(item)
    for (_, together, impl), product in products.items():
        # A name for each parameter, or for some that are given together.
        cases = [tuple(name for name in item.callspec._idlist if name != impl) for item in product]
        if len(cases[0]) > together:
            for i in rest(cases, together):
                product[i].add_marker("exhaustive")
