"""The model of many GPUs: against formulas by hand, and what it must obey whatever the figures."""

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss.definition.projection import Form
from fusedloss.engine import chunks as linear

BENCH = Path(__file__).parents[1] / "bench"

sys.path.insert(0, str(BENCH))
model = importlib.import_module("scale_model")
scale = importlib.import_module("scale")
sys.path.remove(str(BENCH))

US = 1e-6
#: Links of round numbers: a byte takes 1 ns in a node of four, 10 ns between nodes.
SLOW = model.Machine("", 1e12, 1e14, 1.0, 5 * US, 0.0, model.Link(1 * US, 1e9), model.Link(2 * US, 1e8), 4)
#: Where nothing but operations takes time.
COUNTING = model.Machine("", math.inf, 1.0, 1.0, 0.0, 0.0, model.Link(0.0, math.inf), model.Link(0.0, math.inf), 8)

WORKS = st.builds(
    model.Work,
    rows=st.integers(1, 2**20),
    features=st.sampled_from([64, 1024, 8192]),
    classes=st.sampled_from([1000, 32000, 262144]),
    ranks=st.sampled_from([1, 2, 8, 64]),
    size=st.sampled_from([2, 4]),
    picks=st.integers(0, 2),
    budget=st.sampled_from([2**21, 2**27, 2**40]),
    sequence=st.booleans(),
    by_chunks=st.booleans(),
)


@pytest.mark.parametrize(
    ("ranks", "gathered", "reduced"),
    [
        (1, 0, 0),
        (2, 5 + (1 + 1), 5 + 2 * (1 + 2)),
        (4, 5 + 3 * (1 + 1), 5 + 6 * (1 + 1)),
        (8, 5 + (2 + 10) + 3 * (1 + 2), 5 + 6 * (1 + 1) + 2 * (2 + 5)),
        (16, 5 + 3 * (2 + 10) + 3 * (1 + 4), 5 + 6 * (1 + 1) + 6 * (2 + 2.5)),
    ],
)
def test_rings_by_hand(ranks: int, gathered: float, reduced: float) -> None:
    """Of 1000 bytes from each rank, and of 4000 bytes."""
    group = model.layout(SLOW, ranks)
    assert model.all_gather(SLOW, 1000, group) == pytest.approx(gathered * US)
    assert model.all_reduce(SLOW, 4000, group) == pytest.approx(reduced * US)


def test_where_ranks_are() -> None:
    assert model.layout(model.H100, 4) == (4, 1)
    assert model.layout(model.H100, 64) == (8, 8)
    assert model.layout(model.H100, 4, stride=2) == (4, 1)
    assert model.layout(model.H100, 8, stride=2) == (4, 2)
    assert model.layout(model.H100, 128, stride=8) == (1, 128)
    assert model.layout(model.H100, 16, stride=64) == (1, 16)


def test_traffic_by_hand() -> None:
    work = model.Work(100, 8, 1000, ranks=4, size=2)
    assert model.traffic(work) == {"statistics": 3 * 6 * 4 * 100, "hidden": 2 * 3 * 25 * 8 * 2}
    assert model.traffic(work._replace(picks=2))["statistics"] == 3 * 8 * 4 * 100
    assert model.traffic(work._replace(sequence=True))["hidden"] == 3 * 3 * 25 * 8 * 2


