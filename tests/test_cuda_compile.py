"""The CUDA kernels compiled for GPUs that are not here: what nvcc makes of them is held to what they need."""

import sys
from pathlib import Path

import pytest

from fusedloss import backends

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import compile_cuda

if compile_cuda.unavailable() is not None:
    pytest.skip(f"the CUDA kernels: {compile_cuda.unavailable()}", allow_module_level=True)

pytestmark = [pytest.mark.compile, pytest.mark.slow]

#: The GPU that matters most; and every target and every dtype, each at the least once: `make compile-report` takes all.
PAIRS = {
    "sm_90a": (("sm_90a", "bfloat16"),),
    "others": (("sm_80", "float16"), ("sm_100", "float32"), ("sm_90a", "float64")),
}


@pytest.fixture(scope="module", params=["sm_90a", pytest.param("others", marks=pytest.mark.exhaustive)])
def compiled(request: pytest.FixtureRequest) -> list[compile_cuda.Compiled]:
    pairs = PAIRS[request.param]
    kernels = compile_cuda.compile_all(pairs)
    epilogues = backends.BACKENDS["cpu"].epilogues
    terms = {*epilogues.classes}
    names = {("row", loss) for loss in {"", compile_cuda.WITH_PICKS, compile_cuda.WITH_MOMENTS, *terms}} | {
        ("top_rest", ""),
        ("scale", ""),
    }
    names |= {("class_sums", loss) for loss in terms if loss.endswith("over_rows")}
    names |= {("pair", loss) for loss in epilogues.pairs}
    assert {(k.target, k.dtype, k.kernel, k.loss) for k in kernels} == {
        (*pair, *name) for pair in pairs for name in names
    }
    return kernels


def test_nothing_is_spilled(compiled):
    assert [k for k in compiled if k.spills or k.stack] == []


def test_logits_move_by_16_bytes(compiled):
    """Into shared memory, and out of it."""
    assert [k for k in compiled if k.kernel == "row" and not (k.wide_copies and k.wide_stores)] == []
    assert [k for k in compiled if k.kernel in ("scale", "pair") and not k.wide_stores] == []


def test_blocks_share_a_multiprocessor(compiled):
    """Three of 256 threads, or two in float64, or four of 128; else nothing is read while one computes."""
    roomy = [k for k in compiled if k.dtype == "float64" or k.kernel == "class_sums"]
    assert [k for k in compiled if k.registers > (128 if k in roomy else 80)] == []


def test_loops_are_few_instructions(compiled):
    """For each logit of a plain loss: those of the scan and those of the gradient."""
    plain = [k for k in compiled if (k.target, k.dtype, k.kernel, k.loss) == ("sm_90a", "bfloat16", "row", "")]
    assert [k for k in plain if k.scan + k.gradient > 18] == []
