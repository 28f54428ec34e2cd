"""Tables in Markdown and pictures, for all that the benchmarks report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[object], rows: Iterable[Iterable[object]], texts: int = 1) -> list[str]:
    """Return the lines of a table whose first columns hold texts, and the others numbers."""
    return [_line(cells) for cells in (head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows)]


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def aligned(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table that is aligned for a terminal too; a cell is a text, a number, or None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        _line(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)) for line in cells
    ]
    rule = (f"{'-' * (w + 1)}{':' if n else '-'}" for w, n in zip(widths, numeric, strict=True))
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")


def pyplot() -> Any:
    """Return matplotlib's, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
