"""`slicefine export RUN --as merged|lora|slices OUT`."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import ArgumentParser

from slicefine.cli.quiet import quiet
from slicefine.training.extras import require_train

NAME = "export"
HELP = "Turn a run into a model folder that plain transformers loads, a LoRA adapter, or the adapter alone."


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = "slicefine export RUN [--as merged|lora|slices] OUT [--no_verify] [--drop_biases_and_heads] [--trust_remote_code]"
    parser.add_argument("run", type=str, metavar="RUN", help="Run folder or adapter folder")
    parser.add_argument("out", type=str, metavar="OUT", help="Folder to make")
    parser.add_argument(
        "--as",
        dest="kind",
        type=str,
        default="merged",
        help="What to make. merged: an ordinary model; lora: a PEFT LoRA adapter that is the slices exactly; slices: the adapter alone",
    )
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="Do not compare the logits with those of the trained model; for machines whose memory cannot hold the model",
    )
    parser.add_argument(
        "--drop_biases_and_heads",
        action="store_true",
        help="With lora, leave out trained biases and heads, which LoRA servers do not take",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run the code of a base model that brings its own"
    )


def run(given: Any) -> int:
    """Export; returns 0."""
    require_train()
    quiet()
    from slicefine.training.export import export

    out = export(
        given.run,
        given.get("kind", "merged"),
        given.out,
        verify=not given.get("no_verify"),
        drop_biases_and_heads=bool(given.get("drop_biases_and_heads")),
        trust_remote_code=bool(given.get("trust_remote_code")),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(out)
    return 0
