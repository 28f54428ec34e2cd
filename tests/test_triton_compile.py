"""The Triton kernels compiled for GPUs that are not here: what the compiler makes of them is held to what they need."""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "bench/compile_report.py"
RELEASE = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def compile_report(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, since here kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def everything() -> list[dict[str, Any]]:
    """A way through each pass, and the worst of what has spilled."""
    done = compile_report("--quick")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(everything) -> list[dict[str, Any]]:
    """Of long rows in memory, each at a multiple of 16 bytes."""
    rows = [row for row in everything if "product" not in row["loss"] and row["classes"] == 32000]
    return [row for row in rows if row["dtype"] != "float64" and row["kernel"] != "class_sums_pass"]


@pytest.fixture(scope="module")
def products(everything) -> list[dict[str, Any]]:
    """Of 16 bits: full precision is no tensor cores' work."""
    return [row for row in everything if "product" in row["loss"] and row["dtype"] == "bfloat16"]


def test_every_target_is_compiled_for(everything):
    assert {row["target"] for row in everything} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    split = {f"{kernel}, {role}" for kernel in ("statistics_pass", "class_terms_pass") for role in ("split", "merge")}
    passes = {"statistics_pass", "class_terms_pass", "gradient_pass", "class_sums_pass"}
    assert {row["kernel"] for row in everything} == split | passes
    assert {row["dtype"] for row in everything} == {"bfloat16", "float16", "float32", "float64"}


def test_no_register_is_spilled(everything):
    """The tiles are those of triton 3.9. That of 3.6 has other compilers: NVIDIA's spills up to 15 (class weights with
    the mean), AMD's the sums of a product of 128 x 128."""
    most = {} if RELEASE >= (3, 9) else {"sm_80": 6, "sm_90": 15, "gfx942": 414}
    assert [row for row in everything if row["spills"] > most.get(row["target"], 0)] == []


def test_the_table_is_of_these_kernels_and_none_spills():
    """Of every configuration, of which the other tests compile a few: `make compile-report` writes it."""
    checked = compile_report("--check")
    assert checked.returncode == 0, checked.stderr


def test_logits_move_by_16_bytes(compiled):
    """Two at a time of a row loss, one of a class term and where loss and gradient are made in one, which reads twice;
    half as many where there are twice as many lanes."""
    for row in compiled:
        class_term, in_one = row["loss"] == "dsc_one_vs_rest", "in one" in row["loss"]
        moves = (1 if class_term or in_one else 2) / (2 if row["target"] == "gfx942" else 1)
        twice = row["kernel"] == "statistics_pass" and (class_term or in_one)
        if "merge" not in row["kernel"] and "weighted" not in row["loss"]:  # weights are logits' size
            assert row["wide_loads"] == (2 * moves if twice else moves), row
        if row["kernel"] == "gradient_pass" or in_one:
            assert row["wide_stores"] == moves, row


def test_two_programs_or_more_share_a_multiprocessor(compiled):
    """Else nothing is loaded while one computes."""
    assert [row for row in compiled if row["programs"] is not None and row["programs"] < 2] == []


def test_products_are_the_tensor_cores_work(products):
    assert {row["target"] for row in products} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert [row for row in products if (row["products"] == 0) != ("merge" in row["kernel"])] == []
