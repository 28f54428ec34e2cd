"""Models of transformers on the linear form: the same losses and gradients as unfused, and no logits."""

import copy
import doctest
import filecmp
import importlib
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fused_models
import oracle
import pytest
import torch
from fused_models import BATCH, BUDGET, FAMILIES, LENGTH, VOCABULARY, assert_close, gradients_of, llama
from torch import Tensor, nn

import fusedloss as fl
from fusedloss.integrations import transformers as integration
from fusedloss.integrations.transformers import UnbuiltLogits, fuse, unfuse


def _poly1(z: Tensor, t: Tensor, loss_fn: Any) -> Tensor:
    ce = oracle.cross_entropy(z, t)
    return ce + 1 - (-ce).exp()


#: By name or function, with arguments, and the formula.
LOSSES = [
    ("cross_entropy", {}, oracle.cross_entropy),
    (fl.linear_cross_entropy, {"label_smoothing": 0.1}, oracle.cross_entropy),
    (fl.focal_loss, {"gamma": 1.5}, oracle.focal),
    ("linear_mixed_cross_entropy", {"alpha": 0.3, "z_loss": 1e-3}, oracle.mixed_cross_entropy),
    ("flex_loss", {"loss_fn": lambda s: s.ce + s.q}, _poly1),
]


@pytest.mark.parametrize(("make", "loss"), [*zip(FAMILIES.values(), LOSSES * 2, strict=False)], ids=FAMILIES)
def test_training(make: Any, loss: tuple[Any, ...], batch: dict[str, Tensor]) -> None:
    """Gradients of all parameters, in float64, without logits; num_items_in_batch, also where the model itself takes
    the mean; and nothing is left of it.
    """
    chosen, own, formula = loss
    model = make().double().train()
    weight = max(parameter.numel() for parameter in model.parameters())
    unfused, keys, before = model(**batch).loss, list(model.state_dict()), fused_models.attributes_of(model)
    with fused_models.Largest() as built:
        reference = fused_models.reference_of(model, batch, formula, **own)
    of_items = fused_models.reference_of(model, batch, formula, normalizer=77.0, **own)
    assert fuse(model, chosen, budget=BUDGET, **own) is model
    assert type(model) is before[0][1] and list(model.state_dict()) == keys
    with fused_models.Largest() as largest:
        outputs = model(**batch)
        gradients = gradients_of(outputs.loss, model)
    assert largest.elements <= weight < BATCH * (LENGTH - 1) * VOCABULARY <= built.elements
    torch.testing.assert_close(outputs.loss, reference[0], rtol=1e-12, atol=0)
    assert_close(gradients, reference[1], 1e-10)
    for items in (77, torch.tensor(77)):
        loss = model(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(loss, of_items[0], rtol=1e-6, atol=0)  # 1 / 77 as float32
    assert_close(gradients_of(loss, model), of_items[1], 1e-6)

    logits = outputs.logits
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    for name in ("argmax", "__getitem__", "softmax", "__add__", "__len__", "__eq__", "__bool__"):
        with pytest.raises(AttributeError, match="never built"):
            getattr(logits, name)(0) if name in ("__getitem__", "__eq__") else getattr(logits, name)()
    with pytest.raises(AttributeError, match="never built"):
        torch.stack([logits])
    assert isinstance(model.forward(**batch).logits, UnbuiltLogits)  # as some wrappers call it
    assert sum(isinstance(x, UnbuiltLogits) for x in model(**batch, return_dict=False)) == 1
    for _ in range(2):  # the second time there is nothing left to take back
        assert unfuse(model) is model and fused_models.attributes_of(model) == before
    assert torch.equal(model(**batch).loss, unfused)


@pytest.mark.parametrize("make", [llama, fused_models.gpt2])
def test_what_is_saved_is_the_same_to_the_last_byte(make: Any, tmp_path: Path) -> None:
    model = make()
    for folder in ("before", "fused"):
        model.save_pretrained(tmp_path / folder)
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        fuse(model)
    assert {"config.json", "model.safetensors"} <= set(names)
    assert filecmp.cmpfiles(tmp_path / "before", tmp_path / "fused", names, shallow=False)[0] == names
    assert len(names) == len(list((tmp_path / "before").iterdir()))


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_evaluation_takes_the_row_form_and_generation_does_not_change(make: Any, batch: dict[str, Tensor]) -> None:
    model = make().double().eval()
    expected = fused_models.reference_loss(model, batch, oracle.focal, gamma=1.5)
    names = ["input_ids", "decoder_input_ids"][: 1 + model.config.is_encoder_decoder]
    inputs = dict.fromkeys(names, batch["input_ids"])

    @torch.no_grad()
    def answers() -> list[Tensor]:
        logits = [model(**inputs).logits, model(**batch).logits]
        if not model.can_generate():
            return logits
        return [*logits, model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)]

    before = answers()
    fuse(model, "focal_loss", gamma=1.5)
    for got, want in zip(answers(), before, strict=True):
        assert type(got) is Tensor and torch.equal(got, want)
    with torch.no_grad():
        loss = model(**batch).loss
    assert type(loss) is Tensor
    # models cast their logits to float32
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0, check_dtype=False)


