"""A pretrained encoder, its upper layers fine-tuned on words: by their tags, or by questions with spans as answers.

The lower layers are frozen. Their hidden states are computed once for each text, and training begins from there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from bilstm import parts
from packages import DataError
from scores import Span, entities
from tags import OUTSIDE, Sentence
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTIONS = {
    "emph": "Which words are emphasized, or name a control?",
    "literal": "Which words are code or a value?",
    "menuitem": "Which words name a command in a menu?",
    "input": "Which words are to be typed?",
    "keycode": "Which words name a key?",
}


class Words(NamedTuple):
    """A text for the encoder."""

    pieces: list[int]
    places: list[int]  # of the first piece of each word
    cases: list[int]  # of each word
    target: list[tuple[int, ...]]  # of each word, a class for each head


CASES = 4


def case(word: str) -> int:
    """0 for no letters, 1 for small ones, 2 for capitals, 3 for both."""
    return 2 * any(map(str.isupper, word)) + any(map(str.islower, word))


class Tags:
    """One head, whose classes are the BIO tags."""

    heads = 1

    def __init__(self, kinds: Sequence[str]) -> None:
        self.labels = [OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]
        self.classes = len(self.labels)

    def texts(self, sentence: Sentence) -> list[tuple[str, list[tuple[int, ...]]]]:
        """What is asked first, and the target of each word."""
        return [("", [(self.labels.index(tag),) for _, tag in sentence])]

    def spans(self, predicted: Sequence[Tensor]) -> set[Span]:
        """Of the classes (W, heads) of each of the texts of a sentence."""
        return entities([self.labels[i] for i in predicted[0][:, 0].tolist()])


class Questions:
    """A question for each kind, and two heads: does an answer begin at a word, and does one end there?"""

    heads, classes = 2, 2

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = kinds

    def texts(self, sentence: Sentence) -> list[tuple[str, list[tuple[int, ...]]]]:
        found = []
        for kind in self.kinds:
            spans = [span for span in entities([tag for _, tag in sentence]) if span[0] == kind]
            begins, ends = {first for _, first, _ in spans}, {past - 1 for _, _, past in spans}
            question = QUESTIONS.get(kind, f"Which words are {kind}?")
            found.append((question, [(int(i in begins), int(i in ends)) for i in range(len(sentence))]))
        return found

    def spans(self, predicted: Sequence[Tensor]) -> set[Span]:
        """From each beginning to the nearest end, which is to come before the next beginning."""
        found = set()
        for kind, classes in zip(self.kinds, predicted, strict=True):
            first = None
            for i, (begins, ends) in enumerate(classes.tolist()):
                first = i if begins else first
                if ends and first is not None:
                    found.add((kind, first, i + 1))
                    first = None
        return found


class Reader:
    """Cuts sentences into pieces, and computes the states of the frozen layers."""

    def __init__(
        self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frozen: int, max_pieces: int, bf16: bool
    ) -> None:
        self.tokenizer, self.max_pieces, self.bf16 = tokenizer, max_pieces, bf16
        self.longest = encoder.config.max_position_embeddings
        self.lower, self.upper = _split(encoder, frozen)
        self.pieces = functools.cache(self._pieces)

    def _pieces(self, word: str) -> list[int]:
        return self.tokenizer(word, add_special_tokens=False)["input_ids"] or [self.tokenizer.unk_token_id]

    def cut(self, sentence: Sentence) -> Sentence:
        """Its first words, as many as have `max_pieces` together, at least one."""
        total, kept = 0, 0
        for kept, (word, _) in enumerate(sentence):
            total += len(self.pieces(word))
            if total > self.max_pieces:
                return sentence[: max(1, kept)]
        return sentence

    def read(self, form: Tags | Questions, sentences: Iterable[Sentence]) -> list[Words]:
        marks = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        begin, end = ([] if mark is None else [mark] for mark in marks)
        found = []
        for sentence in sentences:
            for question, target in form.texts(sentence):
                asked = [piece for word in question.split() for piece in self.pieces(word)]
                pieces, places = begin + (asked + end if asked else []), []
                for word, _ in sentence:
                    places.append(len(pieces))
                    pieces = pieces + self.pieces(word)
                found.append(Words(pieces + end, places, [case(word) for word, _ in sentence], target))
        return found

    @torch.no_grad()
    def states(self, texts: Sequence[Words], batch: int = 64) -> list[Tensor]:
        """(T, D) of each text."""
        longest = max(len(text.pieces) for text in texts)
        if longest > self.longest:
            raise DataError(f"a text has {longest} pieces, the encoder {self.longest} positions: lower --max-pieces")
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for part in parts([len(text.pieces) for text in texts], batch, None):
            rows = [torch.tensor(texts[i].pieces) for i in part]
            mask = pad_sequence([torch.ones_like(row) for row in rows], True)
            with computing(self.bf16):
                states = self.lower(input_ids=pad_sequence(rows, True), attention_mask=mask).last_hidden_state
            for i, row, own in zip(part, rows, states, strict=True):
                found[i] = own[: len(row)].to(torch.bfloat16 if self.bf16 else torch.float32, copy=True)
        return found


def computing(bf16: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _split(encoder: PreTrainedModel, frozen: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The embeddings with the lowest layers, and the layers above, which take the states as their embeddings."""
    layers = len(getattr(getattr(encoder, "encoder", None), "layer", ()))
    if not layers or frozen > layers:
        raise DataError(f"--frozen {frozen} of {layers} layers: expected a BERT with at least as many")
    lower, upper = copy.deepcopy(encoder).eval(), copy.deepcopy(encoder)
    lower.encoder.layer, upper.encoder.layer = lower.encoder.layer[:frozen], upper.encoder.layer[frozen:]
    lower.pooler = upper.pooler = None
    upper.embeddings = _Given()
    return lower, upper


