"""Models of transformers on the linear form: the same losses and gradients as unfused, and no logits."""

import copy
import doctest
import filecmp
import functools
import gc
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oracle
import products
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss as fl

transformers = pytest.importorskip("transformers", reason="the integration needs the extra [transformers]")
from fusedloss.integrations import transformers as integration  # noqa: E402
from fusedloss.integrations.transformers import fuse, trainer_loss, unfuse  # noqa: E402
from fusedloss.integrations.transformers import _stand_ins as stand_ins  # noqa: E402

VOCABULARY = 1031
BATCH, LENGTH = 2, 12
#: Room for three rows of float64 logits, of 22.
BUDGET = 3 * VOCABULARY * 8

DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1, "dropout": 0.0,
}  # fmt: skip


def _llama(kind: type[Any] | None = None, **options: Any) -> Any:
    return (kind or transformers.LlamaForCausalLM)(transformers.LlamaConfig(**DECODER, **options))


def _gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout))


def _gemma2() -> Any:
    # a cap that the logits of untrained weights reach
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=0.3, initializer_range=0.3)
    )


def _t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    )


def _marian() -> Any:
    model = transformers.MarianMTModel(transformers.MarianConfig(**SEQ2SEQ))
    nn.init.normal_(model.final_logits_bias)
    return model


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=3, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # which takes float64
    return model


def _granite() -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**DECODER, logits_scaling=0.25))


def _bert(tied: bool = True, kind: type[Any] = transformers.BertForMaskedLM) -> Any:
    names = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": tied}
    decoder = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
    model = kind(transformers.BertConfig(**decoder, **names))
    nn.init.normal_(model.cls.predictions.bias if tied else model.cls.predictions.decoder.bias)
    return model


#: Models by what is particular in their way from hidden states to the loss.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2: tied": _gpt2,
    "gemma2: softcap": _gemma2,
    "t5: scaled hidden states, a loss of its own": _t5,
    "marian: a bias beside the layer": _marian,
    "mixtral: a router's loss": _mixtral,
    "granite: scaled logits": _granite,
    "bert: a bias in the layer, no shift": _bert,
}
each_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """And on one thread: these models are too small for two to do anything but wait for each other."""
    torch.manual_seed(20210629)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    labels = tokens.clone()
    labels[0, :3] = labels[1, -2:] = -100
    return {"input_ids": tokens, "labels": labels}


