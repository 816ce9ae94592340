"""One clear sentence where an optional package is missing."""

from __future__ import annotations

from importlib.util import find_spec

from slicefine.errors import SliceFineError

EXTRAS = {
    "train": {
        "accelerate": "accelerate",
        "datasets": "datasets",
        "sklearn": "scikit-learn",
        "tensorboard": "tensorboard",
        "transformers": "transformers",
        "trl": "trl",
        "yaml": "pyyaml",
    },
    "vision": {"PIL": "pillow"},
    "video": {"PIL": "pillow", "av": "av"},
}
"""Extra -> module -> package. `vision` and `video` come with all of `train`."""
OF_TASK = {"image-classification": "vision", "video-classification": "video"}


def require_train() -> None:
    """Raise `SliceFineError` if a package of the extra `train` cannot be imported."""
    _require("train", "Training")


def require_task(task: str) -> None:
    """Raise `SliceFineError` if a package cannot be imported that this task needs and others do not."""
    if task in OF_TASK:
        _require(OF_TASK[task], task.capitalize())


def _require(extra: str, what: str) -> None:
    missing = [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]
    if missing:
        raise SliceFineError(f"{what} needs {', '.join(missing)}: pip install 'slicefine[{extra}]'")