class _Given(nn.Module):
    def forward(self, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


class Network(nn.Module):
    """The upper layers, and a linear layer on each word's first piece: logits (words of all texts, heads, classes).

    MiniLM's pieces are in small letters. What is lost with the capitals is added to the states of these pieces.
    """

    def __init__(self, reader: Reader, form: Tags | Questions) -> None:
        super().__init__()
        self.layers, self.bf16, self.form = copy.deepcopy(reader.upper), reader.bf16, form
        width = self.layers.config.hidden_size
        self.head = nn.Linear(width, form.heads * form.classes)
        self.case = nn.Embedding(CASES, width)
        nn.init.zeros_(self.case.weight)

    def forward(self, texts: Sequence[Words], states: Sequence[Tensor]) -> Tensor:
        width = -(-max(map(len, states)) // 8) * 8  # few shapes: the CPU library keeps kernels for each of them
        padded = torch.stack([nn.functional.pad(own, (0, 0, 0, width - len(own))) for own in states])
        mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in states])
        places = torch.tensor([row * width + place for row, text in enumerate(texts) for place in text.places])
        cases = self.case(torch.tensor([case for text in texts for case in text.cases]))
        padded = padded.flatten(0, 1).float().index_add(0, places, cases).view_as(padded)
        with computing(self.bf16):
            hidden = self.layers(inputs_embeds=padded, attention_mask=mask).last_hidden_state  # (B, T, D)
        chosen = hidden.flatten(0, 1)[places].float()
        return self.head(chosen).unflatten(1, (self.form.heads, self.form.classes))


def targets(texts: Sequence[Words]) -> Tensor:
    """(words of all texts, heads) int64."""
    return torch.tensor([classes for text in texts for classes in text.target])


def train(
    reader: Reader,
    form: Tags | Questions,
    texts: Sequence[Words],
    states: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: dict[str, Any],
) -> Network:
    """A network, fine-tuned. Of one seed, all losses see the same head, batches and dropout."""
    torch.manual_seed(settings["seed"])
    order = random.Random(settings["seed"])
    network = Network(reader, form).train()
    rates = ((network.layers, settings["lr"]), (network.head, settings["head_lr"]), (network.case, settings["head_lr"]))
    optimizer = torch.optim.AdamW(
        [{"params": part.parameters(), "lr": lr} for part, lr in rates], weight_decay=0.01, fused=True
    )
    plan = [part for _ in range(settings["epochs"]) for part in parts([*map(len, states)], settings["batch"], order)]
    total, warmup = len(plan), max(1, len(plan) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup + 1))
    )
    for part in plan:
        own = [texts[i] for i in part]
        logits, target = network(own, [states[i] for i in part]), targets(own)
        sum(loss(logits[:, head], target[:, head]) for head in range(form.heads)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(network: Network, texts: Sequence[Words], states: Sequence[Tensor], batch: int = 64) -> list[Tensor]:
    """The classes (W, heads) of each text's words."""
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for part in parts([*map(len, states)], batch, None):
        own = [texts[i] for i in part]
        classes = network(own, [states[i] for i in part]).argmax(-1)
        for i, row in zip(part, classes.split([len(text.places) for text in own]), strict=True):
            found[i] = row
    return found
