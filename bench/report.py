"""Turns pytest-benchmark's JSON of these benchmarks into tables (Markdown) and plots of ratios (PNG)."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"

PEERS = ("eager", "compiled", "F.cross_entropy")
BYTES = {"float32": 4, "bfloat16": 2}
MARKERS = {"fused": "o", "in place": "D", "eager": "x", "compiled": "+", "F.cross_entropy": "1"}

HEAD = (
    "loss", "logits", "dtype", "floor, ms",
    "fused, ms (forward + backward)", "/ floor", "in place, ms", "/ floor",
    "× eager", "× compiled", "× F.cross_entropy", "memory: fused, in place, eager, compiled",
)  # fmt: skip

NOTES = """\
Medians of rounds in which all candidates have their turn, one after the other, in one process; forward and backward.

- *floor*: 1.5 × `copy_()` of the logits, in the same rounds: the least that reading the logits twice and writing the
  gradient once can take.
- *fused* writes the gradient to a new tensor, in memory kept from the step before; *in place* writes it over the logits
  (`inplace_backward=True`).
- *× eager*, *× compiled*: how many times faster *fused* is than the formula in PyTorch and than `torch.compile` of it.
- *× F.cross_entropy*: likewise; in parentheses where the loss is another one and this only a yardstick.
- *memory*: the most that a step holds beyond logits and gradient, as a multiple of the logits.
"""


LINEAR_NOTES = """\
Hidden states (N, D) and the output layer's weight (V, D) to the loss and both gradients; turns as above.

- *floor*: the three matrix products alone, by `torch.mm` into new memory.
- *×*: how many times faster *fused* is: than `F.linear` and the formula in PyTorch (`F.cross_entropy` where there is
  one), than `torch.compile` of these, than `F.linear_cross_entropy` of torch without options and with
  `LinearCrossEntropyOptions()`, and than `impl="torch_compile"` of cut-cross-entropy. A number after @ is that of the
  candidate's turns where it had fewer than *fused*, as too slow for more.
- *MiB*: the most that a step holds beyond hidden states and weight, in a process of its own, the gradients included.
"""

SUPCON_NOTES = """\
Features (N, D) of 100 labels to the loss and its gradient; turns as above.

- *floor*: the products alone that make the N × N similarities and, of them, the two parts of the gradient, by
  `torch.mm` into memory that is there.
- *×*: how many times faster *fused* is: than the formula in PyTorch on the matrix of similarities, than `torch.compile`
  of it, than `SupConLoss` of pytorch-metric-learning. A number after @ is that of the candidate's turns where it had
  fewer than *fused*, as too slow for more.
