"""Are the parts of every weight alike? Spectral balance, the first property that the hypothesis rests on; needs no data.

Each weight is cut into groups of rows, of columns, and into the heads of attention where they are known: heads compute different things,
so that is the hard test. What the figures would be by chance is measured beside them, twice:

permuted    rows (or columns) in random order before they are cut: what is left are rows that differ, in no order
shuffled    all entries in random order: what is left are the values
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slicefine.analysis.heads import Heads
from slicefine.analysis.spectrum import Spectra, cut, vectors
from slicefine.analysis.weights import Weights
from slicefine.slicing import COLUMN, ROW, SLICE_AXES, Shape
from slicefine.training.threads import cpu_threads

HEAD = "head"
AXES = (ROW, COLUMN, HEAD)
POSTER = 0.001
"""What the poster gives as "inter-group dispersion", without a formula."""
POINTS = 32
"""Of a profile."""
LARGE = 2**22
"""Entries of a weight above which one draw of each null is enough, as they hardly differ."""
DEFINITION = (
    "rho (our definition: the paper gives no formula) is the variance over the groups of their mean squared entry, divided by the square of its mean; "
    "the energy spread is its square root; the decay distance is the mean over the groups of the total variation distance between the eigenvalues of "
    "W_g W_g^T, as shares of their sum, and the mean of these shares."
)
MIXED = "Its heads are those of query, key and value, which are compared with one another."
FIGURES = ("rho", "energy_spread", "decay_distance")

Say = Callable[[int, int, str], None]


class Settings(Protocol):
    """What this stage is told; `AnalysisSettings` has it."""

    @property
    def groups(self) -> int: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def quick(self) -> bool: ...


class Cut(NamedTuple):
    """A way to cut a weight."""

    axis: str
    """`"row"`, `"column"` or `"head"`"""
    along: str
    """What is cut: `"row"` or `"column"`."""
    groups: int
    note: str = ""


def run(source: Weights, settings: Settings, say: Say) -> dict[str, Any]:
    """The stage `balance`: figures of each weight in each of its cuts, with their nulls, and medians over the weights.

    One weight is in memory at a time. Weights that have no figures are in `skipped` with the reason.

    Args:
        source: The weights, of files or of a model.
        settings: Groups, draws and seed; `quick` means one draw.
        say: Called before each weight with the number done, the number of all, and its name.
    """
    weights: list[dict[str, Any]] = []
    skipped = [{"name": name, "why": why} for name, why in source.left_out.items()]
    # Seconds of CPU on 2 busy cores, with one thread and with two: the whole of MiniLM 3 and 32, a matrix of 1,792 rows 0.4 and 3.4.
    with cpu_threads(1):
        for done, (name, shape) in enumerate(source.shapes.items()):
            say(done, len(source.shapes), name)
            cuts, reasons = _cuts(shape, source.heads.get(name), settings.groups)
            if cuts:
                figures, problem = _of_weight(source.read(name), cuts, _generator(source, name, settings), settings)
                weights += [{"name": name, "shape": list(shape), **entry} for entry in figures]
                reasons += [problem] if problem else []
            skipped += [{"name": name, "why": why} for why in reasons]
    source.close()
    say(len(source.shapes), len(source.shapes), "")
    return {
        "groups": settings.groups,
        "definition": DEFINITION,
        "poster": POSTER,
        "weights": weights,
        "summary": {axis: _summary([entry for entry in weights if entry["axis"] == axis]) for axis in AXES},
        "skipped": skipped,
    }


def _cuts(shape: Shape, heads: Heads | None, groups: int) -> tuple[list[Cut], list[str]]:
    """How a weight is cut, and why not in other ways."""
    cuts, reasons = [], []
    for axis, size in zip(SLICE_AXES, shape, strict=True):
        if size >= groups:
            cuts.append(Cut(axis, axis, groups))
        else:
            reasons.append(f"{groups} groups of {axis}s need as many {axis}s; it has {size}")
    if heads is not None and heads.count > 1:
        cuts.append(Cut(HEAD, heads.axis, heads.count, MIXED if heads.fused else ""))
    elif heads is not None:
        reasons.append("it has one head, which there is nothing to compare with")
    return cuts, reasons


def _of_weight(
    weight: Tensor, cuts: Sequence[Cut], generator: torch.Generator, settings: Settings
) -> tuple[list[dict[str, Any]], str | None]:
    """The figures of each cut; or none, and why."""
    if not weight.isfinite().all():
        return [], f"{int((~weight.isfinite()).sum()):,} of its entries are NaN or Inf"
    if not weight.any():
        return [], "all of its entries are zero"
    zeros = {axis: int((~vectors(weight, axis).any(1)).sum()) for axis in SLICE_AXES}
    draws = 1 if settings.quick or weight.numel() > LARGE else settings.draws
    found = [Spectra.of(cut(weight, way.along, way.groups)) for way in cuts]
    permuted = [[Spectra.of(_permuted(weight, way, generator)) for _ in range(draws)] for way in cuts]
    shuffled: list[list[Spectra]] = [[] for _ in cuts]
    for _ in range(draws):
        weight = _shuffled(weight, generator)
        for way, spectra in zip(cuts, shuffled, strict=True):
            spectra.append(Spectra.of(cut(weight, way.along, way.groups)))
    entries = []
    for way, spectra, by_rows, by_entries in zip(cuts, found, permuted, shuffled, strict=True):
        notes = [way.note] if way.note else []
        notes += [f"{zeros[way.along]:,} of its {way.along}s are zero."] if zeros[way.along] else []
        dead = way.groups - len(spectra.decay)
        notes += [f"{dead} of its groups are zero, and have no decay."] if dead else []
        notes += ["Large: one draw of each null."] if weight.numel() > LARGE and settings.draws > 1 else []
        entries.append(
            {
                "axis": way.axis,
                "groups": way.groups,
                **_means([spectra]),
                "null_permuted": _means(by_rows),
                "null_shuffled": _means(by_entries),
                "stable_rank": _range(spectra.stable_rank),
                "effective_rank": _range(spectra.effective_rank),
                "profiles": _profiles(spectra, by_entries),
                "note": " ".join(notes),
            }
        )
    return entries, None


def _permuted(weight: Tensor, way: Cut, generator: torch.Generator) -> Iterator[Tensor]:
    """The groups of `weight` with its rows, or columns, in random order; copied one at a time."""
    every = vectors(weight, way.along)
    order = torch.randperm(len(every), generator=generator, device=weight.device)
    return (every.index_select(0, chosen) for chosen in torch.tensor_split(order, way.groups))


def _shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The entries of `weight` in random order."""
    order = torch.randperm(weight.numel(), generator=generator, device=weight.device, dtype=torch.int32)
    return weight.reshape(-1).index_select(0, order).view(weight.shape)


