"""The corpus: fetched or given, split by file, cut into BPE pieces, and batched by length.

Without `--data` the pairs come from two Debian packages, the help of LibreOffice in English and in German (MPL-2.0),
whose paragraphs are aligned by id. They are fetched with apt, without root, and kept as one TSV in the cache folder.
"""

from __future__ import annotations

import hashlib
import html
import io
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from libreoffice import help_pages, paragraphs
from packages import DataError, cached
from tsv import read_pairs

LINES_PER_BLOCK = 50  # a user's TSV has no files: neighbouring lines stay on one side of the split
PAD, BOS, EOS, UNK = 0, 1, 2, 3


class Pair(NamedTuple):
    source: str
    target: str
    file: str  # the unit of the split


class Batch(NamedTuple):
    source: torch.Tensor  # (B, S) int64, padded with PAD
    target_in: torch.Tensor  # (B, T) int64: BOS, pieces
    target_out: torch.Tensor  # (B, T) int64: pieces, EOS


def load_pairs(path: Path | None) -> list[Pair]:
    """The user's pairs, or the LibreOffice help's where `path` is None."""
    return read_tsv(path) if path is not None else _read_cached(_help_tsv())


def read_tsv(path: Path) -> list[Pair]:
    return [
        Pair(source, target, f"block {(number - 1) // LINES_PER_BLOCK}")
        for number, source, target in read_pairs(path, "source", "target")
    ]


def _read_cached(path: Path) -> list[Pair]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Pair(source, target, file) for file, source, target in (line.split("\t") for line in lines)]


def _help_tsv() -> Path:
    """The cached `file TAB source TAB target` lines of the LibreOffice help."""

    def make(scratch: Path) -> Path:
        pages = help_pages(("en-US", "de"), scratch, "5 MB", "pass your own corpus: --data pairs.tsv")
        pairs = _help_pairs(pages)
        if len(pairs) < 1000:
            raise DataError(f"only {len(pairs)} pairs in the help under {pages}; pass your own: --data pairs.tsv")
        path = scratch / "pairs.tsv"
        path.write_text("".join(f"{p.file}\t{p.source}\t{p.target}\n" for p in pairs), encoding="utf-8")
        return path

    return cached("libreoffice-help-en-de.tsv", make)


def _help_pairs(pages: Path) -> list[Pair]:
    pairs, seen = [], set()
    for english in sorted((pages / "en-US/text").rglob("*.html")):
        german = pages / "de" / english.relative_to(pages / "en-US")
        if not german.exists():
            continue
        translations = _paragraphs(german)
        for identifier, source in _paragraphs(english).items():
            target = translations.get(identifier, "")
            if _usable(source, target) and source.lower() not in seen:
                seen.add(source.lower())
                pairs.append(Pair(source, target, str(english.relative_to(pages / "en-US/text"))))
    return pairs


def _paragraphs(page: Path) -> dict[str, str]:
    """Paragraph id -> plain text."""
    found = paragraphs(page).items()
    return {key: " ".join(html.unescape(re.sub("<[^>]+>", "", body)).split()) for key, body in found}


def _usable(source: str, target: str) -> bool:
    """A translated sentence of 2-80 words a side, of like lengths, of letters for the most part."""
    words = len(source.split()), len(target.split())
    if source == target or not all(2 <= count <= 80 for count in words):
        return False
    letters = [sum(c.isalpha() or c.isspace() for c in side) / len(side) for side in (source, target)]
    return 0.45 <= len(source) / len(target) <= 2.2 and min(letters) >= 0.75


