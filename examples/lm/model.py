"""The model, and the three ways to its loss: the linear form, the row form in Trainer, transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fusedloss as fl
from fusedloss.integrations.transformers import fuse, trainer_loss


class Size(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int


def make_model(size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


#: Function and arguments by the name on the command line; "alpha" is filled in by whoever knows the step.
LOSSES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "cross_entropy": (fl.cross_entropy, {}),
    "focal": (fl.focal_loss, {"gamma": 2.0}),
    "mixed": (fl.mixed_cross_entropy, {"alpha": 0.25}),
    "dsc": (fl.dsc_loss, {}),
}


def fuse_with(model: LlamaForCausalLM, loss: str, **changing: Any) -> None:
    """The linear form: the logits are never built. On a fused model this exchanges the loss."""
    function, arguments = LOSSES[loss]
    fuse(model, function, **{**arguments, **changing})


def row_loss(loss: str, **changing: Any) -> Callable[..., Tensor]:
    """The row form of the model's logits, as Trainer's compute_loss_func."""
    function, arguments = LOSSES[loss]
    return trainer_loss(function, shift=True, **{**arguments, **changing})


@torch.no_grad()
def held_out(model: LlamaForCausalLM, blocks: Tensor, batch: int, bf16: bool) -> tuple[float, float]:
    """(cross-entropy, token accuracy) of blocks (N, length), whatever loss trains, without logits here either."""
    model.eval()
    total, right = 0.0, 0
    for tokens in blocks.split(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(tokens).last_hidden_state[:, :-1]  # (B, L - 1, D)
            weight = model.get_output_embeddings().weight
            loss, stats = fl.linear_cross_entropy(hidden, weight, tokens[:, 1:], reduction="sum", return_stats=True)
        total += loss.item()
        right += int((stats.argmax == tokens[:, 1:]).sum())
    targets = blocks[:, 1:].numel()
    return total / targets, right / targets
