"""The losses as modules, which take options in the constructor and tensors in the call.

Each argument of a function is one of the constructor and an attribute, but for those that a batch brings along, which
are arguments of the call.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import textwrap
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_module_registration_hook

from . import backends
from .checks import DIVISORS, PLAIN, check_choice, check_int, check_number, is_dtensor
from .distributed import fsdp
from .distributed.dtensor import local_projection
from .engine.options import (
    ClassLossModuleOptions,
    CrossEntropyOptions,
    DistillationModuleOptions,
    ForwardOptions,
    Impl,
    LinearClassLossModuleOptions,
    LinearDistillationModuleOptions,
    LinearImpl,
    LinearModuleOptions,
    ModuleOptions,
)
from .engine.output_layer import beside_products, described, is_lora, products
from .engine.project import project
from .losses._overlap import Form, Level
from .losses._registry import argument_names, options_of
from .losses.cross_entropy import cross_entropy, linear_cross_entropy
from .losses.distillation import Divergence, distillation_loss, linear_distillation_loss
from .losses.dsc import dice_loss, dsc_loss, linear_dsc_loss
from .losses.flex import flex_loss, linear_flex_loss
from .losses.focal import focal_loss, linear_focal_loss
from .losses.mixed_cross_entropy import alpha_schedule, linear_mixed_cross_entropy, mixed_cross_entropy
from .losses.supcon import SupConReduction, labels_apart, supcon_loss
from .losses.topk_distillation import Rest, linear_topk_distillation_loss, topk_distillation_loss
from .losses.tversky import linear_tversky_loss, tversky_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self, Unpack

#: After so many calls in training an AlphaSchedule that was never stepped warns: more than an update accumulates.
_CALLS_WITHOUT_A_STEP = 4096

#: Options of the layer that a linear loss has.
_LAYER_DEFAULTS: dict[str, Any] = {"bias": False, "device": None, "dtype": None}

_DOC = """{summary}

The module form of :func:`~fusedloss.{function}`. The arguments of the constructor are attributes.

Args:
{layer}    {values}: a number, a 0-d tensor (a buffer, or a learnable Parameter) or a module that returns
        one when called, such as :class:`AlphaSchedule`. An argument of the call replaces it.
{shared}
All others are as below. The call takes the arguments that belong to a batch:
{call}.
The constructor raises the same errors as the function, for its own arguments.

>>> import torch, fusedloss as fl
>>> loss = fl.nn.{name}({example})
>>> {input} = torch.randn(8, {size}, requires_grad=True)
>>> loss({input}, {batch}).backward()

The function, :func:`~fusedloss.{function}`:

{document}
"""


class _Called(Exception):
    """Raised when a user's function is reached, after all checks."""


def _called(*_: Any) -> Tensor:
    raise _Called


def _sample(value: Any) -> Any:
    """Return an equally valid or invalid value of an argument that can be tried on a CPU."""
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else torch.ones_like(value, device="cpu")
    return _called if callable(value) else value


#: By layer, the losses that are tied to it.
_TIED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[_LinearLoss]] = weakref.WeakKeyDictionary()

#: Where torch defines modules that hold a layer and compute what it computes.
_TRANSPARENT = ("torch._dynamo", "torch.distributed.algorithms")


@functools.cache
def _watch_holders() -> None:
    register_module_module_registration_hook(_note_holder)


def _note_holder(module: nn.Module, _: str, layer: nn.Module | None) -> None:
    """Record in the losses that are tied to a layer which module has just taken it as a child."""
    # A compiler would guard a model that registers a child on the losses that are tied to others, which come and go.
    if layer is not None and not torch.compiler.is_compiling():
        for loss in _TIED.get(layer, ()):
            loss._holder = weakref.ref(module)


def _poses_as_layer(module: nn.Module | None) -> bool:
    """Return whether a module that holds an output layer replaces it: it has a weight (V, D), as adapters do."""
    if module is None or type(module).__module__.startswith(_TRANSPARENT):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _holds(own: Tensor, saved: Tensor) -> bool:
    """Return whether a layer's tensor has the values of a saved one. Tensors on meta have none.

    Of a DTensor and a plain tensor only the shapes are compared.
    """
    if is_dtensor(own) and is_dtensor(saved):
        own, saved = own.to_local(), saved.to_local()  # type: ignore[attr-defined]
    elif is_dtensor(own) or is_dtensor(saved):
        return own.shape == saved.shape
    return own.shape == saved.shape and (own.is_meta or saved.is_meta or torch.equal(own, saved.to(own)))


