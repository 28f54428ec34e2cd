"""The losses as integrations take them: by name or as a function, with arguments that may be callables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..losses._registry import LOSSES, argument_names

#: Arguments that come from a model and its output layer, and with them those that come from its own cross-entropy.
OF_THE_LAYER = frozenset(
    (
        "input", "target", "linear_weight", "linear_bias", "softcap", "reduction", "normalizer", "return_stats",
        "sequence_parallel",
    )
)  # fmt: skip
OF_THE_MODEL = OF_THE_LAYER | {"ignore_index"}

_Forms = tuple[Callable[..., Any], Callable[..., Any]]


def forms(loss: str | Callable[..., Any], **others: _Forms) -> _Forms:
    """Return the row form and the linear form of a loss. `others`: losses that the registry does not have, by name."""
    name = (loss if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))).removeprefix("linear_")
    known = {name: (x.row, x.linear) for name, x in LOSSES.items() if x.linear is not None} | others
    row, linear = known.get(name) or known.get(f"{name}_loss") or (None, None)
    if row is None or linear is None or not (isinstance(loss, str) or loss in (row, linear)):
        raise ValueError(f"loss must be one of {', '.join(known)} or its function, got {loss!r}")
    return row, linear


def check_arguments(loss: Callable[..., Any], arguments: dict[str, Any], of_the_model: frozenset[str]) -> None:
    """Raise TypeError for an argument that a loss does not take or gets `of_the_model`, and for one that it lacks."""
    if not callable(loss):
        raise TypeError(f"loss must be a function, got {loss!r}")
    name, known = getattr(loss, "__name__", repr(loss)), argument_names(loss)
    for argument in arguments:
        if argument in of_the_model:
            raise TypeError(f"{name}() gets {argument!r} from the model and its labels, or cannot be used with it here")
        if argument not in known:
            raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
    for parameter in list(inspect.signature(loss).parameters.values())[2:]:
        needed = parameter.default is parameter.empty and parameter.name in known
        if needed and parameter.name not in of_the_model.union(arguments):
            raise TypeError(f"{name}() needs the argument {parameter.name!r}")


def check_row_loss(loss: Callable[..., Any]) -> None:
    """Raise TypeError for a function of this package that is called with anything but logits and targets."""
    names = argument_names(loss)  # a module has no target among them
    if str(loss.__module__).startswith("fusedloss.") and (names[1:2] != ["target"] or "normalizer" not in names):
        name = getattr(loss, "__name__", repr(loss))
        raise TypeError(f"loss must be a function, a loss of logits and targets, got {name}")


def current(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of this step: what a callable gives, but for ``loss_fn``."""
    return {name: value() if callable(value) and name != "loss_fn" else value for name, value in arguments.items()}
