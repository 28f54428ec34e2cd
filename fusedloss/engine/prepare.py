"""Checks a loss's arguments and makes the rows of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, transforms
from ..definition.epilogue import smoothing_factors
from ..definition.projection import Form, Projection
from ..definition.rows import Rows, Source, Spec
from ..definition.statistics import Targets
from ..distributed import dtensor, vocabulary
from ..distributed.vocabulary import VocabularyShards
from . import constants
from .options import DEFAULTS, CallOptions

SMOOTHING_OVER = ("all", "others")


class Call(NamedTuple):
    """A loss's arguments, checked, as the operators take them."""

    rows: Rows  # targets and candidates of all ranks' classes
    spec: Spec
    token_weight: Tensor | None  # (N,)
    inplace: bool
    shards: VocabularyShards | None
    classes: int  # of all ranks
    options: CallOptions  # with their defaults


def prepare(
    name: str,
    input: Source,
    target: Tensor,
    params: Sequence[float | Tensor],
    without: tuple[str, ...],
    candidates: Tensor | None,
    options: CallOptions,
    more: object = (),
) -> Call:
    """Checks the arguments of a loss; `name` is the public function's on logits.

    `more` is what the ranks of a group must agree on beside the arguments.
    """
    linear = isinstance(input, Projection)
    for option in options:
        if option not in DEFAULTS or option in without or (linear and option == "inplace_backward"):
            raise TypeError(f"{'linear_' * linear}{name}() got an unexpected keyword argument {option!r}")
    o: CallOptions = {**DEFAULTS, **options}
    checks.check_logits(input, target)
    given, transformed = input, transforms.active()
    # Beneath a transform there may be one, too.
    if not linear and (type(input) is not Tensor or transformed) and checks.is_dtensor(input):
        input, o["group"] = dtensor.local_logits(input, o["group"])
    if type(target) is not Tensor or transformed:
        target = dtensor.local_rows(target)
    shards = None if o["group"] is None else vocabulary.shards_of(o["group"], input)
    classes = input.shape[-1] if shards is None else shards.classes
    if shards is not None:
        vocabulary.check_ranks(shards, name, input, target, params, candidates, more, o)
        vocabulary.check_own(shards, input)
    if options or classes < 1:
        _check(input, target, classes, o)
    target = checks.normalized_targets(target, o["ignore_index"])
    if candidates is not None:
        checks.check_candidates(candidates, target)
    impl = backends.resolve(o["impl"], input.device, linear)
    if transformed:
        impl = "reference"
        if o["inplace_backward"]:
            transforms.refuse("inplace_backward=True")
    form = Form(softcap=0.0, teacher_softcap=0.0)  # a compiler would make variables of the defaults
    if isinstance(input, Projection):
        form = input.form
        if len(input.weight) > 1 and impl in backends.PRODUCT_IMPLS:
            raise ValueError(
                f"{backends.named_by(o['impl'])}={impl!r} multiplies one weight on the chip, but LoRA makes "
                f"{len(input.weight)} of the output layer; take impl='triton', or merge the adapters"
            )
        for w in input.weight:
            if impl != "reference" and type(w) not in (Tensor, torch.nn.Parameter):
                checks.check_readable(w)
    if shards is not None:
        if impl == "reference":
            source = backends.named_by(o["impl"])
            raise ValueError(f"group needs an implementation with kernels, but {source} is 'reference'")
        if checks.may_read(target):
            checks.check_indices(target, None, classes)
        # The ranks must agree on the chunks of rows that are divided.
        form = form._replace(group=shards.name, most_classes=max(shards.sizes) if form.row_parts > 1 else 0)

    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    # A compiled backward would not raise the logits' version, by which autograd knows that they are gone.
    inplace = o["inplace_backward"] and not torch.compiler.is_compiling()
    if isinstance(input, Projection):
        hidden, of_layer, bias = input.hidden, input.weight, input.bias
        if hidden[0].dim() != 2:
            hidden = [h.reshape(-1, h.shape[-1]) for h in hidden]
    else:
        hidden, of_layer, bias = [matrix(input, o["inplace_backward"])], [], None
    if inplace and impl == "reference":
        source = backends.named_by(o["impl"])
        raise ValueError(f"inplace_backward needs a compiled implementation, but {source} is 'reference'")
    if inplace:
        assert isinstance(given, Tensor)
        checks.check_no_leaf(given)
    index = (target if target.dim() == 1 else target.reshape(-1)).contiguous()
    weight = o["weight"]
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    if candidates is not None:
        # Those of ignored rows may hold anything.
        count = candidates.shape[-1] if candidates.dim() > target.dim() else 1
        candidates = candidates.reshape(-1, count).to(torch.int64)
        candidates = candidates.masked_fill((index == checks.IGNORED)[:, None], 0).contiguous()
        if shards is not None and checks.may_read(candidates):
            checks.check_indices(index, candidates, classes)
    smoothing, z_loss = float(o["label_smoothing"]), float(o["z_loss"])
    temperature = o["temperature"]
    tempered = isinstance(temperature, Tensor) or temperature != 1
    common: tuple[float, ...] = ()
    if smoothing or z_loss or tempered:
        factors = smoothing_factors(smoothing, o["smoothing_over"], classes)
        common = (*factors, z_loss, 1.0 if isinstance(temperature, Tensor) else 1.0 / temperature)
    numbers, scalars = constants.parameters(params, common, dtype, input.device)
    for i, given_number in enumerate(params):
        if isinstance(given_number, Tensor) and given_number.dim():
            of_row = given_number.shape[target.dim() :]
            ignored = (index == checks.IGNORED).view(-1, *[1] * len(of_row))
            # Those of ignored rows may hold anything, of which a loss must make no NaN.
            numbers[i] = numbers[i].reshape(index.shape + of_row).masked_fill(ignored, 1)
    if isinstance(temperature, Tensor):
        assert scalars is not None
        scalars = torch.cat([scalars[:-1], _inverse(temperature.to(input.device, dtype)).reshape(1)])
    if tempered:
        form = form._replace(tempered=True)
        if inplace and isinstance(temperature, Tensor) and temperature.requires_grad:
            raise ValueError("the gradient of a temperature needs the logits, which inplace_backward overwrites")
    token_weight = o["token_weight"]
    if token_weight is not None:
        # Those of ignored rows may hold anything.
        token_weight = token_weight.reshape(-1).to(dtype).masked_fill(index == checks.IGNORED, 0)
    rows = Rows(hidden, of_layer, bias, [], index, weight, candidates, numbers, scalars)
    spec = Spec(impl, mean=smoothing != 0, smooths=smoothing != 0, z_loss=z_loss != 0, form=form)
    return Call(rows, spec, token_weight, inplace, shards, classes, o)