def test_memory_by_hand() -> None:
    work = model.Work(1000, 64, 5000, ranks=4, size=2, budget=2**20)
    assert work.chunks == (3, 334)
    assert model.memory(work) == {
        "weight": 1250 * 64 * 2,
        "gradient": 1250 * 64 * (4 + 2),
        "logits": 334 * 1250 * 2,
        "hidden": 2 * 1000 * 64 * 2,
        "statistics": 4 * 6 * 4 * 1000,
    }
    whole = model.memory(work._replace(size=4, ranks=1))
    assert whole["gradient"] == 5000 * 64 * 4 and whole["statistics"] == 0
    assert model.memory(work._replace(sequence=True))["hidden"] == 2 * 250 * 64 * 2 + 2 * 334 * 64 * 2


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("budget", [400, 4001, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_those_of_the_linear_forms(rows: int, budget: int, dtype: torch.dtype) -> None:
    form = Form(0.0, budget, False)
    chunks = linear._Chunks(
        torch.zeros(rows, 3, dtype=dtype), torch.zeros(100, 3, dtype=dtype), None,
        torch.zeros(rows, dtype=torch.int64), form, rows, [True] * 3, impl="reference",
    )  # fmt: skip
    work = model.Work(rows, 3, 200, ranks=2, size=dtype.itemsize, budget=budget)
    assert work.chunks == (chunks.count, chunks.rows)
    held = model.memory(work)
    assert held["logits"] == chunks._buffers[0].nbytes
    gradients = linear._Gradients(chunks, [True, True, False])
    assert held["hidden"] == 2 * gradients._hidden.nbytes
    handed = 0 if gradients._weight.dtype == dtype else chunks.weight.nbytes
    assert held["weight"] == chunks.weight.nbytes and held["gradient"] == gradients._weight.nbytes + handed


@given(WORKS)
@settings(max_examples=60, deadline=None)
def test_one_rank_sends_nothing(work: Any) -> None:
    work = work._replace(ranks=1)
    assert set(model.traffic(work).values()) == {0}
    for form in (model.row_form, model.linear_form):
        parts = form(work, SLOW)
        assert parts.statistics == parts.hidden == 0
    assert model.linear_form(work, SLOW) == model.linear_form(work._replace(sequence=True, by_chunks=True), SLOW)
    assert model.data_parallel(work, SLOW, 1) == 0


@given(WORKS, st.sampled_from(sorted(model.RESOURCES)))
@settings(max_examples=100, deadline=None)
def test_faster_parts_never_slow_a_step_down(work: Any, resource: str) -> None:
    faster = model.RESOURCES[resource](model.H100)
    for form in (model.row_form, model.linear_form):
        before, after = form(work, model.H100), form(work, faster)
        assert after.total <= before.total * (1 + 1e-12)
        assert min(before) >= 0


@given(WORKS)
@settings(max_examples=60, deadline=None)
def test_twice_the_ranks_hold_at_most_as_much(work: Any) -> None:
    one, two = model.memory(work), model.memory(work._replace(ranks=2 * work.ranks))
    assert two["weight"] <= one["weight"] and two["gradient"] <= one["gradient"]
    assert two["weight"] * 2 >= one["weight"]


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({"ranks": 1}, (3, 3)),
        ({"ranks": 4}, (4, 4)),
        ({"ranks": 4, "by_chunks": True}, (3, 3)),
        ({"ranks": 1, "budget": 2**16}, (3, 3)),
        ({"ranks": 1, "budget": 2**16, "size": 2}, (3, 4)),
        ({"ranks": 4, "budget": 2**16, "size": 2}, (4, 5)),
    ],
)
def test_how_many_products_there_are(changes: dict[str, Any], products: tuple[int, int]) -> None:
    """Where half precision is summed in float32, and where it is not."""
    work = model.Work(4096, 64, 8192, size=4, budget=2**40)._replace(**changes)
    one = 2 * 4096 * 64 * 8192 / work.ranks
    for sums, count in zip((True, False), products, strict=True):
        parts = model.linear_form(work, COUNTING._replace(sums=sums))
        assert parts.products == pytest.approx(count * one)
        assert parts.total == pytest.approx(parts.products)


def test_passes_are_three_times_the_bytes() -> None:
    machine = COUNTING._replace(copy=1.0, row=1.5)
    work = model.Work(100, 64, 8192, ranks=4, size=2)
    assert model.row_form(work, machine).total == 1.5 * 3 * 100 * 2048 * 2 + 4 * 6 * 4 * 100
    assert model.row_form(work._replace(ranks=1), machine).total == 1.5 * 3 * 100 * 8192 * 2


def test_sums_of_the_weights_gradient() -> None:
    """Of one chunk there is none; of more, each but the first reads it, and half precision writes it wider."""
    machine = COUNTING._replace(copy=1.0)
    work = model.Work(64, 8, 128, size=4, budget=2**40)
    elements = 8 * 128
    assert model.linear_form(work, machine).sums == model.linear_form(work._replace(size=2), machine).sums == 0
    many = work._replace(budget=16 * 128 * 4)  # four chunks
    assert model.linear_form(many, machine).sums == 3 * 4 * elements
    half = many._replace(size=2, budget=16 * 128 * 2)
    assert model.linear_form(half, machine).sums == (4 * 2 + 3 * 4 + (4 + 2)) * elements


def test_the_all_reduce_hides_behind_the_last_product() -> None:
    work = model.Work(4096, 1024, 131072, ranks=8)
    exposed = model.linear_form(work, model.H100, overlap=False).hidden
    assert exposed == model.all_reduce(model.H100, 4096 * 1024 * 2, (8, 1))
    assert model.linear_form(work, model.H100).hidden < exposed
    slow = model.H100._replace(inner=model.Link(0.0, 1e9))
    hidden = model.linear_form(work, slow).hidden
    assert 0 < hidden < model.linear_form(work, slow, overlap=False).hidden


