"""What an installation holds, however it was made: wheel, sdist or editable."""

import ctypes
import importlib.metadata
import math
import platform
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
    code = "import sys, fusedloss.triton_kernels as k\n"
    code += "print(k.__name__, {*sys.modules} & {'triton_kernels', 'transformers'})\n"
    bare = "try: import triton_kernels as k; print(k.__file__)\nexcept ImportError as error: print('refused:', error)"
    for folder in (REPOSITORY, tmp_path):
        result = run_python(code + bare, folder)
        inside, outside = result.stdout.splitlines()[:2]
        assert inside.split() == ["fusedloss.triton_kernels", "set()"], result.stderr
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


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="its symbols are those of x86-64")
def test_what_a_wheel_is_built_with_asks_for_old_symbols_and_works(tmp_path: Path) -> None:
    """tools/old_glibc.h, on all that it replaces; without it this source needs glibc 2.32 and GCC 11 or newer."""
    if shutil.which("g++") is None or shutil.which("readelf") is None:
        pytest.skip("g++ or readelf is not installed")
    source, library = tmp_path / "uses.cpp", tmp_path / "uses.so"
    source.write_text("""
#include <cmath>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>
static std::vector<std::exception_ptr> kept;
static std::shared_ptr<int> shared;
extern "C" double compute(double x) { return std::exp(x) + std::log(x) + std::log2(x) + std::pow(x, x); }
extern "C" int keep(std::size_t count) {
    shared = std::make_shared<int>(1);
    auto another = shared;
    try { throw std::runtime_error("kept"); } catch (...) { kept.assign(count, std::current_exception()); }
    const auto copies = kept;
    kept.clear();
    try {
        std::rethrow_exception(copies.back());
    } catch (const std::runtime_error& error) {
        return error.what()[0] + another.use_count();
    }
}
extern "C" int too_many(std::size_t count) {
    try { return std::allocator<double>().allocate(count) != nullptr; } catch (const std::bad_alloc&) { return -1; }
}
""")
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-o", str(library), str(source)]
    subprocess.run([*command, "-include", str(REPOSITORY / "tools" / "old_glibc.h")], check=True)
    listing = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True
    ).stdout
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    versions = re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", listing)
    assert {name for name, _ in versions} == set(newest)
    assert all(tuple(map(int, version.split("."))) <= newest[name] for name, version in versions)
    loaded = ctypes.CDLL(str(library))
    loaded.compute.restype, loaded.compute.argtypes = ctypes.c_double, [ctypes.c_double]
    assert loaded.compute(1.5) == pytest.approx(math.exp(1.5) + math.log(1.5) + math.log2(1.5) + 1.5**1.5, rel=1e-15)
    assert loaded.keep(3) == ord("k") + 2
    assert loaded.too_many(ctypes.c_size_t(2**62)) == -1


def test_files_and_version_are_those_of_the_sources() -> None:
    for name in ("py.typed", "_engine.pyi", "_cuda.pyi", "triton_kernels/__init__.py"):
        assert (PACKAGE / name).is_file()
    source = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf8"), re.M)
    assert source is not None
    assert fusedloss.__version__ == importlib.metadata.version("fusedloss") == source[1]
    assert re.search(rf"^## {re.escape(source[1])}\b", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf8"), re.M)


def test_build_requires_neither_torch_nor_cmake() -> None:
    (requires,) = re.findall(r"^requires = (\[.*\])$", (REPOSITORY / "pyproject.toml").read_text(encoding="utf8"), re.M)
    assert not re.search(r"torch|cmake|ninja", requires)
