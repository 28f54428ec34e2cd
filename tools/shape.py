"""Print the figures that say how simple the package is, each beside its bar; `--assert` fails where one is over it that
held before."""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import fusedloss as fl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fusedloss"
KERNELS = (ROOT / "csrc", ROOT / "triton_kernels")
TESTS = ROOT / "tests"
CPP = (".h", ".cpp", ".cu")

#: Lines that `lines_of` counts: of the package's Python and the tests at commit ab9f9ec, of the kernels at 1fb0253.
BEFORE = {"package": 6160, "tests": 11891, "kernels": 4409}

#: The most that each figure may be. Frames are those of CPython 3.11, where a comprehension has a frame of its own.
BARS = {
    "operators": 8,
    "arguments of all operators": 90,
    "arguments of one operator": 14,
    "parameters of one function": 10,
    "frames of focal_loss": 36,
    "frames of linear_dsc_loss": 72,
    "frames of supcon_loss": 84,
    "ignore_index, times written": 40,
    "files that name Tversky": 8,
    "lines of the package's Python": round(0.85 * BEFORE["package"]),
    "lines of csrc and triton_kernels": BEFORE["kernels"],
    "lines of the tests": round(0.65 * BEFORE["tests"]),
}

#: Those that have not held since there are bars, which `--assert` lets pass, and the kernels' lines, which are held to
#: what they were before the moments of rows.
OPEN = {"lines of the package's Python", "lines of csrc and triton_kernels", "lines of the tests"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--assert", action="store_true", dest="strict", help="exit with 1 where a figure is over its bar"
    )
    options = parser.parse_args(arguments)
    if not Path(fl.__file__).is_relative_to(PACKAGE):
        parser.error(f"the package of this checkout must be the one that is imported, got {fl.__file__}")
    found = figures()
    over = [name for name, bar in BARS.items() if found[name][0] > bar]
    width = max(map(len, BARS))
    for name, bar in BARS.items():
        figure, whose = found[name]
        state = f"OVER by {figure - bar}" if name in over else "holds"
        print(f"{name:<{width}} {figure:>6}   bar {bar:>6}   {state:<14} {whose}".rstrip())
    print(f"{len(BARS) - len(over)} of {len(BARS)} bars hold")
    return 1 if options.strict and set(over) - OPEN else 0


def figures() -> dict[str, tuple[int, str]]:
    """Return each figure of BARS, and whose it is where that helps."""
    operators = {schema.name: len(schema.arguments) for schema in schemas("fusedloss")}
    engine = [path for folder in (PACKAGE, *KERNELS) for path in sources(folder)]
    others = [path for folder in (ROOT / "bench", TESTS) for path in sources(folder)]
    naming = [path for path in engine + others if times_written("tversky", path)]
    values = [
        (len(operators), ""),
        (sum(operators.values()), ""),
        max((count, name) for name, count in operators.items()),
        longest_parameter_list(PACKAGE),
        *((warm_frames(call, PACKAGE), "") for call in calls()),
        (sum(times_written("ignore_index", path) for path in engine), ""),
        (len(naming), ""),
        (sum(map(lines_of, sources(PACKAGE, ".py"))), ""),
        (sum(lines_of(path) for folder in KERNELS for path in sources(folder)), ""),
        (sum(map(lines_of, sources(TESTS))), ""),
    ]
    return dict(zip(BARS, values, strict=True))


# operators and frames


def schemas(namespace: str) -> list[Any]:
    """Return the schemas of a namespace's operators, those that nobody has called yet among them."""
    return [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{namespace}::")]


def calls() -> Iterator[Callable[[], object]]:
    """Yield the three losses' forwards in the order of BARS, as in training: with inputs that require gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    logits, hidden, weight, features = drawn(8, 1000), drawn(8, 32), drawn(1000, 32), drawn(8, 32)
    target, labels = torch.arange(8), torch.arange(8) // 2
    yield lambda: fl.focal_loss(logits, target)
    yield lambda: fl.linear_dsc_loss(hidden, weight, target)
    yield lambda: fl.supcon_loss(features, labels)


def warm_frames(call: Callable[[], object], folder: Path) -> int:
    """Count the Python frames whose code lies in the folder, in the third of three calls."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and Path(frame.f_code.co_filename).is_relative_to(folder)

    call(), call()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


# sources


def sources(folder: Path, *suffixes: str) -> list[Path]:
    """Return the sources below a folder. `rglob` follows no link, so that kernels that a link names count once."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (suffixes or (".py", ".pyi", *CPP)))


def times_written(word: str, path: Path) -> int:
    return path.read_text(encoding="utf-8").lower().count(word)


def longest_parameter_list(package: Path) -> tuple[int, str]:
    """Return the most parameters of a function and its place. What users call is left out: the public functions of
    losses/, which have a loss's options, and the modules of nn.py."""
    longest = (0, "")
    for path in sources(package, ".py"):
        place = path.relative_to(package)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if place.name == "nn.py":
            tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
        elif place.parts[0] == "losses":
            tree.body = [node for node in tree.body if getattr(node, "name", "_").startswith("_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                name = getattr(node, "name", "lambda")
                longest = max(longest, (parameters(node.args), f"{place}:{node.lineno} {name}"))
    return longest


def parameters(arguments: ast.arguments) -> int:
    """Count parameters as a reader does: all names but `self` and `cls`, `*args` and `**kwargs` too."""
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    several = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(names) - (names[:1] in (["self"], ["cls"])) + several


def lines_of(path: Path) -> int:
    """Count the lines of a source that hold code: not blank ones, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    return _lines_of_cpp(text) if path.suffix in CPP else _lines_of_python(text)


_LAYOUT = {tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def _lines_of_python(text: str) -> int:
    tokens = [
        t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in (tokenize.COMMENT, tokenize.NL)
    ]
    found: set[int] = set()
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        begins = before is None or before.type in _LAYOUT
        docstring = token.type == tokenize.STRING and begins and after is not None and after.type == tokenize.NEWLINE
        if token.type not in _LAYOUT and token.type != tokenize.ENDMARKER and not docstring:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found)


#: Strings and characters, which stay, or a comment.
_CPP_TOKENS = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\[^'\n]+|[^'\\\n])')|//[^\n]*|/\*.*?\*/""", re.S)


def _lines_of_cpp(text: str) -> int:
    code = _CPP_TOKENS.sub(lambda found: found[1] or "\n" * found[0].count("\n"), text)
    return sum(bool(line.strip()) for line in code.splitlines())


if __name__ == "__main__":
    sys.exit(main())
