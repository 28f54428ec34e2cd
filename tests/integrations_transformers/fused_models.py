"""Models of transformers to fuse, and what they are compared with."""

from typing import Any

import oracle
import products
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers", reason="the integration needs the extra [transformers]")


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


def llama(kind: type[Any] | None = None, **options: Any) -> Any:
    return (kind or transformers.LlamaForCausalLM)(transformers.LlamaConfig(**DECODER, **options))


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout))


def gemma2() -> Any:
    # a cap that the logits of untrained weights reach
    config = transformers.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=0.3, initializer_range=0.3)
    return transformers.Gemma2ForCausalLM(config)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def marian() -> Any:
    model = transformers.MarianMTModel(transformers.MarianConfig(**SEQ2SEQ))
    nn.init.normal_(model.final_logits_bias)
    return model


def mixtral() -> Any:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=3, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # which takes float64
    return model


def granite() -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**DECODER, logits_scaling=0.25))


def bert(tied: bool = True, kind: type[Any] = transformers.BertForMaskedLM) -> Any:
    names = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": tied}
    decoder = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
    model = kind(transformers.BertConfig(**decoder, **names))
    nn.init.normal_(model.cls.predictions.bias if tied else model.cls.predictions.decoder.bias)
    return model


def wide(**sizes: int) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"hidden_size": 32, **sizes}))


#: Models by what is particular in their way from hidden states to the loss.
FAMILIES = {
    "llama": llama,
    "gpt2: tied": gpt2,
    "gemma2: softcap": gemma2,
    "t5: scaled hidden states, a loss of its own": t5,
    "marian: a bias beside the layer": marian,
    "mixtral: a router's loss": mixtral,
    "granite: scaled logits": granite,
    "bert: a bias in the layer, no shift": bert,
}


def reference_of(model: Any, batch: dict[str, Tensor], base: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients from the logits of the unfused model, by plain formulas."""
    loss = reference_loss(model, batch, base, **options)
    return loss, gradients_of(loss, model)


def reference_loss(model: Any, batch: dict[str, Tensor], base: Any, **options: Any) -> Tensor:
    outputs = model(**batch)
    labels, logits = batch["labels"], outputs.logits
    if not model.config.is_encoder_decoder and not isinstance(model, transformers.BertForMaskedLM):
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = oracle.loss(base, logits.flatten(0, 1), labels.flatten(), ignore_index=-100, **options)
    if "aux_loss" in outputs:
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    return loss


def gradients_of(loss: Tensor, model: Any) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(x.abs().max().item() for x in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max().item() <= tolerance * largest


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result = products.inside(self, function, arguments)
        if result is None:
            result = function(*arguments, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def attributes_of(model: Any) -> list[Any]:
    return [
        (name, type(module), sorted(module.__dict__), dict(module._forward_pre_hooks), dict(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def with_adapter(model: Any, targets: tuple[str, ...] = ("q_proj",), **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    fixed = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=list(targets), **fixed, **options)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


def checkpoint(model: Any, reentrant: bool) -> None:
    # by its new name, or the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
