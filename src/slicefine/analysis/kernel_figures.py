"""What analysis.json says of the lazy kernels of a model's slices: spectra, and alignments with the whole and with labels."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slicefine.analysis.kernel import (
    ELSEWHERE,
    POSITIONS,
    Cut,
    Grams,
    alignment,
    labels_figures,
    spectrum,
    trace_share,
    without,
)
from slicefine.slicing import ROW, SLICE_AXES


def main_cut(ranks: Sequence[int]) -> Cut:
    """The slices whose figures stand for all: rows, of the middle rank."""
    return Cut(axis=ROW, r=sorted(ranks)[len(ranks) // 2])


def all_cuts(ranks: Sequence[int]) -> list[Cut]:
    """All axes and positions of all ranks."""
    return [
        Cut(axis=axis, r=r, position=position) for r in sorted(ranks) for axis in SLICE_AXES for position in POSITIONS
    ]


class KernelFigures:
    """Figures of `grams`.

    Args:
        labels: The kernel of labels, if there is one.
        weights: Number of weights that the full kernel is of.
        seed: Of random orders of labels.
    """

    def __init__(self, grams: Grams, labels: Tensor | None, *, weights: int, seed: int) -> None:
        self.grams, self.labels, self.weights, self.seed = grams, labels, weights, seed
        self.dominant = _dominant(grams)

    def of(self, cut: Cut) -> dict[str, Any]:
        """Of the slices `cut`; what needs the full kernel is None without it."""
        grams = self.grams
        kernel = grams.slices[cut].sum(0)
        whole = None if grams.full is None else grams.full.sum(0)
        return {
            "axis": cut.axis,
            "r": cut.r,
            **spectrum(kernel),
            "parameters": grams.sizes[cut],
            "parameter_share": grams.sizes[cut] / self.weights,
            "trace_share_of_full": None if whole is None else _share(float(kernel.trace()), float(whole.trace())),
            "alignment_with_full": None if whole is None else alignment(kernel, whole),
            "alignment_without_dominant": self._without_dominant(cut),
            "alignment_per_weight": self._per_weight(cut),
            **labels_figures(kernel, self.labels, self.seed),
        }

    def by_rank(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """Of all slices; eigenvalues and other places are left out but for their figures."""

        def brief(cut: Cut) -> dict[str, Any]:
            return {key: value for key, value in self.of(cut).items() if key != "eigenvalues"}

        def entry(r: int, axis: str) -> dict[str, Any]:
            first, elsewhere = (brief(Cut(axis=axis, r=r, position=position)) for position in POSITIONS)
            return {**first, ELSEWHERE: elsewhere}

        return [entry(r, axis) for r in sorted(ranks) for axis in SLICE_AXES]

    def full(self) -> dict[str, Any] | None:
        """Of whole weights."""
        if self.grams.full is None:
            return None
        kernel = self.grams.full.sum(0)
        return {**spectrum(kernel), **labels_figures(kernel, self.labels, self.seed)}

    def dominant_weight(self, cut: Cut) -> dict[str, Any] | None:
        """The weight with the largest part of the kernel, and the slices `cut` of all others."""
        if self.dominant is None:
            return None
        shares = {
            "trace_share": self.grams.slices[cut],
            "trace_share_of_full": self.grams.full,
        }
        return {
            "name": self.grams.names[self.dominant],
            **{key: None if of is None else trace_share(of, self.dominant) for key, of in shares.items()},
            "without": spectrum(without(self.grams.slices[cut], self.dominant)),
        }

    def _without_dominant(self, cut: Cut) -> float | None:
        if self.grams.full is None or self.dominant is None:
            return None
        return alignment(without(self.grams.slices[cut], self.dominant), without(self.grams.full, self.dominant))

    def _per_weight(self, cut: Cut) -> dict[str, float] | None:
        if self.grams.full is None:
            return None
        pairs = zip(self.grams.slices[cut], self.grams.full, strict=True)
        found = [value for value in (alignment(piece, whole) for piece, whole in pairs) if value is not None]
        return {"median": statistics.median(found), "least": min(found), "greatest": max(found)} if found else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if 0 < whole < float("inf") else None


def _dominant(grams: Grams) -> int | None:
    """Number of the weight with the largest part of the full kernel, or of its slices; None for one weight, and for kernels of zeros."""
    kernels = next(iter(grams.slices.values())) if grams.full is None else grams.full
    shares = [trace_share(kernels, number) for number in range(len(kernels))]
    known = [share for share in shares if share is not None]
    return shares.index(max(known)) if len(known) > 1 else None
