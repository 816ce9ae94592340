"""The lazy neural tangent kernel of a task: how alike its examples are to the gradient of a model, and of a slice of it.

While weights hardly move ("lazy"), a network f learns like kernel regression with K(x, x') = J(x) J(x')', J the gradients of its outputs at
the weights that it starts from (Jacot et al., 2018; of finite, trained networks: Fort et al., 2020). If few eigenvalues of K hold most of its
sum, few directions of the weights decide what is learned.

Our choices:

- Outputs are the logits of a classifier, not its loss: the kernel then knows nothing of labels, and its alignment with them means something.
  K is the sum over the logits, the trace of the kernel of a network with several outputs. For many classes a few orthogonal random
  directions of the logits stand for all of them, which gives the same on average. A language model has a row of logits for every token; its
  output is the mean log-probability of the tokens that it is trained on, up to the sign its loss.
- The kernel of slices is that of the gradients of all active slices together, one in every weight: J restricted to them, J M. Slices that
  cut a weight into disjoint parts have kernels that add up to the kernel of the weight.
- Spectra are of the centred kernel H K H, H = I - 11'/n, as PCA is centred: the mean gradient, which moves the outputs of all examples
  alike, tells no example from another, and would be the one large eigenvalue. Its share is given apart.
- Alignment is that of centred kernels, <A, B> / (|A| |B|) (Cortes et al., 2012; as linear CKA: Kornblith et al., 2019). It is 1 if the
  slices see the examples as the whole network does, up to a factor. It is above 0 also for unrelated kernels; alignment with labels is given
  next to its mean over labels in random order.
- A weight near the output can hold most of the kernel: its gradients are large. Its rows are the same input times a factor each, so its
  slices of rows are aligned with the whole of it whatever the network has learned. So kernels are kept weight by weight; figures are given
  for all weights together, without the dominant one, and each weight against itself.

With n examples a centred kernel has at most n - 1 directions. Its effective rank is given for parts of the examples too: if it grows with
them, there are more directions than examples to see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.analysis.explained import all_directions, effective_rank, shares
from slicefine.analysis.gradients import Example, ExampleGradients, Scalar
from slicefine.slicing import SLICE_AXES, Schedule, Shape, Slice
from slicefine.tuner.base_layers import Place
from slicefine.tuner.targets import weight_name

FIRST, ELSEWHERE = "first", "elsewhere"
POSITIONS = (FIRST, ELSEWHERE)
"""Where slices are: where the schedule begins, index 0; or at a place drawn with the seed."""
PROBES = 8
"""Outputs of a classifier, at most; with more classes, directions of the logits."""
EIGENVALUES = 64
"""That are written down, at most."""
SHUFFLES = 99
"""Random orders of the labels."""
FEWEST = 4
"""Examples of which a kernel has figures."""
MOST_WEIGHTS = 50_000_000
"""Weights of a model for which the full kernel is computed."""
MOST_NUMBERS = 2**31
"""Numbers in the gradients of all weights for all examples, for the full kernel."""
HELD_BYTES = 2**30
"""Of gradients that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Slices of all weights: the same axis, rank and kind of position."""

    axis: str
    r: int
    position: str = FIRST

    def of(self, shape: Shape, widest: int, seed: int) -> Slice:
        """The slice in a weight of `shape`; it begins where that of rank `widest` begins, so that narrower ones lie within wider ones."""
        order = "sweep" if self.position == FIRST else "random"
        schedule = Schedule(r=widest, axis=self.axis, slide_every=None, order=order, seed=seed)
        whole = schedule.slice_at(0, shape)
        return Slice(self.axis, whole.start, min(self.r, whole.width))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The scalar outputs whose gradients make the kernel."""

    scalars: list[Scalar]
    words: str
    labelled: bool
    """Whether the model is given the labels."""


@dataclass(frozen=True, kw_only=True)
class Grams:
    """Kernels of n examples, weight by weight, `(weights, n, n)`, fp64, on the CPU; their sum is the kernel of all weights together."""

    names: list[str]
    """Of the weights."""
    slices: dict[Cut, Tensor]
    sizes: dict[Cut, int]
    """Numbers in the slices."""
    full: Tensor | None
    """Of whole weights."""
    method: str
    """How gradients were computed, in words."""


def outputs_of(model: nn.Module, example: Example, *, seed: int) -> Outputs:
    """The outputs to differentiate, from what `model` returns for one example."""
    with torch.no_grad():
        logits = getattr(model(**example), "logits", None)
    if logits is None or logits.dim() != 2:
        return Outputs(
            scalars=[_loss], words="the mean log-probability of the tokens that are trained on", labelled=True
        )
    classes = logits.shape[1]
    probes = torch.eye(classes)
    words = f"the {classes} logits" if classes > 1 else "the output"
    if classes > PROBES:
        drawn = torch.randn(classes, PROBES, generator=torch.Generator().manual_seed(seed))
        probes = torch.linalg.qr(drawn).Q.T
        words = f"{PROBES} orthogonal random directions of the {classes} logits"
    return Outputs(scalars=[_along(probe.to(logits.device)) for probe in probes], words=words, labelled=False)