def split_by_file(pairs: list[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): whole files go to one side, since neighbouring paragraphs repeat each other.

    About `held_out` of the pairs are held out; a source that also stands in the training side is left out there.
    """
    files = sorted({pair.file for pair in pairs})
    random.Random(seed).shuffle(files)
    sizes = dict.fromkeys(files, 0)
    for pair in pairs:
        sizes[pair.file] += 1
    chosen: set[str] = set()
    count = 0
    for file in files[:-1]:  # at least one file is left to train on
        if count >= held_out * len(pairs):
            break
        chosen.add(file)
        count += sizes[file]
    train = [pair for pair in pairs if pair.file not in chosen]
    known = {pair.source.lower() for pair in train}
    held = [pair for pair in pairs if pair.file in chosen and pair.source.lower() not in known]
    if not held:
        raise DataError(
            f"{len(pairs)} pairs in {len(files)} block(s) leave nothing to hold out; "
            f"at least {LINES_PER_BLOCK + 1} lines with different sources are needed"
        )
    return train, held


class Vocabulary:
    """A joint SentencePiece BPE of both languages."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, pairs: list[Pair], size: int) -> Vocabulary:
        sentences = [text for pair in pairs for text in (pair.source, pair.target)]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise DataError(f"no BPE of --vocab-size {size} from {len(sentences)} sentences: {reason}") from None
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """The pieces of the text, and EOS."""
        return [*self._processor.encode(text), EOS]

    def decode(self, pieces: list[int]) -> str:
        return self._processor.decode(pieces)


class Example(NamedTuple):
    source: list[int]  # pieces, EOS
    target: list[int]  # pieces, EOS


def encode_pairs(pairs: list[Pair], vocabulary: Vocabulary, max_length: int) -> list[Example]:
    """The pairs as pieces; those longer than `max_length` on either side are left out."""
    examples = [Example(vocabulary.encode(pair.source), vocabulary.encode(pair.target)) for pair in pairs]
    return [e for e in examples if max(len(e.source), len(e.target)) <= max_length]


def length_buckets(examples: list[Example], batch_tokens: int, shuffle: random.Random | None) -> list[list[int]]:
    """Indices of the examples in batches that are at most `batch_tokens` large on either side, padding included.

    Neighbours in a batch are of like length. `shuffle` orders the batches, and the examples within a length.
    """
    order = list(range(len(examples)))
    if shuffle is not None:
        shuffle.shuffle(order)
    lengths = [(_padded_length(len(e.target)), _padded_length(len(e.source))) for e in examples]
    order.sort(key=lambda index: lengths[index])
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, *lengths[index])
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = max(lengths[index])
        batches[-1].append(index)
    if shuffle is not None:
        shuffle.shuffle(batches)
    return batches


def _padded_length(length: int) -> int:
    """Rounded up to a multiple of 8: fewer shapes, for each of which the CPU library keeps kernels of its own."""
    return -(-length // 8) * 8


def collate(examples: list[Example]) -> Batch:
    return Batch(
        _padded([e.source for e in examples]),
        _padded([[BOS, *e.target[:-1]] for e in examples]),
        _padded([e.target for e in examples]),
    )


def all_batches(examples: list[Example], batch_tokens: int) -> list[Batch]:
    """Each example once, to measure on."""
    return [collate([examples[i] for i in batch]) for batch in length_buckets(examples, batch_tokens, None)]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    width = _padded_length(max(map(len, rows)))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


class TrainingBatches:
    """Endless batches; the place in the stream is (epoch, index), from which it goes on in the same order."""

    def __init__(self, examples: list[Example], batch_tokens: int, seed: int) -> None:
        self._examples, self._batch_tokens, self._seed = examples, batch_tokens, seed
        self.epoch, self.index = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            order = random.Random(f"{self._seed} {self.epoch}")
            batches = length_buckets(self._examples, self._batch_tokens, order)
            while self.index < len(batches):
                self.index += 1  # counted before the yield: a batch handed out is a batch used
                yield collate([self._examples[i] for i in batches[self.index - 1]])
            self.epoch, self.index = self.epoch + 1, 0


def fingerprint(pairs: list[Pair]) -> str:
    """A short hash of the corpus, by which a checkpoint knows its data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.source}\t{pair.target}\n".encode())
    return digest.hexdigest()[:12]
