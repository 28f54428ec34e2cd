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


def test_bare_triton_kernels_fails_in_the_repository() -> None:
    result = run_python("import triton_kernels", REPOSITORY)
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "import fusedloss.triton_kernels" in result.stderr


def test_bare_triton_kernels_is_never_ours_elsewhere(tmp_path: Path) -> None:
    # It fails, unless another project's package of that name is installed.
    result = run_python("import triton_kernels; print(triton_kernels.__file__)", tmp_path)
    if result.returncode == 0:
        found = Path(result.stdout.strip()).resolve()
        assert not found.is_relative_to(REPOSITORY)
        assert not found.is_relative_to(PACKAGE.resolve())
    else:
        assert re.search(r"^(ImportError|ModuleNotFoundError): ", result.stderr, re.M), result.stderr


@pytest.mark.parametrize("in_repository", [True, False])
def test_triton_kernels_ships_inside_the_package(in_repository: bool, tmp_path: Path) -> None:
    code = "import sys, fusedloss.triton_kernels as k; print(k.__name__, 'triton_kernels' in sys.modules)"
    result = run_python(code, REPOSITORY if in_repository else tmp_path)
    assert result.stdout.split() == ["fusedloss.triton_kernels", "False"], result.stderr


def test_extension_links_no_torch() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed (binutils)")
    listing = subprocess.run([readelf, "-d", _engine.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert any(name.startswith("libc.so") for name in needed)  # the listing was read
    assert not [name for name in needed if re.match(r"lib(torch|c10|shm|python)", name)]


@pytest.mark.parametrize("name", ["py.typed", "_engine.pyi", "_cuda.pyi", "triton_kernels/__init__.py"])
def test_file_ships(name: str) -> None:
    assert (PACKAGE / name).is_file()


def test_version_is_the_one_of_the_sources() -> None:
    source = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf8"), re.M)
    assert source is not None
    assert fusedloss.__version__ == importlib.metadata.version("fusedloss") == source[1]
    assert re.search(rf"^## {re.escape(source[1])}\b", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf8"), re.M)


def test_build_requires_neither_torch_nor_cmake() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf8")
    requires = re.search(r"^requires = (\[.*\])$", text, re.M)
    assert requires is not None
    assert not re.search(r"torch|cmake|ninja", requires[1])