def _reference(
    model: Any, batch: dict[str, Tensor], base: Callable[..., Tensor], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients from the logits of the unfused model, by plain formulas."""
    loss = _reference_loss(model, batch, base, **options)
    return loss, _gradients(loss, model)


def _reference_loss(model: Any, batch: dict[str, Tensor], base: Callable[..., Tensor], **options: Any) -> Tensor:
    outputs = model(**batch)
    labels, logits = batch["labels"], outputs.logits
    if not model.config.is_encoder_decoder and not isinstance(model, transformers.BertForMaskedLM):
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = oracle.loss(base, logits.flatten(0, 1), labels.flatten(), ignore_index=-100, **options)
    if "aux_loss" in outputs:
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    return loss


def _gradients(loss: Tensor, model: Any) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(x.abs().max().item() for x in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max().item() <= tolerance * largest


def _poly1(z: Tensor, t: Tensor, loss_fn: Any) -> Tensor:
    ce = oracle.cross_entropy(z, t)
    return ce + 1 - (-ce).exp()


#: By name or function, with arguments, and the formula.
LOSSES: list[tuple[Any, dict[str, Any], Callable[..., Tensor]]] = [
    ("cross_entropy", {}, oracle.cross_entropy),
    (fl.linear_cross_entropy, {"label_smoothing": 0.1}, oracle.cross_entropy),
    (fl.focal_loss, {"gamma": 1.5}, oracle.focal),
    ("linear_mixed_cross_entropy", {"alpha": 0.3, "z_loss": 1e-3}, oracle.mixed_cross_entropy),
    ("flex_loss", {"loss_fn": lambda s: s.ce + s.q}, _poly1),
]


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        pytest.param(make, loss, id=name, marks=() if i % len(LOSSES) == j else pytest.mark.exhaustive)
        for i, (name, make) in enumerate(FAMILIES.items())
        for j, loss in enumerate(LOSSES)
    ],
)
def test_training(make: Callable[[], Any], loss: tuple[Any, ...], batch: dict[str, Tensor]) -> None:
    """Gradients of all parameters, in float64; num_items_in_batch, also where the model itself takes the mean."""
    chosen, own, formula = loss
    model = make().double().train()
    reference = _reference(model, batch, formula, **own)
    of_items = _reference(model, batch, formula, normalizer=77.0, **own)
    fuse(model, chosen, budget=BUDGET, **own)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, reference[0], rtol=1e-12, atol=0)
    _assert_close(_gradients(outputs.loss, model), reference[1], 1e-10)
    for items in (77, torch.tensor(77)):
        loss = model(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(loss, of_items[0], rtol=1e-6, atol=0)  # 1 / 77 as float32
    _assert_close(_gradients(loss, model), of_items[1], 1e-6)

    logits = outputs.logits
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    for name in ("argmax", "__getitem__", "softmax", "__add__", "__len__", "__eq__", "__bool__"):
        with pytest.raises(AttributeError, match="never built"):
            getattr(logits, name)(0) if name in ("__getitem__", "__eq__") else getattr(logits, name)()
    with pytest.raises(AttributeError, match="never built"):
        torch.stack([logits])
    assert isinstance(model.forward(**batch).logits, integration.UnbuiltLogits)  # as some wrappers call it
    assert sum(isinstance(x, integration.UnbuiltLogits) for x in model(**batch, return_dict=False)) == 1


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result = products.inside(self, function, arguments)
        if result is None:
            result = function(*arguments, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def _attributes(model: Any) -> list[Any]:
    return [
        (name, type(module), sorted(module.__dict__), dict(module._forward_pre_hooks), dict(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@each_family
def test_no_logits_are_built_and_unfuse_restores_the_model(
    make: Callable[[], Any], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """In float32, the model's own loss and gradients; what is saved is the same to the last byte."""
    model = make().train()
    weight = max(parameter.numel() for parameter in model.parameters())
    with Largest() as unfused:
        loss = model(**batch).loss
        expected = _gradients(loss, model)
    assert unfused.elements >= BATCH * (LENGTH - 1) * VOCABULARY > weight
    model.save_pretrained(tmp_path / "before")
    before, keys = _attributes(model), list(model.state_dict())
    assert fuse(model, budget=2 * BUDGET) is model
    assert type(model) is before[0][1] and list(model.state_dict()) == keys
    with Largest() as fused:
        got = model(**batch).loss
        gradients = _gradients(got, model)
    assert fused.elements <= max(weight, 2 * BUDGET // 4)
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
    _assert_close(gradients, expected, 1e-5)

    model.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert {"config.json", "model.safetensors"} <= set(names)
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == names
    assert filecmp.cmpfiles(tmp_path / "before", tmp_path / "fused", names, shallow=False)[0] == names
    for _ in range(2):  # the second time there is nothing left to take back
        assert unfuse(model) is model
        assert _attributes(model) == before
    assert torch.equal(model(**batch).loss, loss)


@each_family
def test_evaluation_takes_the_row_form_and_generation_does_not_change(
    make: Callable[[], Any], batch: dict[str, Tensor]
) -> None:
    model = make().double().eval()
    expected, _ = _reference(model, batch, oracle.focal, gamma=1.5)
    inputs = dict.fromkeys(
        ["input_ids", "decoder_input_ids"][: 1 + model.config.is_encoder_decoder], batch["input_ids"]
    )

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
    model = _llama().train()
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
    model = fuse(_llama().eval(), eval_logits=False)
    with torch.no_grad():
        loss = model(**batch).loss
        assert isinstance(model(**batch).logits, integration.UnbuiltLogits)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is fused, but in training without labels"):
        logits = model.train()(batch["input_ids"]).logits
    assert logits.shape == (BATCH, LENGTH, VOCABULARY) and logits.requires_grad
    ignored = model(batch["input_ids"], labels=torch.full_like(batch["labels"], -100)).loss
    assert ignored.item() == 0 and not any(gradient.any() for gradient in _gradients(ignored, model))
    torch.testing.assert_close(unfuse(model.eval())(**batch).loss, loss)


def test_arguments_may_change_from_step_to_step(batch: dict[str, Tensor]) -> None:
    model = _llama().double().train()
    references = [_reference(model, batch, oracle.mixed_cross_entropy, alpha=a)[0] for a in (0.1, 0.4)]
    assert abs(references[0] - references[1]) > 1e-4
    now = torch.tensor(0.1, dtype=torch.float64)
    fuse(model, fl.linear_mixed_cross_entropy, alpha=lambda: now.item())
    torch.testing.assert_close(model(**batch).loss, references[0])
    now.fill_(0.4)
    torch.testing.assert_close(model(**batch).loss, references[1])
    now.fill_(0.1)
    fuse(unfuse(model), "mixed_cross_entropy", alpha=now)
    now.fill_(0.4)
    torch.testing.assert_close(model(**batch).loss, references[1])


def test_fusing_again_exchanges_the_loss(batch: dict[str, Tensor]) -> None:
    model = _llama().double().train()
    expected = [_reference(model, batch, base)[0] for base in (oracle.cross_entropy, oracle.focal)]
    model = fuse(fuse(model), "focal_loss")
    torch.testing.assert_close(model(**batch).loss, expected[1])
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        fuse(model, "focal_loss", gamma=-1.0)
    torch.testing.assert_close(model(**batch).loss, expected[1])
    torch.testing.assert_close(fuse(model)(**batch).loss, expected[0])
    unfuse(model)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


# What fuse leaves, and what unfuse takes back


class Noisy(transformers.LlamaForCausalLM):
    """Leaves traces wherever it can."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.count += 1
        self.noise = torch.rand(1), random.random()
        return super().forward(input_ids, labels=labels, **kwargs)


def _checkpoint(model: Any, reentrant: bool) -> None:
    # by its new name, or the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_the_probe_leaves_no_trace() -> None:
    model = _llama(Noisy).eval()
    model.model.train()
    _checkpoint(model, reentrant=True)
    flags = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert flags == [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert model.count == 0 and model.noise
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_copy_is_a_fused_model_of_its_own(batch: dict[str, Tensor]) -> None:
    model = fuse(_llama().double().train(), "focal_loss")
    copied = copy.deepcopy(model)
    nn.init.normal_(copied.lm_head.weight)
    losses = model(**batch).loss, copied(**batch).loss
    assert abs(losses[0] - losses[1]) > 1e-3
    assert isinstance(copied(**batch).logits, integration.UnbuiltLogits)
    expected, _ = _reference(unfuse(copied), batch, oracle.focal)
    torch.testing.assert_close(losses[1], expected)
    assert "forward" not in copied.lm_head.__dict__ and "forward" in model.lm_head.__dict__
    assert torch.equal(model(**batch).loss, losses[0])


def test_pickling_and_data_parallel_are_refused(batch: dict[str, Tensor]) -> None:
    model = fuse(_llama().train())
    with pytest.raises(TypeError, match="a fused model cannot be pickled"):
        pickle.dumps(model)
    replica = model._replicate_for_data_parallel()
    replica._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel; use DistributedDataParallel"):
        replica(**batch)
    assert pickle.loads(pickle.dumps(unfuse(model))).lm_head


# What fuse refuses


class Changed(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = self.change(logits)
        return {"loss": self.loss_function(logits, labels, self.vocab_size, **kwargs), "logits": logits}


def _assigned(logits: Any) -> Any:
    logits[..., 5] = -1e4
    return logits


def _tanh_twice(logits: Any) -> Any:
    return torch.tanh(torch.tanh(logits))


FOREIGN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "order": (lambda z: z * (z > 9), "'>' not supported between"),
    "method": (lambda z: z.clamp(max=5), "'clamp' of the logits is not understood"),
    "function": (lambda z: torch.sigmoid(z), "'sigmoid' of the logits is not understood"),
    "assignment": (_assigned, "'assignment to elements' of the logits is not understood"),
    "comparison": (lambda z: z * (z == 0), "'==' of the logits is not understood"),
    "tensor factor": (lambda z: z * torch.ones(VOCABULARY), "'multiplication' of the logits and a tensor of shape"),
    "bias after the cap": (lambda z: torch.tanh(z) + torch.ones(VOCABULARY), "'addition' of the logits and a tensor"),
    "bias of positions": (lambda z: z + torch.ones(8, 1), "'addition' of the logits and a tensor"),
    "chosen classes": (lambda z: F.pad(z[..., torch.arange(7)], (0, VOCABULARY - 7)), "of logits of shape"),
    "factor of 0": (lambda z: z * 0, "'multiplication' of the logits and 0"),
    "two caps": (_tanh_twice, "'tanh' of soft-capped logits"),
    "negative cap": (lambda z: torch.tanh(z) * -2.0, "'multiplication' of the logits and -2.0"),
    "another axis": (lambda z: z[..., None], "of logits of shape"),
    "classes apart": (lambda z: z.view(2, -1), "of logits of shape"),
    "half precision": (lambda z: z.to(torch.float16), "to\\(torch.float16\\)"),
    "on the left": (lambda z: torch.ones(VOCABULARY) + z, "of the logits is not understood"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_work_on_the_logits_is_refused_by_name(change: str) -> None:
    model = _llama(Changed)
    before = _attributes(model)
    work, message = FOREIGN[change]
    Changed.change = staticmethod(work)
    with pytest.raises(ValueError, match=f"Changed cannot be fused: .*({message})"):
        fuse(model)
    assert _attributes(model) == before


KNOWN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda z: z,
    "a cap, then a scale": lambda z: 2 * (torch.tanh(z * 3.0) / 0.5),
    "scale and bias": lambda z: (z / 0.5 + torch.ones(1, VOCABULARY)) * 3 + torch.linspace(0, 1, VOCABULARY),
    "casts and shapes": lambda z: z.to(z.device)[:, :].reshape((-1, z.size(-1))).view(*z.shape).contiguous().float(),
    "cap by method": lambda z: (z / 2.0).tanh() * 2.0,
}


@pytest.mark.parametrize("change", KNOWN)
def test_known_work_on_the_logits_goes_into_the_linear_form(change: str, batch: dict[str, Tensor]) -> None:
    model = _llama(Changed).train()
    Changed.change = staticmethod(KNOWN[change])
    loss = model(**batch)["loss"]
    expected = _gradients(loss, model)
    fused = fuse(model)(**batch)["loss"]
    torch.testing.assert_close(fused, loss)
    _assert_close(_gradients(fused, model), expected, 1e-5)


#: What a model computes in place of the mean of the cross-entropy, of logits (tokens, V) and labels.
CRITERIA: dict[str, tuple[Callable[..., Tensor], str]] = {
    "class weights": (
        lambda z, t, *_: F.cross_entropy(z, t, weight=torch.ones(VOCABULARY)),
        "cross_entropy with weight",
    ),
    "smoothed": (
        lambda z, t, *_: F.cross_entropy(z, t, label_smoothing=0.1),
        "smooths its labels by 0.1; pass label_smoothing to fuse",
    ),
    "the old sum": (lambda z, t, *_: F.cross_entropy(z, t, size_average=False), "cross_entropy with size_average"),
    "three dimensions": (
        lambda z, t, *_: F.cross_entropy(z.view(1, 16, VOCABULARY), t[None]),
        "3 dimensions instead of",
    ),
    "by itself": (lambda *_: torch.ones((), requires_grad=True), "Changed cannot be fused: Changed computed its loss"),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize("kind", CRITERIA)
def test_a_cross_entropy_of_another_kind_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, message = CRITERIA[kind]
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z.view(-1, VOCABULARY)), raising=False)
    monkeypatch.setattr(Changed, "loss_function", staticmethod(lambda z, t, *_: criterion(z, t.flatten())))
    for loss in ("focal_loss", "cross_entropy")[: 1 + (kind == "by itself")]:
        with pytest.raises(ValueError, match=message):
            fuse(_llama(Changed), loss)


def test_a_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(input: list[Tensor], weight: list[Tensor], target: Tensor, **options: Any) -> Any:
        return fl.linear_cross_entropy(input[0], weight[0].detach(), target, **options)

    model = _granite()
    with monkeypatch.context() as patch:
        patch.setattr(stand_ins.Logits, "__truediv__", lambda logits, divisor: logits)
        with pytest.raises(ValueError, match=r"Granite.* cannot be fused: the loss differs by [0-9.e-]+ from that"):
            fuse(model, "focal_loss")
    assert "forward" not in model.__dict__
    wrong = integration.Loss(fl.cross_entropy, frozen, {})
    monkeypatch.setattr(integration.Loss, "of", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"the gradient of output layer.weight differs by"):
        fuse(model)


def test_a_model_that_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        fuse(transformers.LlamaModel(transformers.LlamaConfig(**DECODER)))
    with pytest.raises(TypeError, match=r"must be a transformers.PreTrainedModel, got Linear"):
        fuse(nn.Linear(2, 2))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"got DataParallel; fuse or unfuse the model that it wraps"):
        unfuse(nn.DataParallel(_llama()))  # type: ignore[type-var]
    with torch.device("meta"):
        empty = _llama()
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' of LlamaForCausalLM is on the meta device"):
        fuse(empty)

    for name in ("", "lm_head"):
        model = _llama()
        wrapped = model.get_submodule(name)
        wrapped.forward = wrapped.forward
        before = _attributes(model)
        with pytest.raises(ValueError, match=f"the forward of {type(wrapped).__name__} is replaced already"):
            fuse(model)
        assert _attributes(model) == before


def test_more_tokens_embedded_than_predicted_and_all_parameters_frozen(batch: dict[str, Tensor]) -> None:
    """As before an adapter is added; the probe compares the gradient of its hidden states."""
    model = _llama().train().requires_grad_(False)
    model.set_input_embeddings(nn.Embedding(VOCABULARY + 3001, 16).requires_grad_(False))
    expected = model(**batch).loss
    torch.testing.assert_close(fuse(model)(**batch).loss, expected)
    model.model.layers.requires_grad_()
    assert fuse(model)(**batch).loss.requires_grad


def test_a_loss_that_needs_more_than_labels_asks_for_a_probe(batch: dict[str, Tensor]) -> None:
    other = _llama(type("Embedded", (transformers.LlamaForCausalLM,), {"main_input_name": "inputs_embeds"}))
    with pytest.raises(ValueError, match="Embedded takes inputs_embeds; pass inputs with labels as probe"):
        fuse(other)
    embeds = other.get_input_embeddings()(batch["input_ids"]).detach()
    assert fuse(other, probe={"inputs_embeds": embeds, "labels": batch["labels"]}) is other

    model = _bert(kind=transformers.BertForPreTraining).eval()
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
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("dice_loss", {}, ValueError, "loss must be one of cross_entropy, .*got 'dice_loss'"),
    (F.cross_entropy, {}, ValueError, "loss must be one of .*got <function cross_entropy"),
    ("focal_loss", {"gama": 1.0}, TypeError, "linear_focal_loss.. got an unexpected keyword argument 'gama'"),
    ("focal_loss", {"gamma": -1.0}, ValueError, "gamma must be at least 0, got -1.0"),
    ("focal_loss", {"budget": 1}, ValueError, "budget of 1 bytes is too small"),
    ("mixed_cross_entropy", {}, TypeError, "linear_mixed_cross_entropy.. needs the argument 'alpha'"),
    ("focal_loss", {"return_stats": True}, TypeError, "gets 'return_stats' from the model .*or cannot be used"),
    ("focal_loss", {"teacher": _llama}, TypeError, "teacher is for distillation, got one with focal_loss"),
    ("distillation", {}, TypeError, "distillation needs a teacher"),
    ("distillation", {"teacher": lambda: nn.Linear(1, 1)}, TypeError, "must be a transformers.Pre.*, got Linear"),
    ("distillation", {"teacher": lambda: fuse(_llama())}, ValueError, "the teacher, a Llama.*, is fused with a loss"),
    ("distillation", {"teacher": lambda: _wide(vocab_size=999)}, ValueError, "has 999 classes, but the model 1031"),
    ("distillation", {"teacher": _bert}, ValueError, "the teacher's loss is of other targets than the model's"),
    ("distillation", {"teacher": lambda: _llama().to("meta")}, ValueError, "is on meta, but the model on cpu"),
    ("distillation", {"teacher": _llama, "divergence": "kl"}, ValueError, "divergence must be one of .*got 'kl'"),
    ("distillation", {"teacher": _llama, "teacher_softcap": 3}, TypeError, "gets 'teacher_softcap' from the model"),
]


@pytest.mark.parametrize(("loss", "arguments", "error", "message"), REFUSED)
def test_bad_arguments_are_refused(loss: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, teacher = _llama(), arguments.get("teacher")
    with pytest.raises(error, match=message):
        fuse(model, loss, **arguments | ({"teacher": teacher()} if teacher else {}))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("training", [True, False])
def test_a_new_output_layer_is_followed(training: bool, batch: dict[str, Tensor]) -> None:
    model = _llama().train(training)
    before = _attributes(model)
    fuse(model)
    old = model.lm_head
    for size in (VOCABULARY + 8, VOCABULARY):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.lm_head is not old
        loss = model(**batch).loss
        plain = copy.deepcopy(model)
        torch.testing.assert_close(loss, unfuse(plain)(**batch).loss)
    assert _attributes(unfuse(model)) == before
    assert "forward" not in old.__dict__ and old(torch.zeros(1, 16)).shape == (1, VOCABULARY)


# Distillation


def _wide(**sizes: int) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"hidden_size": 32, **sizes}))


def _of_logits(model: Any, teacher: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The row form of what both make."""
    with torch.no_grad():
        t = teacher(**batch).logits
    z, labels = model(**batch).logits, batch["labels"]
    if not (model.config.is_encoder_decoder or isinstance(model, transformers.BertForMaskedLM)):
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    return fl.distillation_loss(z, t, target=labels, impl="reference", **options)


#: Students and their teachers, whose logits are made otherwise.
LESSONS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "gpt2: larger": (_gpt2, _wide, {"divergence": "forward_kl"}),
    "llama: softcap": (_llama, _gemma2, {"divergence": "jsd", "beta": 0.3}),
    "gemma2: scaled": (_gemma2, _granite, {"divergence": "jsd", "beta": 0.3}),
    "bert: a bias, no shift": (_bert, lambda: _bert(tied=False), {"divergence": "forward_kl"}),
    "marian: a bias, and hidden states scaled": (_marian, _t5, {"divergence": "forward_kl"}),
}


@pytest.mark.parametrize("pair", LESSONS)
def test_distillation(pair: str, batch: dict[str, Tensor]) -> None:
    """Loss and gradients of the row form; neither model's logits are built, and the teacher stays as it was."""
    make, make_teacher, own = LESSONS[pair]
    model, teacher = make().double().train(), make_teacher().double().eval()
    for module in teacher.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    before, names = _attributes(teacher), [*model.state_dict()]
    held = copy.deepcopy(teacher.state_dict())
    own = own | {"temperature": 2.0, "scale_by_temperature_squared": True, "hard_weight": 0.5}
    mean, eighth = (_of_logits(model, teacher, batch, **own, normalizer=n) for n in (None, 8))
    gradients = _gradients(eighth, model)
    fuse(model, "distillation", teacher=teacher.train(), budget=2 * BUDGET, **own)
    weight = max(parameter.numel() for x in (model, teacher) for parameter in x.parameters())
    with Largest() as fused:
        loss = model(**batch, num_items_in_batch=8).loss
    assert fused.elements <= weight < BATCH * (LENGTH - 1) * VOCABULARY + weight
    torch.testing.assert_close(loss, eighth, rtol=1e-6, atol=0)
    _assert_close(_gradients(loss, model), gradients, 1e-6)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(**batch).loss, mean, check_dtype=False)
    assert not teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(dict(teacher.state_dict()), dict(held), rtol=0, atol=0)
    assert [*model.state_dict()] == names and not {*map(id, model.parameters())} & {*map(id, teacher.parameters())}
    unfuse(model)
    assert _attributes(teacher) == before


