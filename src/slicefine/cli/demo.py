"""`slicefine demo`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from slicefine.cli.quiet import quiet
from slicefine.training.extras import require_train

NAME = "demo"
HELP = "Fine-tune a real pretrained model on real text, offline, in a few minutes."


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--output", type=str, default="runs/demo", help="Folder to make; an interrupted demo in it is gone on with"
    )


def run(given: Any) -> int:
    """Run the demo and print its summary; returns 0."""
    import os
    from pathlib import Path

    # Threads that wait for one another in a loop stand still where other work has a core; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require_train()
    quiet()
    from slicefine.demo.run import run_demo

    print("", *run_demo(Path(given.get("output", "runs/demo"))), sep="\n")
    return 0
