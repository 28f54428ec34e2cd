"""What the documentation says: examples run, docstrings are whole, signatures show every option."""

import doctest
import importlib
import inspect
import itertools
import re
import runpy
import shlex
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import fusedloss as fl
from fusedloss import __main__ as command
from fusedloss.losses import _registry

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Pages on a library that may not be installed, and its module.
NEEDS = {DOCS / "trl.md": "trl", DOCS / "lightning.md": "lightning", DOCS / "eole.md": "eole.utils.loss"}

FUNCTIONS = [getattr(fl, name) for name in fl.__all__ if inspect.isfunction(getattr(fl, name))]
LINEAR = [loss.linear for loss in _registry.LOSSES.values() if loss.linear is not None]
LOSSES = [loss.row for loss in _registry.LOSSES.values()]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def test_public_names_are_all_there() -> None:
    assert sorted(fl.__all__) == fl.__all__
    assert {name for name in dir(fl) if name[0] != "_"} == {*fl.__all__, "nn"}
    of_rows = {fl.log_probs, fl.linear_log_probs, fl.linear_topk_log_probs, fl.fit_temperature}
    losses = {*LOSSES, *LINEAR, *_registry.OF_TEACHERS}
    assert losses == {f for f in FUNCTIONS if "input" in inspect.signature(f).parameters} - of_rows


def test_examples_in_docstrings_run() -> None:
    """In a namespace of their own: an example must import what it uses, as one that is pasted has to."""
    losses = {*LOSSES, *LINEAR, *_registry.OF_TEACHERS}
    for name in fl.__all__:
        thing = getattr(fl, name)
        module = importlib.import_module(thing.__module__)
        tests = doctest.DocTestFinder(recurse=False).find(thing, name, module, globs={name: thing})
        assert len(tests) == 1 and (tests[0].examples or thing not in losses), name
        out: list[str] = []
        assert not doctest.DocTestRunner().run(tests[0], out=out.append).failed, "".join(out)


@each_loss
def test_signature_has_its_own_arguments_and_names_the_shared_ones(loss: Callable[..., Any]) -> None:
    """And so has that of the linear form, which has a weight more."""
    parameters, told = inspect.signature(loss).parameters, _registry.LOSSES[loss.__name__]
    first = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert first == ["input", "target"] + (["loss_fn"] if loss is fl.flex_loss else [])
    (options,) = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert options.annotation == ("Unpack[ClassLossOptions]" if told.without else "Unpack[RowOptions]")
    assert told.without in ((), ("label_smoothing", "smoothing_over"))
    assert told.source is None or re.search(rf"^ *Source: \S.*{told.source}", loss.__doc__ or "", re.M | re.S)
    if told.linear is None:
        return
    of_linear = inspect.signature(told.linear).parameters
    assert list(of_linear)[:3] == ["input", "linear_weight", "target"]
    assert of_linear.keys() == {*parameters, "linear_weight"} and told.linear.__module__ == loss.__module__
    assert all(of_linear[name].default == parameter.default for name, parameter in parameters.items())
    own = {"linear_weight", "linear_bias", "softcap", "budget", "drop_ignored", "sequence_parallel"}
    names = {*_registry.argument_names(loss)}
    assert {*_registry.argument_names(told.linear)} == names - {"inplace_backward"} | own


@pytest.mark.parametrize("loss", [*LOSSES, *LINEAR, *_registry.OF_TEACHERS], ids=lambda loss: loss.__name__)
def test_docstring_names_the_options_that_it_takes_and_no_other(loss: Callable[..., Any]) -> None:
    documented: dict[str, str] = {}
    pattern = r"^ {4}((?:[a-z_]+,\s+)*[a-z_]+): (\S.*\n(?: {5}.*\n)*)"
    for names, text in re.findall(pattern, loss.__doc__ or "", re.M):
        documented |= dict.fromkeys(re.split(r",\s+", names), " ".join(text.split()))
    taken = {*_registry.argument_names(loss)}
    assert taken - {"input", "target"} <= documented.keys() <= taken | {"inplace_backward"}
    for name, default in _registry.options_of(loss).items() if loss in LOSSES else ():
        assert default is None or documented[name].endswith(f" Default: {default!r}."), name


