"""Makes in .gpu/, which git ignores, what saves minutes on a machine with a GPU: for its Python and its torch.

Extensions for that Python and sm_90a, Triton's cache of the kernels that gpu_report.py uses with their launchers, and
the wheels of the peers. The given interpreter must have the torch and the Triton of that machine, and pybind11.
gpu_report.py takes from the folder what fits, and says how many kernels it found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile

from gpu import bundle, precompile

PEERS = ("liger-kernel", "cut-cross-entropy")
MOST_BYTES = 60 * 2**20
ARCH = 90

#: Of compiling kernels, for which a busy machine of two cores needs hours.
MOST_SECONDS = 24 * 3600

#: What a launcher of Triton's links to; on the machine it finds the driver's own.
LIBCUDA = """
cuLaunchKernelEx cuGetErrorString cuPointerGetAttribute cuCtxGetCurrent cuCtxSetCurrent cuDevicePrimaryCtxRetain
cuModuleLoadData cuModuleGetFunction cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuDeviceGet
cuDeviceGetAttribute cuOccupancyMaxActiveClusters cuCtxGetLimit cuCtxSetLimit cuTensorMapEncodeTiled
cuTensorMapEncodeIm2col cuLaunchKernel
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="of the machine's version, with its torch and Triton")
    parser.add_argument("--only", choices=STEPS, action="append", help="one of %(choices)s; default all")
    options = parser.parse_args()
    bundle.FOLDER.mkdir(exist_ok=True)
    for name, step in STEPS.items():
        if not options.only or name in options.only:
            step(options.python)
    sizes = {file: file.stat().st_size for file in sorted(bundle.FOLDER.rglob("*")) if file.is_file()}
    for file, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {file.relative_to(bundle.ROOT)}")
    total = sum(sizes.values())
    print(f"{total / 2**20:6.1f} MiB of at most {MOST_BYTES / 2**20:.0f}")
    return 0 if total <= MOST_BYTES else 1


def extensions(python: str) -> None:
    lib = bundle.FOLDER / "lib"
    shutil.rmtree(lib, ignore_errors=True)
    lib.mkdir()
    ask = "import sysconfig; print(sysconfig.get_config_var('SOABI'))"
    abi = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    for built in bundle.build(python, bundle.ROOT / f"build/gpu-{abi}"):
        shutil.copy(built, lib)
    (lib / "made.txt").write_text(bundle.sources_key())
    bundle.write_metadata(lib)


def triton(python: str) -> None:
    """At the path at which the report unpacks it: the cache holds absolute paths.

    What an earlier run that did not come to its end has compiled of the same kernels is there already.
    """
    site = bundle.SCRATCH / "prebuild"
    bundle.write_metadata(site)
    stub = site / "libcuda.so.1"
    source = "".join(f"void {name}(void) {{}}\n" for name in LIBCUDA.split())
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", str(stub)], input=source, text=True, check=True)
    path = os.pathsep.join([str(bundle.ROOT), str(site), str(bundle.ROOT / "bench")])
    environment = os.environ | {"TRITON_CACHE_DIR": str(bundle.CACHE), "PYTHONPATH": path}
    environment |= {"TRITON_LIBCUDA_PATH": str(site), "LD_LIBRARY_PATH": str(site)}
    ask = "from gpu.precompile import cache_key; print(cache_key())"
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, env=environment)
    key, begun = asked.stdout.strip(), bundle.CACHE / "begun.txt"
    if not begun.exists() or begun.read_text() != key:
        shutil.rmtree(bundle.CACHE, ignore_errors=True)
        bundle.CACHE.mkdir(parents=True)
        begun.write_text(key)
    found = precompile.compile_all(python, ARCH, environment, seconds=MOST_SECONDS)
    kernels = found["compiled"] + found["hits"]
    print(f"{kernels} kernels for sm_{ARCH}, {found['hits']} of them hits, and launchers for {found['launchers']}")
    for why in found["failures"]:
        print(f"failed: {why}", file=sys.stderr)
    if found["stopped"]:
        sys.exit(f"{found['stopped']} of the processes that compile did not end; nothing was packed")
    (bundle.CACHE / "made.json").write_text(json.dumps({"key": key, "kernels": kernels}))
    with tarfile.open(bundle.ARCHIVE, "w:gz") as archive:
        for file in sorted(bundle.CACHE.rglob("*")):
            if file.suffix in (".cubin", ".json", ".so"):  # the others are for people
                archive.add(file, file.relative_to(bundle.CACHE))


def wheels(python: str) -> None:
    whl = bundle.FOLDER / "whl"
    shutil.rmtree(whl, ignore_errors=True)
    for peer in PEERS:
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(whl), peer]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{peer} could not be had: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


STEPS = {"extensions": extensions, "triton": triton, "wheels": wheels}

if __name__ == "__main__":
    sys.exit(main())
