"""A user's own data: two columns with a tab between them."""

from __future__ import annotations

from pathlib import Path

from packages import DataError


def read_pairs(path: Path, first: str, second: str) -> list[tuple[int, str, str]]:
    """The line number and the two columns of each `first TAB second` line, in UTF-8; blank lines are skipped.

    Runs of white space become one space. What is something else is named with its line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    pairs = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 (byte {line[error.start]:#04x} at {error.start})") from None
        if not text.strip():
            if "\t" in text:
                raise DataError(f"{where}: the {first} and the {second} are empty")
            continue
        columns = [" ".join(column.split()) for column in text.split("\t")]
        if len(columns) != 2:
            raise DataError(f"{where}: expected {first} TAB {second}, found {len(columns) - 1} tabs: {text[:60]!r}")
        for name, column in zip((first, second), columns, strict=True):
            if not column:
                raise DataError(f"{where}: the {name} is empty: {text[:60]!r}")
        pairs.append((number, columns[0], columns[1]))
    if not pairs:
        raise DataError(f"{path} holds no pairs; expected lines of the form: {first} TAB {second}")
    return pairs
