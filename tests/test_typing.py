"""What a type checker says of a user's file: options, choices, and what a loss returns."""

import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest
from row_losses import shared_options

import fusedloss as fl
from fusedloss.losses import _registry

FILE = Path(__file__).parent / "typed_use.py"


def test_a_users_file() -> None:
    """Each line is refused, by the error that it names, or passes."""
    mypy = pytest.importorskip("mypy.api")
    text, errors, _ = mypy.run([str(FILE), "--strict", "--no-pretty", "--hide-error-context", "--no-error-summary"])
    assert not errors
    found: dict[int, set[str]] = defaultdict(set)
    for line, code in re.findall(rf"^\S*{FILE.name}:(\d+): error: .*\[([a-z-]+)\]$", text, re.M):
        found[int(line)].add(code)
    lines = enumerate(FILE.read_text(encoding="utf8").splitlines(), 1)
    assert found == {i: {line.split("  # error: ")[1]} for i, line in lines if "  # error: " in line}
    assert text.count(": error: ") == len(re.findall(rf"^\S*{FILE.name}:\d+: error: ", text, re.M))


MODULES = {name: x for name, x in vars(fl.nn).items() if hasattr(x, "_function")}


def test_options_are_those_that_are_taken() -> None:
    for loss in _registry.LOSSES.values():
        for function in filter(None, (loss.row, loss.linear)):
            assert shared_options(function) == _registry.options_of(function).keys(), function
    for name, module in MODULES.items():
        layer = {"bias", "device", "dtype"} if name.startswith("Linear") else set()
        assert shared_options(module) == module._defaults.keys() | layer, name


def test_help_shows_annotations_as_they_are_written() -> None:
    public = [*(getattr(fl, name) for name in fl.__all__), *MODULES.values(), *(x.forward for x in MODULES.values())]
    shown = {x.__qualname__: str(inspect.signature(x)) for x in public if callable(x)}
    assert not [name for name, signature in shown.items() if "ForwardRef" in signature]
    assert not [x for x in public if hasattr(x, "__wrapped__") or hasattr(x, "__signature__")]
