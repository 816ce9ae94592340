"""Fine-tune pretrained networks by training sliding slices of the weights that are already there.

    from peft import get_peft_model
    from slicefine import SliceFineConfig

    model = get_peft_model(model, SliceFineConfig(r=5, axis="alternate", slide_every=500))

Importing slicefine makes the method known to PEFT, whichever of the two is imported first. Everything else is loaded when it is
asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicefine.errors import SliceFineError, SliceFineWarning
    from slicefine.slicing import ParameterCounts, Slice
    from slicefine.training.callback import SliceFineCallback
    from slicefine.tuner import (
        SliceFineConfig,
        SliceFineModel,
        active_slices,
        couplings,
        parameter_counts,
        touched_slices,
    )

__version__ = "0.1.0"

_HOME = {
    "ParameterCounts": "slicefine.slicing",
    "Slice": "slicefine.slicing",
    "SliceFineCallback": "slicefine.training.callback",
    "SliceFineConfig": "slicefine.tuner",
    "SliceFineError": "slicefine.errors",
    "SliceFineModel": "slicefine.tuner",
    "SliceFineWarning": "slicefine.errors",
    "active_slices": "slicefine.tuner",
    "couplings": "slicefine.tuner",
    "parameter_counts": "slicefine.tuner",
    "touched_slices": "slicefine.tuner",
}

__all__ = [
    "ParameterCounts",
    "Slice",
    "SliceFineCallback",
    "SliceFineConfig",
    "SliceFineError",
    "SliceFineModel",
    "SliceFineWarning",
    "active_slices",
    "couplings",
    "parameter_counts",
    "touched_slices",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _AfterPeft(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the method as soon as PEFT has been imported.

    Importing PEFT takes seconds, which `slicefine --help` must not pay; and somebody who imports slicefine, then PEFT, and then
    loads an adapter must find the method there.
    """

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return None
        self._loader: Any = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)  # not before: an import that fails may be tried again
        importlib.import_module("slicefine.tuner")


if "peft" in sys.modules:
    importlib.import_module("slicefine.tuner")
else:
    sys.meta_path.insert(0, _AfterPeft())
