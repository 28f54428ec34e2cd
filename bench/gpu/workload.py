"""What the tools look at: `workload.py IMPL DEVICE small`, every kernel of an implementation on small logits, for
compute-sanitizer; or `large`, its main kernels once after a run that compiles them, for Nsight Compute."""

import importlib
import os
import sys
from pathlib import Path

import torch

import fusedloss as fl
from fusedloss import backends

impl, device, size = sys.argv[1], torch.device(sys.argv[2]), sys.argv[3]


def small() -> None:
    for rows, classes in ((9, 33), (3, 5001)):
        hidden, weight = (torch.randn(n, 24, device=device, requires_grad=True) for n in (rows, classes))
        target = torch.randint(classes, (rows,), device=device)
        fl.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, impl=impl).backward()
        fl.linear_dsc_loss(hidden, weight, target, impl=impl).backward()
        if impl in backends.IMPLS:
            logits = (hidden @ weight.t()).detach().requires_grad_()
            (fl.mixed_cross_entropy(logits, target, alpha=0.3, top_k=2, impl=impl) / 2).backward()
            fl.dsc_loss(logits, target, level="class", impl=impl).backward()


def large(rows: int, classes: int) -> None:
    logits = torch.randn(rows, classes, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(classes, (rows,), device=device)
    for start in (lambda: None, torch.cuda.profiler.start if device.type == "cuda" else lambda: None):
        start()
        torch.autograd.grad(fl.cross_entropy(logits, target, impl=impl), logits)
        torch.autograd.grad(fl.dsc_loss(logits, target, level="class", impl=impl), logits)
        if device.type == "cuda":
            torch.cuda.synchronize()


interpreted = "TRITON_INTERPRET" in os.environ
if interpreted:
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    importlib.import_module("interpreted").prepare()
if size == "small":
    small()
else:
    large(*(3, 300) if interpreted else (8192, 32000))
if device.type == "cuda":
    torch.cuda.synchronize()
