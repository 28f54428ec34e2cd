"""Instructions are counted on the way through a kernel's main loop, in listings small enough to be counted by hand."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import sass

LOAD, STORE = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4"
SHUFFLE, BARRIER, ADD = "SHFL.BFLY PT, R5, R4, 0x10, 0x1f", "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R1, R1, R4"


def listing(text: str) -> str:
    """As cuobjdump prints instructions between bars, where "name:" is a label and `name` its address."""
    lines, labels = [], {}
    for line in map(str.strip, text.split("|")):
        if line.endswith(":"):
            labels[line[:-1]] = f"{16 * len(lines):#x}"
        else:
            lines.append(line)
    resolved = (re.sub("`(\\w+)`", lambda found: labels[found[1]], line) for line in lines)
    words = "/* 0x000fe200078e0000 */\n" + " " * 60 + "/* 0x001fca0000000f00 */\n"
    return "".join(f"        /*{16 * n:04x}*/   {line} ;   {words}" for n, line in enumerate(resolved))


#: Programs of logits of two bytes, and what is counted of each loop that moves logits.
PROGRAMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "a body that is jumped over is apart": (
        f"S2R R0, SR_TID.X | again: | {LOAD} | @P0 BRA `on` | {ADD} | {BARRIER} | {SHUFFLE} | on: | {ADD} | "
        "@P2 BRA `again` | EXIT",
        [{"instructions": 4, "logits": 8, "per_logit": 0.5, "barriers": 0, "shuffles": 0, "apart": 3, "once": 2}],
    ),
    "what the loop around does is counted apart": (
        f"MOV R1, RZ | row: | MOV R2, RZ | MOV R3, RZ | columns: | {LOAD} | @P2 BRA `columns` | @P0 BRA `on` | "
        f"{SHUFFLE} | on: | DADD R8, R8, R6 | @P3 BRA `row` | STG.E desc[UR4][R2.64], R8 | EXIT",
        [{"instructions": 2, "around": 5, "once": 3, "shuffles": 0}],
    ),
    "a loop that loads and one that stores are both counted": (
        f"sums: | {LOAD} | {ADD} | @P2 BRA `sums` | {BARRIER} | gradient: | {LOAD} | {ADD} | {ADD} | {STORE} | "
        "@P2 BRA `gradient` | EXIT",
        [{"instructions": 3, "once": 2, "barriers": 0, "tails": 0}, {"instructions": 5, "once": 2}],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_counts(name: str) -> None:
    text, expected = PROGRAMS[name]
    found = sass.count(listing(text), 2)
    assert [{key: getattr(loop, key) for key in right} for loop, right in zip(found, expected, strict=True)] == expected


def test_what_is_no_listing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no instruction in the listing: 'cuobjdump info'"):
        sass.count("cuobjdump info", 2)
