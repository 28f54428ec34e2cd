"""Turns pytest-benchmark's JSON of these benchmarks into a report: tables (Markdown), plots (PNG) and what these are
made of (JSON), with which the next report is compared. Given that JSON instead, it writes tables and plots anew."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from writing import pyplot, table

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
GUIDE = "docs/benchmarks.md"

Run = dict[str, Any]  # of one case, as the benchmark left it
Report = dict[str, Any]
Value = Callable[[Run, str], "float | None"]  # of a candidate

BYTES = {"float32": 4, "bfloat16": 2}
MIB = 2**20

#: What is this many times as much as before is named.
WORSE = 1.1

NOTES = """\
Medians of rounds in which all candidates have their turn, one after the other, in one process; forward and backward.

- *floor*: 1.5 × `copy_()` of the logits, in the same rounds: the least that reading the logits twice and writing the
  gradient once can take. Of `distillation_loss` and of targets for all the classes it is 3 ×.
- *fused* writes the gradient to a new tensor, in memory kept from the step before; *in place* writes it over the logits
  (`inplace_backward=True`).
- *× eager*, *× compiled*: how many times faster *fused* is than the formula in PyTorch and than `torch.compile` of it.
- *× F.cross_entropy*: likewise; in parentheses where the loss is another one and this only a yardstick.
- *memory*: the most that a step holds beyond logits and gradient, as a multiple of the logits.
"""


LINEAR_NOTES = """\
Hidden states (N, D) and the output layer's weight (V, D) to the loss and both gradients; turns as above.

- *floor*: the three matrix products alone, by `torch.mm` into new memory; with a teacher a fourth for its logits, and
  with `reduction="none"` those of both models once more.
- *×*: how many times faster *fused* is: than `F.linear` and the formula in PyTorch (`F.cross_entropy` where there is
  one), than `torch.compile` of these, than `F.linear_cross_entropy` of torch without options and with
  `LinearCrossEntropyOptions()`, and than `impl="torch_compile"` of cut-cross-entropy. A number after @ is that of the
  candidate's turns where it had fewer than *fused*, as too slow for more.
- *× linear_cross_entropy*: that of this package, which is another loss and only a yardstick; with `reduction="none"`
  where the fused one gives rows.
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

TABLE_NOTES = """\
*floor*: 1.5 × a `copy_()` of the logits (row losses; 3 × where they read a second row), or the matrix products alone
(linear forms, contrastive loss). *in place*: the gradient over the logits, / floor. *×*: how many times faster the
fused loss is. *MiB*: the most that a step of it, and of the eager one, holds beyond its inputs, gradients included."""


#: What README begins with, in float32: a loss of logits and one of an output layer's input, by whoever offers the same.
AT_A_GLANCE = (("focal_loss(gamma=2.0)", (1024, 32768)), ("linear_cross_entropy()", (2048, 512, 32000)))

#: The candidates' names for those who have not read the guide.
SPELT_OUT = {
    "fused": "fusedloss",
    "eager": "eager PyTorch",
    "torch": "`F.linear_cross_entropy`",
    "torch chunked": "`F.linear_cross_entropy` in chunks",
    "compiled": "`torch.compile`",
    "F.cross_entropy": "`F.cross_entropy`",
    "cut-cross-entropy": "cut-cross-entropy",
    "pytorch-metric-learning": "pytorch-metric-learning",
}


class Kind(NamedTuple):
    """Losses of the same inputs: they have tables and plots together."""

    title: str
    suffix: str  # of the pictures' names
    sizes: dict[str, str]  # the run's names, and the tables'
    peers: dict[str, str]  # with their markers
    yardstick: str
    main: tuple[int, ...]  # the sizes that the guide shows
    notes: str

    @property
    def markers(self) -> dict[str, str]:
        return {"fused": "o", "in place": "D", **self.peers}

    @property
    def head(self) -> list[str]:
        columns = ["loss", _arrow(self.sizes.values()), "dtype", "floor, ms", "fused, ms", "/ floor"]
        columns += [f"× {peer}" for peer in self.peers]
        return [*columns, "gradients, MiB", *(f"{name}, MiB" for name in ("fused", *self.peers))]

    @property
    def slopes_head(self) -> list[str]:
        first, *others = (f"{size}^" for size in self.sizes.values())
        return ["loss", "dtype", "", f"time ∝ {first}", *others, f"memory ∝ {first}", *others]

    def has(self, run: Run) -> bool:
        return {*self.sizes} == {"rows", "features", "classes"} & {*run}