def test_distillation_in_half_precision_and_under_autocast(batch: dict[str, Tensor]) -> None:
    """A teacher of another dtype is cast to the products' where the model's hidden states are not."""
    model, teacher = _llama().train(), _wide().bfloat16()
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
    teacher, students = _llama().eval(), [_llama().train() for _ in range(2)]
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
    model = _llama().to(dtype).train()
    teacher = copy.deepcopy(model)
    teacher.lm_head.weight.data.mul_(1 + 2**-9)
    fuse(model, "distillation", teacher=teacher, divergence="tv")
    assert model(**batch).loss < 1e-2
    fuse(model, "distillation", teacher=copy.deepcopy(unfuse(model)))
    assert model(**batch).loss < 1e-6


def test_the_teachers_hidden_states_go_with_the_loss(batch: dict[str, Tensor]) -> None:
    """Without a garbage collection: nothing refers to them in a circle."""
    model = fuse(_llama().train(), "distillation", teacher=_wide())
    gc.collect()
    gc.disable()
    try:
        model(**batch).loss.backward()
        assert not [x for x in gc.get_objects() if type(x) is stand_ins.Logits]
    finally:
        gc.enable()


def test_what_a_teacher_cannot_do_is_refused(batch: dict[str, Tensor]) -> None:
    model, teacher = _llama().train(), _llama()
    with pytest.raises(ValueError, match="cannot be its own teacher; pass a copy"):
        fuse(model, "distillation", teacher=model)
    fuse(model, "distillation", teacher=teacher)
    with pytest.raises(ValueError, match="the model gets inputs_embeds, which a teacher cannot share"):
        model(inputs_embeds=torch.zeros(BATCH, LENGTH, 16), labels=batch["labels"])
    adapted = _with_adapter(teacher, ("lm_head",)).get_base_model()
    with pytest.raises(ValueError, match=r"the teacher has LoRA on its output layer.*merge it"):
        fuse(model, "distillation", teacher=adapted)
    unfuse(model)


