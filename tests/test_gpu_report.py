"""The report of a GPU: its text, from figures that are made up; and that without a GPU there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench/gpu_report.py"

_spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
gpu_report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_report)

FAKED = {
    "device": "Made-up GPU",
    "capability": (9, 0),
    "python": "3.12.1",
    "cuda": "13.0",
    "versions": {"fusedloss": "0.1.0", "torch": "2.11.0", "liger-kernel": None},
    "tests": {"passed": True, "summary": "7 passed"},
    "sanitizer": {"memcheck": "ERROR SUMMARY: 0 errors"},
    "row": [
        {
            "rows": 8192, "classes": 32000, "dtype": "bfloat16", "floor": 0.0015, "bytes": 3e9,
            "seconds": {"copy": 0.001, "cross_entropy": 0.003}, "memory": {"copy": 0.0, "cross_entropy": 500.0},
            "hot": {"copy": 0.0009, "cross_entropy": 0.0025},
            "failed": {"liger-kernel": "ModuleNotFoundError: No module named 'liger_kernel'"},
        },
        {
            "rows": 8192, "classes": 128256, "dtype": "bfloat16", "floor": 0.006, "bytes": 12e9,
            "seconds": {"copy": 0.004, "cross_entropy triton": 0.0081, "cross_entropy cuda": 0.00612},
            "hot": {"copy": 0.004, "cross_entropy triton": 0.008, "cross_entropy cuda": 0.006},
            "memory": {"copy": 0.0, "cross_entropy triton": 2004.0, "cross_entropy cuda": 2004.0}, "failed": {},
        },
    ],
    "linear": [
        {
            "rows": 4096, "features": 512, "classes": 32000, "dtype": "bfloat16", "floor": 0.002,
            "seconds": {"products": 0.002, "linear_cross_entropy": 0.003},
            "hot": {"products": 0.002, "linear_cross_entropy": 0.003},
            "memory": {"products": 10.0, "linear_cross_entropy": 250.4}, "failed": {},
        }
    ],
    "left_out": ["row 512 × 262144 × float32"],
}  # fmt: skip


def test_text_of_made_up_figures():
    text = gpu_report.markdown(FAKED)
    for line in (
        "# Benchmarks: Made-up GPU",
        "Python 3.12.1, CUDA 13.0, fusedloss 0.1.0, torch 2.11.0.",
        "Not installed: liger-kernel.",
        "Tests on this GPU: passed: 7 passed",
        "- compute-sanitizer, memcheck: ERROR SUMMARY: 0 errors",
        "| 8192 × 32000 | bfloat16 | copy | 1 | 0.67 | 0.9 | 2000 |",
        "| 8192 × 32000 | bfloat16 | cross_entropy | 3 | 2.00 | 2.5 | 1000 |",
        "| 4096 × 512 × 32000 | bfloat16 | linear_cross_entropy | 3 | 1.50 | 3 | 250 |",
        "- liger-kernel: ModuleNotFoundError: No module named 'liger_kernel'",
        "- row 512 × 262144 × float32",
        "# Made-up GPU",
        "(9, 0, torch.bfloat16): (Timing(128256, 8.1, 6.12),),",
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize(
    ("tests", "line"), [(None, "not run."), ({"passed": False, "summary": "1 failed"}, "FAILED: 1 failed")]
)
def test_red_tests_show(tests, line):
    assert f"Tests on this GPU: {line}" in gpu_report.markdown(FAKED | {"tests": tests}).splitlines()


def test_where_nothing_was_sanitized_it_says_so():
    assert "compute-sanitizer: not run." in gpu_report.markdown(FAKED | {"sanitizer": None}).splitlines()


def test_what_the_sanitizer_would_run():
    """On the CPU: the engine, and Triton's kernels where they are interpreted."""
    small = gpu_report.SMALL_RUN.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    exec(compile(small, "small run", "exec"), {})


def test_the_file_is_named_after_the_device():
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_failure_of_our_own_is_no_footnote():
    assert gpu_report.module_is_ours("cross_entropy in place")
    assert gpu_report.module_is_ours("linear_cross_entropy evaluated fused")
    assert not gpu_report.module_is_ours("liger-kernel")


def test_kernels_that_are_not_built_are_no_failure(monkeypatch):
    for reason in (None, "it is not built"):
        monkeypatch.setattr(gpu_report.backends, "unavailable", lambda impl, reason=reason: reason)
        assert gpu_report.module_is_ours("cross_entropy cuda") == (reason is None)
        assert gpu_report.module_is_ours("cross_entropy triton") == (reason is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_fails_and_writes_nothing():
    before = set(gpu_report.RESULTS.iterdir())
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "gpu_report: there is no GPU that torch can use; nothing was tested or timed\n"
    assert set(gpu_report.RESULTS.iterdir()) == before