ROWS = Kind(
    "Row losses",
    "",
    {"rows": "N", "classes": "V"},
    {"eager": "x", "compiled": "+", "F.cross_entropy": "1"},
    "1.5 × copy",
    (1024, 32768),
    NOTES,
)
ROWS_HEAD = (
    "loss", "logits", "dtype", "floor, ms",
    "fused, ms (forward + backward)", "/ floor", "in place, ms", "/ floor",
    "× eager", "× compiled", "× F.cross_entropy", "memory: fused, in place, eager, compiled",
)  # fmt: skip
LINEAR = Kind(
    "Linear forms",
    "-linear",
    {"rows": "N", "features": "D", "classes": "V"},
    {
        "eager": "x",
        "compiled": "+",
        "torch": "1",
        "torch chunked": "2",
        "cut-cross-entropy": "3",
        "linear_cross_entropy": "4",
    },
    "three matrix products",
    (512, 512, 32000),
    LINEAR_NOTES,
)
SUPCON = Kind(
    "Supervised contrastive loss",
    "-supcon",
    {"rows": "N", "features": "D"},
    {"eager": "x", "compiled": "+", "pytorch-metric-learning": "1"},
    "three matrix products",
    (2048, 256),
    SUPCON_NOTES,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote, or the JSON of a report")
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write, .md, .json and .png added; default: by the CPU's name, in bench/results and the pages",
    )
    options = parser.parse_args(arguments)

    def read(path: Path) -> Report:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            report = data if {"machine", "measured", "runs"} <= {*data} else collect(data)
            by_case(report)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"cannot read benchmarks from {path}: {error!r}")
        if not report["runs"]:
            parser.error(f"{path} holds no benchmark of a loss")
        return report

    report = read(options.json)
    name = slug(report["machine"])
    if "compared" not in report:
        earlier = RESULTS / f"{name}.json"
        report["compared"] = compare(report, read(earlier)) if earlier.exists() else None
    output = options.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    written = write(report, output)
    if options.output is None:
        written += update_pages(report, name)
    print("\n".join(compared(report)))
    print(f"wrote {', '.join(map(str, written))}")
    return 0


