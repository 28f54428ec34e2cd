"""The projection that a linear form passes to a loss in place of logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..distributed.dtensor import local_projection
from ..distributed.sequence import row_parts
from ..engine.project import project


def projected(input: Any, linear_weight: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Check the tensors that produce the logits. Return them as one projection, and the options for the row form.

    Modules hand over lists of hidden states and weights, whose products are summed.
    """
    hidden, weight = (input, linear_weight) if type(input) is list else ([input], [linear_weight])
    rest = dict(options)
    bias, softcap, budget = rest.pop("linear_bias", None), rest.pop("softcap", None), rest.pop("budget", None)
    drop_ignored, split = rest.pop("drop_ignored", None), rest.pop("sequence_parallel", False)
    hidden, weight, bias, group, split = local_projection(hidden, weight, bias, rest.get("group"), split)
    if group is not None:
        rest["group"] = group
    parts = 1 if split is False else row_parts(split, group)
    return project(hidden, weight, bias, softcap, budget, drop_ignored, parts), rest
