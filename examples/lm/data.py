"""The corpus: fetched or given, split by document, cut into BPE pieces, and laid out in blocks of equal length.

Without `--data` the text comes from two Debian packages: the King James Bible, a document a book, and Spurgeon's
commentary on the Psalms, a document a psalm (both in the public domain). They are fetched with apt, without root, and
kept as one file in the cache folder.
"""

from __future__ import annotations

import html
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from packages import DataError, cached, fetch_debian

PACKAGES = ("sword-text-kjv", "sword-comm-tdavid")
SWORD = Path("usr/share/sword/modules")  # where both packages keep their text, below the root
#: Of each part: its folder and testament, and the letter of its index: a block a [b]ook or a [c]hapter.
PARTS = (
    ("texts/ztext/engKJV2006eb/ot", "b"),
    ("texts/ztext/engKJV2006eb/nt", "b"),
    ("comments/zcom/tdavid/ot", "c"),
)
LINES_PER_BLOCK = 200  # a user's text has no documents: neighbouring lines stay on one side of the split
END = "<|end|>"  # of a document


class Document(NamedTuple):
    name: str  # the unit of the split
    text: str  # a paragraph a line


def load_documents(path: Path | None) -> list[Document]:
    """The user's text in blocks of lines, or the two SWORD modules where `path` is None."""
    return read_text(path) if path is not None else _read_cached(_sword_file())


def read_text(path: Path) -> list[Document]:
    """Reads plain UTF-8 text; blank lines are skipped."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})") from None
    lines = [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]
    blocks = [lines[begin : begin + LINES_PER_BLOCK] for begin in range(0, len(lines), LINES_PER_BLOCK)]
    if len(blocks) < 2:
        raise DataError(f"{path} holds {len(lines)} lines of text; at least {LINES_PER_BLOCK + 1} are needed")
    return [Document(f"block {number}", "\n".join(block)) for number, block in enumerate(blocks)]


def _read_cached(path: Path) -> list[Document]:
    documents = (part.partition("\n") for part in path.read_text(encoding="utf-8").split("\f"))
    return [Document(name, text) for name, _, text in documents]


def _sword_file() -> Path:
    """The cached documents, `name` and paragraphs a line each, form feeds between them."""

    def make(scratch: Path) -> Path:
        modules = Path("/") / SWORD
        if not all((modules / part).with_suffix(f".{letter}zz").exists() for part, letter in PARTS):
            fetch_debian(PACKAGES, scratch, "8 MB", "pass your own text: --data text.txt")
            modules = scratch / SWORD
        documents = [document for part, letter in PARTS for document in read_module(modules / part, letter)]
        if sum(len(document.text) for document in documents) < 10_000_000:
            raise DataError(f"too little text in the modules under {modules}; pass your own: --data text.txt")
        path = scratch / "documents"
        path.write_text("\f".join(f"{d.name}\n{d.text}" for d in documents), encoding="utf-8")
        return path

    return cached("sword-english.txt", make)


def read_module(stem: Path, letter: str) -> list[Document]:
    """The documents of a compressed SWORD module: .?zs lists (offset, bytes, bytes unpacked) of .?zz's zlib blocks.

    Blocks without text, such as a module's heading, are left out.
    """
    try:
        index = stem.with_suffix(f".{letter}zs").read_bytes()
        packed = stem.with_suffix(f".{letter}zz").read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; install {' '.join(PACKAGES)} again") from None
    documents = []
    for number, (offset, size, _) in enumerate(struct.iter_unpack("<III", index)):
        text = plain_text(zlib.decompress(packed[offset : offset + size]).decode("utf-8"))
        if len(text) > 200:
            documents.append(Document(f"{stem.parent.name} {stem.name} {number}", text))
    return documents


def plain_text(osis: str) -> str:
    """The paragraphs of OSIS markup, one a line, without its notes."""
    text = re.sub(r"<note\b.*?</note>", "", osis, flags=re.DOTALL)
    text = re.sub(r"</?(?:div|title|p|l|lb|lg|chapter)\b[^>]*>", "\n", text)
    lines = (" ".join(html.unescape(re.sub("<[^>]+>", "", line)).split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def split_by_document(documents: list[Document], held_out: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(train, held out): whole documents go to one side; about `held_out` of the text, at least a document of each."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    goal = held_out * sum(len(document.text) for document in documents)
    count, held = 0, 0
    while count < len(order) - 1 and (count == 0 or held < goal):
        held += len(order[count].text)
        count += 1
    return order[count:], order[:count]


def train_tokenizer(documents: list[Document], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for document in documents for line in document.text.split("\n")), trainer)
    return tokenizer


def make_blocks(documents: list[Document], tokenizer: Tokenizer, length: int) -> Tensor:
    """(N, length) pieces of the documents, one after the other; what is left over at the end is dropped."""
    end = torch.tensor([tokenizer.token_to_id(END)])
    encoded = tokenizer.encode_batch_fast([document.text for document in documents])
    pieces = torch.cat([part for x in encoded for part in (torch.tensor(x.ids), end)])
    if len(pieces) < length:
        raise DataError(f"{len(documents)} document(s) have {len(pieces)} pieces, less than a block of {length}")
    return pieces[: len(pieces) // length * length].reshape(-1, length)
