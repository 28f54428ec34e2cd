"""Bidirectional LSTMs over tokens, their training and their evaluation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

PAD, UNKNOWN = 0, 1
IGNORED = -100  # the target of what only fills a batch


class Vocabulary:
    """A number for each token that is seen often enough; PAD and UNKNOWN are taken."""

    def __init__(self, texts: Iterable[Sequence[str]], least: int) -> None:
        counts = Counter(token for text in texts for token in text)
        kept = sorted(token for token, n in counts.items() if n >= least)
        self._numbers = {token: number for number, token in enumerate(kept, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self._numbers) + 2

    def encode(self, tokens: Sequence[str]) -> list[int]:
        return [self._numbers.get(token, UNKNOWN) for token in tokens]


class Example(NamedTuple):
    tokens: list[int]
    target: int | list[int]  # its class, or those of its tokens


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64, padded with PAD
    lengths: Tensor  # (B,) int64
    target: Tensor  # (B,) int64, or (B, T) padded with IGNORED


class _BiLSTM(nn.Module):
    def __init__(self, words: int, classes: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.forwards, self.backwards = (nn.LSTM(width, hidden, batch_first=True) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, classes)

    def states(self, batch: Batch, padding: float) -> Tensor:
        """(B, T, 2H), `padding` beyond the length of each."""
        embedded = self.dropout(self.embedding(batch.tokens))
        # Each text reversed by itself, so that the way back begins at its last token and not at what fills the batch.
        # A packed batch does that too, in twice the time on a CPU.
        position = torch.arange(batch.tokens.shape[1])
        mirrored = batch.lengths[:, None] - 1 - position  # (B, T)
        inside = (mirrored >= 0)[..., None]
        mirrored = torch.where(inside[..., 0], mirrored, position)[..., None]
        ahead, _ = self.forwards(embedded)
        back, _ = self.backwards(embedded.gather(1, mirrored.expand_as(embedded)))
        back = back.gather(1, mirrored.expand_as(back))
        return torch.cat((ahead, back), -1).masked_fill(~inside, padding)


class Classifier(_BiLSTM):
    """The largest of each hidden state over a text's tokens, and a linear layer on them: logits (B, C)."""

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.dropout(self.states(batch, -torch.inf).amax(1)))


class Tagger(_BiLSTM):
    """A linear layer on the hidden state of each token: logits (B, T, C)."""

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.dropout(self.states(batch, 0.0)))


def parts(lengths: Sequence[int], size: int, order: random.Random | None) -> list[list[int]]:
    """The indices of all texts once, those of like length side by side; `order` shuffles them."""
    indices = list(range(len(lengths)))
    if order is not None:
        order.shuffle(indices)
    indices.sort(key=lambda i: lengths[i] // 8)
    found = [indices[start : start + size] for start in range(0, len(indices), size)]
    if order is not None:
        order.shuffle(found)
    return found


def batches(examples: Sequence[Example], size: int, order: random.Random | None) -> Iterator[tuple[list[int], Batch]]:
    """The indices of `parts`, and their batches."""
    for part in parts([len(example.tokens) for example in examples], size, order):
        rows = [torch.tensor(examples[i].tokens) for i in part]
        targets = [torch.tensor(examples[i].target) for i in part]
        target = pad_sequence(targets, True, IGNORED) if targets[0].dim() else torch.stack(targets)
        yield part, Batch(pad_sequence(rows, True, PAD), torch.tensor([len(row) for row in rows]), target)


def trained(
    kind: type[_BiLSTM],
    examples: Sequence[Example],
    words: int,
    classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: dict[str, Any],
) -> _BiLSTM:
    """A network, trained with Adam. Of one seed, all losses see the same initial weights, batches and dropout."""
    torch.manual_seed(settings["seed"])
    order = random.Random(settings["seed"])
    model = kind(words, classes, settings["width"], settings["hidden"], settings["dropout"]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    for _ in range(settings["epochs"]):
        for _, batch in batches(examples, settings["batch"], order):
            loss(model(batch), batch.target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits_of(model: _BiLSTM, examples: Sequence[Example], batch: int = 256) -> list[Tensor]:
    """Of each example in its order: (C,), or (T, C) of a tagger."""
    rows: list[Tensor] = [torch.empty(0)] * len(examples)
    for part, inputs in batches(examples, batch, None):
        for i, length, row in zip(part, inputs.lengths.tolist(), model(inputs), strict=True):
            rows[i] = row[:length] if row.dim() > 1 else row
    return rows
