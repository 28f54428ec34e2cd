"""The same updates fused and not: step time and peak memory, each side in a process of its own, by turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from model import Size, fuse_with, make_model, row_loss
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from resident import resident_mib
from tables import faster

SIDES = ("fused", "unfused")


class ComparisonError(Exception):
    """One side of the comparison failed."""


def compare(size: Size, blocks: Tensor, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Runs both sides over the same blocks, after an untimed update; prints their figures and returns them."""
    steps, batch = options.compare_steps, options.batch
    order = torch.randint(len(blocks), ((steps + 1) * batch,), generator=torch.Generator().manual_seed(options.seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.pt"
        plan = {"size": tuple(size), "batches": list(blocks[order].split(batch)), "loss": options.loss}
        torch.save({**plan, "dtype": options.dtype, "threads": options.threads, "seed": options.seed}, path)
        command = [sys.executable, __file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides = {name: subprocess.Popen([*command, name, str(path)], **pipes) for name in SIDES}
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        try:
            for turn in range(steps + 1):
                for name in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    answers[name].append(_update(name, sides[name]))
        finally:
            for side in sides.values():
                side.kill()
                with contextlib.suppress(BrokenPipeError):
                    side.communicate()
    figures = {
        name: {
            "step_ms": statistics.median(answer["ms"] for answer in said[1:]),
            "peak_mib": said[-1]["peak_mib"],
            "peak_above_start_mib": said[-1]["peak_mib"] - said[0]["start_mib"],
            "final_loss": said[-1]["loss"],
        }
        for name, said in answers.items()
    }
    print(f"\nfused against unfused {options.loss}, {steps} updates each in turn, {options.dtype}")
    print(f"{'':34}{'fused':>12}{'unfused':>12}{'unfused / fused':>17}")
    for key, label, number in (
        ("step_ms", f"an update of {batch} x {size.length} tokens, ms", ".0f"),
        ("peak_mib", "peak memory, MiB", ",.0f"),
        ("peak_above_start_mib", "  above the idle model's, MiB", ",.0f"),
        ("final_loss", "loss of the last update", ".4f"),
    ):
        fused, unfused = (figures[name][key] for name in SIDES)
        ratio = f"{unfused / fused:17.2f}" if key != "final_loss" else ""
        print(f"{label:34}{format(fused, number):>12}{format(unfused, number):>12}{ratio}")
    print(
        faster(
            "an update",
            "the fused loss",
            "the unfused one",
            figures["unfused"]["step_ms"] / figures["fused"]["step_ms"],
        )
    )
    return figures


def _update(name: str, side: Any) -> dict[str, float]:
    with contextlib.suppress(BrokenPipeError):  # a child that is gone answers nothing
        side.stdin.write("update\n")
        side.stdin.flush()
    answer = side.stdout.readline()
    if not answer:
        raise ComparisonError(f"the comparison's {name} side ended with code {side.wait()}")
    return json.loads(answer)


def _child(side: str, path: str) -> None:
    """Makes an update for every line that it reads, and answers with a line of JSON."""
    plan = torch.load(path, weights_only=True)
    torch.set_num_threads(plan["threads"])
    model = make_model(Size(*plan["size"]), plan["seed"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of_logits = None
    if side == "fused":
        fuse_with(model, plan["loss"])
    elif plan["loss"] != "cross_entropy":  # else transformers' own
        loss_of_logits = row_loss(plan["loss"])
    start_mib = resident_mib("VmRSS")
    for tokens, _ in zip(plan["batches"], sys.stdin, strict=False):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan["dtype"] == "bf16"):
            if loss_of_logits is None:
                loss = model(tokens, labels=tokens).loss
            else:
                loss = loss_of_logits(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        milliseconds = 1000 * (time.perf_counter() - start)
        answer = {"ms": milliseconds, "loss": loss.item(), "start_mib": start_mib, "peak_mib": resident_mib("VmHWM")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])
