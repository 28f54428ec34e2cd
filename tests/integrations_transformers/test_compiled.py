"""Fused models under torch.compile."""

import pytest
import torch
from fused_models import assert_close, bert, gemma2, gradients_of, llama, wide, with_adapter
from torch import Tensor

from fusedloss.integrations.transformers import UnbuiltLogits, fuse

COMPILED = {
    "a cap and a teacher": lambda: fuse(gemma2(), "distillation", teacher=wide(), divergence="reverse_kl"),
    "a copy of the layer": lambda: with_adapter(fuse(llama(), "focal_loss"), modules_to_save=["lm_head"]),
    "LoRA": lambda: with_adapter(fuse(llama(), "focal_loss"), targets=("lm_head",)),
}


@pytest.mark.compile
@pytest.mark.parametrize("kind", COMPILED)
def test_training_compiles_without_a_break(kind: str, batch: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    model = COMPILED[kind]().train()
    expected = model(**batch).loss  # torch 2.11 breaks the graph of the first pass with a new output layer
    outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    torch.testing.assert_close(outputs.loss, expected)
    assert_close(gradients_of(outputs.loss, model), gradients_of(expected, model), 1e-5)
    assert isinstance(outputs.logits, UnbuiltLogits)


@pytest.mark.compile
def test_compiled_models_with_breaks_are_right_too(batch: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    model = fuse(bert(), "focal_loss")
    compiled = torch.compile(model, backend="eager")
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
