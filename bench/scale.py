"""Predicts how the vocabulary-parallel losses scale over GPUs: a table, and plots.

python bench/scale.py              the predictions, from bench/scale_model.py
python bench/scale.py --calibrate  also measures two processes on this machine, to check the model by
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import scale_model as model
from scale_model import H100, Machine, Parts, Work, linear_form

from fusedloss.engine.budgets import DEFAULT_BUDGET
from fusedloss.engine.operators import STATISTICS

OUTPUT = Path(__file__).parent / "results" / "scale"
MEASURED = "## Measured"

#: See the table of budgets.
BUDGET = 2**31
WORKLOADS = {
    "NMT, D = 1024, V = 131072": Work(16384, 1024, 131072, budget=BUDGET),
    "NMT, D = 1024, V = 262144": Work(16384, 1024, 262144, budget=BUDGET),
    "LM, D = 4096, V = 128256": Work(16384, 4096, 128256, budget=BUDGET),
    "LM, D = 8192, V = 262144": Work(16384, 8192, 262144, budget=BUDGET),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
GPUS = (8, 64, 1024)
BUDGETS = (DEFAULT_BUDGET, 2**29, 2**31, 2**33)
TOKENS = 2**20  # of a batch that does not grow with the GPUs
PER_GPU = 8192  # of one that does

TEXT = """\
# Vocabulary-parallel losses on many GPUs

**These are predictions.** `python bench/scale.py` computes them from a model of the steps and from published figures of
one GPU and its links; no group of GPUs has run them, and no speed is claimed. What was measured is how well the model
tells the time of two processes on a CPU: the last section.

A rank of R holds V / R columns of the logits, or rows of the output layer's weight, and all N rows of the batch. Times
are those of the loss and the output layer, forward and backward, in bfloat16 and with budget={budget} MiB.

- *products*: 2 N D V / R operations each, three of them; a fourth where R > 1, as the backward makes the logits once
  more. At least the time that reading and writing their operands takes.
- *passes*: three times the bytes of the logits (read for the statistics, read and written for the gradient), and the
  statistics of all ranks.
- *sums*: where there are several chunks, their parts of the weight's gradient are added in float32, and the sum becomes
  bfloat16.
- *statistics*: one all-gather of {statistics} + K floats a row. *hidden*: the all-reduce of the gradient (N, D), as far
  as the last product of the weight's gradient does not hide it.
- Collectives are rings, inside the nodes and between them; a step of a ring takes latency + bytes / bandwidth. Trees
  would have less latency among many nodes.
- *limit*: that which, made twice as fast, would save the most.
- *sequence*: the total where a rank has N / R of the hidden states, which are gathered chunk by chunk, forward and
  backward, and whose gradient is reduced chunk by chunk, each beside the work on the next chunk. *by chunks*: the total
  if the all-gather were one for each chunk, after which three products would do.
- *sent*: MiB that a rank sends. Memory is a rank's, MiB: the weight, its gradient (of several chunks in float32, and in
  bfloat16 to hand over), a chunk of logits, hidden states and their gradient.

| of a GPU | | from |
| --- | ---: | --- |
| copy, read + written | {copy:.1f} TB/s | published benchmarks; 3.35 in NVIDIA's data sheet |
| large products, bfloat16 | {flops:.0f} TFLOP/s | published benchmarks; 989 in the data sheet |
| link in a node of {node}, each way | {inner:.0f} GB/s | NVLink 4 in the data sheet, 900 GB/s both ways |
| link between nodes, a GPU, each way | {outer:.0f} GB/s | 400 Gb/s InfiniBand, an adapter for each GPU |
| a ring's step in a node, and between nodes | {inner_us} and {outer_us} µs | what NCCL plans with, in `tuning.cc` |
| start of a collective | {start:.0f} µs | the same: rings, LL128 |
| passes over a copy of as many bytes | {row:.1f} | assumed: the least there can be |
| all else of a step | {fixed:.1f} ms | assumed: 40 launches |

![Time by ranks and by GPUs](scale.png)
"""

GROUP = """\
## One group, N = {rows}

Milliseconds. *efficiency*: time of one GPU / (R × time). The fourth product takes up to a quarter of it; R ranks need
fewer chunks, which gives some back.
"""

BUDGET_TEXT = """\
## What a small budget costs

Total in milliseconds by the budget, MiB, N = {rows}. A chunk's part of the weight's gradient is as large as the weight,
however few its rows. {default} MiB is the default on a CPU; a GPU has chunks as large as the weight.
"""

MANY = """\
## Groups of R among all GPUs