# Hooks of the output layer


@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_the_output_layer(training: bool, batch: dict[str, Tensor]) -> None:
    """They receive the hidden states, registered before or after; what they change is in the loss."""
    model = _llama().double().train(training)
    head, seen = model.lm_head, []

    def register() -> None:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        head.register_forward_pre_hook(lambda _, inputs, kwargs: seen.append(inputs[0] * 1), with_kwargs=True)
        head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0] + 0))
        head.register_forward_hook(lambda _, inputs, kwargs, output: seen.append(inputs[0].clone()), with_kwargs=True)

    head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3 - 1,))
    head.register_forward_hook(lambda _, inputs, output: output * 0.5)
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1] * 3 - 1
    expected, gradients = _reference(model, batch, oracle.focal)
    register()
    fuse(model, "focal_loss")
    register()
    seen.clear()
    loss = model(**batch).loss
    assert len(seen) == 8 and all(type(x) is Tensor and torch.equal(x, hidden) for x in seen)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)  # evaluation is in float32
    _assert_close(_gradients(loss, model), gradients, 1e-6)


def test_a_hook_that_reads_the_logits(batch: dict[str, Tensor]) -> None:
    """In evaluation it can, and a loss of its own is none of the fused one; in training there are none."""
    model, seen = fuse(_llama().eval(), "focal_loss"), []
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
    student, teacher, seen = fuse(_llama().train(training)), fuse(_llama().eval()), []
    expected, logits = student(**batch).loss, teacher(batch["input_ids"]).logits
    student.lm_head.register_forward_pre_hook(lambda *_: seen.append(teacher(batch["input_ids"]).logits))
    assert torch.equal(student(**batch).loss, expected)
    assert type(seen[0]) is Tensor and torch.equal(seen[0], logits)


