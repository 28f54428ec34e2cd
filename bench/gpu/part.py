"""What a part of the report knows of its run, and the file into which all parts write what they find."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from writing import aligned

Record = dict[str, Any]


@dataclass
class Part:
    """A part that runs: its time, and its lines in the results, which are on disk as soon as they are written."""

    name: str
    output: Path
    seconds: float
    rehearse: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the part should have ended, well before it is killed."""
        return self.started + 0.85 * self.seconds - time.monotonic()

    def row(self, **cells: Any) -> None:
        """Add a line to the part's table. A cell is a text, a number, or None."""
        self.write(row=cells)

    def failed(self, what: str, why: str) -> None:
        """Record a failure of this package, which turns the verdict red."""
        self.write(failed=what, why=why)

    def left_out(self, what: str, why: str) -> None:
        """Record what was not done, or what failed and is not ours."""
        self.write(left_out=what, why=why)

    def text(self, *lines: str) -> None:
        self.write(text=lines)

    def late(self, what: str) -> bool:
        """Tell whether no time is left for one case more, and record that it was left out."""
        if self.left > 0:
            return False
        self.left_out(what, "no time was left")
        return True

    @contextmanager
    def attempt(self, what: str, ours: bool = True) -> Iterator[None]:
        """Record an exception and go on, unless the GPU is lost for this process."""
        import torch

        try:
            yield
        except Exception as error:
            foreign = not ours or isinstance(error, torch.OutOfMemoryError)
            (self.left_out if foreign else self.failed)(what, described(error))
            if not self.rehearse:
                torch.cuda.synchronize()  # raises again after an error that is sticky

    def write(self, **record: Any) -> None:
        line = json.dumps({"part": self.name, **record}, ensure_ascii=False) + "\n"
        file = os.open(self.output / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())  # one call, so that no line is half of one
            os.fsync(file)
        finally:
            os.close(file)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def read(output: Path) -> dict[str, list[Record]]:
    """Return the records of each part, of its last run alone."""
    found: dict[str, list[Record]] = {}
    file = output / "results.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the disk was full, say
            continue
        if "start" in record:
            found[record["part"]] = []
        found.setdefault(record["part"], []).append(record)
    return found


def verdict(records: list[Record]) -> str:
    """Return "ok", "left out: ..." or "FAILED: ..."."""
    ends = [record["end"] for record in records if "end" in record]
    failures = sum("failed" in record for record in records)
    if not ends:
        return "FAILED: it did not end"
    if ends[-1] != "ok":
        return f"FAILED: {ends[-1]}"
    if failures:
        return f"FAILED: {failures} case{'s' * (failures > 1)}"
    nothing = next((record["why"] for record in records if record.get("left_out") == "all of it"), None)
    return f"left out: {nothing}" if nothing else "ok"


def markdown(found: dict[str, list[Record]], title: str) -> str:
    seconds = {name: next((r["seconds"] for r in records if "seconds" in r), None) for name, records in found.items()}
    about = [{"part": name, "verdict": verdict(records), "s": seconds[name]} for name, records in found.items()]
    lines = [f"# {title}", "", *aligned(about)]
    for name, records in found.items():
        lines += ["", f"## {name}", *section(records)]
    return "\n".join(lines) + "\n"


def section(records: list[Record]) -> list[str]:
    """What a part found: failures first."""
    lines: list[str] = []
    for kind, about in (("failed", "FAILED"), ("left_out", "left out")):
        by_reason: dict[str, list[str]] = {}
        for record in records:
            if kind in record:
                by_reason.setdefault(record["why"], []).append(record[kind])
        lines += ["", *(f"- {about}: {'; '.join(what)}: {why}" for why, what in by_reason.items())] if by_reason else []
    rows = [record["row"] for record in records if "row" in record]
    lines += ["", *aligned(rows)] if rows else []
    for record in records:
        lines += ["", "```", *record["text"], "```"] if "text" in record else []
    return lines
