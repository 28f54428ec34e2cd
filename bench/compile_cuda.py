"""What nvcc makes of the CUDA kernels, for GPUs that need not be here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from fusedloss.backends import cuda

KERNELS = Path(__file__).parents[1] / "csrc/cuda"
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
TARGETS = ("sm_90a", "sm_80", "sm_100")
#: Shared memory of a block and of a multiprocessor of sm_90, in bytes.
BLOCK, MULTIPROCESSOR = 227 * 1024, 228 * 1024
_KERNEL = re.compile(r"(row|class_sums|top_rest|scale)_pass")
CLASSES = (1000, 32000, 128256, 262144)


@dataclass(frozen=True)
class Compiled:
    """A kernel as a machine would run it."""

    target: str
    kernel: str
    loss: str
    dtype: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that move registers to local memory and back
    wide_copies: int  # of 16 bytes into shared memory
    wide_stores: int


def compile_all(pairs: Iterable[tuple[str, str]] | None = None) -> list[Compiled]:
    """For all pairs of target and dtype, or these, as the build does it, with -O3."""
    pairs = product(TARGETS, DTYPES) if pairs is None else pairs
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_compile, dtype, target, Path(folder)) for target, dtype in pairs]
        return [kernel for job in jobs for kernel in job.result()]


def _compile(dtype: str, target: str, folder: Path) -> list[Compiled]:
    cubin = folder / f"{dtype}.{target}.cubin"
    options = ["-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={target}", "-o", str(cubin)]
    log = _run("nvcc", *options, str(KERNELS / f"{dtype}.cu"))
    listing = _run(_cuobjdump() or "", "-sass", str(cubin))
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing, re.S))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        re.S,
    )
    assert len(report) == len(code) > 0, log
    return [
        Compiled(
            target,
            _KERNEL.findall(name)[0],
            _loss(name),
            dtype,
            int(registers),
            int(stack),
            len(re.findall(r"\b(?:LDL|STL)\b", code[name])) + int(spilled),
            len(re.findall(r"\bLDGSTS\.E\.[\w.]*128\b", code[name])),
            len(re.findall(r"\bSTG\.E[\w.]*\.128\b", code[name])),
        )
        for name, stack, spilled, registers in report
    ]


def _loss(name: str) -> str:
    term = re.search(r"\d((?:Dsc|Tversky)[A-Za-z]+?)E", name)
    return re.sub(r"(?<=.)([A-Z])", r"_\1", term[1]).lower() if term else ""


def _run(command: str, *arguments: str) -> str:
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr}")
    return done.stdout + done.stderr


def version() -> str:
    found = re.search(r"V([\d.]+)", _run("nvcc", "--version"))
    assert found is not None
    return found[1]


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    return None if _cuobjdump() else "there is no cuobjdump on PATH, nor triton, which brings one"


def _cuobjdump() -> str | None:
    triton = find_spec("triton")
    folders = triton.submodule_search_locations if triton and triton.submodule_search_locations else []
    return shutil.which("cuobjdump") or next((f"{f}/backends/nvidia/bin/cuobjdump" for f in folders), None)


def rows_of(kernels: Iterable[Compiled]) -> list[dict[str, object]]:
    found = version()
    return [{"nvcc": found} | asdict(kernel) for kernel in kernels]


def markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    """Of a .csv file's lines: the kernel of all row losses on sm_90a, and how `plan` cuts a row."""
    head = ["dtype", "registers", "spills", *(f"{classes} classes" for classes in CLASSES)]
    lines = [
        f"CUDA C++, the kernel of all row losses, by nvcc {rows[0]['nvcc']} for sm_90a. Under a number of classes: the",
        "parts of a row, each the work of a block, and how many blocks a multiprocessor holds.",
        "",
        f"| {' | '.join(head)} |",
        f"| --- {'| ---: ' * (len(head) - 1)}|",
    ]
    for row in rows:
        if (row["target"], row["kernel"], row["loss"]) == ("sm_90a", "row", ""):
            cuts = [_cut(row["dtype"], classes, int(row["registers"])) for classes in CLASSES]
            lines.append(f"| {' | '.join([row['dtype'], row['registers'], row['spills'], *cuts])} |")
    return lines


def _cut(dtype: str, classes: int, registers: int) -> str:
    threads, parts, slots = cuda.plan(classes, DTYPES[dtype], BLOCK, True)
    size = slots * (threads * cuda.ITEM_BYTES + 16) + cuda.OVERHEAD
    of_block = -(-registers // 8) * 8 * threads
    blocks = min(65536 // of_block, MULTIPROCESSOR // (size + 1024), 2048 // threads, 32)
    twice = slots * threads * cuda.ITEM_BYTES * parts < classes * DTYPES[dtype]
    return f"{parts}, {blocks}{', read twice' if twice else ''}"


if __name__ == "__main__":
    print(json.dumps([asdict(kernel) for kernel in compile_all()]))
    sys.exit()