def _check(input: Source, target: Tensor, classes: int, o: CallOptions) -> None:
    if classes < 1:
        checks.check_classes(classes, input)
    # The checks themselves would take most of a small call's time.
    if o["reduction"] not in checks.REDUCTIONS:
        checks.check_choice("reduction", o["reduction"], checks.REDUCTIONS)
    if o["smoothing_over"] not in SMOOTHING_OVER:
        checks.check_choice("smoothing_over", o["smoothing_over"], SMOOTHING_OVER)
    if o["label_smoothing"] is not DEFAULTS["label_smoothing"]:
        checks.check_number("label_smoothing", o["label_smoothing"], 0, 1)
    if o["z_loss"] is not DEFAULTS["z_loss"]:
        checks.check_number("z_loss", o["z_loss"], 0)
    if o["ignore_index"] is not DEFAULTS["ignore_index"]:
        o["ignore_index"] = checks.check_ignored(o["ignore_index"])
    if o["temperature"] is not DEFAULTS["temperature"]:
        o["temperature"] = checks.check_temperature(o["temperature"], input)
    if o["stats"]:
        checks.check_stats(o["stats"], o["return_stats"])
    if o["weight"] is not None:
        checks.check_weight(o["weight"], input, classes)
    if o["token_weight"] is not None:
        checks.check_token_weight(o["token_weight"], target)
    if o["normalizer"] is not None:
        checks.check_normalizer(o["normalizer"], o["reduction"], o["token_weight"])


