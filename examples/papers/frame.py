"""What the scripts of this folder share: the command line, runs that are resumed, tables of mean and deviation."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import count, positive, share_or_all
from packages import DataError
from tables import interval, spread

#: The finished runs behind the pages of docs/papers, which are not made again: hours of processor time.
RECORDED = Path(__file__).resolve().parent / "results"

#: The settings that `add_training` adds.
TRAINING = ("limit", "epochs", "batch", "lr", "width", "hidden", "dropout", "max_length", "least")


class Run(NamedTuple):
    settings: dict[str, Any]  # all that decides its outcome, in what JSON knows
    measured: dict[str, Any]


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """With the options of every script; its own are added to it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("runs").add_argument
    add("--out", type=Path, default=Path("runs/papers") / name, help="folder of the results, the table and the plot")
    add("--fresh", action="store_true", help="make every run anew: those of --out are discarded")
    add("--seeds", type=count(1), default=3, help="runs of each loss")
    add("--seed", type=int, default=1, help="the first: of the weights, the batches and dropout")
    # One: these networks are so small that two threads which sleep while they wait take up to three times as long.
    add("--threads", type=count(1), default=1, help="CPU threads")
    return parser


def add_training(parser: argparse.ArgumentParser, limit: int, epochs: int, lr: float) -> None:
    """The options of a network and its training, `TRAINING`."""
    add = parser.add_argument_group("training").add_argument
    add("--limit", type=count(0), default=limit, help="texts to train on, 0 for all")
    add("--epochs", type=count(1), default=epochs, help="over the training part")
    add("--batch", type=count(1), default=32, help="texts an update")
    add("--lr", type=positive, default=lr, help="of Adam")
    add("--width", type=count(1), default=64, help="of the embeddings, which are learnt")
    add("--hidden", type=count(1), default=64, help="of the LSTM, in each direction")
    add("--dropout", type=share_or_all, default=0.3, help="of the embeddings and of the hidden states")
    add("--max-length", type=count(1), default=128, help="tokens of a text; what follows is cut")
    add("--least", type=count(1), default=2, help="tokens that occur less often in the training part are one")


def run_all(
    plan: Sequence[dict[str, Any]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    told: Callable[[Run], str],
    out: Path,
    fresh: bool = False,
    kept: Callable[[dict[str, Any]], None] = lambda settings: None,
    recorded: bool = True,
) -> list[Run]:
    """The runs of the plan in its order; those of the same settings in `out` or in `RECORDED` are not made again.

    Each is a line of results.jsonl as soon as it ends, so that a script that was stopped resumes from there. Lines of
    other settings stay in the file and are not used. `fresh` discards the file, and does not read `RECORDED`, nor does
    a call with `recorded` False: the later ones of a script that began afresh. `kept` is called with the settings of a
    run whose line is on the disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    done = _read(path)
    for path_of in sorted(RECORDED.glob("*.jsonl")) if recorded and not fresh else ():
        done = {**_read(path_of), **done}
    ready = sum(key(settings) in done for settings in plan)
    if ready:
        print(f"{ready} of {len(plan)} runs are in {path} or in {RECORDED}; --fresh makes them anew")
    runs = []
    for number, settings in enumerate(plan, start=1):
        measured = done.get(key(settings))
        if measured is None:
            start, used = time.perf_counter(), time.process_time()
            measured = run(settings)
            seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
            line = {"settings": settings, "measured": measured, **{k: round(v, 1) for k, v in seconds.items()}}
            _append(path, json.dumps(line, allow_nan=False))
            kept(settings)
            print(f"{number} of {len(plan)}, {line['seconds']:.0f} s: {told(Run(settings, measured))}")
        runs.append(Run(settings, measured))
    return runs


def key(settings: dict[str, Any]) -> str:
    """What two runs of the same settings share."""
    return json.dumps(settings, sort_keys=True)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by settings. A last line without its end is of a run that was stopped, or is being written."""
    if not path.exists():
        return {}
    done = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            done[key(entry["settings"])] = entry["measured"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}, line {number}: not a result; --fresh forgets the file") from None
    return done


def _append(path: Path, line: str) -> None:
    """Under a lock, as several scripts may write: what follows the last whole line is of one that was stopped."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole, end, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole) + len(end))
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def table(runs: Sequence[Run], by: str, columns: dict[str, float], form: str = ".1f") -> str:
    """In Markdown, a row for each value of the setting `by`: the columns' mean and standard deviation over its runs.

    `columns`: what was measured, and what it is multiplied by.
    """
    lines = [f"| {by} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for value in dict.fromkeys(run.settings[by] for run in runs):
        own = [run.measured for run in runs if run.settings[by] == value]
        cells = (spread([scale * measured[name] for measured in own], form) for name, scale in columns.items())
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scores(runs: Sequence[Run], loss: str, column: str) -> list[float]:
    """Of the runs of a loss, a number for each seed."""
    return [run.measured[column] for run in runs if run.settings["loss"] == loss]


def differences(runs: Sequence[Run], title: str, pairs: dict[str, tuple[str, str]], columns: Sequence[str]) -> str:
    """In Markdown, what the first loss of a named pair adds to the second one's columns, seed by seed."""
    lines = [f"| {title} | mean | 95 % interval | of each seed |", "|---|---:|---:|---:|"]
    for name, pair in pairs.items():
        for column in columns:
            both = (scores(runs, loss, column) for loss in pair)
            own = [ours - plain for ours, plain in zip(*both, strict=True)]
            each = ", ".join(f"{value:+.2f}" for value in own)
            lines.append(f"| {name}, {column} | {spread(own, '+.2f')} | {interval(own, '+.2f')} | {each} |")
    return "\n".join(lines) + "\n"


def write_tables(runs: Sequence[Run], columns: dict[str, Sequence[str]], out: Path) -> None:
    """A table of the losses for each set of texts, whose columns are given by its name: printed, and in table.md."""
    tables = []
    for texts, names in columns.items():
        own = [run for run in runs if run.settings["texts"] == texts]
        tables.append(f"{texts}\n\n{table(own, 'loss', dict.fromkeys(names, 100))}")
    written = "\n".join(tables)
    seeds = len({run.settings["seed"] for run in runs})
    print(f"\nin %, mean and standard deviation over {seeds} seed(s)\n\n{written}")
    (out / "table.md").write_text(written, encoding="utf-8")


@contextlib.contextmanager
def save_figure(path: Path, rows: int, columns: int) -> Iterator[Any]:
    """Panels [rows][columns] to draw on, which are written when they are left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2.7 * columns, 2.7 * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield panels
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_scores(panel: Any, scores: dict[str, list[float]]) -> None:
    """Side by side, for each name, a point for each run and a bar at their mean."""
    for i, own in enumerate(scores.values()):
        panel.plot([i] * len(own), own, "o", markersize=4)
        panel.hlines(sum(own) / len(own), i - 0.3, i + 0.3, colors=f"C{i}")
    panel.set_xticks(range(len(scores)), scores)


def main(parse_arguments: Callable[[], argparse.Namespace], compare: Callable[[argparse.Namespace], None]) -> NoReturn:
    """Runs a script, and ends it with a message where its data cannot be had."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line when it is due
    try:
        options = parse_arguments()
        torch.set_num_threads(options.threads)
        compare(options)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
