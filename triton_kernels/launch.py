"""What a program takes at a time: a table, so that nothing is tuned at run time and every configuration is known."""

from __future__ import annotations

from typing import NamedTuple

from .device import INTERPRETED


class Tile(NamedTuple):
    """Rows and columns that a program looks at together, and its warps."""

    rows: int
    block: int
    warps: int


#: Blocks of which a row's statistics are merged before they are merged with those of the others: what is read by one
#: program where a row is split.
SPAN = 4

#: Tiles of 16-bit logits by the largest number of classes that each is for; of wider ones as many bytes. Long rows: two
#: loads of 16 bytes a thread, and few warps, so that the registers of a multiprocessor go round for several programs
#: and some 16 KB are on their way to it. Short rows: several of them together, so that no warp is without work, and few
#: to a thread, since an epilogue takes registers for each. Chosen by what the compiler says of them
#: (bench/results/compile.md); no GPU has timed them yet.
TILES = {
    16: Tile(16, 16, 2),
    64: Tile(8, 64, 4),
    256: Tile(4, 256, 4),
    1024: Tile(1, 1024, 4),
    2**31: Tile(1, 2048, 4),
}

#: A class term's arithmetic takes more registers for each logit.
CLASS_TILES = {
    16: Tile(8, 16, 2),
    64: Tile(4, 64, 4),
    256: Tile(2, 256, 4),
    2**31: Tile(1, 1024, 4),
}

#: Sums over the rows: the rows beside each other are added up before they meet the float64 sums.
COLUMN_TILES = {
    16: Tile(16, 16, 2),
    64: Tile(8, 64, 4),
    2**31: Tile(4, 256, 4),
}

#: Under the interpreter an operation costs the same however large its operands are, and tests are of few rows: blocks
#: of which most of the tests' rows have two or three, and long rows not too many.
INTERPRETED_TILES = {2**12: Tile(8, 128, 1), 2**31: Tile(4, 2048, 1)}

#: Programs that a launch should have, a few for each multiprocessor, before rows are no longer split.
PROGRAMS = 512


def tile(classes: int, itemsize: int, class_term: bool = False) -> Tile:
    """For rows of so many classes, of elements of so many bytes."""
    return _find(CLASS_TILES if class_term else TILES, classes, itemsize)


def column_tile(classes: int, itemsize: int) -> Tile:
    """For sums over the rows."""
    return _find(COLUMN_TILES, classes, itemsize)


def _find(table: dict[int, Tile], classes: int, itemsize: int) -> Tile:
    if INTERPRETED:
        return next(tile for most, tile in INTERPRETED_TILES.items() if classes <= most)
    rows, block, warps = next(tile for most, tile in table.items() if classes <= most)
    wider = itemsize // 2
    fewer = max(1, rows // wider)
    return Tile(fewer, rows * block // (fewer * wider), warps)


def spans(rows: int, classes: int, tile: Tile) -> int:
    """Over how many programs to split each row; 1: not at all."""
    count = -(-classes // (tile.block * SPAN))
    return count if -(-rows // tile.rows) * count <= PROGRAMS else 1


def row_groups(rows: int, classes: int, tile: Tile) -> int:
    """Over how many programs to split the rows of a sum over them, where there are few columns."""
    columns = -(-classes // tile.block)
    return max(1, min(-(-rows // (8 * tile.rows)), PROGRAMS // columns))