def with_second_row(call: Call, second: Source) -> Call:
    """The call with a teacher's logits or targets, checked, that are in hand or are made as the input's are."""
    rows, form = call.rows, call.spec.form
    if isinstance(second, Projection):
        (hidden,), (weight,) = second.hidden, second.weight
        teacher = [hidden.reshape(-1, hidden.shape[-1]), weight]
        teacher += [] if second.bias is None else [second.bias]
        form = form._replace(teacher_softcap=second.form.softcap)
    else:
        teacher = [matrix(second, False)]
    return call._replace(rows=rows._replace(teacher=teacher), spec=call.spec._replace(form=form))


def without_zero_weights(call: Call) -> Call:
    """Rows whose token weight is 0 are ignored, unless the weights are learnt."""
    token_weight, rows = call.token_weight, call.rows
    if token_weight is None or token_weight.requires_grad:
        return call
    return call._replace(rows=rows._replace(target=rows.target.masked_fill(token_weight == 0, checks.IGNORED)))


def matrix(input: Tensor, inplace: bool) -> Tensor:
    """(N, V) with unit stride along the rows, a view of the input wherever one exists."""
    classes = input.shape[-1]
    if inplace:
        try:
            matrix = input.view(math.prod(input.shape[:-1]), classes)
        except RuntimeError:
            matrix = None
        if matrix is None or (matrix.stride(1) != 1 and classes > 1) or (0 <= matrix.stride(0) < classes):
            raise ValueError(
                "inplace_backward needs logits whose rows lie one after the other in memory, got strides "
                f"{input.stride()} for shape {tuple(input.shape)}"
            )
        return matrix
    # A view of what has two dimensions already would cost a small call a twentieth of its time.
    matrix = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), classes)
    return matrix if matrix.stride(1) == 1 or classes == 1 else matrix.contiguous()


def divisor_of(call: Call, mean_over_weights: bool) -> tuple[float | Tensor | None, float | Tensor | None]:
    """What "mean" divides by, which is never 0, and the normalizer that it is, which may be: 1 stands in for it.

    For class weights that sum to 0 it is infinite: loss and gradients are 0, also where label smoothing leaves a sum.
    """
    rows, o, token_weight = call.rows, call.options, call.token_weight
    if o["reduction"] != "mean":
        return None, None
    normalizer = o["normalizer"]
    if isinstance(normalizer, str):  # "token_weight"
        assert token_weight is not None
        normalizer = token_weight.detach().sum()
    if normalizer is not None and checks.is_zero(normalizer):
        normalizer = rows.hidden[0].new_zeros(())
    if isinstance(normalizer, Tensor):
        # A float64 count is no reason for a float64 loss.
        normalizer = normalizer.to(checks.compute_dtype(rows.hidden[0].dtype))
        return torch.where(normalizer == 0, 1, normalizer), normalizer
    if normalizer is not None:
        # PyTorch takes no large int; a symbolic number would become a constant.
        return normalizer if isinstance(normalizer, torch.SymFloat) else float(normalizer), normalizer
    weight = rows.class_weight if mean_over_weights else None
    if weight is None:
        # Arithmetic with a number costs a small call less than with a tensor. A trace and a transform keep the tensor.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if call.spec.impl != "reference" and not traced and checks.may_read(rows.target):
            return max(backends.BACKENDS[call.spec.impl].count(rows.target), 1), None
        return (rows.target != checks.IGNORED).count_nonzero().clamp(min=1), None
    # The loss has yet to say what it thinks of targets that are out of range.
    index, ignored, _ = Targets.of(rows.target, len(weight))
    total = weight[index].masked_fill(ignored, 0).sum()
    return torch.where(total == 0, torch.inf, total), None


def _inverse(temperature: Tensor) -> Tensor:
    """NaN of one that is out of range, which on a GPU nobody looks at."""
    low, high = checks.DIVISORS
    valid = (temperature >= low) & (temperature <= high)
    return torch.where(valid, 1 / torch.where(valid, temperature, 1), math.nan)
