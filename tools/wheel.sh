#!/usr/bin/env bash
# Build dist/*.tar.gz, and from it a wheel for every Linux with glibc 2.28 or newer. Then check what the wheel needs:
# a wheel that needs more would load on this machine and fail on others.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" SKBUILD_CMAKE_DEFINE=FUSEDLOSS_CUDA=OFF
# g++, as in `make`: Clang's OpenMP calls (__kmpc_*) are not in GNU's runtime, whose threads are those of torch.
export CXX="${CXX:-g++}" CXXFLAGS="${CXXFLAGS:-} -include $PWD/tools/old_glibc.h"

fail() {
    echo "make wheel: $*" >&2
    exit 1
}

rm -rf dist build/wheel
python -m build --outdir build/wheel
# torch has loaded libgomp by then, its own: a copy in the wheel would have threads of its own, and what the libgomp of
# this machine needs is of no account.
AUDITWHEEL_LD_LIBRARY_PATH=$(python -c 'import torch; print(torch.__path__[0] + "/lib")')
export AUDITWHEEL_LD_LIBRARY_PATH
auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
cp build/wheel/*.tar.gz dist
wheel=$(echo dist/*.whl)
shown=$(auditwheel show "$wheel")
echo "$shown"
if [[ $(uname -m) == x86_64 && ! ${shown//$'\n'/ } =~ tag\ to\ \"manylinux_2_([5-9]|1[0-9]|2[0-8])_ ]]; then
    fail "$wheel needs a glibc newer than 2.28; see its symbols (objdump -T): tools/old_glibc.h has their older twins"
fi

python -m zipfile -e "$wheel" build/wheel/unpacked
engine=$(echo build/wheel/unpacked/fusedloss/_engine*.so)
# All but libgomp are on every system by the rules of manylinux.
needed=$(readelf -d "$engine" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
    grep -vE '^(ld-linux|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so)' || true)
[[ $needed == libgomp.so.1 ]] || fail "$wheel must need libgomp.so.1 and nothing else, and needs: ${needed:-nothing}"
# No pipe: grep would end before nm does, and that be a failure.
[[ $(nm -D "$engine") == *" U GOMP_parallel"* ]] || fail "$wheel does not call GOMP_parallel: torch's threads would be unused"
echo "built $wheel"
