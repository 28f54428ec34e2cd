"""What gpu_prebuild.py leaves in .gpu/, and how the report takes it into use: without pip, without a network."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu"
ARCHIVE = FOLDER / "triton.tgz"

#: The same on both machines: Triton finds a kernel by the absolute paths that its cache holds.
SCRATCH = Path("/tmp/fusedloss-gpu")
CACHE = SCRATCH / "triton"
SITE = SCRATCH / "site"


def unpacked() -> dict[str, str]:
    """Put extensions, peers and compiled kernels where they are found; return the environment of the parts.

    What does not fit, or is broken, is named and left aside: the report can do without.
    """
    environment, path = dict(os.environ), [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    SITE.mkdir(parents=True, exist_ok=True)
    for built in FOLDER.glob(f"lib/*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        with _told(built):
            if (built.parent / "made.txt").read_text() != sources_key():
                raise ValueError("it was built from other sources than those in csrc")
            to = ROOT / "fusedloss" / built.name
            if not to.exists() or to.stat().st_mtime < built.stat().st_mtime:
                shutil.copyfile(built, to)
    for wheel in FOLDER.glob("whl/*.whl"):
        with _told(wheel), zipfile.ZipFile(wheel) as archive:
            archive.extractall(SITE)
    if ARCHIVE.exists():
        with _told(ARCHIVE), tarfile.open(ARCHIVE) as kernels:
            kernels.extractall(CACHE, filter="data")
        environment["TRITON_CACHE_DIR"] = str(CACHE)
    if importlib.util.find_spec("fusedloss") is None:  # a checkout that nobody installed
        path.insert(0, str(ROOT))
        write_metadata(SITE)
    return environment | {"PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"{file} is left aside: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def sources_key() -> str:
    """Of the extensions: one of other sources would be called in other ways than it can be."""
    files = sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_metadata(site: Path) -> None:
    """Of the package, which asks for its own version, as an installation would have written it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.findall(r'^version = "(.*)"', text, re.M)[0]
    folder = site / f"fusedloss-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fusedloss\nVersion: {version}\n", encoding="utf-8")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build(python: str, folder: Path, architectures: str = "90a-real") -> list[Path]:
    """Build both extensions for an interpreter; return their files. Raises with what CMake said."""
    ask = "import pybind11; print(pybind11.get_cmake_dir())"
    pybind = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DFUSEDLOSS_CUDA=ON", f"-DFUSEDLOSS_CUDA_ARCHITECTURES={architectures}"]
    configure += [f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}")
    return [*folder.glob("_engine*.so"), *folder.glob("_cuda*.so")]


def missing() -> list[str]:
    """Which extensions a new process could not import."""
    ask = "import importlib, sys; importlib.import_module(sys.argv[1])"
    names = ("fusedloss._engine", "fusedloss._cuda")
    return [n for n in names if subprocess.run([sys.executable, "-c", ask, n], capture_output=True).returncode]
