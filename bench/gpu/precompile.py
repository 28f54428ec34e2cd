"""Compiles the Triton kernels that the report uses, for a GPU that need not be there, on all cores.

The report's own losses run on CPU tensors, with a launch that compiles instead; so the kernels get just the constants,
types and alignments that they get on a GPU. Results are garbage, and thrown away. Each process compiles its share.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from . import bundle
from .part import Part

#: Enough that no row is split, as of the 8192 of the report. Keys hold no number of rows but whether 16 divides it.
MANY_ROWS = 2048

#: Of the GPU, which decide what is split: an H200's.
MULTIPROCESSORS = 132


def cache_key() -> str:
    """What compiled kernels depend on: Triton itself, their sources, and which ones the report launches."""
    from triton.runtime.cache import triton_key

    key = hashlib.sha256(triton_key().encode())
    for folder in ("triton_kernels", "fusedloss/backends", "bench/gpu"):
        for file in sorted((bundle.ROOT / folder).glob("*.py")):
            key.update(file.read_bytes())
    return key.hexdigest()


def kernels(part: Part) -> None:
    """Where those of .gpu/ are not these, all are compiled now, on all cores, rather than one by one in the parts."""
    made = bundle.CACHE / "made.json"
    key = cache_key()
    known = json.loads(made.read_text()) if made.exists() and not part.rehearse else {}
    if known.get("key") == key:
        return part.row(kernels=known["kernels"], made="beforehand", key=key[:16])
    if part.rehearse:
        arch = 90
    else:
        import torch

        arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    found = compile_all(sys.executable, arch, dict(os.environ), part.rehearse, part.left)
    part.row(kernels=found["compiled"] + found["hits"], made=f"now, {found['hits']} hits", key=key[:16])
    for why in found["failures"]:  # of a sweep's tile, perhaps; another shows where it is launched
        part.left_out("kernels", why)


def compile_all(
    python: str, arch: int, environment: dict[str, str], tiny: bool = False, seconds: float = 3600
) -> dict[str, Any]:
    """Return how many were in the cache and how many were compiled, what failed, and how many processes were stopped.

    They have so many seconds.
    """
    workers = 1 if tiny else os.cpu_count() or 1
    environment = {name: x for name, x in environment.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [python, "-m", "gpu.precompile", str(arch), "tiny" if tiny else "all"]
    options: dict[str, Any] = {
        "cwd": bundle.ROOT / "bench",
        "env": environment,
        "stdout": subprocess.PIPE,
        "text": True,
    }
    processes = [subprocess.Popen([*command, str(share), str(workers)], **options) for share in range(workers)]
    found: dict[str, Any] = {"hits": 0, "compiled": 0, "launchers": 0, "failures": [], "stopped": 0}
    end = time.monotonic() + seconds
    for process in processes:
        try:
            said = process.communicate(timeout=max(0.1, end - time.monotonic()))[0]
            of_one = json.loads(said.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            process.kill()
            why = f"a process that compiles: {type(error).__name__}, exit status {process.wait()}"
            of_one = {"failures": [why], "stopped": 1}
        for name, value in of_one.items():
            found[name] += value
    return found


def _work(arch: int, tiny: bool, share: int, workers: int) -> dict[str, Any]:
    # The operators are registered for the CPU, as for the interpreter; Triton itself, imported later, compiles.
    os.environ["TRITON_INTERPRET"] = "1"
    from fusedloss.backends import triton as backend

    del os.environ["TRITON_INTERPRET"]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    assert not backend._kernels().launch.INTERPRETED
    target = GPUTarget("cuda", arch, 32)
    answers = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    driver.set_active(SimpleNamespace(**answers))  # type: ignore[arg-type]
    counts: Counter[str] = Counter(hits=0, compiled=0, launchers=0)
    failures: dict[str, None] = {}
    seen: set[str] = set()

    def count(cache_hit: bool, **_: Any) -> None:
        counts["hits" if cache_hit else "compiled"] += 1

    def compiled(kernel: Any, grid: tuple[int, ...], device: Any, *arguments: Any, **constants: Any) -> None:
        key = repr((kernel.__name__, _signature(arguments), sorted(constants.items(), key=repr)))
        if key in seen:
            return
        seen.add(key)
        if zlib.crc32(key.encode()) % workers != share:
            return
        try:
            binary = kernel.warmup(*arguments, grid=grid, **constants)
        except Exception as error:
            failures[f"{kernel.__name__}, {constants}: {type(error).__name__}: {error}"[:300]] = None
            return
        if launcher is not None:
            launcher(binary.src, binary.metadata)
            counts["launchers"] += 1

    triton.knobs.compilation.listener = count
    launcher = _launcher()
    with (
        patch.object(backend, "_launch", compiled),
        patch.object(backend, "_multiprocessors", lambda device: MULTIPROCESSORS, create=True),
    ):
        for run in _everything(tiny):
            try:
                run()
            except Exception as error:
                failures[f"a loss did not run: {type(error).__name__}: {error}"[:300]] = None
    return {**counts, "failures": list(failures)}


def _launcher() -> Callable[..., Any] | None:
    """What Triton builds with a C compiler for each signature; None where it would find no libcuda to link."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        CudaUtils()
        return CudaLauncher
    except Exception:
        return None