# PEFT, before or after


#: What PEFT makes of the output layer: the arguments, and whether the weights are tied.
WRAPPED: dict[str, tuple[dict[str, Any], bool]] = {
    "left alone": ({}, False),
    "trained whole": ({"modules_to_save": ["lm_head"]}, False),
    "trained whole, and the embedding": ({"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "some tokens of tied weights": ({"trainable_token_indices": [1, 2, 3]}, True),
    "LoRA": ({"targets": ("q_proj", "lm_head"), "lora_dropout": 0.5}, False),
    "LoRA of tied weights": ({"targets": ("lm_head",)}, True),
}


def _with_adapter(model: Any, targets: tuple[str, ...] = ("q_proj",), **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=list(targets), init_lora_weights=False, **options
    )
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word")
@pytest.mark.parametrize("first", ["fuse", "peft"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_an_output_layer_that_peft_changes(kind: str, first: str, batch: dict[str, Tensor]) -> None:
    """In training, in evaluation, and while the adapters are disabled."""
    options, tied = WRAPPED[kind]
    model = _llama(tie_word_embeddings=tied).double()
    before, chosen = _attributes(model), {"loss": "focal_loss", "gamma": 1.5, "budget": 2 * BUDGET}
    if first == "fuse":
        fuse(model, **chosen)
    adapted = _with_adapter(model, **options)
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
        gradients = _gradients(trained, adapted)
        with adapted.disable_adapter():
            plain = loss()
        assert all(x.any() for x in gradients) and plain != trained
        adapted.eval()
        return [trained, plain, loss(), *gradients]

    got = results(lambda: adapted(**batch).loss)
    assert unfuse(adapted.get_base_model()) is model
    assert not any("forward" in module.__dict__ for module in adapted.modules())
    expected = results(lambda: _reference_loss(adapted, batch, oracle.focal, gamma=1.5))
    for mine, right in zip(got, expected, strict=True):
        _assert_close([mine], [right], 1e-6)  # evaluation is in float32
    adapted.unload()
    assert _attributes(model) == before


class _Quantized(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.clone(), self.weight)


def test_an_output_layer_that_is_more_than_products_is_refused(batch: dict[str, Tensor]) -> None:
    """Where an adapter makes it one, in training alone: in evaluation there are logits."""
    quantized, model = _llama(), fuse(_llama().double(), "focal_loss")
    quantized.lm_head.__class__ = _Quantized
    with pytest.raises(ValueError, match=r"fused: 'clone' of .* a test_integrations_transformers\._Quantized must"):
        fuse(quantized)
    adapted = _with_adapter(model, ("lm_head",), use_dora=True)
    message = "Linear has the adapter 'default', which is no plain LoRA but a DoraLinearVariant; merge the adapter"
    with pytest.raises(ValueError, match=message):
        adapted.train()(**batch)
    evaluated = adapted.eval()(**batch).loss
    unfuse(model)
    torch.testing.assert_close(evaluated, _reference_loss(adapted, batch, oracle.focal).float(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=f"cannot be fused: .*{message}"):
        fuse(model)
    one_each = _with_adapter(fuse(_llama(), eval_logits=False), ("lm_head",)).eval()
    with pytest.raises(
        ValueError, match="Linear has the arguments adapter_names; merge the adapter, or leave the layer"
    ):
        one_each(**batch, adapter_names=["default"] * BATCH)


# Beside what training does


def test_two_threads_may_run_one_model(batch: dict[str, Tensor]) -> None:
    """One with labels, one without, and both within their forward pass."""
    model = fuse(_llama().train())
    expected, met = model(**batch).loss, threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        met.wait()

    model.lm_head.register_forward_pre_hook(meet)
    inputs = (batch, {"input_ids": batch["input_ids"]})
    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="in training without labels"):
        labelled, generating = pool.map(lambda given: model(**given), inputs)
    assert torch.equal(labelled.loss, expected) and type(generating.logits) is Tensor


def test_autocast(batch: dict[str, Tensor]) -> None:
    model = _marian().train()
    exact, results = _gradients(model(**batch).loss, model), []
    for side in (model, fuse(copy.deepcopy(model))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = side(**batch).loss
        results.append(_gradients(loss, side))
    errors = [max((a - b).abs().max().item() for a, b in zip(r, exact, strict=True)) for r in results]
    assert 0 < errors[1] <= 2 * errors[0]


def _adapted(first: str, **options: Any) -> Any:
    model = _llama()
    adapted = _with_adapter(fuse(model, "focal_loss") if first == "fuse" else model, **options)
    if first == "peft":
        fuse(model, "focal_loss")
    return adapted


COMPILED: dict[str, Callable[[], Any]] = {
    "a row loss": lambda: fuse(_llama(), "focal_loss", gamma=1.5),
    "a cap": lambda: fuse(_gemma2(), "focal_loss", gamma=1.5),
    "distillation": lambda: fuse(_llama(), "distillation", teacher=_wide(), divergence="reverse_kl"),
    "a copy of the layer": lambda: _adapted("fuse", modules_to_save=["lm_head"]),
    "LoRA, later": lambda: _adapted("fuse", targets=("lm_head",)),
    "LoRA, before": lambda: _adapted("peft", targets=("lm_head",)),
}


@pytest.mark.compile
@pytest.mark.parametrize("kind", COMPILED)
def test_training_compiles_without_a_break(kind: str, batch: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    model = COMPILED[kind]().train()
    expected = model(**batch).loss  # torch 2.11 breaks the graph of the first pass with a new output layer
    outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    torch.testing.assert_close(outputs.loss, expected)
    _assert_close(_gradients(outputs.loss, model), _gradients(expected, model), 1e-5)
    assert isinstance(outputs.logits, integration.UnbuiltLogits)


@pytest.mark.compile
def test_compiled_models_with_breaks_are_right_too(batch: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    model = fuse(_bert(), "focal_loss")
    compiled = torch.compile(model, backend="eager")
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_gradient_checkpointing_and_distributed_data_parallel(batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = _llama().train()
    expected = _gradients(model(**batch).loss, model)
    _checkpoint(fuse(model), reentrant=False)
    _assert_close(_gradients(model(**batch).loss, model), expected, 1e-5)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        parallel(**batch).loss.backward()
        del parallel  # the last to hold the group would wait for its threads, and they for Python's lock
    finally:
        torch.distributed.destroy_process_group()
    _assert_close([parameter.grad for parameter in model.parameters()], expected, 1e-5)


# Sharded by FSDP2, on two ranks


def _tied() -> Any:
    return _llama(tie_word_embeddings=True)


def _biased() -> Any:
    model = _marian()
    bias = torch.randn_like(model.final_logits_bias)
    del model.final_logits_bias
    model.final_logits_bias = nn.Parameter(bias)
    return model


#: The model, the modules that are a unit below the model, and whether that is resharded after its forward.
UNITS: dict[str, tuple[Callable[[], Any], list[str], bool]] = {
    "the head": (_llama, ["lm_head"], True),
    "the head and what is before it": (_llama, ["model.norm", "lm_head"], True),
    "kept until the backward": (_llama, ["model.norm", "lm_head"], False),
    "the model alone": (_llama, [], True),
    "tied, with the embedding": (_tied, ["model.embed_tokens", "model.norm", "lm_head"], True),
    "tied, in the model": (_tied, ["model.norm"], True),
    "a bias, within a larger unit": (functools.partial(_bert, False), ["cls"], True),
    "scaled": (_granite, ["lm_head"], True),
    "a bias beside the head": (_biased, [], True),
}


def _micro_batches(rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(2, VOCABULARY, (2, 1, LENGTH), generator=generator)
    return [{"input_ids": x, "labels": x.masked_fill(torch.arange(LENGTH) < 2 + rank, -100)} for x in tokens]


def _train_sharded(model: Any, world: int, rank: int | None) -> list[float]:
    """Two steps of SGD over the micro-batches of one rank, or in one process over those of all; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    values = []
    for _ in range(2):
        # Losses of which the weight is gathered anew for each backward, since there are two of them.
        for of in range(world) if rank is None else [rank]:
            losses = [model(**batch).loss for batch in _micro_batches(of)]
            for last, loss in enumerate(losses):
                if rank is not None:
                    model.set_requires_gradient_sync(bool(last))
                (loss / (world if rank is None else 1)).backward()
            values += [loss.item() for loss in losses]
        optimizer.step()
        optimizer.zero_grad()
    return values


def _trained_alone(model: Any, world: int, rank: int) -> list[float]:
    """The losses of this rank's part, of a model that one process trains."""
    values = torch.tensor(_train_sharded(model, world, None), dtype=torch.float64).view(2, world, 2)
    return values[:, rank].flatten().tolist()


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _shard(model: Any, unit: list[str], reshard: bool, reshard_root: bool | None = None) -> None:
    from torch.distributed.fsdp import fully_shard

    if unit:
        fully_shard([model.get_submodule(part) for part in unit], reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard_root)


def _sharded_models_train_as_in_one_process(rank: int, world: int) -> None:
    # The second makes the logits once more in the backward, and reads the weight there.
    ways: list[tuple[str, dict[str, Any]]] = [("cross_entropy", {}), ("flex_loss", {"loss_fn": lambda s: s.ce})]
    for i, (name, (make, unit, reshard)) in enumerate(UNITS.items()):
        torch.manual_seed(0)
        alone = make().double().train()
        state = copy.deepcopy(alone.state_dict())
        expected = _trained_alone(alone, world, rank)
        for loss, arguments in ways if unit == ["lm_head"] else ways[i % 2 :][:1]:
            model = make().double().train()
            model.load_state_dict(state)
            fuse(model, loss, **arguments)
            _shard(model, unit, reshard)
            with pytest.raises(ValueError, match=r"is sharded by fully_shard, .*; fuse before fully_shard"):
                fuse(model, "focal_loss")
            # In float64, but for the logits that models cast to float32.
            close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
            close(_train_sharded(model, world, rank), expected, msg=lambda m, n=name, of=loss: f"{n}, {of}: {m}")
            for (of, parameter), right in zip(model.named_parameters(), alone.parameters(), strict=True):
                close(_whole(parameter), right, msg=lambda m, n=name, of=f"{loss}, {of}": f"{n}, {of}: {m}")


def _in_mixed_precision(rank: int, world: int) -> None:
    """The loss stays in float32, whatever the dtype of the logits would be."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    alone = _llama().train()
    model = fuse(copy.deepcopy(alone))
    fully_shard(model.lm_head, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    fully_shard(model)
    loss = model(**_micro_batches(rank)[0]).loss
    loss.backward()
    expected = [alone(**_micro_batches(of)[0]).loss for of in range(world)]
    (sum(expected) / world).backward()
    assert loss.dtype == torch.float32 and loss != loss.bfloat16()
    torch.testing.assert_close(loss, expected[rank], rtol=1e-2, atol=0.0)
    for parameter, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        error = (_whole(parameter.grad) - right.grad).abs().max()
        assert error < 0.03 * right.grad.abs().max()


def _a_weight_that_others_have_freed_raises(rank: int, world: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    batch = _micro_batches(rank)[0]
    for original in (True, False):
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"))
        model = fuse(_llama().train())
        expected = model(**batch).loss
        torch.testing.assert_close(wrap(copy.deepcopy(model))(**batch).loss, expected)
        model.lm_head = wrap(model.lm_head)
        with pytest.raises(ValueError, match=r"with shape \(1031, 16\) and no elements in memory: FSDP1"):
            wrap(model)(**batch)
        for part in ("lm_head", ""):
            teacher = _llama()
            model = fuse(_llama().double().train(), "distillation", teacher=teacher)
            if part:
                teacher.lm_head = wrap(teacher.lm_head)
            wrapped = wrap(teacher)
            with pytest.raises(ValueError, match=r"weight of the teacher, a Llama.*, is what is left .*Shard the"):
                model(**batch)
            del wrapped

    # As DeepSpeed ZeRO-3 does: the parameter has its elements within the forward alone.
    model = fuse(_llama().train())
    whole, weight = model.lm_head.weight.detach().clone(), model.lm_head.weight
    weight.data = torch.empty(0)
    model.lm_head.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole))
    model.lm_head.register_forward_hook(lambda *_: setattr(weight, "data", torch.empty(0)))
    with pytest.raises(ValueError, match=r"with shape \(0,\) and no rows: FSDP1 and DeepSpeed ZeRO-3"):
        model(**batch)


def _sharded_teachers_teach_as_whole_ones(rank: int, world: int) -> None:
    for i, (name, (make, unit, reshard)) in enumerate(UNITS.items()):
        # The teacher's weights stay whole after its forward, or not.
        for root in (None, True) if "model.norm" in unit else ((None, True)[i % 2],):
            torch.manual_seed(0)
            alone, whole = make().double().train(), make().double()
            for parameter in whole.parameters():
                parameter.data.mul_(5)
            model, teacher = copy.deepcopy(alone), copy.deepcopy(whole)
            for student, its_teacher in ((alone, whole), (model, teacher)):
                fuse(student, "distillation", teacher=its_teacher, temperature=2.0, eval_logits=root is None)
            for module, reshard_root in ((model, None), (teacher, root)):
                _shard(module, unit, reshard, reshard_root)
            close = functools.partial(
                torch.testing.assert_close, rtol=1e-6, atol=1e-6, msg=lambda m, n=name, r=root: f"{n}, {r}: {m}"
            )
            expected = _trained_alone(alone, world, rank)
            close(_train_sharded(model, world, rank), expected)
            for parameter, right in zip(model.parameters(), alone.parameters(), strict=True):
                close(_whole(parameter), right)
            batch, head = _micro_batches(rank)[0], teacher.get_output_embeddings()
            [lesson] = model._fusedloss.loss.teacher.lessons(model.get_output_embeddings(), batch)
            in_root = unit in ([], ["model.norm"])  # and copied only where it is resharded
            assert (lesson.logits.weight[0] is head.weight) == ((in_root and root is None) or not reshard)
            with torch.no_grad():
                close(model.eval()(**batch).loss, alone.eval()(**batch).loss)
            teacher.reshard()
            for parameter, right in zip(teacher.parameters(), whole.parameters(), strict=True):
                assert parameter.grad is None and torch.equal(_whole(parameter), right)
            with pytest.raises(ValueError, match=r"the teacher, a FSDP.*, is sharded by .*; fuse before fully_shard"):
                fuse(make(), "distillation", teacher=teacher)


def _a_teacher_in_mixed_precision(rank: int, world: int) -> None:
    """Which makes it one of that dtype, whose products are the student's."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model, teacher = _llama().train(), _wide()
    for parameter in teacher.parameters():
        parameter.data.mul_(5)
    half, batch = copy.deepcopy(teacher), _micro_batches(rank)[0]
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = fuse(model, "distillation", teacher=half)(**batch).loss
    gradients = _gradients(expected, model)
    fuse(model, "distillation", teacher=teacher)
    for module in (teacher.lm_head, teacher):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    _assert_close(_gradients(loss, model), gradients, 1e-5)


test_scene = ranks.tests_of({
    _sharded_models_train_as_in_one_process: (2,),
    _sharded_teachers_teach_as_whole_ones: (2,),
    _in_mixed_precision: (2,),
    _a_teacher_in_mixed_precision: (2,),
    _a_weight_that_others_have_freed_raises: (2,),
})  # fmt: skip


# Trainer


def _rows(count: int, decoder: bool) -> list[dict[str, Tensor]]:
    """Micro-batches with differing numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (count, LENGTH), generator=generator)
    labels = [row.masked_fill(torch.arange(LENGTH) < index % 7, -100) for index, row in enumerate(tokens)]
    rows = [{"input_ids": row, "labels": of_row} for row, of_row in zip(tokens, labels, strict=True)]
    return [{**row, "decoder_input_ids": tokens[-1 - i]} for i, row in enumerate(rows)] if decoder else rows


def _trainer(model: Any, folder: Path, *compute: Any, kind: type[Any] = transformers.Trainer, **arguments: Any) -> Any:
    """Of `compute_loss_func` and `compute_metrics`."""
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1,
        "optim": "sgd", "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_grad_norm": 0.0, **arguments,
    }  # fmt: skip
    seq2seq = kind is transformers.Seq2SeqTrainer
    of_kind = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    decoder = model.config.is_encoder_decoder
    loss, metrics = (*compute, None, None)[:2]
    data = {"train_dataset": _rows(12, decoder), "eval_dataset": _rows(4, decoder)}
    return kind(model, of_kind(str(folder), **settings), compute_loss_func=loss, compute_metrics=metrics, **data)


def _train(*args: Any, **kwargs: Any) -> Any:
    trainer = _trainer(*args, **kwargs)
    trainer.train()
    return trainer


def _alike(make: Callable[[], Any]) -> list[Any]:
    models = [make() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


def _assert_trained_alike(models: list[Any], tolerance: float = 1e-5) -> None:
    """The first two, which have moved away from the third."""

    def difference(model: Any, other: Any) -> float:
        return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))

    moved = difference(models[0], models[2])
    assert moved > 1e-4 and difference(models[0], models[1]) <= tolerance * moved


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_a_trainer_with_accumulation_goes_the_unfused_way(smoothing: float, tmp_path: Path) -> None:
    models = _alike(_llama)
    own = {"label_smoothing": smoothing} if smoothing else {}
    trainers = [_train(models[0], tmp_path, label_smoothing_factor=smoothing), _train(fuse(models[1], **own), tmp_path)]
    _assert_trained_alike(models)
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [_llama, _t5, _marian])
@pytest.mark.parametrize("how", ["fuse", "trainer_loss"])
def test_accumulated_gradients_are_those_of_the_whole_batch(make: Callable[[], Any], how: str, tmp_path: Path) -> None:
    models = _alike(lambda: make().double())
    for model, parts in zip(models, (1, 4), strict=False):
        compute = trainer_loss(fl.focal_loss, shift=make is _llama, gamma=1.5) if how == "trainer_loss" else None
        if how == "fuse":
            fuse(model, "focal_loss", gamma=1.5)
        sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 1}
        _train(model, tmp_path, compute, **sizes)
    _assert_trained_alike(models, 1e-6)


def test_a_trainer_in_bf16_and_back(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """Its accelerator wraps the forward; what is fused within can still be unfused."""
    model = fuse(_llama(), "focal_loss")
    trainer = _train(model, tmp_path, bf16=True)
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    model.train()
    assert isinstance(model(**batch).logits, integration.UnbuiltLogits)
    whole = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert isinstance(whole(**batch).logits, integration.UnbuiltLogits)
    unfuse(model)
    assert isinstance(model(**batch).logits, Tensor) and "forward" not in model.lm_head.__dict__


@pytest.mark.compile
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trainer_that_smooths_by_itself_is_refused(compiled: bool, tmp_path: Path) -> None:
    """It takes the labels away, and computes a cross-entropy of the logits whatever the model is fused with."""
    torch._dynamo.reset()
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    model = fuse(_llama(), "focal_loss")
    message = r"label_smoothing_factor=0\.25 makes the Trainer .*pass label_smoothing=0\.25 to fuse"
    trainer = _trainer(model, tmp_path, label_smoothing_factor=0.25, **arguments)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            run()
    assert model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape == (1, 4)
    unfuse(model)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_compute_loss_func_takes_the_logits_of_a_fused_model(tmp_path: Path) -> None:
    """The caller's loss is asked for by name, so that a warning does; label_smoothing_factor is not for it."""
    models = _alike(_llama)
    compute = trainer_loss(fl.focal_loss, shift=True, label_smoothing=0.1)
    _train(models[0], tmp_path, compute)
    with pytest.warns(UserWarning, match="is fused, but in training without labels"):
        _train(fuse(models[1]), tmp_path, compute, label_smoothing_factor=0.1)
    _assert_trained_alike(models, 0.0)


def test_a_trainer_that_collects_logits_needs_them(tmp_path: Path) -> None:
    """And one that generates does not."""

    def _count(prediction: Any) -> dict[str, float]:
        return {"predictions": len(prediction.predictions)}

    model = fuse(_llama(), eval_logits=False)
    trainer = _trainer(model, tmp_path, None, _count)
    for collect in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match=r"eval_logits=False, but the Trainer collects logits.*eval_logits=True"):
            collect()
    expected = _trainer(model, tmp_path).evaluate()["eval_loss"]
    fuse(model)
    metrics = trainer.evaluate()
    assert metrics["eval_predictions"] == 4 and metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)

    arguments = {"predict_with_generate": True, "generation_max_length": 6}
    model = fuse(_t5(), "focal_loss", eval_logits=False)
    metrics = _trainer(model, tmp_path, None, _count, kind=transformers.Seq2SeqTrainer, **arguments).evaluate()
    assert metrics["eval_predictions"] == 4 and metrics["eval_loss"] > 0


# The row forms as a Trainer's loss


@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("shift", [True, False])
def test_trainer_loss(shift: bool, items: Any) -> None:
    logits = torch.randn(2, 7, 50, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (2, 7))
    labels[0, 4:] = -100
    compute = trainer_loss(fl.focal_loss, shift=shift, gamma=1.5, label_smoothing=0.1)
    z, t = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    options = {} if items is None else {"normalizer": items}
    expected = oracle.loss(oracle.focal, z, t, gamma=1.5, label_smoothing=0.1, **options)
    for outputs in ({"logits": logits}, (logits, None)):
        loss = compute(outputs, labels, num_items_in_batch=items)
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients)


def test_trainer_loss_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="shift must be a bool, got 'yes'"):
        trainer_loss(fl.focal_loss, shift="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gets 'normalizer' from the model and its labels"):
        trainer_loss(fl.focal_loss, shift=True, normalizer=3)
    with pytest.raises(TypeError, match="needs the argument 'alpha'"):
        trainer_loss(fl.mixed_cross_entropy, shift=True)
    with pytest.raises(TypeError, match="loss must be a function, got 'focal_loss'"):
        trainer_loss("focal_loss", shift=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the loss needs labels, got None"):
        trainer_loss(fl.focal_loss, shift=True)({"logits": torch.zeros(1, 2, 3)}, None)
    with pytest.raises(ValueError, match=r"factor=0\.1 does not reach .*label_smoothing=0\.1 to trainer"):
        _train(_llama(), tmp_path, trainer_loss(fl.focal_loss, shift=True), label_smoothing_factor=0.1)


# The module


def test_the_package_does_not_import_transformers_and_says_what_to_install() -> None:
    code = "import sys, fusedloss; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
    command = [sys.executable, "-c", code + "import fusedloss.integrations.transformers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ImportError: fusedloss.integrations.transformers needs transformers: pip install" in done.stderr
    assert "'fusedloss[transformers]'" in done.stderr


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(integration)
    assert result.attempted > 5 and not result.failed
