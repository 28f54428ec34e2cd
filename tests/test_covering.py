"""What `make test` leaves out of products of parameters has nothing that the rest has not."""

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import covering
import pytest


def _values(cases: Any, together: int) -> set[tuple[tuple[int, str], ...]]:
    return {values for case in cases for values in combinations(enumerate(case), together)}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 2), (9, 4, 4), (4, 2, 2, 3)], ids=str)
def test_every_few_values_stay_together(sizes: tuple[int, ...], together: int) -> None:
    cases = [tuple(map(str, case)) for case in product(*map(range, sizes))]
    rest = covering.rest(cases, together)
    kept = [case for i, case in enumerate(cases) if i not in rest]
    assert _values(kept, together) == _values(cases, together)
    *_, second, first = sorted(sizes)
    assert len(kept) <= 1.5 * first * (second if together == 2 else 1)


class _Item(SimpleNamespace):
    """A case of a test, as pytest has it."""

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = getattr(pytest.mark, name).mark


def _items(marks: dict[str, pytest.Mark]) -> list[_Item]:
    """Of a product of three parameters, two of them given together, on two implementations."""
    return [
        _Item(nodeid=f"test_x.py::test[{names}]", originalname="test", marks=dict(marks),
              callspec=SimpleNamespace(params={"impl": names[0]}, _idlist=list(names)))
        for names in product(("cpu", "reference"), ("a", "b", "c"), ("x-1", "x-2", "y-1"), ("p", "q", "r"))
    ]  # fmt: skip


def test_the_rest_is_exhaustive_on_each_implementation() -> None:
    items = _items({"covering": pytest.mark.covering(2).mark})
    covering.mark(items)  # type: ignore[arg-type]
    for impl in ("cpu", "reference"):
        mine = [item for item in items if item.callspec.params["impl"] == impl]
        kept = [item for item in mine if "exhaustive" not in item.marks]
        assert 9 <= len(kept) <= 10 < len(mine)
        cases = [[item.callspec._idlist for item in some] for some in (kept, mine)]
        assert _values(cases[0], 2) == _values(cases[1], 2)
