"""What PyTorch's function transforms change: torch.func, forward-mode differentiation, gradients that come in a batch.

The kernels have no rules for them. Under a transform every loss is computed by its definition in plain PyTorch, which
goes through all of them, and so is a backward whose upstream gradients are batched (``is_grads_batched=True``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# These have no public name. torch.autograd.Function asks the first one itself.
torch_func_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda x: False)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)  # by is_grads_batched


def active(*gradients: Tensor | None) -> bool:
    """Tell whether a transform surrounds this code, or batches these upstream gradients of a backward.

    It costs 0.2 us, and torch.compile knows the answer.
    """
    if torch_func_is_active() or getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    if not gradients or torch.compiler.is_compiling():
        return False
    return True in [g is not None and _is_batched(g) for g in gradients]


def plain_backward(*gradients: Tensor | None, inplace: bool = False) -> bool:
    """Tell whether a backward runs in plain PyTorch: it is differentiated itself, or a transform applies to it."""
    if inplace:
        refuse("inplace_backward=True", *gradients)
    return torch.is_grad_enabled() or active(*gradients)


def refuse(what: str, *gradients: Tensor | None) -> None:
    """Raise RuntimeError under a transform, of what cannot be computed by the definition."""
    if active(*gradients):
        raise RuntimeError(
            f"{what} does not go together with function transforms (torch.func, forward-mode differentiation, "
            "is_grads_batched=True, jacobian(vectorize=True)); drop one of the two"
        )


def traced() -> bool:
    """Tell whether torch.jit.trace records this code: what Python decides now, the traced graph keeps for good."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def values(x: Tensor) -> Tensor:
    """Return the values beneath the transforms, those of a whole batch, for the host to look at."""
    while not torch.compiler.is_compiling() and is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