class _Loss(nn.Module):
    """A loss of logits. ``class FocalLoss(_Loss, loss=focal_loss): ...`` writes out its own arguments.

    Its constructor hands on the arguments, and its `forward` those of the call, None for the module's own. `example`:
    arguments of the constructor for the docstring's example.
    """

    _impls: ClassVar[tuple[str, ...]] = backends.IMPLS
    #: For the docstring: the arguments of a layer, and others of the constructor; of the example, the constructor's
    #: arguments, input and its size, and what follows the input.
    _layer_doc: ClassVar[str] = ""
    _shared_doc: ClassVar[str] = """\
    weight: class weights (V,), a buffer.
    return_stats: deprecated here; an argument of the call.
"""
    _example: ClassVar[tuple[str, str, int]] = ("", "logits", 1000)
    _batch: ClassVar[str] = "torch.arange(8)"
    #: Arguments of the constructor that are the call's by now.
    _deprecated: ClassVar[dict[str, Any]] = {"return_stats": False}

    _function: ClassVar[Callable[..., Any]]
    _defaults: ClassVar[dict[str, Any]]
    """Those of the shared options that are attributes."""
    _arguments: ClassVar[tuple[str, ...]]
    """Of the function, what are attributes."""
    _per_call: ClassVar[tuple[str, ...]]
    """Of the function, what forward takes."""

    def __init_subclass__(cls, loss: Callable[..., Any] | None = None, example: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        if loss is None:
            return
        cls._function = staticmethod(loss)
        # What a batch brings along is none. A group could not be copied or saved with the module.
        no_attributes = ("token_weight", "group", "linear_bias", "stats", "target")
        cls._defaults = {k: v for k, v in options_of(loss).items() if k not in no_attributes} | cls._deprecated
        forward = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        cls._per_call = (*[x for x in forward if x not in ("self", "input", "target")], *ForwardOptions.__annotations__)
        own = [name for name in inspect.signature(cls.__init__).parameters if name in argument_names(loss)]
        cls._arguments = (*own, *cls._defaults)
        document = inspect.getdoc(loss) or ""
        first, input, size = cls._example
        cls.__doc__ = _DOC.format(
            summary=document.splitlines()[0],
            function=loss.__name__,
            layer=cls._layer_doc,
            shared=cls._shared_doc,
            values=", ".join([name for name in own if name in cls._per_call] + ["normalizer"]),
            call=", ".join(cls._per_call),
            name=cls.__name__,
            example=", ".join(filter(None, (first, example))),
            input=input,
            size=size,
            batch=cls._batch,
            document=textwrap.indent(document, "    "),
        )

    def __init__(self, options: Mapping[str, Any], **own: Any) -> None:
        super().__init__()
        self._keep(options, own)

    def _keep(self, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Store the arguments as attributes, and check them."""
        for name in options:
            if name not in self._defaults:
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        if "return_stats" in options:
            warnings.warn(
                "return_stats is an argument of the call, loss(input, target, return_stats=True); that of the "
                "constructor goes in a later release",
                DeprecationWarning,
                stacklevel=4,
            )
        for name, value in {**own, **self._defaults, **options}.items():
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and type(value) not in PLAIN:
                value = int(value) if isinstance(value, numbers.Integral) else float(value)
            if (value is None and name == "weight") or (isinstance(value, Tensor) and not isinstance(value, Parameter)):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._try()

    def _given(self, input: Tensor) -> dict[str, Any]:
        """Return the arguments of the function that produce the logits."""
        return {"input": input}

    def _one_row(self) -> dict[str, Any]:
        """Return the same arguments for a single row of zeros."""
        weight = getattr(self, "weight", None)
        classes = max(1, len(weight)) if isinstance(weight, Tensor) and weight.dim() else 2
        return {"input": torch.zeros(classes, device="cpu")}

    def _try(self) -> None:
        """Let the function check the arguments on one row on the CPU."""
        if self.impl is not None:
            check_choice("impl", self.impl, self._impls)
        options = {name: _sample(value) for name, value in self._values().items()}
        options |= {"impl": "reference", "token_weight": torch.ones((), device="cpu")}
        options.pop("inplace_backward", None)
        target = torch.zeros((), dtype=torch.int64, device="cpu")
        with torch.no_grad(), suppress(_Called):
            self._function(target=target, **self._one_row(), **options)

    def _values(self) -> dict[str, Any]:
        """Return the current arguments, with modules replaced by the values that they return."""
        values = {name: getattr(self, name) for name in self._arguments}
        for name in self._per_call:
            if isinstance(values.get(name), nn.Module):
                values[name] = values[name]()
        return values

    def forward(self, input: Tensor, target: Tensor, **batch: Unpack[ForwardOptions]) -> Any:
        return self._call(input, target, batch)

    def _call(self, input: Tensor, target: Tensor | None, batch: Mapping[str, Any], **own: Any) -> Any:
        values = self._values()
        for name, value in {**own, **batch}.items():
            if name not in self._per_call:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
            if value is not None:
                values[name] = value
        return self._function(target=target, **self._given(input), **values)

    def extra_repr(self) -> str:
        shown = []
        for name in self._arguments:
            value = getattr(self, name)
            if isinstance(value, nn.Module):
                continue  # shown as a child
            if isinstance(value, Tensor):
                shown.append(f"{name}={tuple(value.shape) if value.dim() else value.tolist()}")
            elif name not in self._defaults or value != self._defaults[name]:
                shown.append(f"{name}={getattr(value, '__name__', repr(value))}")
        return ", ".join(shown)


class _LinearLoss(_Loss):
    """A loss of hidden states, with the output layer that computes the logits."""

    #: A reference to the layer of another module; None where the layer is a child.
    _tie: weakref.ref[nn.Module] | None = None
    #: The module that took that layer as a child last, since the loss was tied to it.
    _holder: weakref.ref[nn.Module] | None = None

    _impls = backends.LINEAR_IMPLS
    _layer_doc = """\
    in_features, num_classes, bias, device, dtype: of the child ``linear``, a :class:`torch.nn.Linear`, which holds the
        output layer's weight (V, D) and bias. :meth:`tied` takes another module's layer instead. Only weight and bias
        of ``linear``, and LoRA's, are read: a layer that does more (a forward of its own, hooks, pruning) raises.
"""
    _example = ("64, 1000", "hidden", 64)

    def __init__(self, in_features: int, num_classes: int, options: Mapping[str, Any], **own: Any) -> None:
        nn.Module.__init__(self)
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            check_int(name, value, 1)
        shared = dict(options)
        layer = {name: shared.pop(name, default) for name, default in _LAYER_DEFAULTS.items()}
        self._modules["linear"] = nn.Linear(in_features, num_classes, **layer)
        self._keep(shared, own)

    @classmethod
    def tied(cls, layer: nn.Module, *arguments: Any, **options: Any) -> Self:
        """Make a loss whose output layer is another module's, such as the model's nn.Embedding or lm_head.

        `layer` has a weight (V, D), and a bias (V,) or None or none. It is an nn.Linear, a module that has no forward,
        or an embedding, whose weight alone is shared, whatever its forward does to the inputs. The other arguments are
        the constructor's, without those of the layer.

        The other module still owns the layer. The loss holds a weak reference to it as ``linear``: the layer's
        parameters and state_dict keys are not among the loss's, and the loss follows the layer through `.to()` and a
        new weight. A deepcopy or a pickle of a module that holds both keeps them tied. A copy of the loss alone loses
        its layer, and raises when it is called. The layer may have LoRA of PEFT, now or later. If another module takes
        the place of the layer and holds it, the loss raises when it is called.

        Tie a new loss when the model gets another layer in its place. As long as anything else keeps the old layer
        alive, the loss uses the old layer's weight.
        """
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be a module with a weight (V, D), got {layer!r}")
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else weight
            raise ValueError(f"layer must have a weight (V, D), but that of {layer!r} is {got}")
        cls._check_layer(layer)
        for name in _LAYER_DEFAULTS:
            if name in options:
                raise TypeError(f"{cls.__name__}.tied() got {name}={options[name]!r}, which the layer has of its own")
        classes, features = weight.shape
        loss = cls(features, classes, *arguments, device="meta", dtype=weight.dtype, **options)
        del loss._modules["linear"]
        loss._tie_to(layer)
        return loss

    def _tie_to(self, layer: nn.Module) -> None:
        _watch_holders()
        self._tie = weakref.ref(layer)
        _TIED.setdefault(layer, weakref.WeakSet()).add(self)

    @property
    def linear(self) -> nn.Module:
        """Return the output layer: a child, or the layer of another module that the loss is tied to."""
        layer = self._modules.get("linear")
        if layer is None and self._tie is not None:
            layer = self._tie()
        if layer is None:
            raise RuntimeError(
                f"the layer that this {type(self).__name__} was tied to is gone, or was not copied or saved with it; "
                "let the model keep the layer, and copy or save a module that holds both"
            )
        return layer

    @classmethod
    def _check_layer(cls, layer: nn.Module) -> None:
        what = beside_products(layer)
        if what is not None:
            cls._refuse(f"the {described(layer)} has {what}")

    @classmethod
    def _refuse(cls, what: str) -> NoReturn:
        function = cls._function.__name__
        raise ValueError(
            f"{cls.__name__} reads the weight and bias of its output layer and never calls it, but {what}. Make it a "
            "plain nn.Linear (merge or unwrap an adapter, remove a hook, make pruning or weight_norm permanent), or "
            f"use the row form, {function.removeprefix('linear_')}(layer(hidden), target). Where weight and bias are "
            f"right as they are, pass them to {function}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can neither be copied nor pickled; a module that holds both takes the layer once.
        return self.__dict__ | {"_tie": self._tie and self._tie(), "_holder": self._holder and self._holder()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layer, holder = state.pop("_tie", None), state.pop("_holder", None)
        super().__setstate__(state)
        if layer is not None:
            self._tie_to(layer)
        self._holder = weakref.ref(holder) if holder is not None else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # An older state_dict has the tensors of a tied layer here too, when the layer was a child.
        own = f"{prefix}linear."
        if "linear" not in self._modules and any(key.startswith(own) for key in state_dict):
            for key, value in self.linear.state_dict(prefix=own).items():
                if key in state_dict and not _holds(value, state_dict.pop(key)):
                    others[-1].append(  # the error messages
                        f"{key} is not what the layer holds that {type(self).__name__} is tied to. Load the layer "
                        f"before the loss. If the state_dict lacks the layer's own key, rename {key} to that; if it "
                        f"has it and the layer is right, delete {key}."
                    )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _call(self, input: Tensor, target: Tensor | None, batch: Mapping[str, Any], **own: Any) -> Any:
        return self._with_layer(functools.partial(super()._call, target=target, batch=batch, **own), input)

    def _with_layer(self, function: Callable[[Tensor], Any], input: Tensor) -> Any:
        """Call a function that reads the output layer while its weight is unsharded."""
        layer = self._output_layer()
        return fsdp.as_forward(layer, function, input) if fsdp.is_unit(layer) else function(input)

    def logits(self, input: Tensor) -> Tensor:
        """Compute all the logits (*, V) of hidden states (*, D), for evaluation or generation.

        Those of DTensors are a DTensor, as from torch.nn.functional.linear.
        """
        return self._with_layer(self._logits, input)

    def _logits(self, input: Tensor) -> Tensor:
        form: Any = (self.softcap, self.budget, self.drop_ignored)
        made_of = products(self._layer(), input)
        local_projection(*made_of, None, False)  # which checks what DTensors there are
        return project(*made_of, *form).logits()

    def _given(self, input: Tensor) -> dict[str, Any]:
        hidden, weight, bias = products(self._layer(), input)
        return {"input": hidden, "linear_weight": weight, "linear_bias": bias}

    def _one_row(self) -> dict[str, Any]:
        weight = self._layer().weight
        weight = torch.zeros(len(weight), 1, dtype=weight.dtype, device="cpu")
        return {"input": weight[0], "linear_weight": weight}

    def _output_layer(self) -> Any:
        """Return the layer, or the LoRA that has taken its place since the loss was tied to it."""
        holder = self._held_by()
        return holder if is_lora(holder) and holder.base_layer is self.linear else self.linear

    def _held_by(self) -> Any:
        """Return the module that took the tied layer as a child last, or None."""
        return None if self._holder is None else self._holder()

    def _layer(self) -> Any:
        """Return the output layer, whose products and bias must be all that makes its logits."""
        layer, holder = self._output_layer(), self._held_by()
        self._check_layer(layer)
        if layer is not holder and _poses_as_layer(holder):
            self._refuse(f"its layer is now inside a {described(holder)}, which has taken the layer's place")
        return layer

    def extra_repr(self) -> str:
        tied = "" if "linear" in self._modules else f"tied to {(self._tie and self._tie())!r}"
        return ", ".join(filter(None, (super().extra_repr(), tied)))


class CrossEntropyLoss(_Loss, loss=cross_entropy, example="label_smoothing=0.1"):
    def __init__(self, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(options)


class _Distills(_Loss):
    """A loss against a teacher; the call takes the teacher's logits or hidden states."""

    _shared_doc = ""
    _deprecated: ClassVar[dict[str, Any]] = {}


class DistillationLoss(_Distills, loss=distillation_loss, example='divergence="jsd"'):
    _batch = "torch.randn(8, 1000)"

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        beta: float | None = None,
        **options: Unpack[DistillationModuleOptions],
    ) -> None:
        super().__init__(options, divergence=divergence, beta=beta)

    def forward(  # type: ignore[override]
        self, input: Tensor, teacher: Tensor, target: Tensor | None = None, **batch: Unpack[ForwardOptions]
    ) -> Any:
        return self._call(input, target, batch, teacher=teacher)

    def _one_row(self) -> dict[str, Any]:
        row = super()._one_row()
        return {**row, "teacher": row["input"]}


class _OfClasses(_Distills):
    """A loss against some classes of a teacher."""

    _batch = "torch.arange(16).expand(8, -1), torch.randn(8, 16).log_softmax(-1)"

    def forward(  # type: ignore[override]
        self, input: Tensor, index: Tensor, log_prob: Tensor, target: Tensor | None = None,
        **batch: Unpack[ForwardOptions],
    ) -> Any:  # fmt: skip
        return self._call(input, target, batch, index=index, log_prob=log_prob)

    def _one_row(self) -> dict[str, Any]:
        one = torch.zeros(1, device="cpu")
        return {**super()._one_row(), "index": one.long(), "log_prob": one}


class TopkDistillationLoss(_OfClasses, loss=topk_distillation_loss, example='divergence="jsd"'):
    def __init__(
        self,
        *,
        rest: Rest = "bucket",
        divergence: Divergence = "forward_kl",
        beta: float | None = None,
        **options: Unpack[DistillationModuleOptions],
    ) -> None:
        super().__init__(options, rest=rest, divergence=divergence, beta=beta)


class _OfAlpha(_Loss):
    """A loss whose call may bring an alpha."""

    def forward(
        self, input: Tensor, target: Tensor, *, alpha: float | Tensor | None = None, **batch: Unpack[ForwardOptions]
    ) -> Any:
        return self._call(input, target, batch, alpha=alpha)


class DSCLoss(_OfAlpha, loss=dsc_loss, example="alpha=0.01"):
    def __init__(
        self,
        *,
        alpha: float | Tensor | nn.Module = 0.01,
        smooth: float = 1.0,
        squared: bool = True,
        form: Form = "one_vs_rest",
        level: Level = "example",
        detach_weight: bool = False,
        **options: Unpack[ClassLossModuleOptions],
    ) -> None:
        super().__init__(
            options, alpha=alpha, smooth=smooth, squared=squared, form=form, level=level, detach_weight=detach_weight
        )


class DiceLoss(_Loss, loss=dice_loss):
    def __init__(
        self,
        *,
        smooth: float = 1.0,
        squared: bool = True,
        form: Form = "one_vs_rest",
        level: Level = "example",
        **options: Unpack[ClassLossModuleOptions],
    ) -> None:
        super().__init__(options, smooth=smooth, squared=squared, form=form, level=level)


class _OfFunction(_Loss):
    """A loss whose call may bring tensors for the user's function."""

    def forward(
        self, input: Tensor, target: Tensor, *, candidates: Tensor | None = None,
        row_tensors: Sequence[Tensor] | None = None, **batch: Unpack[ForwardOptions],
    ) -> Any:  # fmt: skip
        return self._call(input, target, batch, candidates=candidates, row_tensors=row_tensors)


class FlexLoss(_OfFunction, loss=flex_loss, example="lambda s: s.ce + s.q"):
    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        *,
        statistics: Sequence[str] = (),
        per_chunk: bool = False,
        over: Literal["rows", "classes"] = "rows",
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(options, loss_fn=loss_fn, statistics=statistics, per_chunk=per_chunk, over=over)


class _OfGamma(_Loss):
    """A loss whose call may bring a gamma."""

    def forward(
        self, input: Tensor, target: Tensor, *, gamma: float | Tensor | None = None, **batch: Unpack[ForwardOptions]
    ) -> Any:
        return self._call(input, target, batch, gamma=gamma)


class FocalLoss(_OfGamma, loss=focal_loss, example="gamma=3.0"):
    def __init__(self, *, gamma: float | Tensor | nn.Module = 2.0, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(options, gamma=gamma)


class _Mixes(_Loss):
    """A loss that mixes in training only: in eval() alpha is 0 unless the call passes one."""

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        return values if self.training else values | {"alpha": 0.0}

    def forward(
        self, input: Tensor, target: Tensor, *,
        alpha: float | Tensor | None = None, candidates: Tensor | None = None, **batch: Unpack[ForwardOptions],
    ) -> Any:  # fmt: skip
        return self._call(input, target, batch, alpha=alpha, candidates=candidates)


class MixedCrossEntropyLoss(_Mixes, loss=mixed_cross_entropy, example="alpha=fl.nn.AlphaSchedule(10_000)"):
    def __init__(
        self, *, alpha: float | Tensor | nn.Module, top_k: Literal[1, 2] = 1, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(options, alpha=alpha, top_k=top_k)


class _OfErrors(_Loss):
    """A loss whose call may bring the weights of both kinds of errors."""

    def forward(
        self, input: Tensor, target: Tensor, *,
        alpha: float | Tensor | None = None, beta: float | Tensor | None = None, **batch: Unpack[ForwardOptions],
    ) -> Any:  # fmt: skip
        return self._call(input, target, batch, alpha=alpha, beta=beta)


class TverskyLoss(_OfErrors, loss=tversky_loss):
    def __init__(
        self,
        *,
        alpha: float | Tensor | nn.Module = 0.6,
        beta: float | Tensor | nn.Module | None = None,
        smooth: float = 1.0,
        form: Form = "one_vs_rest",
        level: Level = "example",
        **options: Unpack[ClassLossModuleOptions],
    ) -> None:
        super().__init__(options, alpha=alpha, beta=beta, smooth=smooth, form=form, level=level)


class LinearCrossEntropyLoss(_LinearLoss, loss=linear_cross_entropy, example="label_smoothing=0.1"):
    def __init__(self, in_features: int, num_classes: int, **options: Unpack[LinearModuleOptions]) -> None:
        super().__init__(in_features, num_classes, options)


class LinearDistillationLoss(_Distills, _LinearLoss, loss=linear_distillation_loss, example='divergence="jsd"'):
    _batch = "torch.randn(8, 128), torch.randn(1000, 128)"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        divergence: Divergence = "forward_kl",
        beta: float | None = None,
        teacher_softcap: float | None = None,
        **options: Unpack[LinearDistillationModuleOptions],
    ) -> None:
        own = {"divergence": divergence, "beta": beta, "teacher_softcap": teacher_softcap}
        super().__init__(in_features, num_classes, options, **own)

    def forward(  # type: ignore[override]
        self, input: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor | None = None, *,
        teacher_bias: Tensor | None = None, **batch: Unpack[ForwardOptions],
    ) -> Any:  # fmt: skip
        teacher = {"teacher_input": teacher_input, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
        return self._call(input, target, batch, **teacher)

    def _one_row(self) -> dict[str, Any]:
        row = super()._one_row()
        return {**row, "teacher_input": row["input"], "teacher_weight": row["linear_weight"]}


class LinearTopkDistillationLoss(
    _OfClasses, _LinearLoss, loss=linear_topk_distillation_loss, example='divergence="jsd"'
):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        rest: Rest = "bucket",
        divergence: Divergence = "forward_kl",
        beta: float | None = None,
        **options: Unpack[LinearDistillationModuleOptions],
    ) -> None:
        super().__init__(in_features, num_classes, options, rest=rest, divergence=divergence, beta=beta)


class LinearDSCLoss(_OfAlpha, _LinearLoss, loss=linear_dsc_loss, example="alpha=0.01"):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha: float | Tensor | nn.Module = 0.01,
        smooth: float = 1.0,
        squared: bool = True,
        form: Form = "one_vs_rest",
        level: Level = "example",
        detach_weight: bool = False,
        **options: Unpack[LinearClassLossModuleOptions],
    ) -> None:
        super().__init__(
            in_features, num_classes, options,
            alpha=alpha, smooth=smooth, squared=squared, form=form, level=level, detach_weight=detach_weight,
        )  # fmt: skip


class LinearFlexLoss(_OfFunction, _LinearLoss, loss=linear_flex_loss, example="lambda s: s.ce + s.q"):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss_fn: Callable[..., Tensor],
        *,
        statistics: Sequence[str] = (),
        per_chunk: bool = False,
        over: Literal["rows", "classes"] = "rows",
        **options: Unpack[LinearModuleOptions],
    ) -> None:
        own = {"loss_fn": loss_fn, "statistics": statistics, "per_chunk": per_chunk, "over": over}
        super().__init__(in_features, num_classes, options, **own)


