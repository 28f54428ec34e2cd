"""Output layers that others change: new ones, hooks, and PEFT before or after."""

import copy
from collections.abc import Callable

import fused_models
import oracle
import pytest
import torch
import torch.nn.functional as F
from fused_models import BATCH, BUDGET, VOCABULARY, assert_close, gradients_of, llama
from torch import Tensor, nn

from fusedloss.integrations.transformers import fuse, unfuse


@pytest.mark.parametrize("training", [True, False])
def test_a_new_output_layer_is_followed(training: bool, batch: dict[str, Tensor]) -> None:
    model = llama().train(training)
    before = fused_models.attributes_of(model)
    fuse(model)
    old = model.lm_head
    for size in (VOCABULARY + 8, VOCABULARY):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.lm_head is not old
        loss = model(**batch).loss
        plain = copy.deepcopy(model)
        torch.testing.assert_close(loss, unfuse(plain)(**batch).loss)
    assert fused_models.attributes_of(unfuse(model)) == before
    assert "forward" not in old.__dict__ and old(torch.zeros(1, 16)).shape == (1, VOCABULARY)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_the_output_layer(training: bool, batch: dict[str, Tensor]) -> None:
    """They receive the hidden states, registered before or after; what they change is in the loss."""
    model = llama().double().train(training)
    head, seen = model.lm_head, []

    def register() -> None:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        head.register_forward_pre_hook(lambda _, inputs, kwargs: seen.append(inputs[0] * 1), with_kwargs=True)
        head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0] + 0))
        head.register_forward_hook(lambda _, inputs, kwargs, output: seen.append(inputs[0].clone()), with_kwargs=True)

    head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3 - 1,))
    head.register_forward_hook(lambda _, inputs, output: output * 0.5)
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1] * 3 - 1
    expected, gradients = fused_models.reference_of(model, batch, oracle.focal)
    register()
    fuse(model, "focal_loss")
    register()
    seen.clear()
    loss = model(**batch).loss
    assert len(seen) == 8 and all(type(x) is Tensor and torch.equal(x, hidden) for x in seen)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)  # evaluation is in float32
    assert_close(gradients_of(loss, model), gradients, 1e-6)


def test_a_hook_that_reads_the_logits(batch: dict[str, Tensor]) -> None:
    """In evaluation it can, and a loss of its own is none of the fused one; in training there are none."""
    model, seen = fuse(llama().eval(), "focal_loss"), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    outputs = model(**batch)
    assert torch.equal(seen[0], outputs.logits)
    rows, target = (x[:, 1:].flatten(0, 1) for x in (seen[0], batch["labels"]))
    assert torch.equal(F.cross_entropy(rows, target), F.cross_entropy(outputs.logits[:, 1:].flatten(0, 1), target))
    with pytest.raises(AttributeError, match="'detach' of the logits is not understood by the fused loss"):
        model.train()(**batch)


@pytest.mark.parametrize("training", [True, False])
def test_another_fused_model_within_the_forward_of_one(training: bool, batch: dict[str, Tensor]) -> None:
    """A teacher that a hook of the student calls: its output layer is none of the student's loss."""
    student, teacher, seen = fuse(llama().train(training)), fuse(llama().eval()), []
    expected, logits = student(**batch).loss, teacher(batch["input_ids"]).logits
    student.lm_head.register_forward_pre_hook(lambda *_: seen.append(teacher(batch["input_ids"]).logits))
    assert torch.equal(student(**batch).loss, expected)
    assert type(seen[0]) is Tensor and torch.equal(seen[0], logits)


#: What PEFT makes of the output layer: the arguments, and whether the weights are tied.
WRAPPED = {
    "left alone": ({}, False),
    "trained whole, as is the embedding": ({"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "some tokens of tied weights": ({"trainable_token_indices": [1, 2, 3]}, True),
    "LoRA": ({"targets": ("q_proj", "lm_head"), "lora_dropout": 0.5}, False),
    "LoRA of tied weights": ({"targets": ("lm_head",)}, True),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word")
@pytest.mark.parametrize("first", ["fuse", "peft"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_an_output_layer_that_peft_changes(kind: str, first: str, batch: dict[str, Tensor]) -> None:
    """In training, in evaluation, and while the adapters are disabled."""
    options, tied = WRAPPED[kind]
    model = llama(tie_word_embeddings=tied).double()
    before, chosen = fused_models.attributes_of(model), {"loss": "focal_loss", "gamma": 1.5, "budget": 2 * BUDGET}
    if first == "fuse":
        fuse(model, **chosen)
    adapted = fused_models.with_adapter(model, **options)
    if first == "peft":
        with pytest.raises(TypeError, match=r"got PeftModelForCausalLM; .*get_base_model\(\)"):
            fuse(adapted)
        fuse(adapted.get_base_model(), **chosen)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # away from the weights that they are copies of
            nn.init.normal_(parameter, std=0.1)

    def results(loss: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(6)  # of the dropout
        adapted.train()
        trained = loss()
        gradients = gradients_of(trained, adapted)
        with adapted.disable_adapter():
            plain = loss()
        assert all(x.any() for x in gradients) and plain != trained
        adapted.eval()
        return [trained, plain, loss(), *gradients]

    got = results(lambda: adapted(**batch).loss)
    assert unfuse(adapted.get_base_model()) is model
    assert not any("forward" in module.__dict__ for module in adapted.modules())
    expected = results(lambda: fused_models.reference_loss(adapted, batch, oracle.focal, gamma=1.5))
    for mine, right in zip(got, expected, strict=True):
        assert_close([mine], [right], 1e-6)  # evaluation is in float32
    adapted.unload()
    assert fused_models.attributes_of(model) == before


class _Quantized(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.clone(), self.weight)


def test_an_output_layer_that_is_more_than_products_is_refused(batch: dict[str, Tensor]) -> None:
    """Where an adapter makes it one, in training alone: in evaluation there are logits."""
    quantized, model = llama(), fuse(llama().double(), "focal_loss")
    quantized.lm_head.__class__ = _Quantized
    with pytest.raises(ValueError, match=r"fused: 'clone' of .* a test_output_layer\._Quantized must"):
        fuse(quantized)
    adapted = fused_models.with_adapter(model, ("lm_head",), use_dora=True)
    message = "Linear has the adapter 'default', which is no plain LoRA but a DoraLinearVariant; merge the adapter"
    with pytest.raises(ValueError, match=message):
        adapted.train()(**batch)
    evaluated = adapted.eval()(**batch).loss
    unfuse(model)
    torch.testing.assert_close(
        evaluated, fused_models.reference_loss(adapted, batch, oracle.focal).float(), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match=f"cannot be fused: .*{message}"):
        fuse(model)
    one_each = fused_models.with_adapter(fuse(llama(), eval_logits=False), ("lm_head",)).eval()
    with pytest.raises(
        ValueError, match="Linear has the arguments adapter_names; merge the adapter, or leave the layer"
    ):
        one_each(**batch, adapter_names=["default"] * BATCH)