# README and docs/


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a page in a language, each with the number of its first line."""
    text = page.read_text(encoding="utf8")
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(2)), textwrap.dedent(match[2])) for match in found]


needs_readme = pytest.mark.skipif(not README.exists(), reason="runs in the repository, where README.md is")
each_page = pytest.mark.parametrize(
    "page", [README, *PAGES], ids=lambda page: page.relative_to(README.parent).as_posix()
)


@needs_readme
@each_page
def test_examples_of_a_page_run(page: Path) -> None:
    """One after the other, as a reader would paste them."""
    if page in NEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Eole names kernels for GPUs that are not there
            pytest.importorskip(NEEDS[page], reason=f"{page.name} is about {NEEDS[page]}", exc_type=ImportError)
    namespace: dict[str, Any] = {"__name__": page.stem}
    try:
        for line, block in blocks(page, "python"):
            exec(compile("\n" * line + block, page.name, "exec"), namespace)
    finally:
        if dist.is_initialized():  # where a block between the first and the last failed
            dist.destroy_process_group()


@needs_readme
@each_page
def test_no_block_is_passed_over(page: Path) -> None:
    """Every fence is one that `blocks` finds, in a language that the tests know."""
    kinds = [kind for kind in re.findall(r"(?:```|~~~)(.*)$", page.read_text(encoding="utf8"), re.M) if kind]
    known = {language: len(blocks(page, language)) for language in ("python", "sh", "text")}
    assert {kind for kind in kinds if not kind.startswith("{")} <= known.keys()
    assert {language: kinds.count(language) for language in known} == known


@needs_readme
def test_readme_is_short_and_its_first_screen_has_all_that_a_newcomer_needs() -> None:
    lines = README.read_text(encoding="utf8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    needed = ("pip install -e .", "fusedloss check", "fl.linear_cross_entropy(", "fuse(model", "does not win", ".png)")
    assert not [text for text in needed if text not in first]


@needs_readme
@each_page
def test_sentences_can_be_read_once(page: Path) -> None:
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "", page.read_text(encoding="utf8"), flags=re.S)
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    paragraphs = re.split(r"\n\n|\n(?=[-#|!<])", re.sub(r"^\|.*\n", "", text, flags=re.M))
    for part in (re.sub(r"\]\([^)]*\)", "]", part) for part in [*cells, *paragraphs]):
        for sentence in re.split(r"(?<=[.!?:;])\W*\s", part):
            assert len(sentence.split()) <= 32, sentence


@needs_readme
def test_what_names_the_version_and_what_it_needs_agree() -> None:
    project = (README.parent / "pyproject.toml").read_text(encoding="utf8")
    readme = README.read_text(encoding="utf8")
    version, python = (re.search(rf'^{key} = "(.*)"$', project, re.M)[1] for key in ("version", "requires-python"))
    (torch,) = re.findall(r"^dependencies = \[\"torch>=(.*)\"\]$", project, re.M)
    assert f"version: {version}\n" in (README.parent / "CITATION.cff").read_text(encoding="utf8")
    assert f"python-{python.removeprefix('>=')}%2B" in readme and f"torch-{torch}%2B" in readme


@needs_readme
def test_the_reference_is_whole() -> None:
    pages = [[page.read_text(encoding="utf8")] for page in PAGES if page.parent.name == "reference"]
    for page in pages:
        runpy.run_path(str(DOCS / "conf.py"))["_listed"](None, "", page)
    text = "\n".join(itertools.chain.from_iterable(pages))
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
@each_page
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


def curves(picture: Path) -> dict[str, list[float]]:
    """The points of the curves of a picture, by their names."""
    groups = re.findall(r'<g id="((?:loss|derivative)-[^"]+)">\s*<path d="([^"]+)"', picture.read_text(encoding="utf8"))
    return {name: [float(number) for number in re.findall(r"-?[\d.]+", path)] for name, path in groups}


@needs_readme
def test_pictures_are_those_of_the_losses(tmp_path: Path) -> None:
    """Curve by curve: another release of matplotlib may write the rest otherwise."""
    pytest.importorskip("matplotlib", reason="draws the pictures (fusedloss[demo])")
    drawing = runpy.run_path(str(DOCS / "pictures.py"))
    assert {path.stem for path in (DOCS / "pictures").iterdir()} == {draw.__name__ for draw in drawing["PICTURES"]}
    for draw in drawing["PICTURES"]:
        committed, drawn = curves(DOCS / "pictures" / f"{draw.__name__}.svg"), curves(drawing["save"](draw, tmp_path))
        assert committed.keys() == drawn.keys() and len(drawn) >= 6
        for name, points in drawn.items():
            assert points == pytest.approx(committed[name], abs=0.01), f"{name}: python docs/pictures.py"