class LinearFocalLoss(_OfGamma, _LinearLoss, loss=linear_focal_loss, example="gamma=3.0"):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        gamma: float | Tensor | nn.Module = 2.0,
        **options: Unpack[LinearModuleOptions],
    ) -> None:
        super().__init__(in_features, num_classes, options, gamma=gamma)


class LinearMixedCrossEntropyLoss(
    _Mixes, _LinearLoss, loss=linear_mixed_cross_entropy, example="alpha=fl.nn.AlphaSchedule(10_000)"
):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha: float | Tensor | nn.Module,
        top_k: Literal[1, 2] = 1,
        **options: Unpack[LinearModuleOptions],
    ) -> None:
        super().__init__(in_features, num_classes, options, alpha=alpha, top_k=top_k)


class LinearTverskyLoss(_OfErrors, _LinearLoss, loss=linear_tversky_loss):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha: float | Tensor | nn.Module = 0.6,
        beta: float | Tensor | nn.Module | None = None,
        smooth: float = 1.0,
        form: Form = "one_vs_rest",
        level: Level = "example",
        **options: Unpack[LinearClassLossModuleOptions],
    ) -> None:
        super().__init__(
            in_features, num_classes, options, alpha=alpha, beta=beta, smooth=smooth, form=form, level=level
        )


