"""What the model of bench/scale.py says of two processes on this machine, and what they take."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from scale_model import Link, Machine, Work, linear_form, row_form
from torch import Tensor

import fusedloss as fl

WORLD = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


#: Rows, features, classes, bytes of a chunk's logits; features of 0: the row form.
STEPS = [(512, 512, 32000, 2**27), (2048, 256, 32000, 2**27), (1024, 512, 32000, 2**23), (512, 0, 64000, 1)]
QUICK = [(32, 16, 1000, 2**27), (32, 16, 1000, 2**14), (32, 0, 1000, 1)]

TEXT = """\
 on this machine

Two processes of one thread each over gloo, on {processor} with {cores} threads; torch {torch}. Medians, each process
measuring while the other does. Load before: {load}. What the model is told:

{parameters}
*latency* and *bandwidth* are those of an all-reduce of 1 and of {floats} floats. What it then tells of a rank's step,
with half of the classes, against the step; without overlap, which two busy cores do not have:

{steps}"""


def report(quick: bool, table: Callable[..., str]) -> str:
    """The section's text, but for the first word of its heading."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(folder, quick), nprocs=WORLD)
        found = json.loads(Path(folder, "found").read_text(encoding="utf-8"))
    found |= {"processor": _processor(), "cores": os.cpu_count(), "load": load, "torch": torch.__version__}
    found["parameters"] = table(["", *DTYPES], found["parameters"])
    found["steps"] = table(
        ["form", "dtype", "N × D → V", "chunks", "predicted, ms", "measured, ms", "ratio"], found["steps"]
    )
    return TEXT.format(**found)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0] if names else platform.machine()


def _rank(rank: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(minutes=5)
    )
    side, floats = (32, 2**12) if quick else (512, 2**22)
    machines = {name: measured(dtype, side, floats) for name, dtype in DTYPES.items()}
    steps = [compared(name, m, *shape) for shape in (QUICK if quick else STEPS) for name, m in machines.items()]
    if rank == 0:
        rows = {
            "copy, GB/s": lambda m: m.copy / 1e9,
            "products, GFLOP/s": lambda m: m.flops / 1e9,
            "passes over a copy": lambda m: m.row,
            "fixed, ms": lambda m: m.fixed * 1e3,
            "latency, µs": lambda m: m.inner.latency * 1e6,
            "bandwidth, GB/s": lambda m: m.inner.bandwidth / 1e9,
        }
        parameters = [[name, *(f"{value(m):.3g}" for m in machines.values())] for name, value in rows.items()]
        text = json.dumps({"parameters": parameters, "steps": steps, "floats": floats})
        Path(folder, "found").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


def seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """The median of rounds that the ranks begin together, after one that is not timed."""
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times[1:])


def measured(dtype: torch.dtype, side: int, floats: int) -> Machine:
    """This machine as the model wants it, from parts of a step."""
    hidden, weight = torch.randn(side, side, dtype=dtype), torch.randn(32 * side, side, dtype=dtype)
    target = torch.randint(len(weight), (4 * side,))
    logits = torch.randn(len(target), len(weight), dtype=dtype)
    copied = torch.empty_like(logits)
    copy = seconds(lambda: copied.copy_(logits))

    def products() -> None:
        gradient = torch.mm(hidden, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), hidden)

    def reduced(x: Tensor) -> float:
        return seconds(lambda: dist.all_reduce(x))

    nothing = reduced(torch.zeros(1)) / 2  # of two steps
    link = Link(nothing, 4 * floats / max(1e-9, reduced(torch.zeros(floats)) - 2 * nothing))
    passes = seconds(lambda: step(fl.cross_entropy, target, None, logits))
    fixed = seconds(lambda: step(fl.linear_cross_entropy, target[:1] % 8, None, hidden[:1], weight[:8]), 50)
    flops = 6 * len(weight) * side**2 / seconds(products)
    row = passes / copy / 1.5
    return Machine("CPU", 2 * logits.nbytes / copy, flops, row, 0.0, fixed, link, link, WORLD, sums=False)


def step(loss: Callable[..., Tensor], target: Tensor, group: Any, *sources: Tensor, **options: Any) -> None:
    """A rank's step; without a group, of its own classes alone."""
    leaves = [x.detach().requires_grad_() for x in sources]
    rows = loss(*leaves, target, reduction="none", group=group, **options)
    torch.autograd.grad(rows, leaves, torch.ones_like(rows))


def compared(name: str, machine: Machine, rows: int, features: int, classes: int, budget: int) -> list[str]:
    """A line of the table: the model's time of a step, and the step's."""
    dtype, half = DTYPES[name], classes // WORLD
    work = Work(rows, features, classes, WORLD, dtype.itemsize, budget=budget)
    generator = torch.Generator().manual_seed(0)  # targets are the same on every rank
    target = torch.randint(WORLD * half, (rows,), generator=generator)
    group = fl.VocabularyShards(dist.group.WORLD, [half] * WORLD)
    if features:
        sources = (torch.randn(rows, features, dtype=dtype), torch.randn(half, features, dtype=dtype))
        predicted = linear_form(work, machine, overlap=False).total
        taken = seconds(lambda: step(fl.linear_cross_entropy, target, group, *sources, budget=budget))
    else:
        logits = torch.randn(rows, half, dtype=dtype)
        predicted = row_form(work, machine).total
        taken = seconds(lambda: step(fl.cross_entropy, target, group, logits))
    shape = f"{rows} × {features} → {classes}" if features else f"{rows} × {classes}"
    cells = ["linear" if features else "row", name, shape, str(work.chunks[0]) if features else "-"]
    return [*cells, f"{predicted * 1e3:.3g}", f"{taken * 1e3:.3g}", f"{predicted / taken:.2f}"]
