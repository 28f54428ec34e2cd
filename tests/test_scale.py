"""The predictions for many GPUs: the report is what the model says, and the model has the package's chunks."""

import sys
from pathlib import Path

import torch

from fusedloss.tools.footprint import footprint

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import scale


def test_chunks_and_memory_are_those_of_the_linear_forms_and_the_report_is_what_the_model_says() -> None:
    """`make scale` writes it anew."""
    for rows, budget in ((1, 400), (1000, 4001), (1000, 2**20)):
        work, known = scale.Work(rows, 3, 100, size=4, budget=budget), footprint(rows, 3, 100, torch.float32, budget)
        assert work.chunks == (known.chunks, known.chunk_rows)
        assert work.memory[0::2] == (known.weight, known.chunk) and work.memory[3] == 2 * known.hidden
    text = scale.OUTPUT.with_suffix(".md").read_text(encoding="utf-8")
    assert text == scale.predictions("scale.png")
