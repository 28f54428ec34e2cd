"""The trainers of TRL on the fused passes.

They compute log-probabilities, entropy and metrics from hidden states by one autograd function, in the forward that
:func:`trl.trainer.add_fused_lm_head` gives a model. That function is replaced, for all trainers of the process. Which
rows count, logit scale, soft-capping, gathered weights and the router's loss stay TRL's own business.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any, get_args

import torch
from torch import Tensor

from ..checks import check_choice
from ..engine.dispatch import row_statistics
from ..engine.options import LinearImpl
from ..losses._linear import projected

try:
    import trl
    from trl.trainer import utils
except ImportError as error:
    raise ImportError("fusedloss.integrations.trl needs TRL: pip install 'fusedloss[trl]'") from error

__all__ = ["fuse_trainers", "unfuse_trainers"]

#: TRL's function as its forward knows it, and the parameters and outputs of it that are known here.
_NAME = "_ChunkedLogProbFunction"
_PARAMETERS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
#: What TRL's function gives beside the log-probabilities, in its order, and the statistics that make it.
_STATISTICS = {"entropy": "entropy", "log_sum_sq_probs": "power", "mean_logits": "mean", "is_top1": "top"}
_OUTPUTS = ("log_probs", *_STATISTICS)
_TESTED = "1.16.0"


def fuse_trainers(*, budget: int | None = None, impl: LinearImpl | None = None) -> None:
    """Make all trainers of TRL in this process compute with the passes of this package, until they are unfused.

    These are SFTTrainer, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer and any other that gives a model TRL's fused
    output layer, created before or after this call. Losses, gradients and logged metrics are those of TRL, up to
    rounding. Log-probabilities, entropy and the metrics' statistics come from one pass over each chunk of logits,
    in all dtypes.

    Before TRL's function is replaced, all its results are compared with those of the replacement on a few rows. A
    second call changes the options.

    Args:
        budget: bytes that a chunk of logits may take, as in the linear forms.
        impl: the implementation, as in the linear forms.

    Raises RuntimeError, with TRL's version, if TRL computes differently; then nothing is replaced. With DeepSpeed
    ZeRO-3 a trainer raises RuntimeError at its first step, because the weight is freed before the backward.

    >>> from fusedloss.integrations.trl import fuse_trainers, unfuse_trainers
    >>> fuse_trainers()
    >>> unfuse_trainers()
    """
    if impl is not None:
        check_choice("impl", impl, get_args(LinearImpl))
    own = getattr(utils, _NAME, None)
    if isinstance(own, _LogProbs):
        own = own.own
    fused = _LogProbs(own, budget, impl)
    _check(own)
    _compare(own, _LogProbs(own, budget, None))
    setattr(utils, _NAME, fused)


def unfuse_trainers() -> None:
    """Undo :func:`fuse_trainers`; without a previous call nothing changes."""
    fused = getattr(utils, _NAME, None)
    if isinstance(fused, _LogProbs):
        setattr(utils, _NAME, fused.own)


class _LogProbs:
    """Stands in the place of TRL's autograd function, of which only `apply` is called."""

    def __init__(self, own: Any, budget: int | None, impl: LinearImpl | None) -> None:
        self.own, self.budget, self.impl = own, budget, impl

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """What TRL's function gives: (N,) for each of the outputs, None for those that are not asked for."""
        for name in outputs:
            if name not in _OUTPUTS:
                raise _unknown(f"asks for {name!r} of each token")
        if hasattr(weight, "ds_id") and torch.is_grad_enabled():
            raise RuntimeError(
                "fused trainers do not run with DeepSpeed ZeRO-3, which frees the output layer's weight before the "
                "backward; call unfuse_trainers(), or use ZeRO-2 or FSDP"
            )
        if not logit_scale > 0:
            raise ValueError(
                f"fused trainers need logits that are scaled by a positive number, but the model's are by {logit_scale}"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        # (c / s) tanh(z / (c / s)) / (tau / s) is c tanh(s z / c) / tau: without a copy of the hidden states
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        options = {"linear_bias": bias, "softcap": softcap, "budget": self.budget, "impl": self.impl}
        projection, rest = projected(hidden, weight, {**options, "temperature": temperature / logit_scale})
        statistics = tuple([_STATISTICS[name] for name in outputs if name != "log_probs"])
        # What linear_log_probs computes, and what the metrics need from the same pass.
        s = row_statistics("linear_log_probs", projection, targets, statistics, rest)  # type: ignore[arg-type]
        return (
            -s.ce,
            s.entropy if "entropy" in outputs else None,
            s.power.detach().log() if "log_sum_sq_probs" in outputs else None,
            s.mean_logit.detach() if "mean_logits" in outputs else None,
            s.top_index == targets if "is_top1" in outputs else None,
        )


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"TRL {trl.__version__} {what}, which fused trainers do not know; they are tested with TRL {_TESTED}. Train "
        "without fuse_trainers, or with that version"
    )


def _check(own: Any) -> None:
    """Raises where TRL's forward does not call a function of the known form."""
    if own is None:
        raise _unknown(f"has no {_NAME} in trl.trainer.utils")
    parameters = tuple(inspect.signature(getattr(own, "forward", own)).parameters)[1:]
    if parameters != _PARAMETERS:
        raise _unknown(f"computes log-probabilities from ({', '.join(parameters)})")
    if _NAME not in _names(getattr(getattr(utils, "add_fused_lm_head", None), "__code__", None)):
        raise _unknown(f"has no add_fused_lm_head that calls {_NAME}")


def _names(code: CodeType | None) -> set[str]:
    """The global names that a function uses, also in functions within it."""
    if code is None:
        return set()
    return {*code.co_names}.union(*(_names(x) for x in code.co_consts if isinstance(x, CodeType)))


@torch.enable_grad()
def _compare(own: Any, fused: _LogProbs) -> None:
    """Raises where values or gradients of TRL's function are not ours."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    sources, classes = [draw(6, 8), draw(11, 8), draw(11)], 11
    targets = (sources[0] @ sources[1].t() + sources[2]).argmax(-1)
    targets[::2] = torch.arange(3)
    upstream = [draw(6).detach() for _ in range(2)]
    function: Any
    for softcap, scale in ((None, 0.5), (2.0, 1.5)):
        results = []
        for function in (own, fused):
            with torch.autocast("cpu", enabled=False):
                made = function.apply(*sources, targets, 0.7, classes // 2, softcap, scale, _OUTPUTS)
            gradients = torch.autograd.grad(made[:2], sources, upstream)
            results.append(dict(zip([*_OUTPUTS, "hidden", "weight", "bias"], [*made, *gradients], strict=True)))
        for name, value in results[0].items():
            if not torch.allclose(value.float(), results[1][name].float(), rtol=1e-4, atol=1e-5):
                raise _unknown(f"computes other {name}")
