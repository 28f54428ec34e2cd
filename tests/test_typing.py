"""The signatures that a user sees, beside what mypy says of `typed_use.py` in `make lint`."""

import inspect

from row_losses import shared_options

import fusedloss as fl
from fusedloss.losses import _registry

MODULES = {name: x for name, x in vars(fl.nn).items() if hasattr(x, "_function")}


def test_options_are_those_that_are_taken() -> None:
    for loss in _registry.LOSSES.values():
        for function in filter(None, (loss.row, loss.linear)):
            assert shared_options(function) == _registry.options_of(function).keys(), function
    for name, module in MODULES.items():
        layer = {"bias", "device", "dtype"} if name.startswith("Linear") else set()
        assert shared_options(module) == module._defaults.keys() | layer, name


def test_help_shows_annotations_as_they_are_written() -> None:
    public = [*(getattr(fl, name) for name in fl.__all__), *MODULES.values(), *(x.forward for x in MODULES.values())]
    shown = {x.__qualname__: str(inspect.signature(x)) for x in public if callable(x)}
    assert not [name for name, signature in shown.items() if "ForwardRef" in signature]
    assert not [x for x in public if hasattr(x, "__wrapped__") or hasattr(x, "__signature__")]