def _generator(source: Weights, name: str, settings: Settings) -> torch.Generator:
    """Of a weight's own: what is drawn for it does not depend on the others."""
    digest = hashlib.sha256(f"{settings.seed} {name}".encode()).digest()
    return torch.Generator(source.device).manual_seed(int.from_bytes(digest[:4]))


def _means(every: Sequence[Spectra]) -> dict[str, float]:
    return {name: _figure(statistics.fmean(getattr(spectra, name) for spectra in every)) for name in FIGURES}


def _range(values: Tensor) -> dict[str, float]:
    return {
        "mean": _figure(float(values.mean())),
        "least": _figure(float(values.min())),
        "greatest": _figure(float(values.max())),
    }


def _profiles(spectra: Spectra, shuffled: Sequence[Spectra]) -> dict[str, list[float]]:
    """Share of the energy in the largest eigenvalues, over the share of the eigenvalues: mean, least and greatest of the groups."""
    curves, by_chance = spectra.cumulative, torch.cat([other.cumulative for other in shuffled])
    last = curves.shape[1] - 1
    points = sorted({round(last * number / (POINTS - 1)) for number in range(POINTS)})
    lines = {"mean": curves.mean(0), "low": curves.amin(0), "high": curves.amax(0), "shuffled": by_chance.mean(0)}
    return {"x": [_figure(point / last) for point in points]} | {
        name: [_figure(value) for value in line[points].tolist()] for name, line in lines.items()
    }


def _summary(entries: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Medians over weights; None if there are none."""
    if not entries:
        return None
    rhos = [entry["rho"] for entry in entries]
    return {
        "rho_median": statistics.median(rhos),
        "rho_greatest": max(rhos),
        "rho_shuffled_median": statistics.median(entry["null_shuffled"]["rho"] for entry in entries),
        "rho_permuted_median": statistics.median(entry["null_permuted"]["rho"] for entry in entries),
        "energy_spread_median": statistics.median(entry["energy_spread"] for entry in entries),
        "decay_distance_median": statistics.median(entry["decay_distance"] for entry in entries),
    }


def _figure(value: float) -> float:
    """Six digits, which is more than the figures are good for."""
    return float(f"{value:.6g}")
