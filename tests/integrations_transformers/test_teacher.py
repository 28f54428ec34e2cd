"""Distillation from a teacher, whose logits are not built either."""

import copy
import gc
from typing import Any

import fused_models
import pytest
import torch
from fused_models import BATCH, BUDGET, LENGTH, VOCABULARY, assert_close, gradients_of, llama, transformers
from torch import Tensor, nn

import fusedloss as fl
from fusedloss.integrations.transformers import _stand_ins, fuse, unfuse


def _of_logits(model: Any, teacher: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The row form of what both make."""
    with torch.no_grad():
        t = teacher(**batch).logits
    z, labels = model(**batch).logits, batch["labels"]
    if not (model.config.is_encoder_decoder or isinstance(model, transformers.BertForMaskedLM)):
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    return fl.distillation_loss(z, t, target=labels, impl="reference", **options)


#: Students and their teachers, whose logits are made otherwise.
LESSONS = {
    "gpt2: larger": (fused_models.gpt2, fused_models.wide, {"divergence": "forward_kl"}),
    "llama: softcap": (llama, fused_models.gemma2, {"divergence": "jsd", "beta": 0.3}),
    "gemma2: scaled": (fused_models.gemma2, fused_models.granite, {"divergence": "jsd", "beta": 0.3}),
    "bert: a bias, no shift": (fused_models.bert, lambda: fused_models.bert(tied=False), {"divergence": "forward_kl"}),
    "marian: a bias, and hidden states scaled": (fused_models.marian, fused_models.t5, {"divergence": "forward_kl"}),
}


@pytest.mark.parametrize("pair", LESSONS)
def test_distillation(pair: str, batch: dict[str, Tensor]) -> None:
    """Loss and gradients of the row form; neither model's logits are built, and the teacher stays as it was."""
    make, make_teacher, own = LESSONS[pair]
    model, teacher = make().double().train(), make_teacher().double().eval()
    for module in teacher.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    before, names = fused_models.attributes_of(teacher), [*model.state_dict()]
    held = copy.deepcopy(teacher.state_dict())
    own = own | {"temperature": 2.0, "scale_by_temperature_squared": True, "hard_weight": 0.5}
    mean, eighth = (_of_logits(model, teacher, batch, **own, normalizer=n) for n in (None, 8))
    gradients = gradients_of(eighth, model)
    fuse(model, "distillation", teacher=teacher.train(), budget=2 * BUDGET, **own)
    weight = max(parameter.numel() for x in (model, teacher) for parameter in x.parameters())
    with fused_models.Largest() as fused:
        loss = model(**batch, num_items_in_batch=8).loss
    assert fused.elements <= weight < BATCH * (LENGTH - 1) * VOCABULARY + weight
    torch.testing.assert_close(loss, eighth, rtol=1e-6, atol=0)
    assert_close(gradients_of(loss, model), gradients, 1e-6)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(**batch).loss, mean, check_dtype=False)
    assert not teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(dict(teacher.state_dict()), dict(held), rtol=0, atol=0)
    assert [*model.state_dict()] == names and not {*map(id, model.parameters())} & {*map(id, teacher.parameters())}
    unfuse(model)
    assert fused_models.attributes_of(teacher) == before


def test_distillation_in_half_precision_and_under_autocast(batch: dict[str, Tensor]) -> None:
    """A teacher of another dtype is cast to the products' where the model's hidden states are not."""
    model, teacher = llama().train(), fused_models.wide().bfloat16()
    for parameter in teacher.parameters():
        parameter.data.mul_(5)
    fuse(model, fl.distillation_loss, teacher=teacher, divergence="tv")
    loss = model(**batch).loss
    exact = copy.deepcopy(teacher).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch).loss
    right = fuse(model, "distillation", teacher=exact, divergence="tv")(**batch).loss
    torch.testing.assert_close((loss, half), (right, right), rtol=2e-2, atol=0)


def test_teachers_are_shared_and_let_go(batch: dict[str, Tensor]) -> None:
    """By two students of whom one is unfused; a copy of a student has the same one."""
    teacher, students = llama().eval(), [llama().train() for _ in range(2)]
    for student in students:
        fuse(student, "distillation", teacher=teacher)
    losses = [student(**batch).loss for student in students]
    copied = copy.deepcopy(students[1])
    fuse(students[0], "focal_loss")
    assert "forward" not in teacher.lm_head.__dict__
    for student in (students[1], copied):
        assert torch.equal(student(**batch).loss, losses[1])
    students[1].resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM, has 1031 classes, but the model 1039"):
        students[1](**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_model_teaches_it(dtype: torch.dtype, batch: dict[str, Tensor]) -> None:
    """The loss of the two is rounding, if not 0, which no probe takes for a difference."""
    model = llama().to(dtype).train()
    teacher = copy.deepcopy(model)
    teacher.lm_head.weight.data.mul_(1 + 2**-9)
    fuse(model, "distillation", teacher=teacher, divergence="tv")
    assert model(**batch).loss < 1e-2
    fuse(model, "distillation", teacher=copy.deepcopy(unfuse(model)))
    assert model(**batch).loss < 1e-6


def test_the_teachers_hidden_states_go_with_the_loss(batch: dict[str, Tensor]) -> None:
    """Without a garbage collection: nothing refers to them in a circle."""
    model = fuse(llama().train(), "distillation", teacher=fused_models.wide())
    gc.collect()
    gc.disable()
    try:
        model(**batch).loss.backward()
        assert not [x for x in gc.get_objects() if type(x) is _stand_ins.Logits]
    finally:
        gc.enable()


def test_what_a_teacher_cannot_do_is_refused(batch: dict[str, Tensor]) -> None:
    model, teacher = llama().train(), llama()
    with pytest.raises(ValueError, match="cannot be its own teacher; pass a copy"):
        fuse(model, "distillation", teacher=model)
    fuse(model, "distillation", teacher=teacher)
    with pytest.raises(ValueError, match="the model gets inputs_embeds, which a teacher cannot share"):
        model(inputs_embeds=torch.zeros(BATCH, LENGTH, 16), labels=batch["labels"])
    adapted = fused_models.with_adapter(teacher, ("lm_head",)).get_base_model()
    with pytest.raises(ValueError, match=r"the teacher has LoRA on its output layer.*merge it"):
        fuse(model, "distillation", teacher=adapted)
