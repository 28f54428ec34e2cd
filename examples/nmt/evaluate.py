"""Held-out loss, token accuracy, translation by beam search, and BLEU."""

from __future__ import annotations

from typing import NamedTuple

import sacrebleu
import torch
from data import BOS, EOS, PAD, Batch, Vocabulary
from model import Memory, Transformer
from torch import Tensor

import fusedloss as fl


class HeldOut(NamedTuple):
    loss: float  # cross-entropy per piece, in nats, without smoothing, whatever loss trains
    accuracy: float  # share of the pieces that are the model's first choice


@torch.no_grad()
def held_out(model: Transformer, batches: list[Batch], impl: str | None = None) -> HeldOut:
    """One pass; `return_stats` gives the accuracy from the same pass."""
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        rows, stats = fl.linear_cross_entropy(
            model(batch.source, batch.target_in),
            model.output_weight,
            batch.target_out,
            ignore_index=PAD,
            reduction="sum",
            return_stats=True,
            impl=impl,
        )
        loss += rows.item()
        right += int((stats.argmax == batch.target_out).sum())
        count += int((batch.target_out != PAD).sum())
    model.train(training)
    return HeldOut(loss / count, right / count)


def bleu(translations: list[str], references: list[str]) -> float:
    return sacrebleu.corpus_bleu(translations, [references]).score


def chrf(translations: list[str], references: list[str]) -> float:
    return sacrebleu.corpus_chrf(translations, [references]).score


@torch.no_grad()
def translate(
    model: Transformer, vocabulary: Vocabulary, sources: list[str], beam: int = 1, batch_size: int = 64
) -> list[str]:
    """Beam search, batched over sentences of like length; beam 1 is greedy decoding."""
    training = model.training
    model.eval()
    pieces = [vocabulary.encode(text)[: model.size.max_length] for text in sources]
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    translations = [""] * len(sources)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(pieces[chosen[-1]])
        source = torch.tensor([pieces[i] + [PAD] * (width - len(pieces[i])) for i in chosen])
        for index, target in zip(chosen, beam_search(model, source, beam), strict=True):
            translations[index] = vocabulary.decode(target)
    model.train(training)
    return translations


def beam_search(model: Transformer, source: Tensor, beam: int) -> list[list[int]]:
    """source (B, S) -> the best target of each row, as pieces without BOS and EOS.

    A target's score is its log-probability divided by its length; ended targets stay in the beam and may be
    overtaken.
    """
    rows = len(source)
    memory = model.encode(source)
    memory = Memory(
        [(k.repeat_interleave(beam, 0), v.repeat_interleave(beam, 0)) for k, v in memory.layers],
        memory.mask.repeat_interleave(beam, 0),
    )
    targets = torch.full((rows * beam, 1), BOS)
    score = torch.full((rows, beam), -torch.inf)
    score[:, 0] = 0.0  # all beams start alike: one of them is enough
    length = torch.zeros(rows, beam)
    ended = torch.zeros(rows, beam, dtype=torch.bool)
    past = None
    for _ in range(min(2 * source.shape[1] + 10, model.size.max_length)):
        hidden, past = model.decode(targets[:, -1:], memory, past)
        log_prob = model.logits(hidden[:, 0]).log_softmax(-1).view(rows, beam, -1)  # (B, K, V)
        log_prob[..., [PAD, BOS]] = -torch.inf
        choices, piece = log_prob.topk(beam)  # (B, K, K): the best of a beam of K are among the K best of each
        padding = torch.zeros(beam).index_fill(0, torch.arange(1, beam), -torch.inf)
        choices = torch.where(ended[..., None], padding, choices)
        piece = piece.masked_fill(ended[..., None], PAD)
        lengths = (length + (~ended).float())[..., None].expand_as(choices)
        total = score[..., None] + choices
        best = (total / lengths).flatten(1).topk(beam).indices  # (B, K) into K * K
        score, length, piece = (x.flatten(1).gather(1, best) for x in (total, lengths, piece))
        parent = best // beam
        ended = ended.gather(1, parent) | (piece == EOS)
        origin = (torch.arange(rows)[:, None] * beam + parent).flatten()
        targets = torch.cat((targets[origin], piece.view(-1, 1)), dim=1)
        if bool(ended.all()):
            break
        if beam > 1:
            past = [(keys[origin], values[origin]) for keys, values in past]
    best = (score / length).argmax(1)
    return [
        [piece for piece in row if piece not in (PAD, EOS)]
        for row in targets.view(rows, beam, -1)[torch.arange(rows), best, 1:].tolist()
    ]
