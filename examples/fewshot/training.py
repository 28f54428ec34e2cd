"""One run: a fresh classifier, trained on the labelled questions with one loss, and measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from model import Classifier, Encoded
from torch import Tensor
from transformers import PreTrainedModel

import fusedloss as fl

LOSSES = ("CE", "CE + SupCon")


class Settings(NamedTuple):
    lr: float  # of the encoder, at its highest
    head_lr: float
    lam: float  # the share of the contrastive loss
    temperature: float
    batch: int  # at most; batches of an epoch are of equal size


#: (logits, features, labels) -> the loss of a batch.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_of(name: str, settings: Settings) -> Loss:
    """One of `LOSSES`."""
    if name == "CE":
        return lambda logits, features, labels: fl.cross_entropy(logits, labels)
    return fl.nn.CrossEntropySupConLoss(lam=settings.lam, temperature=settings.temperature)


def updates(size: int, epochs: int, batch: int) -> int:
    return epochs * math.ceil(size / batch)


def batches(size: int, epochs: int, batch: int, order: torch.Generator) -> Iterator[Tensor]:
    """Indices; every epoch has all of them once."""
    for _ in range(epochs):
        yield from torch.randperm(size, generator=order).tensor_split(math.ceil(size / batch))


def train(
    encoder: PreTrainedModel,
    drawn: Encoded,
    classes: int,
    loss: Loss,
    epochs: int,
    settings: Settings,
    seed: int,
    bf16: bool,
    progress: Callable[[], object],
) -> Classifier:
    """A copy of the encoder, fine-tuned. Of one seed, all losses see the same head, batches and dropout."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(encoder), classes, bf16).train()
    size = len(drawn.labels)
    total = updates(size, epochs, settings.batch)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": settings.lr},
            {"params": model.head.parameters(), "lr": settings.head_lr},
        ],
        weight_decay=0.01,
        fused=True,
    )
    warmup = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup + 1))
    )
    for chosen in batches(size, epochs, settings.batch, torch.Generator().manual_seed(seed)):
        logits, features = model([drawn.pieces[i] for i in chosen.tolist()])
        loss(logits, features, drawn.labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress()
    return model.eval()


@torch.no_grad()
def predict(model: Classifier, questions: Encoded, batch: int = 64) -> tuple[Tensor, Tensor]:
    """(classes (N,), features (N, D)) of the questions, computed with those of like length side by side."""
    order = sorted(range(len(questions.pieces)), key=lambda i: len(questions.pieces[i]))
    classes = torch.empty(len(order), dtype=torch.int64)
    features = torch.empty(len(order), model.head.in_features)
    for chosen in torch.tensor(order).split(batch):
        logits, features[chosen] = model([questions.pieces[i] for i in chosen.tolist()])
        classes[chosen] = logits.argmax(1)
    return classes, features


def accuracy(classes: Tensor, questions: Encoded) -> float:
    return (classes == questions.labels).double().mean().item()
