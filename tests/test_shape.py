"""tools/shape.py: that each counter counts right, so that a bar that holds says something."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

shape = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tools" / "shape.py")))

PYTHON = '"""A docstring\nof two lines."""\nimport os  # a comment\n\n\n'
PYTHON += "def a_loss(a, /, b, *c, word=2, **e):\n    return b\n"
CPP = '// a comment\n/* of\n   two lines */ int a = 1;\nconst char* url = "http://x"; /* behind code */\n'


def test_lines_words_and_parameters(tmp_path: Path) -> None:
    """A link counts once; of public losses the options do not count as parameters."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "linked").symlink_to("losses")
    python, cpp = tmp_path / "losses" / "a.py", tmp_path / "a.cu"
    python.write_text(PYTHON)
    cpp.write_text(CPP)
    assert shape.sources(tmp_path) == [cpp, python] and shape.sources(tmp_path, ".cu") == [cpp]
    assert (shape.lines_of(python), shape.lines_of(cpp)) == (3, 2)
    assert shape.times_written("word", python) == 1
    assert shape.longest_parameter_list(tmp_path) == (0, "")
    python.rename(tmp_path / "a.py")
    assert shape.longest_parameter_list(tmp_path) == (5, "a.py:6 a_loss")


def test_figures_over_their_bars_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Here of the package itself: each bar has a figure, and `--assert` fails as the report says."""
    found = shape.figures()
    assert list(found) == list(shape.BARS) and min(count for count, _ in found.values()) > 0
    for bars, code in ((dict.fromkeys(found, 10**6), 0), ({**shape.BARS, "operators": 0}, 1)):
        monkeypatch.setitem(shape.main.__globals__, "BARS", bars)
        monkeypatch.setitem(shape.main.__globals__, "figures", lambda: found)
        assert shape.main(["--assert"]) == code and shape.main([]) == 0
        assert ("OVER by" in capsys.readouterr().out) == bool(code)
