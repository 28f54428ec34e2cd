"""Trainers of TRL on the fused passes: losses, metrics and gradients of TRL's own."""

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from products import inside
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss as fl

transformers = pytest.importorskip("transformers", reason="the integration needs the extra [transformers]")
trl = pytest.importorskip("trl", reason="the integration needs TRL, the extra [trl]")
import datasets  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fusedloss.integrations import trl as integration  # noqa: E402
from fusedloss.integrations.transformers import fuse  # noqa: E402
from fusedloss.integrations.trl import fuse_trainers, unfuse_trainers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

VOCABULARY = 97
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "scale": ("Granite", {"logits_scaling": 3.0}),
    "router": ("Mixtral", {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}),
}
TEXTS = [" ".join(f"w{(7 * i + j) % 60}" for j in range(5 + i)) for i in range(4)]
PROMPTS = ["w1 w2 ", "w3 ", "w4 w5 w6 ", "w7 "]
GOOD, BAD = ["w4 w5 w6", "w7 w8", "w9", "w10 w11"], ["w12", "w13 w14 w15", "w16 w17", "w18"]
ONLINE = {
    "num_generations": 2, "max_completion_length": 5, "beta": 0.1, "temperature": 0.7,
    "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions],
}  # fmt: skip
#: A trainer, its data, and its options.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("SFT", {"text": TEXTS}, {}),
    "dft": ("SFT", {"prompt": PROMPTS, "completion": GOOD}, {"loss_type": "dft"}),
    "dpo": ("DPO", {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {}),
    "wpo": ("DPO", {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {"use_weighting": True}),
    "kto": ("KTO", {"prompt": PROMPTS, "completion": GOOD, "label": [True, True, False, False]}, {}),
    "grpo": ("GRPO", {"prompt": PROMPTS}, {**ONLINE, "entropy_coef": 0.1, "num_iterations": 2}),
    "rloo": ("RLOO", {"prompt": PROMPTS}, ONLINE),
}


@pytest.fixture(autouse=True)
def _unfused() -> Iterator[None]:
    yield
    unfuse_trainers()


@functools.cache
def _tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _model(family: str = "llama") -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **options))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn(value.shape))  # no gradient is 0 for reasons of symmetry
    return model


def _trainer(kind: str, tmp_path: Path, model: Any = None, trainer: Any = None, **options: Any) -> Any:
    name, data, own = KINDS[kind]
    options = {**own, **options}
    for_trainer = {key: options.pop(key) for key in ("reward_funcs", "peft_config") if key in options}
    if model is None:  # a reference model is loaded from where the model is from
        _model().save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
        options["model_init_kwargs"] = {"dtype": "float32"}
    config = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to="none",
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0,
           "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True} | options,
    )  # fmt: skip
    if kind in ("wpo", "dpo", "kto") and not isinstance(model, str):
        for_trainer["ref_model"] = _model()
    return (trainer or getattr(trl, f"{name}Trainer"))(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(data), processing_class=_tokenizer(),
        **for_trainer,
    )  # fmt: skip


def _trained(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What two steps log, and how far they move the parameters: the gradients."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    transformers.set_seed(0)
    trainer.train()
    times = ("_runtime", "_per_second", "step_time", "flos")
    logs = [{k: v for k, v in log.items() if not k.endswith(times)} for log in trainer.state.log_history]
    return logs, {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}


def _assert_same(ours: Any, own: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    logs, moved = own
    assert len(logs) == len(ours[0]) >= 3
    for log, expected in zip(ours[0], logs, strict=True):
        assert log == pytest.approx(expected, rel=rtol, abs=atol, nan_ok=True)
    assert all(value.any() for value in moved.values())
    torch.testing.assert_close(ours[1], moved, rtol=rtol, atol=atol)


def _refuse(*_: Any) -> None:
    raise AssertionError("TRL's own function runs")


def _both(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    own = _trained(make())
    trainer = make()
    fuse_trainers()
    monkeypatch.setattr(utils._ChunkedLogProbFunction.own, "apply", _refuse)
    return _trained(trainer), own


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_logs_and_learns_what_it_does_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own = _both(lambda: _trainer(kind, tmp_path), monkeypatch)
    expected = {
        "SFT": ("entropy", "mean_token_accuracy"),
        "DPO": ("entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins"),
        "KTO": ("rewards/margins",),
        "GRPO": ("entropy", "kl", "entropy_coef"),
        "RLOO": ("entropy", "kl"),
    }[KINDS[kind][0]]
    assert {*expected} <= own[0][0].keys()
    _assert_same(ours, own)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_logits_that_the_model_changes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, own = _both(lambda: _trainer("dpo", tmp_path, _model(family)), monkeypatch)
    _assert_same(ours, own)