Milliseconds of the loss, hidden states whole or split, whichever is faster, + of the data-parallel all-reduce of the
weight's gradient, (V / R, D), between the groups. That may hide behind the backward of the model, but not where the
weight is tied to the embedding, whose gradient comes last: *best* counts it whole. *efficiency* of the best, over that
of 8 GPUs. *fixed*: {tokens} tokens in all; *growing*: {per_gpu} a GPU.
"""

CROSSINGS = """\
## Where one thing becomes dearer than another

Powers of two. *ranks*: from which collectives and fixed costs take more than half of the time, N = 16384. *rows*: from
which they take less than half of it, 8 ranks. *classes*: from which 8 ranks are faster than one, 64 rows. *link*: GB/s
in a node from which the all-reduce of 16384 rows is hidden, 8 ranks. *budget*: MiB from which one GPU is within a tenth
of the time that one chunk would take. *GPUs*: from which groups of 8 are faster than data parallelism alone whose
all-reduce is not hidden, fixed batch. The all-gather's bytes take longer than its latency from {told} rows on, 8 ranks.
"""


def on(work: Work, tokens: int, gpus: int, ranks: int) -> tuple[float, float]:
    """Seconds of the loss where groups of so many ranks share the tokens, and of the all-reduce between the groups."""
    part = work._replace(rows=-(-tokens * ranks // gpus), ranks=ranks)
    loss = min(linear_form(part._replace(sequence=split), H100).total for split in (False, True))
    return loss, model.data_parallel(part, H100, gpus // ranks)


def best(work: Work, tokens: int, gpus: int) -> int:
    return min((r for r in RANKS if r <= gpus), key=lambda r: sum(on(work, tokens, gpus, r)))


def group_rows(works: dict[str, Work]) -> Iterator[list[str]]:
    for name, work in works.items():
        alone = linear_form(work, H100).total
        for ranks in RANKS:
            part = work._replace(ranks=ranks)
            seconds, held = linear_form(part, H100), model.memory(part)
            others = [linear_form(part._replace(**{way: True}), H100).total for way in ("sequence", "by_chunks")]
            yield [
                name, str(ranks), *map(_ms, seconds[:5]), _ms(seconds.total), f"{alone / ranks / seconds.total:.2f}",
                model.limit(lambda m, p=part: linear_form(p, m).total, H100), *map(_ms, others),
                *map(_mib, (sum(model.traffic(part).values()), *list(held.values())[:4])),
            ]  # fmt: skip


def budget_rows(works: dict[str, Work]) -> Iterator[list[str]]:
    for name, work in works.items():
        for ranks in (1, 8):
            parts = [work._replace(ranks=ranks, budget=budget) for budget in BUDGETS]
            yield [name, str(ranks), *(_ms(linear_form(part, H100).total) for part in parts)]


def gpu_rows(works: dict[str, Work]) -> Iterator[list[str]]:
    for name, work in works.items():
        for batch in ("fixed", "growing"):
            totals = {g: TOKENS if batch == "fixed" else PER_GPU * g for g in GPUS}
            costs = {g: sum(on(work, t, g, best(work, t, g))) * g / t for g, t in totals.items()}
            for gpus, tokens in totals.items():
                cells = (" + ".join(map(_ms, on(work, tokens, gpus, r))) if r <= gpus else "-" for r in (1, 8, 64))
                efficiency = costs[GPUS[0]] / costs[gpus]
                yield [name, batch, str(gpus), *cells, f"R = {best(work, tokens, gpus)}", f"{efficiency:.2f}"]


def crossing_rows(works: dict[str, Work]) -> Iterator[list[str]]:
    for name, work in works.items():
        yield [name, *(_power(model.smallest(holds)) for holds in crossings(work).values())]


def crossings(work: Work) -> dict[str, Callable[[int], bool]]:
    """For each column what holds from a certain number on."""
    shared = work._replace(ranks=8)

    def seconds(**changes: int) -> float:
        return linear_form(work._replace(**changes), H100).total

    def idle(part: Work) -> bool:
        products, passes, sums, *others = linear_form(part, H100)
        return sum(others) > products + passes + sums

    def linked(bandwidth: int) -> Machine:
        return H100._replace(inner=H100.inner._replace(bandwidth=bandwidth * 1e9))

    return {
        "ranks": lambda n: idle(work._replace(ranks=n)),
        "rows": lambda n: not idle(shared._replace(rows=n)),
        "classes": lambda n: seconds(rows=64, classes=n, ranks=8) < seconds(rows=64, classes=n),
        "link": lambda n: linear_form(shared, linked(n)).hidden == 0,
        "budget": lambda n: n * 2**20 >= 2 * work.classes and seconds(budget=n * 2**20) < 1.1 * seconds(budget=2**60),
        "GPUs": lambda n: n >= 8 and sum(on(work, TOKENS, n, 8)) < sum(on(work, TOKENS, n, 1)),
    }


def told_rows() -> int | None:
    """From which the all-gather among 8 ranks takes twice the time of an empty one."""
    group = model.layout(H100, 8)
    empty = model.all_gather(H100, 0, group)
    return model.smallest(lambda n: model.all_gather(H100, Work(n, 1, 8, ranks=8).told, group) > 2 * empty)


def predictions(works: dict[str, Work]) -> str:
    inner, outer = H100.inner, H100.outer
    rows = next(iter(works.values())).rows
    text = TEXT.format(
        statistics=STATISTICS, budget=BUDGET // 2**20, copy=H100.copy / 1e12, flops=H100.flops / 1e12, node=H100.node,
        inner=inner.bandwidth / 1e9, outer=outer.bandwidth / 1e9, inner_us=inner.latency * 1e6,
        outer_us=outer.latency * 1e6, start=H100.start * 1e6, row=H100.row, fixed=H100.fixed * 1e3,
    )  # fmt: skip
    head = ["workload", "R", *Parts._fields[:5], "total", "efficiency", "limit", "sequence", "by chunks", "sent"]
    head += ["weight", "gradient", "logits", "hidden states"]
    many = ["workload", "batch", "GPUs", *(f"R = {r}" for r in (1, 8, 64)), "best", "efficiency"]
    parts = [text, GROUP.format(rows=rows), table(head, group_rows(works))]
    parts += [BUDGET_TEXT.format(rows=rows, default=DEFAULT_BUDGET // 2**20)]
    parts += [table(["workload", "R", *(_mib(budget) for budget in BUDGETS)], budget_rows(works))]
    parts += [MANY.format(tokens=TOKENS, per_gpu=PER_GPU), table(many, gpu_rows(works))]
    parts += [CROSSINGS.format(told=told_rows())]
    return "\n".join([*parts, table(["workload", *crossings(Work(1, 1, 1))], crossing_rows(works))])


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}" if size < 2**20 * 1000 else f"{size / 2**20:.0f}"


def _power(number: int | None) -> str:
    return "-" if number is None else str(number)


def plot(works: dict[str, Work], path: Path) -> None:
    """Above, where a group's time goes; below, a fixed batch on more and more GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(works), figsize=(4 * len(works), 7), squeeze=False, layout="constrained")
    for (name, work), above, below in zip(works.items(), *axes, strict=True):
        every = [linear_form(work._replace(ranks=ranks), H100) for ranks in RANKS]
        bottom = [0.0] * len(RANKS)
        for part, values in zip(Parts._fields, zip(*every, strict=True), strict=True):
            scaled = [ranks * seconds * 1e3 for ranks, seconds in zip(RANKS, values, strict=True)]
            above.bar([str(ranks) for ranks in RANKS], scaled, bottom=bottom, label=part)
            bottom = [x + y for x, y in zip(bottom, scaled, strict=True)]
        above.set(title=name, xlabel=f"ranks R of a group, N = {work.rows}")
        gpus = [2**i for i in range(3, 11)]
        for ranks, marker in ((1, "o"), (8, "x"), (64, "+")):
            some = [g for g in gpus if g >= ranks]
            times = [sum(on(work, TOKENS, g, ranks)) * 1e3 for g in some]
            below.loglog(some, times, marker + "-", label=f"R = {ranks}")
        ideal = sum(on(work, TOKENS, 8, 1)) * 8e3
        below.loglog(gpus, [ideal / g for g in gpus], "k:", label="as of 8, R = 1")
        below.set(xlabel=f"GPUs, {TOKENS} tokens")
    for row, label in zip(axes, ("R × time, ms", "loss and data-parallel all-reduce, ms"), strict=True):
        row[0].legend(fontsize=8)
        row[0].set_ylabel(label)
    figure.suptitle("Predicted, not measured: H100, bfloat16")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrate", action="store_true", help="measure this machine: two minutes")
    parser.add_argument("--quick", action="store_true", help="one workload, small measurements")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write, .md and .png added")
    options = parser.parse_args(arguments)
    works = dict(list(WORKLOADS.items())[: 1 if options.quick else None])
    written = [Path(f"{options.output}.md"), Path(f"{options.output}.png")]
    # What was measured stays until it is measured again.
    _, mark, measured = (written[0].read_text(encoding="utf-8") if written[0].exists() else "").partition(MEASURED)
    if options.calibrate:
        import scale_check

        mark, measured = MEASURED, scale_check.report(options.quick, table)
    written[0].parent.mkdir(parents=True, exist_ok=True)
    plot(works, written[1])
    text = predictions(works).replace("(scale.png)", f"({written[1].name})")
    written[0].write_text(f"{text}\n{mark}{measured}", encoding="utf-8")
    print(f"wrote {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
