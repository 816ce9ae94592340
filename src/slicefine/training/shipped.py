"""The recipes that ship: `recipes/` in a clone, `slicefine/recipes/` where the package is installed."""

from __future__ import annotations

from pathlib import Path

import slicefine
from slicefine.errors import SliceFineError, did_you_mean


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that ships, in alphabetical order."""
    package = Path(slicefine.__file__).parent
    folder = next((place for place in (package / "recipes", package.parents[1] / "recipes") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """The recipe called `name`, or the file of that path. Raises `SliceFineError` if `name` can be neither."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file() or len(path.parts) > 1:
        return path
    known = shipped()
    if name not in known:
        raise SliceFineError(
            f"There is no recipe {name!r}.{did_you_mean(name, known)} A recipe is a YAML file, or one of those that ship: "
            f"{', '.join(known)}."
        )
    return known[name]


def headline(recipe: Path) -> str:
    """What a recipe is for: its first line, a comment."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".")
