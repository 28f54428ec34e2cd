"""What the documentation says: examples run, docstrings are whole, signatures show every option."""

import ast
import doctest
import importlib.util
import inspect
import pydoc
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fusedloss as fl
from fusedloss import __main__ as command
from fusedloss.definition.statistics import OPTIONAL
from fusedloss.engine import dispatch as row

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

#: Of no formula.
SETTINGS = {"set_threads_after_fork"}

FUNCTIONS = [getattr(fl, name) for name in fl.__all__ if inspect.isfunction(getattr(fl, name)) and name not in SETTINGS]
LINEAR = [function for function in FUNCTIONS if function.__name__.startswith("linear_")]
LOSSES = [f for f in FUNCTIONS if hasattr(f, "__signature__") and f not in LINEAR]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)

NO_ROW_LOSSES = {"alpha_schedule", "calibration_bins", "calibration_error", "normalizer", "supcon_loss"}

#: The formula of each, as its docstring has it; and where it comes from, but for what has no paper.
FORMULAS = {
    "cross_entropy": "-log p_t",
    "focal_loss": "-(1 - p_t)^gamma log p_t",
    "mixed_cross_entropy": "-[(1 - alpha) log p_y + alpha log p_yhat]",
    "dsc_loss": "1 - (2 u y + smooth) / (u^k + y + smooth)",
    "dice_loss": "1 - (2 p y + smooth) / (p^k + y + smooth)",
    "tversky_loss": "1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth)",
    "flex_loss": "loss_fn(s)",
    "alpha_schedule": "maximum * step / total_steps",
    "normalizer": "n = sum_i [target_i != ignore_index] * weight_{target_i} * token_weight_i",
    "calibration_bins": "(b - 1) / B < conf <= b / B",
    "calibration_error": "ECE = sum_b (n_b / n) |acc_b - conf_b|",
    "supcon_loss": "L_i = log sum_{k != i} exp s_ik - 1/|P(i)| sum_{j in P(i)} s_ij",
}
SOURCES = {
    "calibration_bins": "arXiv:1706.04599",
    "calibration_error": "arXiv:1706.04599",
    "focal_loss": "arXiv:1708.02002",
    "mixed_cross_entropy": "arXiv:2106.15880",
    "dsc_loss": "arXiv:1911.02855",
    "dice_loss": "arXiv:1911.02855",
    "supcon_loss": "arXiv:2004.11362",
    "tversky_loss": "arXiv:1706.05721",
}


def test_public_names_are_all_there() -> None:
    assert sorted(fl.__all__) == fl.__all__
    assert {loss.__name__ for loss in LOSSES} == set(FORMULAS) - NO_ROW_LOSSES
    assert {function.__name__.removeprefix("linear_") for function in FUNCTIONS} == set(FORMULAS)


@pytest.mark.parametrize("name", fl.__all__)
def test_examples_in_docstrings_run(name: str) -> None:
    """In a namespace of their own: an example must import what it uses, as one that is pasted has to."""
    thing = getattr(fl, name)
    module = importlib.import_module(thing.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, module, globs={name: thing})
    assert len(tests) == 1
    if name.removeprefix("linear_") in FORMULAS:
        assert tests[0].examples
    out: list[str] = []
    result = doctest.DocTestRunner().run(tests[0], out=out.append)
    assert not result.failed, "".join(out)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstring_has_formula_and_source(function: Callable[..., Any]) -> None:
    doc, name = function.__doc__ or "", function.__name__.removeprefix("linear_")
    assert FORMULAS[name] in " ".join(doc.split())
    assert SOURCES.get(name, "") in doc
    if name in SOURCES:
        assert re.search(r"^ *Source: \S.*\d{4}", doc, re.M)
    assert len(doc.splitlines()[0]) < 130 and doc.splitlines()[0].count(".")


@each_loss
def test_docstring_has_shapes_and_errors(loss: Callable[..., Any]) -> None:
    doc = loss.__doc__ or ""
    shapes, errors = doc.index("Shapes:"), doc.index("Raises:")
    assert "input (*, V)" in doc[shapes:errors] and "target (*)" in doc[shapes:errors]
    for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32"):
        assert name in doc[shapes:errors]
    for error in ("TypeError", "ValueError", "IndexError", "RuntimeError"):
        assert error in doc[errors:]


