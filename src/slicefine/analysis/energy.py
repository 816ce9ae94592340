"""Is what a task needs in few directions? Task energy, the second property that the hypothesis rests on.

Two spectra, of examples that are trained on: of the hidden states (`states.py`), and of the lazy kernel of the slices (`kernel.py`). The
paper names both and fixes neither. Steep spectra are no proof by themselves: a network with random weights may have them too, so the same is
measured for a twin whose weights are drawn anew, on the same examples and with the same head.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slicefine.analysis.kernel import gram_matrices, label_kernel, outputs_of, why_no_full
from slicefine.analysis.kernel_figures import KernelFigures, all_cuts, main_cut
from slicefine.analysis.states import OUTLIER_IN_WORDS, Say, collect, figures, layer_names
from slicefine.analysis.subject import places_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slicefine.analysis.settings import AnalysisSettings
    from slicefine.analysis.subject import Batch, Subject

SPLIT = "train"
BATCH = 16
STATE_EXAMPLES = {False: 512, True: 128}
"""By `quick`: whose states are looked at."""
KERNEL_EXAMPLES = {False: 64, True: 12}
"""By `quick`: whose gradients are."""
DEFINITIONS = {
    "k": "The least number of directions that hold this share of the variance, or of the sum of the kernel's eigenvalues.",
    "outliers": f"An outlier is {OUTLIER_IN_WORDS}; figures are given with and without these.",
    "participation_ratio": "sum(l)^2 / sum(l^2) of the variances l along the principal components: as many equal directions would have it.",
    "effective_rank": "The exponential of the entropy of the kernel's eigenvalues as shares of their sum, at most the number of examples less one.",
    "by_examples": "The effective rank for parts of the examples: where it grows with them, there are more directions than examples to see them.",
    "kernel": "Inner products of the gradients of the model's outputs, example by example, with respect to one slice of every weight together; "
    "centred for its spectrum (our choice).",
    "alignment": "Of two kernels, debiased: 1 if they are the same up to a factor, about 0 if they have nothing in common.",
    "alignment_per_weight": "Of the slice of each weight with the whole of it.",
    "dominant": "The weight with the largest part of the kernel: slices of rows of one near the output are aligned whatever the network has learned.",
    "p_of_labels": "The share of random orders of the labels whose alignment is as great.",
    "elsewhere": "The same slices at a place drawn with the seed, instead of the first.",
}
_ALL = 1000
_STATES, _TWIN_STATES, _KERNEL, _TWIN_KERNEL = (
    "hidden states",
    "states of the twin",
    "gradients",
    "gradients of the twin",
)
_PARTS = {_STATES: (0, 100), _TWIN_STATES: (100, 200), _KERNEL: (200, 620), _TWIN_KERNEL: (620, _ALL)}
"""What part of the progress is whose."""


def run(subject: Subject, settings: AnalysisSettings, say: Say) -> dict[str, Any]:
    """The stage: figures as analysis.json has them. `subject.model` stays as it is.

    Raises `SliceFineError` if there are no examples.
    """
    wanted = min(STATE_EXAMPLES[settings.quick], max(subject.count(SPLIT), 1))
    size = min(BATCH, wanted)
    batches = subject.batches(SPLIT, size=size, count=wanted // size, seed=settings.seed)
    twin = subject.untrained(settings.seed + 1)  # another one than `--untrained` analyses
    layers, skipped = _layers(subject.model, batches, _progress(say, _STATES))
    untrained, skipped_of_twin = _layers(twin, batches, _progress(say, _TWIN_STATES))
    kernel = _kernel(subject, twin, settings, say)
    return {
        "split": SPLIT,
        "examples": size * len(batches),
        "tokens": max((layer["samples"] for layer in layers), default=0),
        "definitions": DEFINITIONS,
        "layers": layers,
        "untrained": untrained,
        "skipped": skipped + [{**entry, "name": f"{entry['name']} (untrained)"} for entry in skipped_of_twin],
        "ntk": kernel,
        "summary": {**_summary(layers, untrained), **_kernel_summary(kernel)},
    }


def _progress(say: Say, what: str) -> Callable[[float], None]:
    start, end = _PARTS[what]
    return lambda share: say(round(start + (end - start) * share), _ALL, what)


def _layers(
    model: PreTrainedModel, batches: Sequence[Batch], tell: Callable[[float], None]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Figures of the layers, and those that have none."""
    seen = 0

    def one_more() -> None:
        nonlocal seen
        seen += 1
        tell(seen / len(batches))

    moments = collect(model, batches, one_more)
    if not moments:
        return [], [{"name": "all layers", "why": f"{type(model).__name__} does not return its hidden states"}]
    found = {name: figures(name, of) for name, of in zip(layer_names(len(moments)), moments, strict=True)}
    why = "its states do not vary from token to token, or are not finite"
    skipped = [{"name": name, "why": why} for name, layer in found.items() if layer is None]
    return [layer for layer in found.values() if layer is not None], skipped


