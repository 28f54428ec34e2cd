"""How much memory a step takes, told beforehand: the driver's own chunks, and the peak that is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss as fl
from fusedloss import backends
from fusedloss.definition.projection import Form, Projection
from fusedloss.definition.rows import Rows, Spec
from fusedloss.engine import budgets as chunking
from fusedloss.engine import chunks as linear
from fusedloss.tools.footprint import footprint

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize(
    ("rows", "features", "classes", "budget"),
    [
        (100, 8, 50, 2**20),  # one chunk
        (100, 8, 50, 50 * 4 * 30),  # four, none of them as large as it may be
        (100, 8, 50, 50 * 4),  # a row each
        (1, 1, 1, 4),
        (1009, 3, 7, 999),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_chunks_are_those_of_the_driver(
    rows: int, features: int, classes: int, budget: int, dtype: torch.dtype
) -> None:
    budget *= 2 if dtype == torch.float64 else 1
    hidden, weight = torch.zeros(rows, features, dtype=dtype), torch.zeros(classes, features, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    spec = Spec("cpu", needed=(True, True), form=Form(budget=budget))
    rows_of_hidden = Rows.of(Projection(hidden, weight, None, spec.form), target)
    chunks = linear._Chunks(rows_of_hidden, spec, backends.BACKENDS["cpu"], rows)
    gradients = linear._Gradients(chunks)
    f = footprint(rows, features, classes, dtype, budget)
    assert (f.chunks, f.chunk_rows) == (chunks.count, chunks.size)
    assert f.chunk == sum(buffer.nbytes for buffer in chunks._buffers) <= budget
    assert f.hidden_sum == gradients._hidden[0].nbytes and f.weight_sum == gradients._weight[0].nbytes
    assert f.hidden == hidden.nbytes
    assert f.logits == (hidden @ weight.t()).nbytes and f.weight == weight.nbytes


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


def test_the_default_budget_is_that_of_the_linear_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDLOSS_LINEAR_BUDGET", raising=False)
    assert footprint(4096, 512, 131072, torch.bfloat16).chunk == chunking.DEFAULT_BUDGET
    monkeypatch.setenv("FUSEDLOSS_LINEAR_BUDGET", str(2**20))
    assert footprint(4096, 512, 131072, torch.bfloat16).chunk_rows == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8, 50, torch.float32), ValueError, "rows must be at least 1, got 0"),
        ((8, 2.0, 50, torch.float32), TypeError, "features must be an int, got 2.0"),
        ((8, 8, True, torch.float32), TypeError, "classes must be an int, got True"),
        ((8, 8, 50, torch.int64), TypeError, "dtype must be float64, .* got torch.int64"),
        ((8, 8, 50, torch.float32, 199), ValueError, "budget of 199 bytes is too small .* 200 bytes"),
        ((8, 8, 50, torch.float32, 2e5), TypeError, "budget must be an int, got 200000.0"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        footprint(*arguments)  # type: ignore[arg-type]


def test_the_smallest_budget_is_one_that_the_loss_takes() -> None:
    hidden, weight, target = torch.zeros(8, 8), torch.zeros(50, 8), torch.zeros(8, dtype=torch.int64)
    assert footprint(8, 8, 50, torch.float32, 200).chunk_rows == 1
    assert fl.linear_cross_entropy(hidden, weight, target, budget=200).isfinite()