@each_loss
def test_signature_shows_the_shared_options(loss: Callable[..., Any]) -> None:
    """`**options` in the source, spelled out for help() and for editors, with the defaults that hold."""
    parameters = inspect.signature(loss).parameters
    assert list(parameters)[:2] == ["input", "target"]
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    without = {"label_smoothing", "smoothing_over"} if loss in (fl.dsc_loss, fl.dice_loss, fl.tversky_loss) else set()
    for name in row.RowOptions.__annotations__:
        if name in without:
            assert name not in parameters
            continue
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == row._DEFAULTS[name]  # type: ignore[literal-required]
    assert "weight: 'Tensor | None' = None" in str(inspect.signature(loss))
    assert "ignore_index" in pydoc.render_doc(loss)
    first = [p for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert [p.name for p in first] == ["input", "target"] + (["loss_fn"] if loss is fl.flex_loss else [])


@each_loss
def test_docstring_names_the_options_that_it_takes_and_no_other(loss: Callable[..., Any]) -> None:
    documented: set[str] = set()
    for names in re.findall(r"^ {4}([a-z_, ]+): \S", loss.__doc__ or "", re.M):
        documented |= set(names.split(", "))
    parameters = set(inspect.signature(loss).parameters) - {"input", "target"}
    assert documented == parameters


@each_loss
def test_signature_can_be_called_as_it_stands(loss: Callable[..., Any]) -> None:
    """Every default spelled out is one that the loss takes."""
    parameters = inspect.signature(loss).parameters
    given: dict[str, Any] = {"alpha": 0.25} if loss is fl.mixed_cross_entropy else {}
    given |= {"loss_fn": lambda s: s.ce} if loss is fl.flex_loss else {}
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    z, target = torch.randn(3, 5), torch.tensor([0, 1, -100])
    plain = loss(z, target, **given)
    assert torch.equal(loss(z, target, **given, **{k: v for k, v in defaults.items() if k not in given}), plain)


@pytest.mark.parametrize("linear", LINEAR, ids=lambda linear: linear.__name__)
def test_linear_form_documents_all_that_it_takes(linear: Callable[..., Any]) -> None:
    loss = getattr(fl, linear.__name__.removeprefix("linear_"))
    parameters, of_row = inspect.signature(linear).parameters, inspect.signature(loss).parameters
    assert list(parameters)[:3] == ["input", "linear_weight", "target"]
    own = {"linear_weight", "linear_bias", "softcap", "budget", "drop_ignored", "sequence_parallel"}
    assert set(parameters) == set(of_row) - {"inplace_backward"} | own
    for name in set(parameters) & set(of_row):
        assert parameters[name].default == of_row[name].default
    doc = linear.__doc__ or ""
    for name in parameters:
        assert re.search(rf"^ *([a-z_, ]*, )?{name}(, [a-z_, ]*)?: \S", doc, re.M), name
    assert "Returns" in doc and "ValueError" in doc and linear.__module__ == loss.__module__


def test_statistics_documents_what_it_holds() -> None:
    doc = fl.Statistics.__doc__ or ""
    names = list(fl.Statistics.__annotations__)
    for name in names:
        group = f"{name.split('_')[0]}_*"
        assert f"``{name}``" in doc or f"``{group}``" in doc, name
    for fields in OPTIONAL.values():
        assert set(fields) <= set(names)
    assert all(f"``{field}``" in doc for field in ("ce", "q", "lse", "target_logit", "target"))


# README and docs/


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a page in a language, each with the number of its first line."""
    text = page.read_text(encoding="utf8")
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(2)), textwrap.dedent(match[2])) for match in found]


def run_blocks(page: Path) -> dict[str, Any]:
    """One after the other, as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, page.name, "exec"), namespace)
    return namespace


needs_readme = pytest.mark.skipif(not README.exists(), reason="runs in the repository, where README.md is")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())


@needs_readme
def test_readme_examples_run() -> None:
    namespace = run_blocks(README)
    assert namespace["loss"].isfinite() and namespace["logits"].grad is not None
    assert 0 <= namespace["accuracy"] <= 1


@each_page
def test_examples_of_a_page_run(page: Path) -> None:
    try:
        run_blocks(page)
    finally:
        if dist.is_initialized():  # where a block between the first and the last failed
            dist.destroy_process_group()


@needs_readme
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.relative_to(README.parent).as_posix())
def test_no_block_is_passed_over(page: Path) -> None:
    """Every fence is one that `blocks` finds, in a language that the tests know."""
    kinds = [kind for kind in re.findall(r"(?:```|~~~)(.*)$", page.read_text(encoding="utf8"), re.M) if kind]
    known = {language: len(blocks(page, language)) for language in ("python", "sh", "text")}
    assert {kind for kind in kinds if not kind.startswith("{")} <= known.keys()
    assert {language: kinds.count(language) for language in known} == known


