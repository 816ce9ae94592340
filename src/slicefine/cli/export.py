"""`slicefine export RUN --as merged OUT`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from slicefine.cli.quiet import quiet
from slicefine.training.extras import require_train

NAME = "export"
HELP = "Turn a run into an ordinary model folder that plain transformers loads."


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("run", type=str, metavar="RUN", help="Run folder or adapter folder")
    parser.add_argument("out", type=str, metavar="OUT", help="Folder to make")
    parser.add_argument("--as", dest="kind", type=str, default="merged", help="What to make: merged")


def run(given: Any) -> int:
    """Export; returns 0."""
    require_train()
    quiet()
    from slicefine.training.export import export

    print(export(given.run, given.get("kind", "merged"), given.out))
    return 0