class SupConLoss(nn.Module):
    """Compute the supervised contrastive loss of features, as :func:`~fusedloss.supcon_loss` does.

    The constructor takes the options. The call takes the tensors, `self_index`, `contrast_includes_batch`, `averaged`
    and the `group`, which could not be copied or saved with a module.

    Args:
        temperature: a number, a 0-d tensor (a buffer) or a learnable Parameter.
        normalize, positives, reduction, impl: as for the function.

    >>> import torch, fusedloss as fl
    >>> loss = fl.nn.SupConLoss(temperature=0.1)
    >>> features = torch.randn(8, 64, requires_grad=True)
    >>> loss(features, torch.arange(8) // 2).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.3,
        *,
        normalize: bool = True,
        positives: Literal["out", "in"] = "out",
        reduction: SupConReduction = "mean",
        impl: LinearImpl | None = None,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and not isinstance(temperature, Parameter):
            self.register_buffer("temperature", temperature)
        else:
            is_learnt = isinstance(temperature, Parameter)
            self.temperature = temperature if is_learnt else check_number("temperature", temperature, *DIVISORS)
        self.normalize, self.positives, self.reduction, self.impl = normalize, positives, reduction, impl
        if impl is not None:
            check_choice("impl", impl, backends.LINEAR_IMPLS)
        with torch.no_grad():  # the function checks its arguments
            two, pair = torch.ones(2, 1, device="cpu"), torch.zeros(2, dtype=torch.int64, device="cpu")
            supcon_loss(two, pair, **self._options() | {"impl": "reference"})

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        contrast: Tensor | None = None,
        contrast_labels: Tensor | None = None,
        self_index: Tensor | None = None,
        contrast_includes_batch: bool = False,
        positive_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        averaged: bool = False,
    ) -> Tensor:
        return supcon_loss(
            features, labels, contrast=contrast, contrast_labels=contrast_labels, self_index=self_index,
            contrast_includes_batch=contrast_includes_batch, positive_mask=positive_mask,
            group=group, averaged=averaged, **self._options(),
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        names = ("temperature", "normalize", "positives", "reduction", "impl")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        values = ((n, x.tolist() if isinstance(x, Tensor) else x) for n, x in self._options().items() if n != "impl")
        return ", ".join(f"{name}={value}" for name, value in values)


class CrossEntropySupConLoss(nn.Module):
    """Compute the joint loss (1 - lam) * cross-entropy + lam * supervised contrastive loss, for fine-tuning.

    Args:
        lam: in [0, 1].
        temperature, normalize, positives: of :class:`SupConLoss`, which is the child ``supcon``.
        reduction: of the contrastive part: "mean" over the anchors with a positive, so that both parts are averages, or
            "sum" as Gunel et al. write it (no 1/N, where their cross-entropy has it). Cross-entropy is the mean.
        cross_entropy: further arguments of :class:`CrossEntropyLoss`, the child ``cross_entropy``.

    forward(logits, features, labels, *, contrast=None, contrast_labels=None, self_index=None,
    contrast_includes_batch=False, group=None): logits (N, V) and features (N, D) or (N, views, D) of the same N
    examples with labels (N,). What comes between labels and group is for the contrastive part, such as a memory bank.
    An example of the ignored label has no positives but its own views, and others are contrasted with it.
    With `group`, whose ranks' features are one batch, gradients are taken to be averaged over them, as
    DistributedDataParallel does: cross-entropy stays the mean over this rank's examples, and the contrastive part is
    computed with averaged=True.

    Source: Gunel et al. 2021, "Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning"
    (arXiv:2011.01403), with lam = 0.9 and temperature = 0.3.

    >>> import torch, fusedloss as fl
    >>> loss = fl.nn.CrossEntropySupConLoss(lam=0.9, temperature=0.3)
    >>> features, head = torch.randn(8, 64, requires_grad=True), torch.nn.Linear(64, 3)
    >>> loss(head(features), features, torch.arange(8) % 3).backward()
    """

    def __init__(
        self,
        lam: float = 0.9,
        temperature: float | Tensor = 0.3,
        *,
        normalize: bool = True,
        positives: Literal["out", "in"] = "out",
        reduction: Literal["mean", "sum"] = "mean",
        impl: Impl | None = None,
        **cross_entropy: Unpack[CrossEntropyOptions],
    ) -> None:
        super().__init__()
        self.lam = check_number("lam", lam, 0, 1)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.supcon = SupConLoss(temperature, normalize=normalize, positives=positives, reduction=reduction, impl=impl)
        if "return_stats" in cross_entropy:
            raise TypeError("CrossEntropySupConLoss takes no return_stats; its child cross_entropy does")
        self.cross_entropy = CrossEntropyLoss(impl=impl, **cross_entropy)

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        contrast: Tensor | None = None,
        contrast_labels: Tensor | None = None,
        self_index: Tensor | None = None,
        contrast_includes_batch: bool = False,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        ignored: Any = self.cross_entropy.ignore_index
        which: dict[str, Any] = {
            "self_index": self_index,
            "contrast_includes_batch": contrast_includes_batch,
            "group": group,
        }
        own_labels, contrast_labels = labels_apart(ignored, features, labels, contrast, contrast_labels, **which)
        contrastive: Tensor = self.supcon(
            features, own_labels, contrast=contrast, contrast_labels=contrast_labels, averaged=group is not None,
            **which,
        )  # fmt: skip
        classified: Tensor = self.cross_entropy(logits, labels)
        return (1 - self.lam) * classified + self.lam * contrastive

    def extra_repr(self) -> str:
        return f"lam={self.lam}"


class AlphaSchedule(nn.Module):
    """Count updates and return the alpha of :func:`~fusedloss.alpha_schedule`, to be the alpha of a loss.

    Call :meth:`step` after each update of the optimizer, as for a scheduler of learning rates. The count is a buffer,
    ``updates`` (0-d int64), so that training resumed from a state_dict continues the schedule. Several losses may share
    a schedule.

    Args:
        total_steps: the updates after which alpha stays at `maximum`, those of the warm-up among them.
        maximum: the last alpha, in [0, 1].
        warmup: the updates of plain cross-entropy at the beginning, whose alpha is 0.

    Without :meth:`step` alpha stays 0. The schedule warns once if it is called 4,096 times in training mode before the
    first step, which is more often than gradients are accumulated. Calls in compiled code do not count.

    The call returns alpha as a 0-d float64 tensor on the buffer's device. It causes neither a host read nor, under
    torch.compile, a recompilation.

    >>> import torch, fusedloss as fl
    >>> loss = fl.nn.MixedCrossEntropyLoss(alpha=fl.nn.AlphaSchedule(total_steps=100))
    >>> loss.alpha.step()
    >>> loss
    MixedCrossEntropyLoss(
      top_k=1
      (alpha): AlphaSchedule(updates=1, total_steps=100, maximum=0.5)
    )
    """

    updates: Tensor
    #: How often alpha was asked for in training before the first step; None after that, or after the warning.
    _calls: int | None = 0

    def __init__(self, total_steps: int, maximum: float = 0.5, warmup: int = 0) -> None:
        super().__init__()
        alpha_schedule(0, total_steps, maximum, warmup)
        self.total_steps = total_steps
        self.maximum = maximum
        self.warmup = warmup
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """Count one update."""
        self.updates += 1
        if self._calls is not None:
            self._calls = None

    def forward(self) -> Tensor:
        # A compiler would guard on the count, and compile anew for each.
        if not torch.compiler.is_compiling() and self.training and self._calls is not None:
            self._count_call(self._calls + 1)
        return alpha_schedule(self.updates, self.total_steps, self.maximum, self.warmup)

    def _count_call(self, calls: int) -> None:
        self._calls = calls if calls < _CALLS_WITHOUT_A_STEP else None
        if self._calls is None and not self.updates.is_meta and int(self.updates) < self.total_steps:
            warnings.warn(
                f"alpha was asked for {calls} times, but AlphaSchedule.step() was never called, so that alpha stays at "
                f"that of {int(self.updates)} updates; call it after each update of the optimizer",
                UserWarning,
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        warmup = f", warmup={self.warmup}" if self.warmup else ""
        return f"updates={self.updates.tolist()}, total_steps={self.total_steps}, maximum={self.maximum}{warmup}"
