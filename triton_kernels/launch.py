"""What a program takes at a time: a table, so that nothing is tuned at run time and every configuration is known."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .device import INTERPRETED


class Tile(NamedTuple):
    """Rows and columns that a program looks at together, and its warps; of a product also how much of the depth it
    multiplies at a time, and how many such steps are on their way to it."""

    rows: int
    block: int
    warps: int
    depth: int = 0
    stages: int = 0

    @property
    def span(self) -> int:
        """Blocks of a span. Products are split in any case, into fewer pieces."""
        return 2 * SPAN if self.depth else SPAN


class Product(NamedTuple):
    """What the compiler is told of logits that are products."""

    depth: int
    precision: str
    softcap: float  # 0: none
    masks_target: bool
    tempered: int  # 1: the logits have a factor


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
    2**31: Tile(1, 2048, 4),
}

#: More in the sums of a pair term, and there are two rows to read.
PAIR_TILES = {**CLASS_TILES, 2**31: Tile(1, 1024, 4)}

#: So do the sums of moments.
MOMENT_TILES = {**CLASS_TILES, 2**31: Tile(1, 2048, 8)}

#: The gradient's programs reduce nothing and repeat nothing but their beginning, which many columns share.
GRADIENT_TILES = {most: tile if most < 2**31 else Tile(1, 4096, 4) for most, tile in TILES.items()}

#: Where a program goes over its rows three times, twice for reading: few rows on the way at a time, which the second
#: level of caches holds.
IN_ONE_TILES = {
    **{most: tile for most, tile in TILES.items() if most < 2**31},
    2**16: Tile(1, 4096, 16),
    2**31: Tile(1, 8192, 32),
}

#: Products by the bytes of an element. Tensor cores take 16 rows at least. No GPU has timed these either.
PRODUCT_TILES = {
    2: Tile(128, 128, 8, 64, 3),
    4: Tile(64, 64, 8, 16, 3),
    8: Tile(32, 32, 8, 16, 2),
}

#: Where a class term, or the search for the top classes, takes registers too.
HEAVY_PRODUCT_TILES = {
    2: Tile(64, 32, 8, 64, 3),
    4: Tile(32, 64, 8, 16, 3),
    8: Tile(16, 32, 8, 16, 2),
}
INTERPRETED_PRODUCT_TILE = Tile(4, 128, 1, 64)

#: Sums over the rows: the rows beside each other are added up before they meet the float64 sums.
COLUMN_TILES = {
    16: Tile(16, 16, 2),
    64: Tile(8, 64, 4),
    2**31: Tile(4, 256, 4),
}

#: Under the interpreter an operation costs the same however large its operands are, and tests are of few rows: blocks
#: of which most of the tests' rows have two or three, and long rows not too many.
INTERPRETED_TILES = {2**12: Tile(8, 128, 1), 2**31: Tile(4, 2048, 1)}

#: NVIDIA's compilers like to spill a few registers for one program more on a multiprocessor. These kernels are told
#: that there are more, on the architectures on which they do, with Triton 3.6 or 3.9: by name, whether they search for
#: the top classes, whether they sum logits for the mean, bytes of an element, and columns of the tile.
ROOMY = {
    ("statistics_pass", False, True, 2, 2048): (80, 90, 100),
    ("statistics_pass", True, True, 2, 2048): (80, 90, 100),
    ("statistics_pass", True, True, 4, 2048): (80, 100),
    ("statistics_pass", True, False, 4, 2048): (90,),
    ("statistics_pass, moments", False, False, 2, 32): (80,),
    ("statistics_pass, moments", True, False, 4, 64): (80, 90, 100),
    ("statistics_pass, moments", True, False, 4, 2048): (90, 100),
    ("class_terms_pass", False, False, 2, 32): (80, 100),
    ("class_terms_pass", False, False, 2, 2048): (80, 90, 100),
    ("class_terms_pass", False, False, 4, 2048): (80, 90, 100),
    ("pair_terms_pass", False, False, 2, 1024): (100,),
    ("pair_terms_pass", False, False, 4, 1024): (90,),
    ("class_sums_pass", False, False, 2, 256): (80, 90),
    ("class_sums_pass", False, False, 4, 256): (80, 90),
    ("top_rest_pass", False, False, 2, 64): (90, 100),
}

#: Programs that a multiprocessor should have, before rows are no longer split.
PROGRAMS = 16


def tile(classes: int, itemsize: int, table: dict[int, Tile] = TILES) -> Tile:
    """For rows of so many classes, of elements of so many bytes."""
    return _find(table, classes, itemsize)


def product_tile(rows: int, itemsize: int, heavy: bool) -> Tile:
    if INTERPRETED:
        return INTERPRETED_PRODUCT_TILE
    tile = (HEAVY_PRODUCT_TILES if heavy else PRODUCT_TILES)[itemsize]
    if heavy and triton.runtime.driver.active.get_current_target().backend == "hip":
        tile = tile._replace(warps=tile.warps // 2)  # of 64 lanes
    return tile._replace(rows=min(tile.rows, max(16, 1 << (rows - 1).bit_length())))


def column_tile(classes: int, itemsize: int) -> Tile:
    """For sums over the rows."""
    return _find(COLUMN_TILES, classes, itemsize)


def _find(table: dict[int, Tile], classes: int, itemsize: int) -> Tile:
    if INTERPRETED:
        return next(tile for most, tile in INTERPRETED_TILES.items() if classes <= most)
    rows, block, warps, *_ = next(tile for most, tile in table.items() if classes <= most)
    wider = itemsize // 2
    if itemsize == 8:
        warps = min(warps, 8)  # a thread of more has too few registers
    fewer = max(1, rows // wider)
    return Tile(fewer, block if itemsize < 8 else rows * block // (fewer * wider), warps)


def registers(kernel: str, searches: bool, means: bool, itemsize: int, tile: Tile) -> int | None:
    """Of a thread: two programs on a multiprocessor, one of products or moments. None: as the compiler likes."""
    if INTERPRETED:
        return None
    # Products of float32 are no tensor cores' work; programs of the fewest classes are small in any case.
    always = itemsize == 8 or (itemsize == 4 and tile.depth > 0) or tile.block == 16
    found = ROOMY.get((kernel, searches, means, itemsize, tile.block), ())
    if not (always or found):
        return None
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or not (always or target.arch in found):
        return None
    programs = 1 if tile.depth or kernel.endswith("moments") else 2
    return min(255, 65536 // (32 * tile.warps * programs))


def spans(rows: int, classes: int, tile: Tile, multiprocessors: int) -> int:
    """Over how many programs to split each row; 1: not at all."""
    count = all_spans(classes, tile)
    return count if tile.depth or -(-rows // tile.rows) * count <= PROGRAMS * multiprocessors else 1


def all_spans(classes: int, tile: Tile) -> int:
    return -(-classes // (tile.block * tile.span))


def row_groups(rows: int, classes: int, tile: Tile, multiprocessors: int) -> int:
    """Over how many programs to split the rows of a sum over them, where there are few columns."""
    columns = -(-classes // tile.block)
    return max(1, min(-(-rows // (8 * tile.rows)), PROGRAMS * multiprocessors // columns))
