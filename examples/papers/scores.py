"""F1 of classes and of entities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Span = tuple[str, int, int]  # kind, first, past the last


def f1_scores(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(C,) of predictions and targets (N,): 2 TP / (2 TP + FP + FN), NaN for a class that neither holds."""
    right = target[predicted == target].bincount(minlength=classes)
    return 2 * right / (predicted.bincount(minlength=classes) + target.bincount(minlength=classes))


def f1(predicted: Tensor, target: Tensor, classes: int) -> float:
    """Of two classes that of the first, which is to be the rare one; of more the mean over those that occur."""
    scores = f1_scores(predicted, target, classes)
    return float(scores[0].nan_to_num() if classes == 2 else scores.nanmean())


def entities(tags: Sequence[str]) -> set[Span]:
    """Of what BIO tags mark; an I- that continues nothing begins an entity."""
    found = set()
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and (mark != "I" or own != kind):
            found.add((kind, first, i))
            kind = ""
        if mark != "O" and not kind:
            kind, first = own, i
    return found


def entity_scores(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """`span_scores` of the entities that BIO tags mark."""
    return span_scores([entities(tags) for tags in predicted], [entities(tags) for tags in gold])


def span_scores(predicted: Sequence[set[Span]], gold: Sequence[set[Span]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences; one counts where its kind and both ends are right."""
    right = sum(len(p & g) for p, g in zip(predicted, gold, strict=True))
    said, there = sum(map(len, predicted)), sum(map(len, gold))
    return {
        "precision": right / said if said else 0.0,
        "recall": right / there if there else 0.0,
        "F1": 2 * right / (said + there) if said + there else 0.0,
    }
