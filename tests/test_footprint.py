"""How much memory a step takes, told beforehand: the driver's own chunks, and the peak that is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedloss.engine import budgets as chunking
from fusedloss.tools.footprint import footprint

BENCH = Path(__file__).parents[1] / "bench"


_PEAKS = """
import json, sys
import torch, fusedloss as fl
from fusedloss.tools.footprint import footprint
from memory import peak_memory
rows, features, classes, budget = 512, 128, 131072, 96 * 2**20
target = torch.randint(classes, (rows,))
def step(form, rows):
    x, t = hidden[:rows], target[:rows]
    if form == "evaluation":
        with torch.no_grad():
            return fl.linear_cross_entropy(x, weight, t, budget=budget)
    if form == "linear":
        loss = fl.linear_cross_entropy(x, weight, t, budget=budget)
    else:
        logits = torch.nn.functional.linear(x, weight)
        loss = fl.cross_entropy(logits, t, inplace_backward=form == "row_in_place")
    return torch.autograd.grad(loss, (hidden, weight))
result = []
for dtype in (torch.float32, torch.bfloat16):
    hidden = torch.randn(rows, features).to(dtype).requires_grad_()
    weight = torch.randn(classes, features).to(dtype).requires_grad_()
    f = footprint(rows, features, classes, dtype, budget)
    for form in ("evaluation", "linear", "row_in_place", "row"):
        step(form, 8)
        result.append([str(dtype), form, getattr(f, form), peak_memory(lambda: step(form, rows))])
print(json.dumps(result))
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps what was freed")
def test_peaks_are_those_measured() -> None:
    """Within 10 %, in a process of its own, where nothing that was freed before serves again."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(BENCH),
        "FUSEDLOSS_KEEP_BYTES": "0",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # larger blocks go back to the system
    }
    done = subprocess.run([sys.executable, "-c", _PEAKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for dtype, form, told, measured in json.loads(done.stdout):
        if measured is None:
            pytest.skip("the kernel does not tell a process's peak")
        assert 0.95 * told < measured < 1.1 * told, (dtype, form, told, measured)


def test_the_default_budget_is_that_of_the_linear_forms_and_wrong_arguments_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FUSEDLOSS_LINEAR_BUDGET", raising=False)
    assert footprint(4096, 512, 131072, torch.bfloat16).chunk == chunking.DEFAULT_BUDGET
    monkeypatch.setenv("FUSEDLOSS_LINEAR_BUDGET", str(2**20))
    assert footprint(4096, 512, 131072, torch.bfloat16).chunk_rows == 4
    with pytest.raises(TypeError, match=r"features must be an int, got 2\.0"):
        footprint(8, 2.0, 50, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"budget of 199 bytes is too small .* 200 bytes"):
        footprint(8, 8, 50, torch.float32, 199)
