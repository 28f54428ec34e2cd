"""The CUDA kernels on a host: their sources compiled by the C++ compiler against tests/cuda/host_device.h."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc/cuda"
NAME = "_cuda_host"


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def load() -> ModuleType:
    """Builds it unless these sources were built before; processes that need it at once wait for the first."""
    cxx = compiler()
    assert cxx is not None
    sources = sorted([*KERNELS.glob("*.cu"), KERNELS / "bindings.cpp"])
    flags = [
        *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-isystem", f"{Path(torch.__file__).parent}/include", "-isystem", sysconfig.get_path("include")),
        *(
            "-I",
            str(ROOT / "tests/cuda"),
            "-DFUSEDLOSS_HOST_DEVICE",
            f"-DFUSEDLOSS_MODULE={NAME}",
            '-DFUSEDLOSS_TARGETS="host"',
        ),
    ]
    inputs = [*sources, *KERNELS.glob("*.h"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "tests/cuda").glob("*.h")]
    key = hashlib.sha256(repr((cxx, flags, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in sorted(inputs):
        key.update(path.read_bytes())
    folder = ROOT / "build" / NAME / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _alone(folder / "lock"):
        if not library.exists():
            objects = [folder / f"{source.stem}.o" for source in sources]
            for source, to in zip(sources, objects, strict=True):
                _run(cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(to))
            _run(cxx, "-shared", *map(str, objects), "-o", str(library) + ".part")
            Path(str(library) + ".part").rename(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with open(lock, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
