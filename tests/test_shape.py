"""tools/shape.py: each bar has a figure, and one over its bar is told."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

shape = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tools" / "shape.py")))


def test_figures_over_their_bars_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Here of the package itself; `--assert` fails as the report says."""
    found = shape.figures()
    assert list(found) == list(shape.BARS) and min(count for count, _ in found.values()) > 0
    for bars, code in ((dict.fromkeys(found, 10**6), 0), ({**shape.BARS, "operators": 0}, 1)):
        monkeypatch.setitem(shape.main.__globals__, "BARS", bars)
        monkeypatch.setitem(shape.main.__globals__, "figures", lambda: found)
        assert shape.main(["--assert"]) == code and shape.main([]) == 0
        assert ("OVER by" in capsys.readouterr().out) == bool(code)
