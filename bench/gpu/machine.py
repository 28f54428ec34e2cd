"""The machine, the extensions, and what the rest is judged by: copies and products."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import bundle
from .part import Part, described
from .timing import Clock

PACKAGES = ("fusedloss", "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "pytest-xdist")


def machine(part: Part) -> None:
    for package in PACKAGES:
        part.row(what=package, found=bundle.version(package) or "not installed")
    part.row(what="Python", found=platform.python_version())
    part.row(what="cores", found=str(os.cpu_count()))
    part.row(what="CUDA of torch", found=str(torch.version.cuda or torch.version.hip))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        part.row(what="GPU", found=f"{found}, {gpu.L2_cache_size / 2**20:.0f} MiB of L2")
    from fusedloss import backends

    for impl in backends.LINEAR_IMPLS:
        part.row(what=f"impl={impl!r}", found=backends.unavailable(impl) or "ready")
    part.row(what="CUDA kernels", found=backends.cuda.TARGETS or "none")
    for tool in ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
        part.row(what=tool, found=shutil.which(tool) or "not on PATH")
    if shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.used"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        part.text(*subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines())


def build(part: Part) -> None:
    """Only where nobody has: a minute on many cores."""
    missing = [] if part.rehearse else bundle.missing()
    if not missing:
        return part.left_out("all of it", "it is a rehearsal" if part.rehearse else "both extensions load")
    with part.attempt(f"building {', '.join(missing)}"):
        major, minor = torch.cuda.get_device_capability()
        for built in bundle.build(sys.executable, bundle.SCRATCH / "build", f"{major}{minor}a-real"):
            shutil.copyfile(built, bundle.ROOT / "fusedloss" / built.name)
        part.row(built=", ".join(missing), still_missing=", ".join(bundle.missing()) or "none")


def ceilings(part: Part) -> None:
    """Columns: GB/s of bytes read and written, TFLOP/s of products; each the median of cold runs."""
    clock = Clock(part.device)
    options: dict[str, Any] = {"device": part.device, "dtype": torch.bfloat16}

    def measure(what: str, call: Callable[[], object], moved: float = 0, operations: float = 0) -> None:
        if part.late(what):
            return
        try:
            seconds = clock.median(call) / 1e3
        except Exception as error:  # an overload that this torch or this device has not
            return part.left_out(what, described(error))
        rate = {"GB/s": moved / seconds / 1e9 if moved else None}
        part.row(what=what, ms=seconds * 1e3, **rate, **{"TFLOP/s": operations / seconds / 1e12 or None})

    for size in (2**14, 2**15) if part.rehearse else (2**29, 2**31, 2**33):
        source = torch.randn(size // 2, **options)
        target = torch.empty_like(source)
        measure(f"copy of {size >> 20} MiB", lambda x=source, y=target: y.copy_(x), moved=2 * size)
        measure(f"sum of {size >> 20} MiB", lambda x=source: x.sum(), moved=size)
    del source, target
    from .tables import LINEAR_CASES

    shapes = [(8192, 8192, 8192), *LINEAR_CASES]
    for n, d, v in [(16, 16, 32)] if part.rehearse else shapes:
        x, w, g = (torch.randn(shape, **options) for shape in ((n, d), (v, d), (n, v)))
        total = torch.zeros(v, d, device=part.device)
        new: dict[str, Any] = {"out_dtype": torch.float32, "out": total}
        products: dict[str, Callable[[], object]] = {
            "logits": lambda x=x, w=w, g=g: torch.mm(x, w.t(), out=g),
            "by hidden": lambda x=x, w=w, g=g: torch.mm(g, w, out=x),
            "by weight": lambda x=x, w=w, g=g: torch.mm(g.t(), x, out=w),
            "by weight, mm out_dtype": lambda x=x, g=g, new=new: torch.mm(g.t(), x, **new),
            "by weight, addmm out_dtype": lambda x=x, g=g, t=total, new=new: torch.addmm(t, g.t(), x, **new),
            "by weight, mm and add_": lambda x=x, g=g, t=total: t.add_(torch.mm(g.t(), x)),
        }
        for name, product in products.items():
            measure(f"{n} × {d} × {v} {name}", product, operations=2.0 * n * d * v)
            g.normal_()
        del x, w, g, total, new, products