def test_hidden_states_by_chunks_cost_what_nothing_hides() -> None:
    """At the least the first gather of each way and the last reduction, and of a slow link all of it."""
    work = model.Work(2**14, 4096, 128256, ranks=8, sequence=True)
    count, rows = work.chunks
    gathered = model.all_gather(model.H100, rows * 4096 * 2 / 8, (8, 1))
    assert 2 * gathered <= model.linear_form(work, model.H100).hidden < 3 * count * gathered
    slow = model.H100._replace(inner=model.Link(0.0, 1e6))
    gathered = model.all_gather(slow, rows * 4096 * 2 / 8, (8, 1))
    assert model.linear_form(work, slow).hidden == pytest.approx(3 * count * gathered, rel=0.01)


def test_what_limits() -> None:
    work = model.Work(4096, 1024, 131072, ranks=8)

    def found(**changes: Any) -> str:
        return model.limit(lambda m: model.linear_form(work, m).total, model.H100._replace(**changes))

    assert found() == "products"
    assert found(copy=1e11) == "memory"
    assert found(inner=model.Link(1e-6, 1e8)) == "bandwidth"
    assert found(fixed=1.0) == "latency"


def test_smallest_power_of_two() -> None:
    assert model.smallest(lambda n: n >= 5) == 8
    assert model.smallest(lambda n: False) is None


# the report


@pytest.fixture(scope="module")
def text() -> str:
    return scale.predictions(scale.WORKLOADS)


def _tables(text: str) -> Iterator[list[list[str]]]:
    for part in re.findall(r"(?:^\|.*\n)+", text, re.M):
        yield [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]


def test_the_tables_are_whole(text: str) -> None:
    figures, group, budgets, many, crossings = _tables(text)
    assert all(len({len(row) for row in rows}) == 1 for rows in (figures, group, budgets, many, crossings))
    assert len(group) == 2 + len(scale.WORKLOADS) * len(scale.RANKS)
    assert len(many) == 2 + len(scale.WORKLOADS) * 2 * len(scale.GPUS)
    for row in budgets[2:]:
        times = [float(cell) for cell in row[2:]]
        assert sorted(times, reverse=True) == times
    assert [row[0] for row in crossings[2:]] == list(scale.WORKLOADS)
    head = group[0]
    for row in group[2:]:
        parts = [float(cell) for cell in row[2 : head.index("total")]]
        assert sum(parts) + model.H100.fixed * 1e3 == pytest.approx(float(row[head.index("total")]), rel=0.02)
        assert row[head.index("limit")] in model.RESOURCES
        assert (row[1] == "1") == (row[head.index("sent")] == "0") == (parts[3] == 0)


def test_no_speed_of_a_gpu_is_claimed(text: str) -> None:
    assert text.split("\n\n")[1].startswith("**These are predictions.**")
    assert "no speed is claimed" in " ".join(text.split())


def test_the_tables_in_the_tree_are_the_models(text: str) -> None:
    """`make scale` writes them anew."""
    written = scale.OUTPUT.with_suffix(".md").read_text(encoding="utf-8")
    assert written.partition(scale.MEASURED)[0].strip() == text.strip()
    assert scale.MEASURED in written


def test_what_was_measured_stays(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "there" / "scale"
    assert scale.main(["--output", str(output), "--quick"]) == 0
    path = output.with_suffix(".md")
    assert scale.MEASURED not in path.read_text(encoding="utf-8")
    path.write_text(f"old\n{scale.MEASURED} here\n\nit took long\n", encoding="utf-8")
    assert scale.main(["--output", str(output)]) == 0
    assert path.read_text(encoding="utf-8") == f"{text}\n{scale.MEASURED} here\n\nit took long\n"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, BENCH / "scale.py", "--quick", "--calibrate", "--output", tmp_path / "scale"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = (tmp_path / "scale.md").read_text(encoding="utf-8").partition(scale.MEASURED)[2]
    parameters, steps = _tables(measured)
    assert all(float(cell) > 0 for row in parameters[2:] for cell in row[1:])
    assert [row[:2] for row in steps[2:]] == [[f, d] for f in ("linear", "linear", "row") for d in parameters[0][1:]]
    assert all(float(cell) > 0 for row in steps[2:] for cell in row[-3:])
