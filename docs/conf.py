"""The documentation as a site: `make docs`. Nothing is fetched while it is built or read."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from fusedloss import nn
from fusedloss.losses._registry import LOSSES

project = "fusedloss"
author = "fusedloss contributors"
version = release = version_of("fusedloss")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
autosummary_generate = False  # the tables alone: a function is told on its page
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"fusedloss {version}"
html_show_copyright = False
default_role = "code"
smartquotes = False  # strings are to be copied
nitpicky = True
# What others document: no index of theirs is here to look names up in.
nitpick_ignore_regex = [("py:.*", r"(eole|torch|transformers|trl)\..*")]

autodoc_mock_imports = ["eole"]  # not among what the documentation is built with
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what each argument may be
python_maximum_signature_line_length = 100
napoleon_use_param = False
napoleon_use_rtype = False

napoleon_custom_sections = ["Shapes", ("Options of every row loss", "params_style")]

#: Where the docstring of a linear form or a module begins to repeat that of its function.
_REPEATED = re.compile(r"^(?:The row form|The function), (:func:`.+`):$", re.M)
#: The arguments that it has in common with it.
_AS_BELOW = re.compile(r"^ {4}\w+(?:,\s+\w+)*:\s+as\s+below\b", re.M)


_MODULES = [name for name, x in vars(nn).items() if name[0] != "_" and getattr(x, "__module__", "") == nn.__name__]

#: What pages of the reference list by these names, but for what they have by its own.
_LISTS = {
    "row forms": [f".. autofunction:: {name}" for name in LOSSES],
    "linear forms": [f".. autofunction:: {loss.linear.__name__}" for loss in LOSSES.values() if loss.linear],
    "modules": [f".. autoclass:: {name}" for name in _MODULES if not name.startswith("Linear")],
    "linear modules": [f".. autoclass:: {name}" for name in _MODULES if name.startswith("Linear")],
}


def _first_screen() -> str:
    """README up to its second section, as a page of docs/; a link to a file that is no page is its text."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    text = re.sub(r"^!\[[^]]*\]\(https:.*\n", "", text, flags=re.M)  # the badges: nothing is fetched
    text = re.sub(r"(!\[[^]]*\]\()", r"\1../", text)
    text = re.sub(r"(?<!!)\[([^]]+)\]\((?!docs/|https?:)[^)]+\)", r"\1", text)
    return text.replace("](../docs/", "](").replace("](docs/", "](")


def _listed(app: Any, page: str, source: list[str]) -> None:
    source[0] = source[0].replace("%first screen%", _first_screen())
    for name, lines in _LISTS.items():
        own = set(source[0].splitlines())
        source[0] = source[0].replace(f"%{name}%", "\n".join(line for line in lines if line not in own))
    first = source[0].partition("\n## Memory")[0]  # which is of another module
    names = re.findall(r"^\.\. auto(?:function|class):: (\w+)", first, re.M)
    source[0] = source[0].replace("%table%", "\n   ".join([".. autosummary::", ":nosignatures:", "", *names]))


def _as_rst(app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Docstrings are written for help(): they repeat, and formulas and lists are indented rather than marked up."""
    text = "\n".join(lines)
    if repeated := _REPEATED.search(text):
        text = _AS_BELOW.sub(f"    others: as of {repeated[1]}", text[: repeated.start()])
    if name.startswith("fusedloss.nn."):  # names that are relative to where the docstring came from
        text = re.sub(r":func:`(\w+)`", r":func:`~fusedloss.\1`", text)
        text = text.replace(":meth:`tied`", ":meth:`~fusedloss.nn.LinearCrossEntropyLoss.tied`")
    lines[:] = _marked_up(text.split("\n"))


def _marked_up(lines: list[str]) -> list[str]:
    """Paragraphs that stand further in than the one before are literal, columns a list, and `*` and `|` themselves."""
    result: list[str] = []
    literal, column = 0, False
    for line, before in zip(lines, ["", *lines], strict=False):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent < literal:
            literal = 0
        if line.strip() and not before.strip() and not literal:
            outer = next((len(x) - len(x.lstrip()) for x in reversed(result) if x.strip()), 0)
            if indent > outer:
                literal = indent
                result += [" " * outer + "::", ""]
        if not literal and not line.lstrip().startswith(">>>"):
            line = re.sub(r"(``.*?``)|([*|])", lambda m: m[1] or f"\\{m[2]}", line)
            column = re.match(r"``\S+`` {2,}", line) is not None or (column and indent > 8)
            if column:
                line = re.sub(r"^(``\S+``) {2,}", r"- \1 ", line) if indent == 0 else f"  {line.strip()}"
        result.append(line)
    return result


def _formula(display: str) -> Any:
    """A formula as MathML, made while the site is built: browsers set it without a script or a font of ours."""

    from docutils.nodes import SkipNode  # a test reads this file where neither is installed
    from latex2mathml.converter import convert

    def visit(translator: Any, node: Any) -> None:
        translator.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return visit, None


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", _formula("inline"), _formula("block"))
    app.connect("source-read", _listed)
    app.connect("autodoc-process-docstring", _as_rst, priority=100)  # before napoleon