def _loss(output: Any) -> Tensor:
    return output.loss.float()


def _along(probe: Tensor) -> Scalar:
    return lambda output: output.logits[0].float() @ probe


def why_no_full(places: Mapping[str, Place], examples: int) -> str:
    """Why the full kernel is not computed; empty if it is."""
    weights = sum(place.stored.numel() for place in places.values())
    if weights > MOST_WEIGHTS:
        return f"The kernel of all weights is for models of at most {MOST_WEIGHTS / 1e6:.0f} M weights; these are {weights / 1e6:.0f} M."
    if weights * examples > MOST_NUMBERS:
        return f"{examples} gradients of {weights / 1e6:.0f} M weights are more than {MOST_NUMBERS / 1e9:.1f} thousand million numbers."
    return ""


def gram_matrices(
    model: nn.Module,
    places: Mapping[str, Place],
    examples: Sequence[Example],
    outputs: Outputs,
    cuts: Sequence[Cut],
    *,
    full: bool,
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> Grams:
    """The kernels of `cuts`, and of all weights if `full`. The gradients of so many weights at a time as fit into `HELD_BYTES`.

    Args:
        places: Of `model`.
        seed: Of the positions elsewhere.
        tell: Told the share that is done, 0 to 1.
    """
    if not outputs.labelled:
        examples = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    gradients = ExampleGradients(model, examples)
    count, widest = len(examples), max(cut.r for cut in cuts)
    held = {
        weight_name(name, place): _Held(place, count, cuts, widest=widest, full=full, seed=seed)
        for name, place in places.items()
    }
    wanted = [*cuts, None] if full else [*cuts]
    kernels = {cut: torch.zeros(len(held), count, count, dtype=torch.float64) for cut in wanted}
    rows = {name: number for number, name in enumerate(held)}
    steps, done = len(outputs.scalars) * count * len(held), 0

    def keep(name: str, numbers: Sequence[int], found: Tensor) -> None:
        nonlocal done
        held[name].keep(numbers, found)
        done += len(numbers)
        tell(done / steps)

    for part in _parts(held):
        for scalar in outputs.scalars:
            for weight in part.values():
                weight.empty()
            gradients.each({name: weight.place.stored for name, weight in part.items()}, scalar, keep)
            for cut, kernel in kernels.items():
                for name, weight in part.items():
                    kernel[rows[name]] += weight.gram(cut)
        for weight in part.values():
            weight.free()
    why = f" ({gradients.why_loop})" if gradients.why_loop else ""
    return Grams(
        names=list(places),
        slices={cut: kernel for cut, kernel in kernels.items() if cut is not None},
        sizes={cut: sum(weight.size(cut) for weight in held.values()) for cut in cuts},
        full=kernels.get(None),
        method=f"{gradients.method}{why}",
    )


class _Held:
    """What is kept of the gradients of one weight: the widest slice of each axis and position, and all of it if `full`."""

    def __init__(self, place: Place, count: int, cuts: Sequence[Cut], *, widest: int, full: bool, seed: int) -> None:
        self.place, self.count, self.widest, self.seed = place, count, widest, seed
        keys = dict.fromkeys((cut.axis, cut.position) for cut in cuts)
        self.strips = {key: Cut(axis=key[0], r=widest, position=key[1]).of(place.shape, widest, seed) for key in keys}
        self.shapes: dict[Any, tuple[int, ...]] = {
            key: tuple(_strip(place.matrix, strip).shape) for key, strip in self.strips.items()
        }
        if full:
            self.shapes[None] = place.shape
        self.values: dict[Any, Tensor] = {}

    @property
    def bytes(self) -> int:
        """When it is full."""
        return 4 * self.count * sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def empty(self) -> None:
        """Room for gradients; those of examples that do not use the weight stay zero."""
        device = self.place.stored.device
        for key, shape in self.shapes.items():
            if key in self.values:
                self.values[key].zero_()
            else:
                self.values[key] = torch.zeros(self.count, *shape, device=device)

    def free(self) -> None:
        self.values.clear()

    def keep(self, numbers: Sequence[int], gradients: Tensor) -> None:
        for number, gradient in zip(numbers, gradients, strict=True):
            matrix = self.place.oriented(gradient)
            for key, values in self.values.items():
                values[number] = matrix if key is None else _strip(matrix, self.strips[key])

    def gram(self, cut: Cut | None) -> Tensor:
        """`(n, n)`, of the gradients that are kept."""
        chosen = self.values[None] if cut is None else self.values[cut.axis, cut.position][:, : cut.r]
        flat = chosen.reshape(self.count, -1)
        return (flat @ flat.T).cpu().double()

    def size(self, cut: Cut) -> int:
        """Number of weights in the slice."""
        return cut.of(self.place.shape, self.widest, self.seed).size(self.place.shape)


def _strip(matrix: Tensor, piece: Slice) -> Tensor:
    """The rows or columns of a slice, first; a view."""
    dim = SLICE_AXES.index(piece.axis)
    return matrix.narrow(dim, piece.start, piece.width).movedim(dim, 0)


def _parts(held: Mapping[str, _Held]) -> Iterator[dict[str, _Held]]:
    """The weights in groups whose gradients fit into `HELD_BYTES`, one weight at least."""
    part: dict[str, _Held] = {}
    for name, weight in held.items():
        if part and sum(other.bytes for other in part.values()) + weight.bytes > HELD_BYTES:
            yield part
            part = {}
        part[name] = weight
    if part:
        yield part


def centred(kernel: Tensor) -> Tensor:
    """H K H: the mean of every row and column is 0."""
    rows = kernel - kernel.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def alignment(kernel: Tensor, other: Tensor) -> float | None:
    """Alignment of two kernels of the same examples, debiased: at most 1, about 0 for kernels that have nothing in common.

    None if one of them is constant or not finite, or there are fewer than four examples. With the centred kernels themselves (CKA) it would be
    near 1 for any two kernels of a few examples and thousands of weights, whose diagonals outweigh all else: so diagonals are left
    out, and what is left is centred without them (the unbiased estimator of HSIC: Song et al., 2007, eq. 5, in the form of Székely and
    Rizzo, 2014).
    """
    if len(kernel) < FEWEST:
        return None
    a, b = _without_diagonal(kernel.double()), _without_diagonal(other.double())
    size = a.norm() * b.norm()
    # What rounding leaves of a constant kernel is none.
    least = 1e-12 * kernel.double().norm() * other.double().norm()
    return float((a * b).sum() / size) if size > least and bool(size.isfinite()) else None


def _without_diagonal(kernel: Tensor) -> Tensor:
    """Zero on the diagonal, and in the sum of every row and column."""
    count = len(kernel)
    off = kernel - torch.diag(kernel.diagonal())
    sums = off.sum(0)
    found = off - (sums[:, None] + sums[None, :]) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    return found - torch.diag(found.diagonal())


def spectrum(kernel: Tensor) -> dict[str, Any]:
    """Figures of the centred kernel, and the share of the whole kernel that is in the mean of the gradients; None where there is nothing."""
    parts = _shares(kernel)
    count = len(kernel)
    return {
        "eigenvalues": [] if parts is None else parts[:EIGENVALUES].tolist(),
        "k": None if parts is None else all_directions(parts),
        "effective_rank": None if parts is None else effective_rank(parts),
        "mean_share": None if parts is None else float(kernel.mean() * count / kernel.trace()),
        "by_examples": [
            [part, effective_rank(found)]
            for part in (count // 4, count // 2, count)
            if part >= FEWEST and (found := _shares(kernel[:part, :part])) is not None
        ],
    }


def _shares(kernel: Tensor) -> Tensor | None:
    middle = centred(kernel.double())
    size = middle.norm()
    return shares(middle) if size > 1e-6 * kernel.double().norm() and bool(size.isfinite()) else None


def trace_share(kernels: Tensor, number: int) -> float | None:
    """Share of a weight in the kernel of all weights together; None if there is nothing."""
    traces = kernels.diagonal(dim1=1, dim2=2).sum(1)
    whole = float(traces.sum())
    return float(traces[number]) / whole if 0 < whole < float("inf") else None


def without(kernels: Tensor, number: int) -> Tensor:
    """The kernel of all weights but one, `(n, n)`."""
    return torch.cat([kernels[:number], kernels[number + 1 :]]).sum(0)


def label_kernel(examples: Sequence[Example]) -> Tensor | None:
    """`(n, n)`: 1 for two examples of one class, else 0; products of labels that are numbers. None without a label for each example."""
    labels = [example["labels"].detach().cpu() for example in examples if "labels" in example]
    numbers = bool(labels) and labels[0].is_floating_point()
    if len(labels) < len(examples) or any(len(label) != 1 or label.dim() > 1 + numbers for label in labels):
        return None
    rows = torch.cat(labels)
    if not numbers:
        return (rows[:, None] == rows[None, :]).double()
    values = rows.double().reshape(len(rows), -1)
    return values @ values.T


def labels_figures(kernel: Tensor, labels: Tensor | None, seed: int) -> dict[str, float | None]:
    """Alignment with the kernel of labels; its mean over labels in random order, and the share of orders that do as well (p)."""
    exact = None if labels is None else alignment(kernel, labels)
    chance: list[float] = []
    if labels is not None and exact is not None:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(labels), generator=generator) for _ in range(SHUFFLES)]
        chance = [alignment(kernel, labels[order][:, order]) or 0.0 for order in orders]
    return {
        "alignment_with_labels": exact,
        "alignment_with_shuffled_labels": sum(chance) / len(chance) if chance else None,
        "p_of_labels": (1 + sum(value >= exact for value in chance)) / (1 + len(chance)) if exact is not None else None,
    }