- *MiB*: the most that a step holds beyond the features, in a process of its own, the gradient included.
"""

SLOPES_NOTES = """\
How time and memory grow: exponents of a power law through the above, by least squares of the logarithms; - where a size
does not vary.
"""


class Kind(NamedTuple):
    """What is measured beside its matrix products and has tables of its own."""

    title: str
    sizes: dict[str, str]  # the run's names, and the tables'
    peers: tuple[str, ...]
    notes: str

    @property
    def markers(self) -> dict[str, str]:
        return dict(zip(("fused", *self.peers), "ox+123", strict=False))

    @property
    def head(self) -> list[str]:
        columns = ["loss", _arrow(self.sizes.values()), "dtype", "floor, ms", "fused, ms", "/ floor"]
        columns += [f"× {peer}" for peer in self.peers]
        return [*columns, "gradients, MiB", *(f"{name}, MiB" for name in ("fused", *self.peers))]

    @property
    def slopes_head(self) -> list[str]:
        first, *others = (f"{size}^" for size in self.sizes.values())
        return ["loss", "dtype", "", f"time ∝ {first}", *others, f"memory ∝ {first}", *others]


LINEAR = Kind(
    "Linear forms",
    {"rows": "N", "features": "D", "classes": "V"},
    ("eager", "compiled", "torch", "torch chunked", "cut-cross-entropy"),
    LINEAR_NOTES,
)
SUPCON = Kind(
    "Supervised contrastive loss",
    {"rows": "N", "features": "D"},
    ("eager", "compiled", "pytorch-metric-learning"),
    SUPCON_NOTES,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument(
        "--output", type=Path, help="where to write, .md and .png added; default: by the CPU's name, in bench/results"
    )
    options = parser.parse_args(arguments)
    try:
        data = json.loads(options.json.read_text(encoding="utf-8"))
        every = [b["extra_info"] for b in data["benchmarks"] if "floor" in b["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"cannot read benchmarks from {options.json}: {error}")
    if not every:
        parser.error(f"{options.json} holds no benchmark of a loss")
    machine = describe(data["machine_info"])
    output = options.output or RESULTS / slug(machine[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = [run for run in every if "features" not in run]
    linear = [run for run in every if "features" in run and "classes" in run]
    supcon = [run for run in every if "features" in run and "classes" not in run]
    text = [f"# Benchmarks: {machine[0]}", "", f"{machine[1]}.", ""]
    written = [Path(f"{output}.md")]
    for part, lines, markers, yardstick, suffix in (
        (runs, markdown, MARKERS, "1.5 × copy", ""),
        (linear, partial(products_markdown, LINEAR), LINEAR.markers, "three matrix products", "-linear"),
        (supcon, partial(products_markdown, SUPCON), SUPCON.markers, "three matrix products", "-supcon"),
    ):
        if part:
            picture = Path(f"{output}{suffix}.png")
            plot(part, machine, picture, markers, yardstick)
            text += lines(part, picture.name)
            written.append(picture)
    written[0].write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {', '.join(map(str, written))}")
    return 0


def describe(machine: dict[str, Any]) -> tuple[str, str]:
    """The machine and the software, without the machine's own name."""
    own = machine["fusedloss"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    return (
        f"{cpu}, {own['threads']} threads",
        f"fusedloss {own['version']} ({own['impl']}), torch {own['torch']}, Python {machine['python_version']}",
    )


def slug(text: str) -> str:
    """A file's name: "AMD EPYC 9R14, 2 threads" -> "amd-epyc-9r14-2-threads"."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def markdown(runs: list[dict[str, Any]], plot_name: str) -> list[str]:
    lines = [f"![Time over the floor]({plot_name})", ""]
    lines += [_line(HEAD), _line(["---", "---", "---", *["---:"] * (len(HEAD) - 4), "---"])]
    lines += [_line(_cells(run)) for run in runs]
    return [*lines, "", NOTES]


def products_markdown(kind: Kind, runs: list[dict[str, Any]], plot_name: str) -> list[str]:
    lines = [f"## {kind.title}", "", f"![Time over the floor]({plot_name})", ""]
    lines += [_line(kind.head), _line(["---"] * 3 + ["---:"] * (len(kind.head) - 3))]
    lines += [_line(_products_cells(kind, run)) for run in runs]
    lines += ["", kind.notes]
    failures = dict.fromkeys((name, error) for run in runs for name, error in run["failed"].items())
    for name, error in failures:
        where = [f"{_shape(r)} {r['dtype']}" for r in runs if r["failed"].get(name) == error]
        # Of a path, the file's name: the rest says nothing but where things lie on that machine.
        message = re.sub(r"(/[^/\s'\"]+)+/", "", error)
        lines.append(
            f"- *{name}* did not run ({', '.join(where) if len(where) < len(runs) else 'anywhere'}): {message}"
        )
    slopes = [_line(cells) for cells in _slopes(kind, runs)]
    if slopes:
        rule = ["---"] * 3 + ["---:"] * 2 * len(kind.sizes)
        lines += ["", _line(kind.slopes_head), _line(rule), *slopes, "", SLOPES_NOTES]
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(run: dict[str, Any]) -> list[str]:
    seconds, floor = run["seconds"], run["floor"]
    parts = f"{_ms(run['forward']['fused'])} + {_ms(run['backward']['fused'])}"
    cells = [f"`{run['loss']}`", _shape(run), run["dtype"], _ms(floor)]
    cells += [f"{_ms(seconds['fused'])} ({parts})", f"{seconds['fused'] / floor:.2f}"]
    in_place = seconds.get("in place")
    cells += ["-", "-"] if in_place is None else [_ms(in_place), f"{in_place / floor:.2f}"]
    for peer in PEERS:
        faster = f"{seconds[peer] / seconds['fused']:.3g}"
        cells.append(f"({faster})" if peer == "F.cross_entropy" and not run["same_as_cross_entropy"] else faster)
    memory = [run["memory"].get(name) for name in ("fused", "in place", "eager", "compiled")]
    cells.append(" ".join("-" if m is None else f"{m:.2f}" for m in memory) if any(memory) else "-")
    return cells


def _products_cells(kind: Kind, run: dict[str, Any]) -> list[str]:
    seconds, turns, floor = run["seconds"], run["turns"], run["floor"]
    cells = [f"`{run['loss']}`", _shape(run), run["dtype"], _ms(floor)]
    cells += [_ms(seconds["fused"]), f"{seconds['fused'] / floor:.2f}"]
    for peer in kind.peers:
        if peer in seconds:
            fewer = f" @{turns[peer]}" if turns[peer] < turns["fused"] else ""
            cells.append(f"{seconds[peer] / seconds['fused']:.3g}{fewer}")
        else:
            cells.append("failed" if peer in run["failed"] else "-")
    gradients = (run["rows"] + run.get("classes", 0)) * run["features"] * BYTES[run["dtype"]]
    memory = [run["memory"].get(name) for name in ("fused", *kind.peers)]
    return cells + ["-" if m is None else f"{m / 2**20:.0f}" for m in (gradients, *memory)]


def _slopes(kind: Kind, runs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The exponents of time and memory by the sizes, for each loss, dtype and candidate."""
    for loss, dtype in dict.fromkeys((run["loss"], run["dtype"]) for run in runs):
        part = [run for run in runs if (run["loss"], run["dtype"]) == (loss, dtype)]
        if len(part) == 1:
            continue
        for name in ("products", "fused", *kind.peers):
            times = [run["floor"] if name == "products" else run["seconds"].get(name) for run in part]
            memory = [run["memory"].get(name) for run in part]
            if any(times):
                label = "floor" if name == "products" else name
                yield [f"`{loss}`", dtype, label, *exponents(kind, part, times), *exponents(kind, part, memory)]


def exponents(kind: Kind, runs: list[dict[str, Any]], values: list[float | None]) -> list[str]:
    """(b, c, ...) of value = a N^b D^c ...; - where the runs that have a value do not determine it."""
    import numpy as np

    found = [(run, value) for run, value in zip(runs, values, strict=True) if value]
    varied = [size for size in kind.sizes if len({run[size] for run, _ in found}) > 1]
    columns = np.array([[1.0, *(math.log(run[size]) for size in varied)] for run, _ in found])
    if not varied or np.linalg.matrix_rank(columns) <= len(varied):
        return ["-"] * len(kind.sizes)
    fit = np.linalg.lstsq(columns, np.log([value for _, value in found]), rcond=None)[0]
    powers = dict(zip(varied, fit[1:].round(2) + 0.0, strict=True))  # 0 is added for the sign of one that is none
    return [f"{powers[size]:.2f}" if size in powers else "-" for size in kind.sizes]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _shape(run: dict[str, Any]) -> str:
    if "features" in run:
        return _arrow(str(run[size]) for size in LINEAR.sizes if size in run)
    return f"{run['rows']} × {run['classes']}"


def _arrow(sizes: Iterable[str]) -> str:
    """N × D → V, or N × D."""
    rows, features, *classes = sizes
    return " → ".join([f"{rows} × {features}", *classes])


def plot(
    runs: list[dict[str, Any]], machine: tuple[str, str], path: Path, markers: dict[str, str], yardstick: str
) -> None:
    """For each loss and shape, the candidates' times as multiples of the floor; a panel a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(run["dtype"] for run in runs))
    labels = list(dict.fromkeys(_label(run) for run in runs))
    figure, axes = plt.subplots(
        1, len(dtypes), sharey=True, squeeze=False, figsize=(4 + 4 * len(dtypes), 1.8 + 0.24 * len(labels)),
        layout="constrained",
    )  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for name, marker in markers.items():
            points = [
                (run["seconds"][name] / run["floor"], labels.index(_label(run)))
                for run in runs
                if run["dtype"] == dtype and name in run["seconds"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=name, linestyle="none", markersize=6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(dtype)
        axis.set_xlabel(f"time of forward + backward / floor ({yardstick})")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].invert_yaxis()
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, title=machine[0], loc="outside upper center", ncols=len(entries))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(run: dict[str, Any]) -> str:
    return f"{run['loss']}  {_shape(run)}"


if __name__ == "__main__":
    sys.exit(main())