@needs_readme
def test_pages_are_there() -> None:
    assert {page.stem for page in PAGES} >= {"quickstart", "choosing", "flex", "linear", "migration", "troubleshooting"}
    assert len([page for page in PAGES if blocks(page, "python")]) >= 14
    assert "](docs/index.md)" in README.read_text(encoding="utf8")


@needs_readme
def test_the_reference_is_whole() -> None:
    text = "".join(page.read_text(encoding="utf8") for page in PAGES if page.parent.name == "reference")
    listed = set(re.findall(r"^\.\. auto(?:function|class):: (\w+)", text, re.M))
    modules = {
        name
        for name, x in vars(fl.nn).items()
        if inspect.isclass(x) and x.__module__ == "fusedloss.nn" and name[0] != "_"
    }
    assert "FocalLoss" in modules and listed >= {*fl.__all__, *modules}
    losses = {loss.__name__.removesuffix("_loss") for loss in LOSSES} - {"flex"} | {"supcon"}
    assert {page.stem for page in PAGES if page.parent.name == "losses"} == losses - {"dice"}  # which is on DSC's


@needs_readme
def test_readme_names_every_loss() -> None:
    text = README.read_text(encoding="utf8")
    for loss in (*LOSSES, *LINEAR):
        assert f"`fl.{loss.__name__}`" in text
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", text, re.M))


@needs_readme
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.relative_to(README.parent).as_posix())
def test_page_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf8")
    for name in set(re.findall(r"\bfl\.(\w+)", text)):
        assert name in fl.__all__ or name == "nn", name
    for name in set(re.findall(r"\bfl\.nn\.(\w+)", text)):
        assert hasattr(fl.nn, name), name
    folders = "|".join(path.name for path in README.parent.iterdir() if path.is_dir() and path.name[0].isalpha())
    for path in re.findall(rf"^((?:{folders})/\S*) ", text, re.M) + re.findall(rf"`((?:{folders})/[^\s`<]*)`", text):
        assert (README.parent / path).exists() or path == "build/docs", path
    targets = (README.parent / "Makefile").read_text(encoding="utf8")
    shell = "".join(block for _, block in blocks(page, "sh"))
    lines = [line.strip() for line in shell.splitlines()] + re.findall(r"`((?:make|python|pip) [^`]+)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", targets, re.M), line
        elif words[:3] == ["python", "-m", "fusedloss"]:
            command._parser().parse_args(words[3:])
        elif words[:1] == ["python"]:
            assert (README.parent / words[1]).exists(), line
        for extra in re.findall(r"(?:fusedloss|\.)\[(\w+)\]", " ".join(words)):
            assert re.search(rf"^{extra} = ", (README.parent / "pyproject.toml").read_text(encoding="utf8"), re.M), line


@needs_readme
def test_the_calculator_prints_what_its_page_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FUSEDLOSS_LINEAR_BUDGET", raising=False)
    ((_, line),) = blocks(DOCS / "linear.md", "sh")
    assert command.main(shlex.split(line)[3:]) == 0
    ((_, shown),) = blocks(DOCS / "linear.md", "text")
    assert capsys.readouterr().out == shown


@needs_readme
def test_examples_are_short_and_parse() -> None:
    _, usage = blocks(README, "python")[0]
    assert ast.parse(usage).body
    assert len([line for line in usage.splitlines() if line.strip()]) <= 12


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    pytest.importorskip("matplotlib", reason="draws the pictures (fusedloss[demo])")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(picture: Path) -> dict[str, list[float]]:
    """The points of the curves of a picture, by their names."""
    groups = re.findall(r'<g id="((?:loss|derivative)-[^"]+)">\s*<path d="([^"]+)"', picture.read_text(encoding="utf8"))
    return {name: [float(number) for number in re.findall(r"-?[\d.]+", path)] for name, path in groups}


@needs_readme
def test_pictures_are_those_of_the_losses(pictures: ModuleType, tmp_path: Path) -> None:
    """Curve by curve: another release of matplotlib may write the rest otherwise."""
    assert {path.stem for path in (DOCS / "pictures").iterdir()} == {draw.__name__ for draw in pictures.PICTURES}
    for draw in pictures.PICTURES:
        committed, drawn = curves(DOCS / "pictures" / f"{draw.__name__}.svg"), curves(pictures.save(draw, tmp_path))
        assert committed.keys() == drawn.keys() and len(drawn) >= 6
        for name, points in drawn.items():
            assert points == pytest.approx(committed[name], abs=0.01), f"{name}: python docs/pictures.py"