def _kernel(subject: Subject, twin: PreTrainedModel, settings: AnalysisSettings, say: Say) -> dict[str, Any]:
    """Figures of the kernels of slices."""
    examples = subject.examples(SPLIT, count=KERNEL_EXAMPLES[settings.quick], seed=settings.seed)
    places, seed = subject.places, settings.seed
    why = why_no_full(places, len(examples))
    main = main_cut(settings.ranks)
    outputs = outputs_of(subject.model, examples[0], seed=seed)
    grams = gram_matrices(
        subject.model,
        places,
        examples,
        outputs,
        all_cuts(settings.ranks),
        full=not why,
        seed=seed,
        tell=_progress(say, _KERNEL),
    )
    of_twin = gram_matrices(
        twin,
        places_of(twin, subject.new_modules),
        examples,
        outputs,
        [main],
        full=not why,
        seed=seed,
        tell=_progress(say, _TWIN_KERNEL),
    )
    weights = sum(place.stored.numel() for place in places.values())
    labels = label_kernel(examples)
    kernel = KernelFigures(grams, labels, weights=weights, seed=seed)
    beside = KernelFigures(of_twin, labels, weights=weights, seed=seed).of(main)
    return {
        "examples": len(examples),
        "outputs": outputs.words,
        "method": grams.method,
        **kernel.of(main),
        "by_rank": kernel.by_rank(settings.ranks),
        "full": kernel.full(),
        "dominant": kernel.dominant_weight(main),
        "untrained": beside,
        "why_no_full": why,
    }


def _summary(layers: Sequence[dict[str, Any]], untrained: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the layers, without outliers: those alone must not make a spectrum steep."""

    def k90(layer: dict[str, Any], kind: str) -> int:
        return layer["variance"][kind]["k"]["0.9"]

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    return {
        "k90_median": median([k90(layer, "without") for layer in layers]),
        "k90_median_with_outliers": median([k90(layer, "with") for layer in layers]),
        "dimension": statistics.median_high(layer["dimension"] for layer in layers) if layers else None,
        "share": median([k90(layer, "without") / layer["dimension"] for layer in layers]),
        "share_with_outliers": median([k90(layer, "with") / layer["dimension"] for layer in layers]),
        "untrained_share": median([k90(layer, "without") / layer["dimension"] for layer in untrained]),
        "outliers": sum(len(layer["outliers"]) for layer in layers),
        "truncated": any(layer["truncated"] for layer in layers),
    }


def _kernel_summary(kernel: dict[str, Any]) -> dict[str, Any]:
    per_weight, whole = kernel["alignment_per_weight"] or {}, kernel["full"] or {}
    return {
        "ntk_examples": kernel["examples"],
        "ntk_k90": (kernel["k"] or {}).get("0.9"),
        "ntk_effective_rank": kernel["effective_rank"],
        "ntk_effective_rank_full": whole.get("effective_rank"),
        "ntk_effective_rank_untrained": kernel["untrained"]["effective_rank"],
        "ntk_alignment_with_full": kernel["alignment_with_full"],
        "ntk_alignment_without_dominant": kernel["alignment_without_dominant"],
        "ntk_alignment_per_weight": per_weight.get("median"),
        "ntk_alignment_per_weight_untrained": (kernel["untrained"]["alignment_per_weight"] or {}).get("median"),
    }
