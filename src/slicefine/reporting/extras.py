"""One clear sentence where what draws and writes pages is missing."""

from __future__ import annotations

from importlib.util import find_spec

from slicefine.errors import SliceFineError

PACKAGES = {"jinja2": "jinja2", "matplotlib": "matplotlib", "yaml": "pyyaml"}
"""Module -> package."""


def missing() -> str | None:
    """What to install, in a sentence; None if everything is there."""
    absent = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    return f"A report needs {', '.join(absent)}: pip install 'slicefine[report]'" if absent else None


def require_report() -> None:
    """Raise `SliceFineError` if a package of the extra `report` cannot be imported."""
    if sentence := missing():
        raise SliceFineError(sentence)
