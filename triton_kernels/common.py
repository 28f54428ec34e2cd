"""What every loss has: weights of the classes, the factors of its terms, and the squared log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def class_weights_of(class_weight, columns, exists, T: tl.constexpr):
    if class_weight is None:
        return tl.full((1, 1), 1.0, T)
    else:
        return tl.load(class_weight + columns, exists, other=0.0)


@triton.jit
def target_weight_of(class_weight, target, live, V, T: tl.constexpr):
    return class_weights_of(class_weight, target, live & (target >= 0) & (target < V), T)


@triton.jit
def load_common(common, K: tl.constexpr, T: tl.constexpr):
    """What every loss has, see fusedloss.engine.operators."""
    if common is None:
        return tl.full((1, 1), 1.0 if K == 0 else 0.0, T)
    else:
        return tl.full((1, 1), tl.load(common + K), T)


@triton.jit
def z_loss_of(common, target_weight, lse, T: tl.constexpr):
    """Its term and its slope by lse; with no such loss an infinite lse is no matter."""
    z_loss = load_common(common, 2, T) * target_weight
    return tl.where(z_loss != 0, z_loss * lse * lse, 0.0), tl.where(z_loss != 0, 2 * z_loss * lse, 0.0)
