"""Instructions are counted on the way through a kernel's main loop, in listings small enough to be counted by hand."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import sass

LOAD, MASKED = "LDG.E.128 R4, desc[UR4][R2.64]", "@P1 LDG.E.128 R4, desc[UR4][R2.64]"
STORE = "STG.E.128 desc[UR4][R2.64], R4"
SHUFFLE, BARRIER, ADD = "SHFL.BFLY PT, R5, R4, 0x10, 0x1f", "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R1, R1, R4"
MAIN = f"main: | {LOAD} | {ADD} | @P2 BRA `main`"
TAIL = f"tail: | {MASKED} | ISETP.LT P1, R3, R7 | {ADD} | @P2 BRA `tail`"


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


#: Programs, the bytes of a logit, and what is counted of each loop that moves logits.
PROGRAMS: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
    **{
        f"a body that {jump} jumps over is apart": (
            f"S2R R0, SR_TID.X | again: | {LOAD} | {jump} | {ADD} | {BARRIER} | {SHUFFLE} | on: | "
            "FMNMX R6, R6, R4, !PT | @P2 BRA `again` | EXIT",
            2,
            [{"instructions": 4, "logits": 8, "per_logit": 0.5, "barriers": 0, "shuffles": 0, "apart": 3, "once": 2,
              "tails": 0, "loop": "0x10-0x70", "way": ("0x20 jumps to 0x60, 3 between",)}],
        )
        for jump in ("@P0 BRA `on`", "BRA.U UP0, `on`", "@!UP1 BRA P1, `on`")
    },
    "a body that lies elsewhere is apart, and its jump back makes no loop": (
        f"again: | {LOAD} | @P0 BRA `rare` | back: | {SHUFFLE} | {BARRIER} | @P2 BRA `again` | EXIT | "
        f"rare: | {ADD} | {ADD} | BRA `back`",
        2,
        [{"instructions": 5, "barriers": 1, "shuffles": 1, "apart": 3}],
    ),
    "the shorter of two ways that load is counted": (
        f"again: | @P0 BRA `masked` | {LOAD} | BRA `on` | masked: | ISETP.LT P1, R3, R7 | {ADD} | {MASKED} | "
        f"on: | {ADD} | @P2 BRA `again` | EXIT",
        2,
        [{"instructions": 5, "apart": 3}],
    ),
    "a way without a load is not counted": (
        f"again: | @P0 BRA `next` | {LOAD} | {ADD} | next: | @P2 BRA `again` | EXIT",
        2,
        [{"instructions": 4, "apart": 0}],
    ),
    "a masked tail after the loop": (f"{MAIN} | {TAIL} | EXIT", 2, [{"instructions": 3, "tails": 4, "once": 1}]),
    "what the loop around does is counted apart": (
        f"MOV R1, RZ | row: | MOV R2, RZ | MOV R3, RZ | columns: | {LOAD} | @P2 BRA `columns` | @P0 BRA `on` | "
        f"{SHUFFLE} | on: | DADD R8, R8, R6 | @P3 BRA `row` | STG.E desc[UR4][R2.64], R8 | EXIT",
        2,
        [{"instructions": 2, "around": 5, "once": 3, "shuffles": 0}],
    ),
    "a loop that loads and one that stores are both counted": (
        f"sums: | {LOAD} | {ADD} | @P2 BRA `sums` | {BARRIER} | gradient: | {LOAD} | {ADD} | {ADD} | {STORE} | "
        "@P2 BRA `gradient` | EXIT",
        2,
        [{"instructions": 3, "once": 2, "barriers": 0, "tails": 0}, {"instructions": 5, "once": 2}],
    ),
    "without a loop the program is counted to its end": (
        f"@P0 BRA `ignored` | {LOAD} | {ADD} | CALL.REL.NOINC `division` | @!P1 EXIT | {STORE} | EXIT | "
        f"ignored: | {STORE} | EXIT | division: | {ADD} | RET.REL.NODEC R2 0x0 | self: | BRA `self` | NOP",
        4,
        [{"instructions": 7, "logits": 4, "loop": "", "apart": 2, "once": 0}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_counts(name: str) -> None:
    text, itemsize, expected = PROGRAMS[name]
    found = sass.count(listing(text), itemsize)
    assert [{key: getattr(loop, key) for key in right} for loop, right in zip(found, expected, strict=True)] == expected


def test_marks_and_what_is_no_listing() -> None:
    marked = sass.marked(listing(f"again: | {LOAD} | @P0 BRA `on` | {ADD} | on: | @P2 BRA `again` | EXIT"))
    assert [line[:7] for line in marked.splitlines()] == ["| 00000", "| 00010", ": 00020", "| 00030", "  00040"]
    with pytest.raises(ValueError, match=r"no instruction in the listing: 'cuobjdump info'"):
        sass.count("cuobjdump info", 2)
