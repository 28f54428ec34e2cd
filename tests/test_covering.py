"""What `make test` leaves out of products of parameters has nothing that the rest has not."""

from itertools import combinations, product
from typing import Any

import covering
import pytest

pytest_plugins = "pytester"


def _values(cases: Any, together: int) -> set[tuple[tuple[int, str], ...]]:
    return {values for case in cases for values in combinations(enumerate(case), together)}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 2), (9, 4, 4), (4, 2, 2, 3)], ids=str)
def test_every_few_values_stay_together(sizes, together):
    cases = [tuple(map(str, case)) for case in product(*map(range, sizes))]
    rest = covering.rest(cases, together)
    kept = [case for i, case in enumerate(cases) if i not in rest]
    assert _values(kept, together) == _values(cases, together)
    *_, second, first = sorted(sizes)
    assert len(kept) <= 1.5 * first * (second if together == 2 else 1)


def test_the_rest_is_exhaustive_on_each_implementation(pytester):
    pytester.makeconftest("import covering\n\ndef pytest_collection_modifyitems(items):\n    covering.mark(items)\n")
    pytester.makepyfile("""
        import pytest

        @pytest.mark.covering(1)
        @pytest.mark.parametrize("impl", ["cpu", "reference"])
        @pytest.mark.parametrize("x", range(3))
        @pytest.mark.parametrize("y", "ab")
        def test_product(x, y, impl):
            pass
    """)
    pytester.runpytest("-m", "not exhaustive").assert_outcomes(passed=6, deselected=6)
