"""`slicefine recipes`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from slicefine.training import shipped

NAME = "recipes"
HELP = "List the recipes that ship; `slicefine train NAME` runs one."


def add(parser: ArgumentParser) -> None:
    """It has no arguments."""


def run(given: Any) -> int:
    """Print names, what they are for, and where they are; returns 0."""
    found = shipped.shipped()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {shipped.headline(path)}")
    folders = {str(path.parent) for path in found.values()}
    print(f"\nRun one with `slicefine train NAME`, or copy and change it: {', '.join(folders)}")
    return 0