def test_shifted_labels_are_taken_as_they_are(batch: dict[str, Tensor]) -> None:
    """And those of the logits that are kept, in training and in evaluation."""
    model = llama().train()
    shifted = torch.randint(VOCABULARY, batch["labels"].shape)
    last = shifted[:, -4:].clone()
    kept = {"input_ids": batch["input_ids"], "logits_to_keep": 4, "labels": last}
    calls = ({**batch, "shift_labels": shifted}, {**kept, "shift_labels": last})
    expected = [model(**inputs).loss for inputs in calls]
    assert abs(expected[0].item() - model(**batch).loss.item()) > 1e-4
    fuse(model)
    for training in (True, False):
        model.train(training)
        for inputs, right in zip(calls, expected, strict=True):
            torch.testing.assert_close(model(**inputs).loss, right)
        with pytest.raises((ValueError, RuntimeError), match=r"rows|batch_size|shape"):
            model(**kept | {"labels": batch["labels"]})


def test_evaluation_without_logits_and_training_without_labels(batch: dict[str, Tensor]) -> None:
    model = fuse(llama().eval(), eval_logits=False)
    with torch.no_grad():
        loss = model(**batch).loss
        assert isinstance(model(**batch).logits, UnbuiltLogits)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is fused, but in training without labels"):
        logits = model.train()(batch["input_ids"]).logits
    assert logits.shape == (BATCH, LENGTH, VOCABULARY) and logits.requires_grad
    ignored = model(batch["input_ids"], labels=torch.full_like(batch["labels"], -100)).loss
    assert ignored.item() == 0 and not any(gradient.any() for gradient in gradients_of(ignored, model))
    torch.testing.assert_close(unfuse(model.eval())(**batch).loss, loss)


def test_arguments_may_change_from_step_to_step(batch: dict[str, Tensor]) -> None:
    model = llama().double().train()
    low, high = (fused_models.reference_loss(model, batch, oracle.mixed_cross_entropy, alpha=a) for a in (0.1, 0.4))
    assert abs(low - high) > 1e-4
    now = torch.tensor(0.0, dtype=torch.float64)
    for alpha in (now.item, now):
        fuse(model, fl.linear_mixed_cross_entropy, alpha=alpha)
        for value, expected in ((0.1, low), (0.4, high)):
            now.fill_(value)
            torch.testing.assert_close(model(**batch).loss, expected)


def test_fusing_again_exchanges_the_loss(batch: dict[str, Tensor]) -> None:
    model = llama().double().train()
    expected = [fused_models.reference_loss(model, batch, base) for base in (oracle.cross_entropy, oracle.focal)]
    model = fuse(fuse(model), "focal_loss")
    torch.testing.assert_close(model(**batch).loss, expected[1])
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        fuse(model, "focal_loss", gamma=-1.0)
    torch.testing.assert_close(model(**batch).loss, expected[1])
    torch.testing.assert_close(fuse(model)(**batch).loss, expected[0])
    held = model.forward  # as a wrapper does
    assert torch.equal(unfuse(model)(**batch).loss, held(**batch).loss)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_a_copy_is_a_fused_model_of_its_own(batch: dict[str, Tensor]) -> None:
    model = fuse(llama().double().train(), "focal_loss")
    copied = copy.deepcopy(model)
    nn.init.normal_(copied.lm_head.weight)
    losses = model(**batch).loss, copied(**batch).loss
    assert abs(losses[0] - losses[1]) > 1e-3
    assert isinstance(copied(**batch).logits, UnbuiltLogits)
    torch.testing.assert_close(losses[1], fused_models.reference_loss(unfuse(copied), batch, oracle.focal))
    assert "forward" not in copied.lm_head.__dict__ and "forward" in model.lm_head.__dict__
    assert torch.equal(model(**batch).loss, losses[0])


def test_pickling_and_data_parallel_are_refused(batch: dict[str, Tensor]) -> None:
    model = fuse(llama().train())
    with pytest.raises(TypeError, match="a fused model cannot be pickled"):
        pickle.dumps(model)
    replica = model._replicate_for_data_parallel()
    replica._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel; use DistributedDataParallel"):
        replica(**batch)
    assert pickle.loads(pickle.dumps(unfuse(model))).lm_head


def test_two_threads_may_run_one_model(batch: dict[str, Tensor]) -> None:
    """One with labels, one without, and both within their forward pass."""
    model = fuse(llama().train())
    expected, met = model(**batch).loss, threading.Barrier(2, timeout=60)
    model.lm_head.register_forward_pre_hook(lambda *_: (met.wait(), None)[1])
    inputs = (batch, {"input_ids": batch["input_ids"]})
    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="in training without labels"):
        labelled, generating = pool.map(lambda given: model(**given), inputs)
    assert torch.equal(labelled.loss, expected) and type(generating.logits) is Tensor


def test_autocast(batch: dict[str, Tensor]) -> None:
    model = fused_models.marian().train()
    exact, results = gradients_of(model(**batch).loss, model), []
    for side in (model, fuse(copy.deepcopy(model))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = side(**batch).loss
        results.append(gradients_of(loss, side))
    errors = [max((a - b).abs().max().item() for a, b in zip(r, exact, strict=True)) for r in results]
    assert 0 < errors[1] <= 2 * errors[0]


def test_gradient_checkpointing_and_distributed_data_parallel(batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = llama().train()
    expected = gradients_of(model(**batch).loss, model)
    fused_models.checkpoint(fuse(model), reentrant=False)
    assert_close(gradients_of(model(**batch).loss, model), expected, 1e-5)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        parallel(**batch).loss.backward()
        del parallel  # the last to hold the group would wait for its threads, and they for Python's lock
    finally:
        torch.distributed.destroy_process_group()
    assert_close([parameter.grad for parameter in model.parameters()], expected, 1e-5)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"fusedloss\.integrations\.transformers needs .*'fusedloss\[transformers\]'"):
        importlib.import_module(integration.__name__)


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(integration)
    assert result.attempted > 5 and not result.failed
