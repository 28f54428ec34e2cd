"""Predict how the vocabulary-parallel losses scale over GPUs, by bench/scale_model.py: tables and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from scale_model import H100, RESOURCES, Parts, Work, data_parallel, linear_form
from writing import pyplot, table

from fusedloss.engine.budgets import DEFAULT_BUDGET
from fusedloss.engine.operators import STATISTICS

OUTPUT = Path(__file__).parent / "results" / "scale"
BUDGET = 2**31  # see the table of budgets
WORKLOADS = {
    "NMT, D = 1024, V = 131072": Work(16384, 1024, 131072, budget=BUDGET),
    "NMT, D = 1024, V = 262144": Work(16384, 1024, 262144, budget=BUDGET),
    "LM, D = 4096, V = 128256": Work(16384, 4096, 128256, budget=BUDGET),
    "LM, D = 8192, V = 262144": Work(16384, 8192, 262144, budget=BUDGET),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = (DEFAULT_BUDGET, 2**29, 2**31, 2**33)
TOKENS, PER_GPU = 2**20, 8192  # of a batch that does not grow with the GPUs; of one that does

TEXT = """\
# Vocabulary-parallel losses on many GPUs

**These are predictions.** `python bench/scale.py` computes them from a model of the steps and from published figures of
one GPU and its links; no group of GPUs has run them, and no speed is claimed. Of two processes on a CPU the model of
version 0.1.0, told that machine's figures, predicted 0.75 to 1.28 times what their steps took.

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
  backward, and whose gradient is reduced chunk by chunk, each beside the work on the next chunk.
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

![Time by ranks and by GPUs]({picture})
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


def on(work: Work, tokens: int, gpus: int, ranks: int) -> tuple[float, float]:
    """Seconds of the loss where groups of so many ranks share the tokens, and of the all-reduce between the groups."""
    part = work._replace(rows=-(-tokens * ranks // gpus), ranks=ranks)
    loss = min(linear_form(part._replace(sequence=split), H100).total for split in (False, True))
    return loss, data_parallel(part, H100, gpus // ranks)


def group_rows() -> Iterator[list[str]]:
    for name, work in WORKLOADS.items():
        alone = linear_form(work, H100).total
        for ranks in RANKS:
            part = work._replace(ranks=ranks)
            seconds = linear_form(part, H100)
            limit = min(RESOURCES, key=lambda name, part=part: linear_form(part, RESOURCES[name](H100)).total)
            split = linear_form(part._replace(sequence=True), H100).total
            cells = [*map(_ms, seconds[:5]), _ms(seconds.total), f"{alone / ranks / seconds.total:.2f}", limit]
            yield [name, str(ranks), *cells, _ms(split), *map(_mib, (part.sent, *part.memory))]


def budget_rows() -> Iterator[list[str]]:
    for name, work in WORKLOADS.items():
        for ranks in (1, 8):
            parts = [work._replace(ranks=ranks, budget=budget) for budget in BUDGETS]
            yield [name, str(ranks), *(_ms(linear_form(part, H100).total) for part in parts)]


def gpu_rows() -> Iterator[list[str]]:
    for name, work in WORKLOADS.items():
        for batch in ("fixed", "growing"):
            first = None
            for gpus in (8, 64, 1024):
                tokens = TOKENS if batch == "fixed" else PER_GPU * gpus
                costs = {ranks: on(work, tokens, gpus, ranks) for ranks in RANKS if ranks <= gpus}
                best = min(costs, key=lambda ranks: sum(costs[ranks]))
                cost = sum(costs[best]) * gpus / tokens
                first = first or cost
                cells = (" + ".join(map(_ms, costs[ranks])) if ranks in costs else "-" for ranks in (1, 8, 64))
                yield [name, batch, str(gpus), *cells, f"R = {best}", f"{first / cost:.2f}"]


def predictions(picture: str) -> str:
    inner, outer = H100.inner, H100.outer
    rows = next(iter(WORKLOADS.values())).rows
    text = TEXT.format(
        statistics=STATISTICS, budget=BUDGET // 2**20, copy=H100.copy / 1e12, flops=H100.flops / 1e12, node=H100.node,
        inner=inner.bandwidth / 1e9, outer=outer.bandwidth / 1e9, inner_us=inner.latency * 1e6,
        outer_us=outer.latency * 1e6, start=H100.start * 1e6, row=H100.row, fixed=H100.fixed * 1e3, picture=picture,
    )  # fmt: skip
    head = ["workload", "R", *Parts._fields[:5], "total", "efficiency", "limit", "sequence", "sent"]
    head += ["weight", "gradient", "logits", "hidden states"]
    many = ["workload", "batch", "GPUs", "R = 1", "R = 8", "R = 64", "best", "efficiency"]
    parts = [text, GROUP.format(rows=rows), *table(head, group_rows()), ""]
    parts += [BUDGET_TEXT.format(rows=rows, default=DEFAULT_BUDGET // 2**20)]
    parts += [*table(["workload", "R", *map(_mib, BUDGETS)], budget_rows()), ""]
    return "\n".join([*parts, MANY.format(tokens=TOKENS, per_gpu=PER_GPU), *table(many, gpu_rows()), ""])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}" if size < 2**20 * 1000 else f"{size / 2**20:.0f}"


def plot(path: Path) -> None:
    """Above, where a group's time goes; below, a fixed batch on more and more GPUs."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(WORKLOADS), figsize=(4 * len(WORKLOADS), 7), layout="constrained")
    for (name, work), above, below in zip(WORKLOADS.items(), *axes, strict=True):
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
            below.loglog(
                some, [sum(on(work, TOKENS, g, ranks)) * 1e3 for g in some], marker + "-", label=f"R = {ranks}"
            )
        below.loglog(gpus, [sum(on(work, TOKENS, 8, 1)) * 8e3 / g for g in gpus], "k:", label="as of 8, R = 1")
        below.set(xlabel=f"GPUs, {TOKENS} tokens")
    for row, label in zip(axes, ("R × time, ms", "loss and data-parallel all-reduce, ms"), strict=True):
        row[0].legend(fontsize=8)
        row[0].set_ylabel(label)
    figure.suptitle("Predicted, not measured: H100, bfloat16")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write, .md and .png added")
    output = parser.parse_args(arguments).output
    plot(Path(f"{output}.png"))
    Path(f"{output}.md").write_text(predictions(f"{output.name}.png"), encoding="utf-8")
    print(f"wrote {output}.md and {output}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
