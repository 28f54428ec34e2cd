"""What an installation holds, however it was made: wheel, sdist or editable."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusedloss
from fusedloss import _engine

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(fusedloss.__file__).parent


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in that folder, which `python -c` puts first on sys.path."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def test_triton_kernels_ships_inside_the_package(tmp_path: Path) -> None:
    """Its bare name is refused, unless another project's package of that name is installed."""
    code = "import sys, fusedloss.triton_kernels as k; print(k.__name__, 'triton_kernels' in sys.modules)\n"
    bare = "try: import triton_kernels as k; print(k.__file__)\nexcept ImportError as error: print('refused:', error)"
    for folder in (REPOSITORY, tmp_path):
        result = run_python(code + bare, folder)
        inside, outside = result.stdout.splitlines()[:2]
        assert inside.split() == ["fusedloss.triton_kernels", "False"], result.stderr
        if folder == REPOSITORY:
            assert outside.startswith("refused: ") and "import fusedloss.triton_kernels" in outside
        elif not outside.startswith("refused: "):
            found = Path(outside).resolve()
            assert not any(found.is_relative_to(path) for path in (REPOSITORY, PACKAGE.resolve()))


def test_extension_links_no_torch() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed (binutils)")
    listing = subprocess.run([readelf, "-d", _engine.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert any(name.startswith("libc.so") for name in needed)  # the listing was read
    assert not [name for name in needed if re.match(r"lib(torch|c10|shm|python)", name)]


def test_files_and_version_are_those_of_the_sources() -> None:
    for name in ("py.typed", "_engine.pyi", "_cuda.pyi", "triton_kernels/__init__.py"):
        assert (PACKAGE / name).is_file()
    source = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf8"), re.M)
    assert source is not None
    assert fusedloss.__version__ == importlib.metadata.version("fusedloss") == source[1]
    assert re.search(rf"^## {re.escape(source[1])}\b", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf8"), re.M)


def test_build_requires_neither_torch_nor_cmake() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf8")
    requires = re.search(r"^requires = (\[.*\])$", text, re.M)
    assert requires is not None
    assert not re.search(r"torch|cmake|ninja", requires[1])
