"""The Triton kernels compiled for GPUs that are not here: what the compiler makes of them is held to what they need."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import tritons

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
#: Of the oldest release the report has some targets and dtypes alone, even where it is the installed one.
of_all_targets = pytest.mark.skipif(
    importlib.metadata.version("triton") == tritons.OLDEST,
    reason=f"triton {tritons.OLDEST} compiles fewer kernels here",
)
#: Of the main loop of a kernel for sm_90 with 32000 classes, by either Triton: the most instructions for each logit,
#: barriers and shuffles. A gradient has no such loop, and the whole program is counted. Pairs have two logits.
BOUNDS = {
    ("statistics_pass", "cross_entropy, plain", "bfloat16"): (10, 0, 0),
    ("statistics_pass", "cross_entropy, plain", "float32"): (11, 0, 0),
    ("gradient_pass", "cross_entropy, plain", "bfloat16"): (14, 0, 0),
    ("gradient_pass", "cross_entropy, plain", "float32"): (14, 0, 0),
    ("statistics_pass", "mixed_cross_entropy, plain", "bfloat16"): (16, 0, 0),
    ("statistics_pass", "mixed_cross_entropy, plain", "float32"): (16, 0, 0),
    ("pair_terms_pass", "forward_kl", "bfloat16"): (21, 0, 0),
    ("pair_gradient_pass", "forward_kl", "bfloat16"): (27, 0, 0),
    ("pair_terms_pass", "mixture_kl", "bfloat16"): (60, 0, 0),
    ("pair_gradient_pass", "mixture_kl", "bfloat16"): (48, 0, 0),
}
#: Of statistics, class terms and gradient of one-vs-rest dice together, in bfloat16.
DICE_BOUND = 120


def compile_report(environment: dict[str, str]) -> dict[str, Any]:
    """In a process of its own, since here kernels may be interpreted."""
    command = [sys.executable, str(ROOT / "bench/compile_report.py"), "--json", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    return compile_report(next(iter(tritons.environments().values())))


@pytest.fixture(scope="module")
def oldest() -> dict[str, Any]:
    if tritons.unavailable() is not None:
        pytest.skip(tritons.unavailable())
    return compile_report(tritons.environments()[tritons.OLDEST])


@pytest.fixture(params=["installed", "oldest"])
def report(request) -> dict[str, Any]:
    """What is wrong with the files of bench/results, and of a few kernels what comes of them."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def everything(installed) -> list[dict[str, Any]]:
    """A way through each pass, and the worst of what has spilled."""
    return installed["kernels"]


@pytest.fixture(scope="module")
def compiled(everything) -> list[dict[str, Any]]:
    """Of long rows in memory, each at a multiple of 16 bytes."""
    rows = [row for row in everything if "product" not in row["loss"] and row["classes"] == 32000]
    others = ("class_sums_pass", "scale_pass", "units_pass")
    return [row for row in rows if row["dtype"] != "float64" and row["kernel"] not in others]


@pytest.fixture(scope="module")
def products(everything) -> list[dict[str, Any]]:
    """Of 16 bits: full precision is no tensor cores' work."""
    return [row for row in everything if "product" in row["loss"] and row["dtype"] == "bfloat16"]


@of_all_targets
def test_every_target_is_compiled_for(everything):
    assert {row["target"] for row in everything} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    split = {f"{kernel}, {role}" for kernel in ("statistics_pass", "class_terms_pass") for role in ("split", "merge")}
    passes = {"statistics", "class_terms", "gradient", "class_sums", "top_rest", "scale", "units"}
    passes |= {"pair_terms", "pair_gradient"}
    assert {row["kernel"] for row in everything} == split | {f"{name}_pass" for name in passes}
    assert {row["dtype"] for row in everything} == {"bfloat16", "float16", "float32", "float64"}


def test_the_releases_are_those_that_are_said(everything, oldest):
    assert {row["triton"] for row in oldest["kernels"]} == {tritons.OLDEST}
    assert {row["triton"] for row in everything} == {next(iter(tritons.environments()))} != {tritons.OLDEST}


def test_every_kernel_compiles_and_none_spills(report):
    """And the table is of these kernels, of every configuration, of which this compiles a few."""
    assert [row for row in report["kernels"] if row["error"] or row["spills"]] == []
    assert report["faults"] == []


def test_main_loops_are_short(report):
    rows = [row for row in report["kernels"] if (row["target"], row["classes"]) == ("sm_90", 32000)]
    found = {(row["kernel"], row["loss"], row["dtype"]): row for row in rows}
    counted = {key: tuple(found[key][name] for name in ("per_logit", "barriers", "shuffles")) for key in BOUNDS}
    assert [key for key in BOUNDS if any(x > y for x, y in zip(counted[key], BOUNDS[key], strict=True))] == []
    dice = {row["kernel"]: row["per_logit"] for row in rows if row["loss"] == "dsc_one_vs_rest"}
    kernels = ("statistics_pass", "class_terms_pass", "gradient_pass")
    assert sum(dice[kernel] for kernel in kernels) <= DICE_BOUND


def test_logits_move_by_16_bytes(compiled):
    """All of them; where loss and gradient are made in one they are read twice, and pairs are of two rows."""
    for row in compiled:
        block, warps = map(int, re.findall(r"× (\d+), (\d+) warps", row["tile"])[0])
        threads = warps * (64 if row["target"] == "gfx942" else 32)
        moves = block * (4 if row["dtype"] == "float32" else 2) / (16 * threads)
        in_one = "in one" in row["loss"]
        reads = 2 if in_one or "pair" in row["kernel"] else 1
        # Weights are as large as the logits.
        if "merge" not in row["kernel"] and not re.search("weighted|over_rows", row["loss"]):
            assert row["wide_loads"] == reads * moves, row
        if row["kernel"] in ("gradient_pass", "pair_gradient_pass") or in_one:
            assert row["wide_stores"] == moves, row


def test_two_programs_or_more_share_a_multiprocessor(compiled):
    """Else nothing is loaded while one computes."""
    assert [row for row in compiled if row["programs"] is not None and row["programs"] < 2] == []


@of_all_targets
def test_products_are_the_tensor_cores_work(products):
    assert {row["target"] for row in products} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert [row for row in products if (row["products"] == 0) != ("merge" in row["kernel"])] == []


def test_a_batch_of_another_size_takes_the_same_kernels():
    """Of a run of other lengths none is compiled anew."""
    script = """
import sys
sys.path.insert(0, "bench")
import compile_triton as report
import torch

found = []
for report.ROWS in (4096, 4097):
    found.append([compiled() for _, compiled in report.launches("sm_90", "cross_entropy", torch.bfloat16, 32000)])
assert len(found[0]) == 2 and all(x is y for x, y in zip(*found)), found
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-c", script], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_oldest_release_is_the_one_that_make_installs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f" triton=={tritons.OLDEST} " in makefile and f"{tritons.FOLDER.relative_to(ROOT)}/installed:" in makefile


def test_the_product_of_a_logit_and_a_factor_is_rounded():
    """The compiler fuses products with differences: of large ones, the rounding error of the other would remain."""
    what = "'sm_90', 'statistics, moments', torch.float32, 1000, 'gradient_pass'"
    script = f"import compile_triton, torch\nfor _, call in compile_triton.launches({what}): print(call().asm['ptx'])"
    environment = next(iter(tritons.environments().values()))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mul.rn.f32" in done.stdout and "fma.rn.f32" in done.stdout
