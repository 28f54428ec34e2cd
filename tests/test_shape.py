"""tools/shape.py: that each counter counts right, so that a bar that holds says something."""

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

shape = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tools" / "shape.py")))

PYTHON = '''\
"""A docstring
of two lines."""

import os  # a comment behind code


def product(a, *, b=2):
    """Another."""
    # a comment
    text = """a string

    of three lines"""
    return text * (
        a
        + b
    )
'''
CPP = r"""// a comment
#include <x>

/* of
   two lines */ int a = 1;
const char* url = "http://x"; /* behind code */
char quote = '"', escaped = '\'';  // "
int b = 2;
"""


@pytest.mark.parametrize(("suffix", "text", "lines"), [(".py", PYTHON, 9), (".py", "", 0), (".cu", CPP, 5)])
def test_lines_of_code(tmp_path: Path, suffix: str, text: str, lines: int) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(text)
    assert shape.lines_of(path) == lines


def test_sources_and_words(tmp_path: Path) -> None:
    """A link counts once, and what is no source not at all."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernels").symlink_to("../kernels")
    (tmp_path / "kernels" / "a.py").write_text("word, Word, a_word")
    (tmp_path / "package" / "data.json").write_text("word")
    (found,) = shape.sources(tmp_path)
    assert found == tmp_path / "kernels" / "a.py" and shape.sources(tmp_path, ".cu") == []
    assert shape.times_written("word", found) == 3


@pytest.mark.parametrize(
    ("signature", "count"), [("", 0), ("a, /, b, *, c", 3), ("self, a, *b, c=1, **d", 4), ("cls", 0), ("a, self", 2)]
)
def test_parameters(signature: str, count: int) -> None:
    (function,) = ast.parse(f"def f({signature}): pass").body
    assert shape.parameters(function.args) == count


def test_the_longest_parameter_list(tmp_path: Path) -> None:
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "a.py").write_text("def a_loss(a, b, c, d, e): ...\ndef _formula(a, b): ...\n")
    (tmp_path / "nn.py").write_text("class Loss:\n    def __init__(self, a, b, c, d): ...\n")
    assert shape.longest_parameter_list(tmp_path) == (2, "losses/a.py:2 _formula")
    (tmp_path / "row.py").write_text("class Row:\n    def to(self, a):\n        return lambda a, b, *c: 0\n")
    assert shape.longest_parameter_list(tmp_path) == (3, "row.py:3 lambda")


def test_frames(tmp_path: Path) -> None:
    """Of a warm call, those of the folder alone."""
    path = tmp_path / "own.py"
    text = "calls = []\ndef own(): pass\ndef outer():\n    own(), foreign()\n    if len(calls) < 2: calls.append(own())"
    names = {"foreign": lambda: None}
    exec(compile(text, path, "exec"), names)
    assert shape.warm_frames(names["outer"], tmp_path) == 2
    assert shape.warm_frames(names["outer"], tmp_path / "elsewhere") == 0


def test_operators() -> None:
    with torch.library._scoped_library("shape_example", "DEF") as library:
        library.define("first(Tensor x, int[] y, *, float z=1) -> Tensor")
        library.define("second(Tensor x) -> ()")
        assert sorted(len(schema.arguments) for schema in shape.schemas("shape_example")) == [1, 3]


def test_figures_over_their_bars_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Here of the package itself: each bar has a figure, and `--assert` fails as the report says."""
    found = shape.figures()
    assert list(found) == list(shape.BARS) and min(count for count, _ in found.values()) > 0
    for bars, code in ((dict.fromkeys(found, 10**6), 0), ({**shape.BARS, "operators": 0}, 1)):
        monkeypatch.setitem(shape.main.__globals__, "BARS", bars)
        monkeypatch.setitem(shape.main.__globals__, "figures", lambda: found)
        assert shape.main(["--assert"]) == code and shape.main([]) == 0
        assert ("OVER by" in capsys.readouterr().out) == bool(code)
