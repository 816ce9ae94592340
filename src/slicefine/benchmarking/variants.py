"""A method with the settings that an ablation changes. Read without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from slicefine.benchmarking.methods import AXES, SLICEFINE, Method
from slicefine.errors import did_you_mean

EIGHTH = "eighth"
"""A move after each eighth of the run, in whole steps: 7 or 8 moves, within the paper's 5 to 10."""
RESET, CARRIED = "reset", "carried"
FROZEN, TRAINED = "frozen", "trained"
CHOICES = {
    "order": ("sweep", "random"),
    "moments": (RESET, CARRIED),
    "bias": ("none", "slicefine_only"),
    "norms": (FROZEN, TRAINED),
    "axis": tuple(AXES.values()),
}
"""Setting -> its values, of those that are words."""
OF_MOVES = ("moments", "rewarm")
"""Settings of what happens at a move."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method; all other settings are of SliceFine alone."""

    method: Method
    slide_every: int | str | None = EIGHTH
    """Optimizer steps per position in a final run; `eighth` of the run; None = it never moves."""
    order: str = "sweep"
    bias: str = "none"
    norms: str = FROZEN
    """Whether the gains of normalisations, and their biases, are trained in full beside the slices."""
    moments: str = RESET
    """Whether the optimizer's moments are dropped when a slice moves, or carried over to the next position."""
    rewarm: int = 0
    """Steps of a final run after a move, in which the update of a slice grows linearly to its full size."""

    @property
    def name(self) -> str:
        """The method, and what is not as usual."""
        changed = [
            f"{field.name} {'null' if value is None else value}"
            for field in dataclasses.fields(self)
            if field.name != "method" and (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join([self.method.name, *changed])

    def every(self, steps: int, final_steps: int) -> int | None:
        """Steps per position in a run of `steps`: the same share of it as in one of `final_steps`, in whole steps."""
        if self.slide_every is None:
            return None
        whole = final_steps / 8 if self.slide_every == EIGHTH else float(self.slide_every)
        return max(1, round(whole * steps / final_steps))

    def rewarmed(self, steps: int, final_steps: int) -> int:
        """Steps after a move in which updates grow, in a run of `steps`: as `every`."""
        return math.ceil(self.rewarm * steps / final_steps)

    @property
    def slice_settings(self) -> dict[str, Any]:
        """Settings of `SliceFineConfig` beside rank, axis and interval."""
        return {"order": self.order, "bias": self.bias}


def variants(methods: Sequence[Method], values: dict[str, Sequence[Any]]) -> list[Variant]:
    """Every combination of `values` for the methods that slide, and all other methods as they are; each once.

    What happens at a move makes no difference to slices that never move.

    `values`: names of settings, `r` and `axis` among them, to those that are to be tried.
    """
    found = []
    for one in methods:
        if one.kind != SLICEFINE:
            found.append(Variant(method=one))
            continue
        for chosen in product(*values.values()):
            settings = dict(zip(values, chosen, strict=True))
            of_method = {name: settings.pop(name) for name in ("r", "axis") if name in settings}
            if settings.get("slide_every", EIGHTH) is None:
                settings = {name: value for name, value in settings.items() if name not in OF_MOVES}
            found.append(Variant(method=dataclasses.replace(one, **of_method), **settings))
    return list(dict.fromkeys(found))


def unused(values: dict[str, Sequence[Any]], methods: Sequence[Method]) -> list[str]:
    """What is wrong with an ablation that changes none of `methods`."""
    if not values or not methods or any(one.kind == SLICEFINE for one in methods):
        return []
    flags, named = ", ".join(f"`--{name}`" for name in values), ", ".join(one.name for one in methods)
    return [f"{flags} change {SLICEFINE} alone; `--methods` are {named}. Add {SLICEFINE}-5RC, say, or leave them out."]


def problems(values: dict[str, Sequence[Any]]) -> list[str]:
    """What is wrong with the values of an ablation."""
    found = []
    for name, choices in CHOICES.items():
        found += [
            f"`--{name}` is one of {', '.join(choices)}; got {value!r}.{did_you_mean(str(value), choices)}"
            for value in values.get(name, ())
            if value not in choices
        ]
    found += [f"`--r` is at least 1; got {value}." for value in values.get("r", ()) if value < 1]
    found += [f"`--rewarm` is at least 0 steps; got {value}." for value in values.get("rewarm", ()) if value < 0]
    for value in values.get("slide_every", ()):
        if value is not None and value != EIGHTH and not (isinstance(value, int) and value >= 1):
            found.append(
                f"`--slide_every` is a number of steps, `{EIGHTH}` of the run, or null for no move; got {value!r}."
            )
    return found


def unmoved(values: dict[str, Sequence[Any]], steps: int) -> list[str]:
    """What is wrong with intervals that are no shorter than a run of `steps`."""
    return [
        f"`--slide_every` {value} moves nothing in a run of {steps} steps. Give fewer, or null for no move."
        for value in values.get("slide_every", ())
        if isinstance(value, int) and value >= steps
    ]
