"""A small pre-norm Transformer with one embedding for source, target and output, and cached decoding."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # (B, heads, length, width / heads) each


class Size(NamedTuple):
    vocab_size: int
    d_model: int
    layers: int  # of the encoder, and of the decoder
    heads: int
    dropout: float
    max_length: int  # the longest sequence of pieces that can be read or written


class Attention(nn.Module):
    """Softmax attention written out: for short sentences on a CPU the fused kernel's backward takes twice as long."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.scale = size.heads, (size.heads / size.d_model) ** 0.5
        self.query = nn.Linear(size.d_model, size.d_model)
        self.key_value = nn.Linear(size.d_model, 2 * size.d_model)
        self.out = nn.Linear(size.d_model, size.d_model)

    def keys_values(self, x: Tensor) -> KeysValues:
        keys, values = self.key_value(x).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """x (B, T, D), mask broadcast to (B, heads, T, S): 0 where x may look, -inf elsewhere -> (B, T, D)."""
        keys, values = keys_values
        scores = self._split(self.query(x)) * self.scale @ keys.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        heads = scores.softmax(-1).to(values.dtype) @ values
        return self.out(heads.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _feed_forward(size: Size) -> nn.Module:
    wide = 4 * size.d_model
    return nn.Sequential(
        nn.Linear(size.d_model, wide), nn.ReLU(), nn.Dropout(size.dropout), nn.Linear(wide, size.d_model)
    )


class EncoderLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(size), _feed_forward(size)
        self.norms = nn.ModuleList(nn.LayerNorm(size.d_model) for _ in range(2))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.attention(y, self.attention.keys_values(y), mask))
        return x + self.dropout(self.feed_forward(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention, self.cross, self.feed_forward = Attention(size), Attention(size), _feed_forward(size)
        self.norms = nn.ModuleList(nn.LayerNorm(size.d_model) for _ in range(3))
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self, x: Tensor, memory: KeysValues, mask: Tensor, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """x (B, T, D) -> the same, and the keys and values so far. With a past, x is the next position alone."""
        y = self.norms[0](x)
        present = self.attention.keys_values(y)
        causal = None
        if past is None:
            causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu_(1)
        else:
            present = (torch.cat((past[0], present[0]), dim=2), torch.cat((past[1], present[1]), dim=2))
        x = x + self.dropout(self.attention(y, present, causal))
        x = x + self.dropout(self.cross(self.norms[1](x), memory, mask))
        return x + self.dropout(self.feed_forward(self.norms[2](x))), present


class Memory(NamedTuple):
    """What the decoder needs of the source."""

    layers: list[KeysValues]
    mask: Tensor  # (B, 1, 1, S): 0 where a piece stands, -inf on padding


class Transformer(nn.Module):
    positions: Tensor  # (max_length, D)

    def __init__(self, size: Size, pad: int) -> None:
        super().__init__()
        self.size, self.pad = size, pad
        self.embedding = nn.Embedding(size.vocab_size, size.d_model, padding_idx=pad)
        self.register_buffer("positions", _sinusoids(size.max_length, size.d_model), persistent=False)
        self.dropout = nn.Dropout(size.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(size) for _ in range(size.layers))
        self.decoder = nn.ModuleList(DecoderLayer(size) for _ in range(size.layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(size.d_model), nn.LayerNorm(size.d_model)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("embedding"):
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=size.d_model**-0.5)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """source (B, S), target_in (B, T) -> hidden states (B, T, D): the linear losses make no logits of them."""
        return self.decode(target_in, self.encode(source))[0]

    def encode(self, source: Tensor) -> Memory:
        mask = torch.zeros(source.shape).masked_fill_(source == self.pad, -torch.inf)[:, None, None, :]
        x = self._embed(source, 0)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.encoder_norm(x)
        return Memory([layer.cross.keys_values(x) for layer in self._decoder_layers()], mask)

    def decode(
        self, target: Tensor, memory: Memory, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """target (B, T) -> hidden states (B, T, D) and the keys and values of every layer.

        With `past`, target holds the next piece alone (B, 1).
        """
        x = self._embed(target, 0 if past is None else past[0][0].shape[2])
        present = []
        for index, layer in enumerate(self._decoder_layers()):
            x, state = layer(x, memory.layers[index], memory.mask, None if past is None else past[index])
            present.append(state)
        return self.decoder_norm(x), present

    def _decoder_layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.decoder))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), tied to the embedding."""
        return self.embedding.weight

    def _embed(self, pieces: Tensor, start: int) -> Tensor:
        x = self.embedding(pieces) * math.sqrt(self.size.d_model)
        return self.dropout(x + self.positions[start : start + pieces.shape[1]])


def autocast(dtype: str) -> torch.autocast:
    """`with autocast("bf16")`: the matrix products in bf16, everything else as it is; "fp32" changes nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def _sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines in the first half, cosines in the second."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / max(width // 2 - 1, 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)
