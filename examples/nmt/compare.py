"""The same training with the fused loss and with the eager one: tokens per second, peak memory, time of the loss.

Each side is a process of its own, so that its peak memory is its own, and the two take turns, a few updates each,
so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from data import PAD, Batch
from model import Size, Transformer, autocast
from optimizer import MuonAdamW
from resident import resident_mib
from tables import faster
from torch import Tensor

import fusedloss as fl

SIDES = ("fused", "eager")
ALPHA, SMOOTHING = 0.25, 0.1
ROUNDS = 5
WARMUP = 3  # updates before the clock runs


class ComparisonError(Exception):
    """One side of the comparison failed."""


def eager_mixed_cross_entropy(logits: Tensor, target: Tensor, alpha: float, smoothing: float, pad: int) -> Tensor:
    """The mixed cross-entropy as one writes it in plain PyTorch: logits (*, V), target (*) -> the mean, 0-d."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    gold = log_p.gather(-1, target[..., None])[..., 0]
    own = log_p.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
    rows = -(1 - smoothing) * ((1 - alpha) * gold + alpha * own) - smoothing * log_p.mean(-1)
    keep = target != pad
    return rows[keep].mean()


def fused_mixed_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, impl: str | None) -> Tensor:
    """The same of hidden states (*, D) and the output layer's weight (V, D), without the logits."""
    return fl.linear_mixed_cross_entropy(
        hidden, weight, target, alpha=ALPHA, label_smoothing=SMOOTHING, ignore_index=PAD, impl=impl
    )


def compare(
    size: Size, batches: list[Batch], lr: float, dtype: str, seed: int, threads: int, impl: str | None
) -> dict[str, dict[str, float]]:
    """Runs both sides over the batches, the first WARMUP untimed; prints their figures and returns them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.pt"
        plan = {"lr": lr, "dtype": dtype, "seed": seed, "threads": threads, "impl": impl}
        torch.save({"size": tuple(size), "batches": [tuple(batch) for batch in batches], **plan}, path)
        sides = [_Side(name, path) for name in SIDES]
        try:
            for turn in range(2 * ROUNDS):
                for side in sides if turn % 2 == 0 else sides[::-1]:
                    side.ask("updates" if turn < ROUNDS else "loss")  # the peak is read before the loss runs alone
        finally:
            for side in sides:
                side.close()
    figures = {side.name: side.summary() for side in sides}
    _print(figures, batches, size, dtype)
    return figures


class _Side:
    """A child process that does a round of work for every line it reads, and answers with a line of JSON."""

    def __init__(self, name: str, plan: Path) -> None:
        self.name = name
        command = [sys.executable, __file__, name, str(plan)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: dict[str, list[dict[str, float]]] = {"updates": [], "loss": []}

    def ask(self, work: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a child that is gone answers nothing
            self._process.stdin.write(f"{work}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ComparisonError(f"the comparison's {self.name} side ended with code {self._process.wait()}")
        self._answers[work].append(json.loads(answer))

    def summary(self) -> dict[str, float]:
        updates = self._answers["updates"]
        return {
            "update_ms": statistics.median(answer["update_ms"] for answer in updates),
            "tokens_per_second": statistics.median(answer["tokens_per_second"] for answer in updates),
            "peak_mib": updates[-1]["peak_mib"],
            "peak_above_start_mib": updates[-1]["peak_mib"] - updates[-1]["start_mib"],
            "loss_ms": statistics.median(answer["ms"] for answer in self._answers["loss"]),
            "final_loss": updates[-1]["final_loss"],
        }

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def _print(figures: dict[str, dict[str, float]], batches: list[Batch], size: Size, dtype: str) -> None:
    tokens = max(batch.target_out.numel() for batch in batches)
    fused, eager = figures["fused"], figures["eager"]
    print(
        f"\nfused against eager mixed cross-entropy, {len(batches)} updates each in turn, medians of {ROUNDS} rounds\n"
        f"{'':34}{'fused':>12}{'eager':>12}{'eager / fused':>15}"
    )
    for key, label, number in (
        ("update_ms", "an update, ms", ".1f"),
        # of one update's largest batch, forward and backward
        ("loss_ms", f"output layer and loss, {tokens} x {size.vocab_size}, ms", ".1f"),
        ("peak_mib", "peak memory, MiB", ",.0f"),
        ("peak_above_start_mib", "  above the idle model's, MiB", ",.0f"),
        ("final_loss", "loss of the last update", ".4f"),
    ):
        ratio = f"{eager[key] / fused[key]:15.2f}" if key != "final_loss" else ""
        print(f"{label:34}{format(fused[key], number):>12}{format(eager[key], number):>12}{ratio}")
    for key, what in (("update_ms", "training"), ("loss_ms", "the output layer and the loss alone")):
        print(faster(what, "the fused loss", "the eager one", eager[key] / fused[key]))


def _child(side: str, path: str) -> None:
    plan = torch.load(path, weights_only=True)
    torch.set_num_threads(plan["threads"])
    torch.manual_seed(plan["seed"])
    size, batches = Size(*plan["size"]), [Batch(*batch) for batch in plan["batches"]]
    model = Transformer(size, PAD)
    optimizer = MuonAdamW(model, plan["lr"])

    def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
        with autocast(plan["dtype"]):
            if side == "fused":
                return fused_mixed_cross_entropy(hidden, model.output_weight, target, plan["impl"])
            return eager_mixed_cross_entropy(model.logits(hidden), target, ALPHA, SMOOTHING, PAD)

    def hidden_of(batch: Batch) -> Tensor:
        with autocast(plan["dtype"]):
            return model(batch.source, batch.target_in)

    def update(batch: Batch) -> float:
        loss = loss_of(hidden_of(batch), batch.target_out)
        loss.backward()
        optimizer.step(share=0.1)
        return loss.item()

    start_mib = resident_mib("VmRSS")
    for batch in batches[:WARMUP]:
        update(batch)
    parts = [batches[WARMUP:][part::ROUNDS] for part in range(ROUNDS)]
    largest = max(batches, key=lambda batch: batch.target_out.numel())

    for line in sys.stdin:
        if line == "updates\n":
            part = parts.pop(0)
            start = time.perf_counter()
            losses = [update(batch) for batch in part]
            seconds = time.perf_counter() - start
            tokens = sum(int((batch.target_out != PAD).sum()) for batch in part)
            answer = {
                "update_ms": 1000 * seconds / len(part),
                "tokens_per_second": tokens / seconds,
                "final_loss": losses[-1],
                "start_mib": start_mib,
                "peak_mib": resident_mib("VmHWM"),
            }
        else:
            leaves = (hidden_of(largest).detach().requires_grad_(), model.output_weight)
            answer = {"ms": statistics.median(_milliseconds(loss_of, leaves, largest.target_out) for _ in range(5))}
        print(json.dumps(answer), flush=True)


def _milliseconds(loss_of: Callable[[Tensor, Tensor], Tensor], leaves: tuple[Tensor, Tensor], target: Tensor) -> float:
    """Of the output layer and the loss, forward and backward; leaves: hidden states and weight."""
    start = time.perf_counter()
    torch.autograd.grad(loss_of(leaves[0], target), leaves)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    _child(*sys.argv[1:])
