"""Turns pytest-benchmark's JSON of these benchmarks into a table (Markdown) and a plot of ratios (PNG)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

PEERS = ("eager", "compiled", "F.cross_entropy")
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
- *fused* writes the gradient to new memory, *in place* over the logits (`inplace_backward=True`).
- *× eager*, *× compiled*: how many times faster *fused* is than the formula in PyTorch and than `torch.compile` of it.
- *× F.cross_entropy*: likewise; in parentheses where the loss is another one and this only a yardstick.
- *memory*: the most that a step holds beyond logits and gradient, as a multiple of the logits.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument(
        "--output", type=Path, help="where to write, .md and .png added; default: by the CPU's name, in bench/results"
    )
    options = parser.parse_args(arguments)
    try:
        data = json.loads(options.json.read_text(encoding="utf-8"))
        runs = [b["extra_info"] for b in data["benchmarks"] if "floor" in b["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"cannot read benchmarks from {options.json}: {error}")
    if not runs:
        parser.error(f"{options.json} holds no benchmark of a loss")
    machine = describe(data["machine_info"])
    output = options.output or RESULTS / slug(machine[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    table, plot_file = Path(f"{output}.md"), Path(f"{output}.png")
    table.write_text(markdown(runs, machine, plot_file.name), encoding="utf-8")
    plot(runs, machine, plot_file)
    print(f"wrote {table} and {plot_file}")
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


def markdown(runs: list[dict[str, Any]], machine: tuple[str, str], plot_name: str) -> str:
    lines = [f"# Benchmarks: {machine[0]}", "", f"{machine[1]}.", "", f"![Time over the floor]({plot_name})", ""]
    lines += [_line(HEAD), _line(["---", "---", "---", *["---:"] * (len(HEAD) - 4), "---"])]
    lines += [_line(_cells(run)) for run in runs]
    return "\n".join([*lines, "", NOTES])


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


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _shape(run: dict[str, Any]) -> str:
    return f"{run['rows']} × {run['classes']}"


def plot(runs: list[dict[str, Any]], machine: tuple[str, str], path: Path) -> None:
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
        for name, marker in MARKERS.items():
            points = [
                (run["seconds"][name] / run["floor"], labels.index(_label(run)))
                for run in runs
                if run["dtype"] == dtype and name in run["seconds"]
            ]
            axis.plot(*zip(*points, strict=True), marker, label=name, linestyle="none", markersize=6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(dtype)
        axis.set_xlabel("time of forward + backward / floor (1.5 × copy)")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].invert_yaxis()
    entries = axes[0][0].get_legend_handles_labels()
    figure.legend(*entries, title=machine[0], loc="outside upper center", ncols=len(MARKERS))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(run: dict[str, Any]) -> str:
    return f"{run['loss']}  {_shape(run)}"


if __name__ == "__main__":
    sys.exit(main())
