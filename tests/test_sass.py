"""Instructions are counted on the way through a kernel's main loop, in listings small enough to be counted by hand."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import sass

LOAD, MASKED = "LDG.E.128 R4, desc[UR4][R2.64]", "@P1 LDG.E.128 R4, desc[UR4][R2.64]"
STORE = "STG.E.128 desc[UR4][R2.64], R4"


def listing(text: str) -> str:
    """As cuobjdump prints a text of one instruction a line, where "name:" is a label and `name` its address."""
    lines, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = f"{16 * len(lines):#x}"
        else:
            lines.append(line)
    resolved = (re.sub("`(\\w+)`", lambda found: labels[found[1]], line) for line in lines)
    words = "/* 0x000fe200078e0000 */\n" + " " * 60 + "/* 0x001fca0000000f00 */\n"
    return "".join(f"        /*{16 * n:04x}*/   {line} ;   {words}" for n, line in enumerate(resolved))


def only(text: str, itemsize: int = 2) -> sass.Count:
    (found,) = sass.count(listing(text), itemsize)
    return found


@pytest.mark.parametrize("jump", ["@P0 BRA `on`", "BRA.U UP0, `on`", "@!UP1 BRA P1, `on`"])
def test_a_body_that_is_jumped_over_is_apart(jump):
    found = only(f"""
        S2R R0, SR_TID.X
        again:
        {LOAD}
        {jump}
        FADD R1, R1, R4
        BAR.SYNC.DEFER_BLOCKING 0x0
        SHFL.BFLY PT, R5, R4, 0x10, 0x1f
        on:
        FMNMX R6, R6, R4, !PT
        @P2 BRA `again`
        EXIT
    """)
    assert (found.instructions, found.logits, found.per_logit) == (4, 8, 0.5)
    assert (found.barriers, found.shuffles, found.apart) == (0, 0, 3)
    assert (found.around, found.once, found.tails) == (0, 2, 0)
    assert found.loop == "0x10-0x70"
    assert found.way == ("0x20 jumps to 0x60, 3 between",)


def test_a_body_that_lies_elsewhere_is_apart():
    """Its jump back into the loop is to an earlier address, and makes no loop of its own."""
    found = only(f"""
        again:
        {LOAD}
        @P0 BRA `rare`
        back:
        SHFL.BFLY PT, R5, R4, 0x10, 0x1f
        BAR.SYNC.DEFER_BLOCKING 0x0
        @P2 BRA `again`
        EXIT
        rare:
        FADD R1, R1, R4
        FADD R1, R1, R5
        BRA `back`
    """)
    assert (found.instructions, found.barriers, found.shuffles, found.apart) == (5, 1, 1, 3)
    assert found.way == ("0x10 falls through to 0x20, 3 between",)


def test_the_shorter_of_two_ways_that_load_is_counted():
    found = only(f"""
        again:
        @P0 BRA `masked`
        {LOAD}
        BRA `on`
        masked:
        ISETP.LT P1, R3, R7
        FADD R1, R1, R4
        {MASKED}
        on:
        FADD R1, R1, R4
        @P2 BRA `again`
        EXIT
    """)
    assert (found.instructions, found.apart) == (5, 3)


def test_a_way_without_a_load_is_not_counted():
    """As of a row that is ignored."""
    found = only(f"""
        again:
        @P0 BRA `next`
        {LOAD}
        FADD R1, R1, R4
        next:
        @P2 BRA `again`
        EXIT
    """)
    assert (found.instructions, found.apart) == (4, 0)


def test_a_masked_tail_is_apart():
    """Whether it comes before or after."""
    main = f"main: \n {LOAD} \n FADD R1, R1, R4 \n @P2 BRA `main`"
    tail = f"tail: \n {MASKED} \n ISETP.LT P1, R3, R7 \n FADD R1, R1, R4 \n @P2 BRA `tail`"
    for text in (f"{main}\n{tail}\nEXIT", f"{tail}\n{main}\nEXIT"):
        found = only(text)
        assert (found.instructions, found.tails, found.once) == (3, 4, 1)


def test_the_loop_that_loads_most_at_a_time_is_the_main_one():
    rest = f"rest: \n {LOAD} \n @P2 BRA `rest`"
    main = f"main: \n {LOAD} \n LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R4.64] \n FADD R1, R1, R4 \n @P2 BRA `main`"
    found = only(f"{rest}\n{main}\nEXIT", itemsize=4)
    assert (found.instructions, found.logits, found.tails) == (4, 8, 2)


def test_what_the_loop_around_does_is_counted_apart():
    found = only(f"""
        MOV R1, RZ
        row:
        MOV R2, RZ
        MOV R3, RZ
        columns:
        {LOAD}
        @P2 BRA `columns`
        @P0 BRA `on`
        SHFL.BFLY PT, R5, R4, 0x10, 0x1f
        on:
        DADD R8, R8, R6
        @P3 BRA `row`
        STG.E desc[UR4][R2.64], R8
        EXIT
    """)
    assert (found.instructions, found.around, found.once, found.shuffles) == (2, 5, 3, 0)


def test_a_loop_that_loads_and_one_that_stores_are_both_counted():
    first, second = sass.count(
        listing(f"""
        sums:
        {LOAD}
        FADD R1, R1, R4
        @P2 BRA `sums`
        BAR.SYNC.DEFER_BLOCKING 0x0
        gradient:
        {LOAD}
        FMUL R4, R4, R1
        FADD R4, R4, R1
        {STORE}
        @P2 BRA `gradient`
        EXIT
    """),
        2,
    )
    assert (first.instructions, second.instructions) == (3, 5)
    assert (first.once, second.once) == (2, 2)
    assert (first.barriers, first.tails) == (0, 0)


def test_without_a_loop_the_program_is_counted():
    """To its end: an exit under a predicate is that of some threads. What is called is not looked at."""
    found = only(
        f"""
        @P0 BRA `ignored`
        {LOAD}
        FMUL R4, R4, R1
        CALL.REL.NOINC `division`
        @!P1 EXIT
        {STORE}
        EXIT
        ignored:
        {STORE}
        EXIT
        division:
        FADD R1, R1, R4
        RET.REL.NODEC R2 0x0
        self:
        BRA `self`
        NOP
    """,
        itemsize=4,
    )
    assert (found.instructions, found.logits, found.loop, found.apart, found.once) == (7, 4, "", 2, 0)


def test_what_loads_less_at_a_time_is_not_counted():
    assert sass.count(listing("again: \n LDG.E.U16 R4, desc[UR4][R2.64] \n @P2 BRA `again` \n EXIT"), 2) == []


def test_what_is_no_listing_raises():
    with pytest.raises(ValueError, match=r"no instruction in the listing: 'cuobjdump info'"):
        sass.count("cuobjdump info", 2)


def test_marks():
    text = f"again: \n {LOAD} \n @P0 BRA `on` \n FADD R1, R1, R4 \n on: \n @P2 BRA `again` \n EXIT"
    assert [line[:7] for line in sass.marked(listing(text)).splitlines()] == [
        "| 00000", "| 00010", ": 00020", "| 00030", "  00040",
    ]  # fmt: skip
