"""Layers of a loaded model that its files have no values for, and heads for another number of classes."""

from __future__ import annotations

from typing import Any

from slicefine.errors import raise_all


def new_modules(loaded: dict[str, Any]) -> list[str]:
    """Modules without pretrained values, from what `from_pretrained(..., output_loading_info=True)` tells."""
    keys = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    return sorted({key.rpartition(".")[0] for key in keys})


def replaced_head(loaded: dict[str, Any], name: str, outputs: int) -> list[str]:
    """A note if the head in the files of the model `name` was replaced by one with `outputs`; empty if it was not.

    The model must be loaded with `ignore_mismatched_sizes=True`. Raises `SliceFineError` if anything else has another size.
    """
    mismatched = [(key, tuple(stored), tuple(made)) for key, stored, made in loaded["mismatched_keys"]]
    raise_all(
        [
            f"{key} has shape {stored} in the files, {made} in the model that its config.json describes."
            for key, stored, made in sorted(mismatched)
            if made[0] != outputs or stored[1:] != made[1:]
        ],
        f"`model.name` {name!r} is damaged",
    )
    sizes = sorted({stored[0] for _, stored, _ in mismatched})
    return [
        f"The head of {size} classes in the files of {name} was replaced by a new one of {outputs}." for size in sizes
    ]