def collect(data: dict[str, Any]) -> Report:
    """What is kept of pytest-benchmark's JSON: the runs and what they ran on, without the machine's own name."""
    machine, commit = data["machine_info"], data["commit_info"]
    own = machine["fusedloss"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    versions = f"fusedloss {own['version']} ({own['impl']}), torch {own['torch']}, Python {machine['python_version']}"
    state = f"{commit['id'][:7]}{', changed' * commit['dirty']}" if commit["time"] else "no commit"
    runs = [b["extra_info"] for b in data["benchmarks"] if "floor" in b["extra_info"]]
    for run in runs:
        # Of a path, the file's name: the rest says nothing but where things lie on that machine.
        failed = run.get("failed", {})
        failed.update((name, re.sub(r"(/[^/\s'\"]+)+/", "", error)) for name, error in failed.items())
    return {
        "machine": f"{cpu}, {own['threads']} threads",
        "measured": f"{data['datetime'][:10]} ({versions}; {state})",
        "runs": json.loads(json.dumps(runs), parse_float=lambda digits: float(f"{float(digits):.6g}")),
    }


def write(report: Report, output: Path) -> list[Path]:
    head = json.dumps({key: report[key] for key in report if key != "runs"}, indent=1, ensure_ascii=False)
    runs = ",\n".join(json.dumps(run, ensure_ascii=False) for run in report["runs"])  # a line each
    written = [Path(f"{output}.md"), Path(f"{output}.json")]
    written[0].write_text(markdown(report, output.name), encoding="utf-8")
    written[1].write_text(f'{head[:-2]},\n "runs": [\n{runs}\n]}}\n', encoding="utf-8")
    drawn = {suffix: draw for kind, runs in parts(report) for suffix, (_, draw) in pictures(kind, runs).items()}
    if glance := at_a_glance(report):
        drawn["-glance"] = partial(plot_glance, glance)
    for suffix, draw in drawn.items():
        written.append(Path(f"{output}{suffix}.png"))
        draw(title=report["machine"], path=written[-1])
    return written


def parts(report: Report) -> Iterator[tuple[Kind, list[Run]]]:
    for kind in (ROWS, LINEAR, SUPCON):
        if runs := [run for run in report["runs"] if kind.has(run)]:
            yield kind, runs


def slug(text: str) -> str:
    """A file's name: "AMD EPYC 9R14, 2 threads" -> "amd-epyc-9r14-2-threads"."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


# what is compared and drawn


def over_floor(run: Run, name: str) -> float | None:
    seconds = run["seconds"].get(name)
    return None if seconds is None else seconds / run["floor"]


def gradients(run: Run) -> float:
    """Their MiB, the least that a step can hold beyond its inputs but where it is done in place."""
    numbers = (
        (run["rows"] + run.get("classes", 0)) * run["features"] if "features" in run else run["rows"] * run["classes"]
    )
    return numbers * BYTES[run["dtype"]] / MIB


def held(run: Run, name: str) -> float | None:
    """The most MiB that a step holds beyond its inputs, gradients included."""
    memory = run["memory"].get(name)
    if memory is None:
        return None
    # Of row losses the runs have it beyond logits and gradient, as a multiple.
    return memory / MIB if "features" in run else (memory + (name != "in place")) * gradients(run)


def over_gradients(run: Run, name: str) -> float | None:
    memory = held(run, name)
    return None if memory is None else memory / gradients(run)


#: What is compared with earlier figures, and by how much it changes of itself.
COMPARED: dict[str, tuple[Value, float]] = {"time / floor": (over_floor, 0.0), "MiB": (held, 2.0)}


def by_case(report: Report) -> dict[str, Run]:
    return {f"`{run['loss']}` {_shape(run)} {run['dtype']}": run for run in report["runs"]}


def compare(report: Report, earlier: Report) -> dict[str, Any]:
    """How the cases that are in both have changed, and those named that are worse by more than a tenth."""
    now, before = by_case(report), by_case(earlier)
    both = [case for case in now if case in before]
    worse, floors = [], 0
    for case in both:
        for name in ("fused", "in place"):
            for what, (value, noise) in COMPARED.items():
                old, new, eager_old, eager_new = (value(r[case], n) for n in (name, "eager") for r in (before, now))
                if old is not None and new is not None and new > WORSE * old + noise:
                    eager = None if not eager_old or eager_new is None else eager_new / eager_old
                    if value is over_floor and eager is not None and new <= WORSE * old * eager:
                        floors += 1
                        continue
                    worse.append({"case": case, "name": name, "what": what, "before": old, "now": new, "eager": eager})
    changes = [over_floor(now[case], "fused") / over_floor(before[case], "fused") for case in both]
    return {
        "with": earlier["measured"],
        "cases": len(both),
        "change": median(changes) if changes else None,
        "worse": worse,
        "floors": floors,
        "left_out": Counter(run["loss"] for case, run in before.items() if case not in now),
    }


# tables


def markdown(report: Report, name: str) -> str:
    lines = [f"# Benchmarks: {report['machine']}", ""]
    lines += [f"Measured {report['measured']}. `{GUIDE}` says how to read this.", ""]
    if at_a_glance(report):
        lines += [f"![{GLANCE}]({name}-glance.png)", ""]
    lines += ["## Compared with before", "", *compared(report), ""]
    for kind, runs in parts(report):
        lines += [f"## {kind.title}", ""]
        for suffix, (about, _) in pictures(kind, runs).items():
            lines += [f"![{about}]({name}{suffix}.png)", ""]
        lines += _rows_table(runs) if kind is ROWS else _products_tables(kind, runs)
    return "\n".join(lines)


def compared(report: Report) -> list[str]:
    found = report["compared"]
    if found is None:
        return ["There are no earlier figures of this machine."]
    lines = [f"Earlier figures: {found['with']}. Cases in both: {found['cases']}."]
    if found["cases"]:
        lines[0] += f" The median change of *fused* over its floor: × {found['change']:.2f}."
        lines[0] += f" Worse by more than {WORSE - 1:.0%}: {len(found['worse']) or 'none'}."
    if found["floors"]:
        lines[0] += f" Over a floor that was faster, and no worse than eager PyTorch: {found['floors']} more."
    rows = []
    for x in found["worse"]:
        values = [f"{x['before']:.3g}", f"{x['now']:.3g}", f"× {x['now'] / x['before']:.2f}" if x["before"] else "-"]
        eager = "-" if x["eager"] is None else f"× {x['eager']:.2f}"
        rows.append([x["case"], x["name"], x["what"], *values, eager])
    if rows:
        lines += ["", *table(("case", "", "", "before", "now", "change", "eager's change"), rows, 3)]
    if found["left_out"]:
        cases = ", ".join(f"`{loss}` ({count})" for loss, count in found["left_out"].items())
        lines += ["", f"Not measured this time, and left out, with the number of cases: {cases}."]
    return lines


def _rows_table(runs: list[Run]) -> list[str]:
    lines = table(ROWS_HEAD, map(_cells, runs), 3)
    return [lines[0], lines[1].removesuffix(": |") + " |", *lines[2:], "", NOTES]  # the last column holds texts


def _products_tables(kind: Kind, runs: list[Run]) -> list[str]:
    lines = [*table(kind.head, (_products_cells(kind, run) for run in runs), 3), "", kind.notes]
    failures = dict.fromkeys((name, error) for run in runs for name, error in run["failed"].items())
    for name, error in failures:
        where = [f"{_shape(r)} {r['dtype']}" for r in runs if r["failed"].get(name) == error]
        lines.append(f"- *{name}* did not run ({', '.join(where) if len(where) < len(runs) else 'anywhere'}): {error}")
    slopes = list(_slopes(kind, runs))
    return lines + (["", *table(kind.slopes_head, slopes, 3), "", SLOPES_NOTES] if slopes else [])


def update_pages(report: Report, name: str) -> list[Path]:
    """Write the figures of README and the guide, if they are this machine's."""
    written = []
    for page, text in ((ROOT / "README.md", first_screen(report, name)), (ROOT / GUIDE, guide_table(report, name))):
        begin, end = f"<!-- bench/results/{name}.json, by make report -->\n", "<!-- end -->"
        before, found, rest = page.read_text(encoding="utf-8").partition(begin)
        if found:
            page.write_text(before + begin + text + end + rest.partition(end)[2], encoding="utf-8")
            written.append(page)
    return written


def at_a_glance(report: Report) -> list[Run]:
    """Return the runs that README begins with; none where one of them was not measured."""
    found = {
        (run["loss"], tuple(run[k] for k in kind.sizes)): run
        for kind, runs in parts(report)
        for run in runs
        if run["dtype"] == "float32"
    }
    return [found[case] for case in AT_A_GLANCE] if {*AT_A_GLANCE} <= {*found} else []


def peers_of(run: Run) -> list[str]:
    """Return those who offer the same loss; a yardstick is another loss."""
    other = {"fused", "in place", "linear_cross_entropy"}
    if not run.get("same_as_cross_entropy"):
        other.add("F.cross_entropy")
    return [name for name in run["seconds"] if name not in other]


def first_screen(report: Report, name: str) -> str:
    """Return what the package brings, where it does not win, and the picture."""
    rows, linear = at_a_glance(report)

    def gain(run: Run, peer: str) -> str:
        return f"{_times(run, peer)} × as fast as {SPELT_OUT[peer]}"

    def memory(run: Run) -> str:
        return (
            f"needs {held(run, 'fused'):.0f} MiB beyond its inputs where eager PyTorch needs {held(run, 'eager'):.0f}"
        )

    bold = (
        f"**Focal loss of {rows['rows']:,} rows and {rows['classes']:,} classes, forward and backward, is "
        f"{gain(rows, 'eager')} and {gain(rows, 'compiled')}. It {memory(rows)}. Cross-entropy made straight from "
        f"{linear['rows']:,} hidden states of {linear['features']:,} features, over {linear['classes']:,} classes, "
        f"never stores the logits: it is {gain(linear, 'eager')} and {gain(linear, 'compiled')}, "
        f"and {memory(linear)}.**"
    )
    where = f"[{report['machine']}](bench/results/{name}.md), {report['measured'].partition(' (')[0]}"
    lines = [
        *textwrap.wrap(bold, 118, break_long_words=False),
        f"({where}: float32.) Where it does not win, the worst of each kind:",
        "",
        *(f"- {text}" for text in losses_of(report)),
        "",
        f"![{GLANCE}](bench/results/{name}-glance.png)",
        "",
    ]
    return "\n".join(lines)


def losses_of(report: Report) -> list[str]:
    """Return, of each kind, the case that is slowest beside a peer, and who needs less memory at a glance."""
    found = []
    for _, runs in parts(report):
        cases = [(run["seconds"][peer] / run["seconds"]["fused"], run, peer) for run in runs for peer in peers_of(run)]
        ratio, run, peer = min(cases, key=itemgetter(0), default=(math.inf, {}, ""))
        if ratio < 1:
            found.append(
                f"`{run['loss']}` ({_axes(run)}, {run['dtype']}) is {ratio:.2f} × as fast as {SPELT_OUT[peer]}."
            )
    for run in at_a_glance(report):
        for peer in peers_of(run):
            less, own = held(run, peer), held(run, "fused")
            if less is not None and own is not None and less < own:
                found.append(
                    f"{SPELT_OUT[peer]} needs less memory than `{run['loss']}` ({less:.0f} MiB, not {own:.0f}), and "
                    f"{run['seconds'][peer] / run['seconds']['fused']:.2f} × its time."
                )
    return found or ["Nowhere that was measured."]


def _axes(run: Run) -> str:
    names = {"rows": "rows", "features": "features", "classes": "classes"}
    return ", ".join(f"{run[size]:,} {name}" for size, name in names.items() if size in run)


def guide_table(report: Report, name: str) -> str:
    """Return the runs in float32 of one shape each, and the plot of the row losses' times."""
    head = ("loss", "sizes", "floor, ms", "fused, ms", "/ floor", "in place", "× eager", "× compiled", "MiB", "eager's")
    rows = []
    for kind, runs in parts(report):
        for run in runs:
            if run["dtype"] == "float32" and tuple(run[size] for size in kind.sizes) == kind.main:
                ratios = [over_floor(run, name) for name in ("fused", "in place")]
                faster = [_times(run, peer) for peer in ("eager", "compiled")]
                memory = [held(run, name) for name in ("fused", "eager")]
                cells = [f"`{run['loss']}`", _shape(run), _ms(run["floor"]), _ms(run["seconds"]["fused"])]
                cells += ["-" if x is None else f"{x:.2f}" for x in ratios]
                rows.append([*cells, *faster, *("-" if x is None else f"{x:.0f}" for x in memory)])
    about = f"{report['machine']}, float32, measured {report['measured']}; all of it: `bench/results/{name}.md`."
    picture = f"![Time of the row losses over the floor](../bench/results/{name}.png)"
    return "\n".join([about, "", *table(head, rows, 2), "", TABLE_NOTES, "", picture, ""])


def _cells(run: Run) -> list[str]:
    seconds, floor = run["seconds"], run["floor"]
    parts = f"{_ms(run['forward']['fused'])} + {_ms(run['backward']['fused'])}"
    cells = [f"`{run['loss']}`", _shape(run), run["dtype"], _ms(floor)]
    cells += [f"{_ms(seconds['fused'])} ({parts})", f"{seconds['fused'] / floor:.2f}"]
    in_place = seconds.get("in place")
    cells += ["-", "-"] if in_place is None else [_ms(in_place), f"{in_place / floor:.2f}"]
    for peer in ROWS.peers:
        faster = _times(run, peer)
        cells.append(f"({faster})" if peer == "F.cross_entropy" and not run["same_as_cross_entropy"] else faster)
    memory = [run["memory"].get(name) for name in ("fused", "in place", "eager", "compiled")]
    cells.append(" ".join("-" if m is None else f"{m:.2f}" for m in memory) if any(memory) else "-")
    return cells


def _products_cells(kind: Kind, run: Run) -> list[str]:
    seconds, turns, floor = run["seconds"], run["turns"], run["floor"]
    cells = [f"`{run['loss']}`", _shape(run), run["dtype"], _ms(floor)]
    cells += [_ms(seconds["fused"]), f"{seconds['fused'] / floor:.2f}"]
    for peer in kind.peers:
        fewer = f" @{turns[peer]}" if peer in turns and turns[peer] < turns["fused"] else ""
        cells.append("failed" if peer in run["failed"] else _times(run, peer) + fewer)
    memory = [gradients(run), *(held(run, name) for name in ("fused", *kind.peers))]
    return cells + ["-" if m is None else f"{m:.0f}" for m in memory]


def _times(run: Run, peer: str) -> str:
    """How many times faster the fused loss is."""
    seconds = run["seconds"]
    return f"{seconds[peer] / seconds['fused']:.3g}" if peer in seconds else "-"


def _slopes(kind: Kind, runs: list[Run]) -> Iterator[list[str]]:
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


def exponents(kind: Kind, runs: list[Run], values: list[float | None]) -> list[str]:
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


def _shape(run: Run) -> str:
    if "features" in run:
        return _arrow(str(run[size]) for size in LINEAR.sizes if size in run)
    return f"{run['rows']} × {run['classes']}"


def _arrow(sizes: Iterable[str]) -> str:
    """N × D → V, or N × D."""
    rows, features, *classes = sizes
    return " → ".join([f"{rows} × {features}", *classes])


# plots

GLANCE = "Time and memory of a step by fusedloss and by others"


def plot_glance(runs: list[Run], *, title: str, path: Path) -> None:
    """Bars from 0: time and memory of each candidate, a row of panels for each run."""
    plt = pyplot()
    names = [["fused", *peers_of(run)] for run in runs]
    figure, axes = plt.subplots(
        len(runs), 2, figsize=(10, 1.4 + 0.36 * sum(map(len, names))), layout="constrained",
        height_ratios=[len(part) + 1 for part in names],
    )  # fmt: skip
    for run, part, panels in zip(runs, names, axes, strict=True):
        milliseconds = [run["seconds"][name] * 1e3 for name in part]
        mebibytes = [held(run, name) for name in part]
        for axis, values, what in zip(panels, (milliseconds, mebibytes), ("ms", "MiB beyond the inputs"), strict=True):
            values = [math.nan if value is None else value for value in values]
            colours = ["tab:blue" if name == "fused" else "silver" for name in part]
            bars = axis.barh([SPELT_OUT[name].replace("`", "") for name in part], values, color=colours)
            axis.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=3, fontsize=9)
            axis.set_xlim(0, 1.15 * max(value for value in values if value == value))
            axis.invert_yaxis()
            axis.set_xlabel(what)
            axis.spines[["top", "right"]].set_visible(False)
        panels[1].set_yticks([])
        panels[0].set_title(f"{run['loss'].removesuffix('()')}, {_shape(run)}", loc="left", fontsize=10)
    figure.suptitle(f"A step, forward and backward, float32: {title}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pictures(kind: Kind, runs: list[Run]) -> dict[str, tuple[str, Callable[..., None]]]:
    """By the end of its name, what each of them shows and what draws it."""
    label = f"time of forward + backward / floor ({kind.yardstick})"
    found = {kind.suffix: ("Time over the floor", partial(plot, kind, runs, over_floor, label, "log"))}
    measured = [run for run in runs if any(held(run, name) is not None for name in kind.markers)]
    if measured:
        label = "memory of a step beyond its inputs / its gradients"
        draw = partial(plot, kind, measured, over_gradients, label, "symlog")
        found[f"{kind.suffix}-memory"] = ("Memory over that of the gradients", draw)
    grown = {size: one_size_varies(kind, runs, size) for size in kind.sizes}
    if any(grown.values()):
        draw = partial(plot_growth, kind, {size: part for size, part in grown.items() if part})
        found[f"{kind.suffix}-growth"] = ("Growth of time and memory with the sizes", draw)
    return found


def plot(kind: Kind, runs: list[Run], value: Value, label: str, scale: str, *, title: str, path: Path) -> None:
    """For each loss and shape, the candidates' values as multiples of the least possible; a panel a dtype."""
    plt = pyplot()
    dtypes = list(dict.fromkeys(run["dtype"] for run in runs))
    labels = list(dict.fromkeys(_label(run) for run in runs))
    figure, axes = plt.subplots(
        1, len(dtypes), sharey=True, squeeze=False, figsize=(4 + 4 * len(dtypes), 1.8 + 0.24 * len(labels)),
        layout="constrained",
    )  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        part = [run for run in runs if run["dtype"] == dtype]
        for name, marker in kind.markers.items():
            points = [(x, labels.index(_label(run))) for run in part if (x := value(run, name)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=name, linestyle="none", markersize=6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale(scale)
        axis.set_title(dtype)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].invert_yaxis()
    _save(figure, axes, title, path)


def one_size_varies(kind: Kind, runs: list[Run], size: str) -> list[Run]:
    """The most runs of one loss that differ in this size alone; none where there are fewer than three."""
    others: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        same = (run["loss"], run["dtype"], *(run[other] for other in kind.sizes if other != size))
        others.setdefault(same, []).append(run)
    longest = max(others.values(), key=len)
    return sorted(longest, key=itemgetter(size)) if len(longest) > 2 else []


def plot_growth(kind: Kind, grown: dict[str, list[Run]], *, title: str, path: Path) -> None:
    """Time and memory of the candidates by one size after the other."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(grown), squeeze=False, figsize=(1 + 4.5 * len(grown), 7.5), layout="constrained")
    for (size, runs), (time, memory) in zip(grown.items(), axes.T, strict=True):
        sizes = [run[size] for run in runs]
        fixed = [f"{name} = {runs[0][other]}" for other, name in kind.sizes.items() if other != size]
        time.set_title("\n".join([f"{runs[0]['loss']}, {runs[0]['dtype']}", ", ".join(fixed)]), fontsize=10)
        time.plot(sizes, [run["floor"] * 1e3 for run in runs], "k-", label="floor; the gradients' memory")
        memory.plot(sizes, [gradients(run) for run in runs], "k-")
        for name, marker in kind.markers.items():
            milliseconds = [run["seconds"].get(name, math.nan) * 1e3 for run in runs]
            mebibytes = [math.nan if (m := held(run, name)) is None else m for run in runs]
            if not all(map(math.isnan, milliseconds)):
                time.plot(sizes, milliseconds, f"{marker}--", label=name)
                memory.plot(sizes, mebibytes, f"{marker}--")
        time.set_yscale("log")
        memory.set_yscale("symlog")
        memory.set_ylim(bottom=0)
        for axis, unit in ((time, "ms"), (memory, "MiB beyond the inputs")):
            axis.set_xscale("log")
            axis.set_xticks(sizes, sizes)
            axis.minorticks_off()
            axis.set_xlabel(kind.sizes[size])
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
    _save(figure, axes, title, path)


def _save(figure: Any, axes: Any, title: str, path: Path) -> None:
    handles = (axis.get_legend_handles_labels() for axis in axes.flat)
    entries = {label: line for pair in handles for line, label in zip(*pair, strict=True)}
    figure.legend(entries.values(), entries, title=title, loc="outside upper center", ncols=3 * axes.shape[1])
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def _label(run: Run) -> str:
    return f"{run['loss']}  {_shape(run)}"


if __name__ == "__main__":
    sys.exit(main())
