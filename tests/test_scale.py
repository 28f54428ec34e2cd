"""The predictions for many GPUs: the report is what the model says, and the model has the package's chunks."""

import sys
from pathlib import Path

import pytest
import torch

from fusedloss.tools.footprint import footprint

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import scale


@pytest.mark.parametrize(("rows", "budget"), [(1, 400), (1000, 4001), (1000, 2**20)])
def test_chunks_and_memory_are_those_of_the_linear_forms(rows: int, budget: int) -> None:
    work, known = scale.Work(rows, 3, 100, size=4, budget=budget), footprint(rows, 3, 100, torch.float32, budget)
    assert work.chunks == (known.chunks, known.chunk_rows)
    assert work.memory[0::2] == (known.weight, known.chunk) and work.memory[3] == 2 * known.hidden


def test_the_report_is_what_the_model_says_and_claims_no_speed() -> None:
    """`make scale` writes it anew."""
    text = scale.OUTPUT.with_suffix(".md").read_text(encoding="utf-8")
    assert text == scale.predictions("scale.png")
    assert text.split("\n\n")[1].startswith("**These are predictions.**") and "no speed is claimed" in text


def test_it_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert scale.main(["--output", str(tmp_path / "many")]) == 0
    assert "(many.png)" in (tmp_path / "many.md").read_text(encoding="utf-8")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