def _signature(argument: Any) -> Any:
    """What Triton tells two calls of a kernel apart by."""
    if isinstance(argument, tuple):
        return tuple(map(_signature, argument))
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() < 32
    if hasattr(argument, "data_ptr"):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    return argument if argument is None else type(argument).__name__


class _Compiling(Part):
    """A part whose results are nothing."""

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    def write(self, **record: Any) -> None:
        pass

    @contextmanager
    def attempt(self, what: str, ours: bool = True) -> Iterator[None]:
        with suppress(Exception):
            yield


def _everything(tiny: bool) -> Iterator[Callable[[], object]]:
    """All that the report launches, the timed losses first. Logits are never read, so that any memory will do."""
    import torch

    from . import correctness, tables, tiles

    def empty(*shape: Any, generator: Any = None, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, **options)

    def fewer(rows: int) -> int:
        return min(rows, MANY_ROWS)

    with patch.object(torch, "randn", empty):
        part = _Compiling("", Path(tempfile.gettempdir()), 1e9)
        for case in tiles.TINY if tiny else tiles.CASES:
            problem = tiles._problem(part, case._replace(rows=fewer(case.rows)))
            for sweep in tiles.SWEEPS[:1] if tiny else tiles.SWEEPS:
                table = tiles.run_once(sweep, *problem)[1].table
                for tile in [] if tiny else tiles.tiles_of(table, case.dtype.itemsize):
                    yield partial(tiles.run_once, sweep, *problem, table, tile)
        if tiny:
            return
        for case in tables.ROW_CASES:
            row_problem = tables.RowProblem(case._replace(rows=fewer(case.rows)), part.device)
            yield from (c.make() for name, c in row_problem.ours(every=True).items() if "triton" in name)
        for case in tables.LINEAR_CASES:
            # The depth is a matter of the products, and 16 divides it here and there.
            linear_problem = tables.LinearProblem(case._replace(rows=fewer(case.rows), features=64), part.device)
            yield from (c.make() for name, c in linear_problem.ours().items() if "cuda" not in name)
    yield lambda: correctness.traps(part)
    for compiled in (correctness.triton, correctness.fused):
        yield lambda compiled=compiled: compiled(part)
    for arguments in (["triton", "cpu", "small"], ["triton", "cpu", "large"]):
        with patch.object(sys, "argv", ["workload.py", *arguments]):
            yield lambda: runpy.run_path(str(Path(__file__).with_name("workload.py")))


if __name__ == "__main__":
    print(json.dumps(_work(int(sys.argv[1]), sys.argv[2] == "tiny", int(sys.argv[3]), int(sys.argv[4]))))
