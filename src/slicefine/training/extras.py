"""One clear sentence where an optional package is missing."""

from __future__ import annotations

from importlib.util import find_spec

from slicefine.errors import SliceFineError

TRAIN = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "trl": "trl",
    "yaml": "pyyaml",
}


def require_train() -> None:
    """Raise `SliceFineError` if a package of the extra `train` cannot be imported."""
    missing = [package for module, package in TRAIN.items() if find_spec(module) is None]
    if missing:
        raise SliceFineError(f"Training needs {', '.join(missing)}: pip install 'slicefine[train]'")
