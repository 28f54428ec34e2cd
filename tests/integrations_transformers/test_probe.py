"""The comparison that fuse makes before, and the models and arguments that it refuses."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_models import DECODER, VOCABULARY, attributes_of, bert, checkpoint, granite, llama, transformers, wide
from torch import Tensor, nn

import fusedloss as fl
from fusedloss.integrations.transformers import _fusion, _stand_ins, fuse, unfuse


class Noisy(transformers.LlamaForCausalLM):
    """Leaves traces wherever it can."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.count += 1
        self.noise = torch.rand(1), random.random()
        return super().forward(input_ids, labels=labels, **kwargs)


def test_the_probe_leaves_no_trace() -> None:
    model = llama(Noisy).eval()
    model.model.train()
    checkpoint(model, reentrant=True)
    flags = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert flags == [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert model.count == 0 and model.noise
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(input: list[Tensor], weight: list[Tensor], target: Tensor, **options: Any) -> Any:
        return fl.linear_cross_entropy(input[0], weight[0].detach(), target, **options)

    model = granite()
    with monkeypatch.context() as patch:
        patch.setattr(_stand_ins.Logits, "__truediv__", lambda logits, divisor: logits)
        with pytest.raises(ValueError, match=r"Granite.* cannot be fused: the loss differs by [0-9.e-]+ from that"):
            fuse(model, "focal_loss")
        with pytest.raises(ValueError, match=r"Llama.* with a Granite.* as its teacher: a logit of .* differs"):
            fuse(llama(), "distillation", teacher=model)
    assert "forward" not in model.__dict__
    wrong = _fusion.Loss(fl.cross_entropy, frozen, {})
    monkeypatch.setattr(_fusion.Loss, "of", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"the gradient of output layer.weight differs by"):
        fuse(model)


def test_a_model_that_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        fuse(transformers.LlamaModel(transformers.LlamaConfig(**DECODER)))
    model = llama()
    model.set_output_embeddings(model.get_input_embeddings())
    with pytest.raises(ValueError, match=r"no layer that makes its logits: .* gives a torch.nn.\S+Embedding"):
        fuse(model)
    with pytest.raises(TypeError, match=r"must be a transformers.PreTrainedModel, got Linear"):
        fuse(nn.Linear(2, 2))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"got DataParallel; fuse or unfuse the model that it wraps"):
        unfuse(nn.DataParallel(llama()))  # type: ignore[type-var]
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' of LlamaForCausalLM is on the meta device"):
        fuse(empty)

    for name in ("", "lm_head"):
        model = llama()
        wrapped = model.get_submodule(name)
        wrapped.forward = wrapped.forward
        before = attributes_of(model)
        with pytest.raises(ValueError, match=f"the forward of {type(wrapped).__name__} is replaced already"):
            fuse(model)
        assert attributes_of(model) == before


def test_more_tokens_embedded_than_predicted_and_all_parameters_frozen(batch: dict[str, Tensor]) -> None:
    """As before an adapter is added; the probe compares the gradient of its hidden states."""
    model = llama().train().requires_grad_(False)
    model.set_input_embeddings(nn.Embedding(VOCABULARY + 3001, 16).requires_grad_(False))
    expected = model(**batch).loss
    torch.testing.assert_close(fuse(model)(**batch).loss, expected)
    model.model.layers.requires_grad_()
    assert fuse(model)(**batch).loss.requires_grad


def test_a_loss_that_needs_more_than_labels_asks_for_a_probe(batch: dict[str, Tensor]) -> None:
    other = llama(type("Embedded", (transformers.LlamaForCausalLM,), {"main_input_name": "inputs_embeds"}))
    with pytest.raises(ValueError, match="Embedded takes inputs_embeds; pass inputs with labels as probe"):
        fuse(other)
    embeds = other.get_input_embeddings()(batch["input_ids"]).detach()
    assert fuse(other, probe={"inputs_embeds": embeds, "labels": batch["labels"]}) is other

    model = bert(kind=transformers.BertForPreTraining).eval()
    message = "BertForPreTraining computes no loss from input_ids and labels alone.*probe="
    with pytest.raises(ValueError, match=f"cannot be fused: {message}"):
        fuse(model, "focal_loss")
    more = {**batch, "next_sentence_label": torch.tensor([0, 1])}
    outputs = model(**more)
    words = fl.focal_loss(outputs.prediction_logits, batch["labels"])
    sentences = F.cross_entropy(outputs.seq_relationship_logits, more["next_sentence_label"])
    fuse(model, "focal_loss", probe=more, eval_logits=False)
    torch.testing.assert_close(model(**more).loss, words + sentences)
    with pytest.raises(ValueError, match=message):
        model(**batch)


#: Losses with arguments, and a message; "distillation" with a teacher.
REFUSED = [
    ("dice_loss", {}, ValueError, "loss must be one of cross_entropy, .*got 'dice_loss'"),
    (F.cross_entropy, {}, ValueError, "loss must be one of .*got <function cross_entropy"),
    ("focal_loss", {"gama": 1.0}, TypeError, "linear_focal_loss.. got an unexpected keyword argument 'gama'"),
    ("focal_loss", {"budget": 1}, ValueError, "budget of 1 bytes is too small"),
    ("mixed_cross_entropy", {}, TypeError, "linear_mixed_cross_entropy.. needs the argument 'alpha'"),
    ("focal_loss", {"return_stats": True}, TypeError, "gets 'return_stats' from the model .*or cannot be used"),
    ("cross_entropy", {"sequence_parallel": True}, TypeError, "gets 'sequence_parallel' from the model .*or cannot"),
    ("focal_loss", {"teacher": llama}, TypeError, "teacher is for distillation, got one with focal_loss"),
    ("distillation", {}, TypeError, "distillation needs a teacher"),
    ("distillation", {"teacher": lambda: nn.Linear(1, 1)}, TypeError, "must be a transformers.Pre.*, got Linear"),
    ("distillation", {"teacher": lambda: fuse(llama())}, ValueError, "the teacher, a Llama.*, is fused with a loss"),
    ("distillation", {"teacher": lambda: wide(vocab_size=999)}, ValueError, "has 999 classes, but the model 1031"),
    ("distillation", {"teacher": bert}, ValueError, "the teacher's loss is of other targets than the model's"),
    ("distillation", {"teacher": lambda: llama().to("meta")}, ValueError, "is on meta, but the model on cpu"),
    ("distillation", {"teacher": llama, "divergence": "kl"}, ValueError, "divergence must be one of .*got 'kl'"),
    ("distillation", {"teacher": llama, "teacher_softcap": 3}, TypeError, "gets 'teacher_softcap' from the model"),
]


@pytest.mark.parametrize(("loss", "arguments", "error", "message"), REFUSED)
def test_bad_arguments_are_refused(loss: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, teacher = llama(), arguments.get("teacher")
    with pytest.raises(error, match=message):
        fuse(model, loss, **arguments | ({"teacher": teacher()} if teacher else {}))
    assert "forward" not in model.__dict__
