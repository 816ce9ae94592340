"""How many directions the hidden states of a task's examples lie along, layer by layer: PCA in one pass over the data.

The states x_TD (T tokens, D features) of a layer arrive batch by batch and are not kept. Of each layer there are the number n of
tokens, their mean m and the centred second moment S = sum (x - m)(x - m)', and two such triples become one exactly
(Chan, Golub & LeVeque, 1983):

    n = n1 + n2,    d = m2 - m1,    m = m1 + d n2 / n,    S = S1 + S2 + d d' n1 n2 / n

No large sums are subtracted from each other, so a mean far from zero costs no digits. Sums are in fp64, on devices without it (MPS) in
fp32. The eigenvalues of S / n are the variances along the principal components.

In pretrained transformers a few features vary far more than all others and would make any spectrum steep ("outlier dimensions":
Kovaleva et al., 2021; Rudman et al., 2023, who take those above 5 times the mean variance; "massive activations": Sun et al., 2024).
So every figure is given with them and without. Ours, and a choice: a feature is an outlier if its variance is more than 10 times the
median over the features of its layer; the median is not moved by the outliers themselves.

Pad tokens are left out. Images and clips: all patches, and the class token. Feature maps `(B, D, H, W)`: every place is a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicefine.analysis.explained import all_directions, curve, participation_ratio, shares

OUTLIER = 10
"""A feature is an outlier if its variance is more than this many times the median."""
OUTLIER_IN_WORDS = (
    f"a feature whose variance is more than {OUTLIER} times the median over the features of its layer (our definition)"
)
Say = Callable[[int, int, str], None]
"""Told of progress: done, total, what."""


class Moments:
    """Number, mean and centred second moments of vectors that arrive in batches.

    Args:
        dimension: D, the length of a vector.
        device: Where the sums are kept, `(D, D)` the largest of them.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=dtype, device=device)
        self.scatter = torch.zeros(dimension, dimension, dtype=dtype, device=device)

    def add(self, vectors: Tensor) -> None:
        """Take in N vectors, `(N, D)` of any dtype."""
        if len(vectors):
            vectors = vectors.to(self.mean)
            mean = vectors.mean(0)
            centred = vectors - mean
            self._combine(len(vectors), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in what `other` has seen."""
        if other.count:
            self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter
        self.scatter += torch.outer(difference, difference) * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """S / n, `(D, D)`, on the CPU in fp64; zeros where nothing was seen."""
        return self.scatter.cpu().double() / max(self.count, 1)


def collect(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], tell: Callable[[], None]) -> list[Moments]:
    """Moments of the states of each layer: of the embeddings first, then of the output of each block; empty if a model gives no states.

    The model without its head is run, as it is: put it into eval mode before.

    Args:
        tell: Called after every batch.
    """
    backbone: Any = cast(Any, model).base_model
    layers: list[Moments] = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            states = getattr(backbone(**inputs, output_hidden_states=True), "hidden_states", None) or ()
        for number, state in enumerate(states):
            vectors = tokens(state, batch.get("attention_mask"))
            if number == len(layers):
                layers.append(Moments(vectors.shape[1], vectors.device))
            layers[number].add(vectors)
        tell()
    return layers


def tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """The states of all tokens that are no padding, `(N, D)`.

    Args:
        states: `(B, T, D)`, or feature maps `(B, D, *places)`.
        mask: `(B, T)`, 0 at padding; a mask of another shape is not of these tokens, and all of them count.
    """
    if states.dim() > 3:
        states = states.movedim(1, -1)
    if mask is not None and mask.shape == states.shape[:-1]:
        return states[mask.bool()]
    return states.reshape(-1, states.shape[-1])


def outliers(variances: Tensor) -> list[int]:
    """The features whose variance is more than `OUTLIER` times the median, by rising index. None where the median is 0."""
    median = variances.median()
    return torch.nonzero(variances > OUTLIER * median).flatten().tolist() if median > 0 else []


ENOUGH = 10
"""Tokens for each dimension, below which the numbers of directions come out too small. Our choice: 90 % of the variance of MiniLM on TREC take 143 directions
at 4 tokens for each (`--quick`), and 157 at 18."""


def layer_names(count: int) -> list[str]:
    """Of `count` states: `layer n` is the output of block n."""
    return ["embeddings", *(f"layer {number}" for number in range(count - 1))][:count]


def figures(name: str, moments: Moments) -> dict[str, Any] | None:
    """What analysis.json says of a layer; None if its states do not vary, or are not finite."""
    covariance = moments.covariance
    every = shares(covariance)
    if every is None:
        return None
    found = outliers(covariance.diagonal())
    kept = [feature for feature in range(len(covariance)) if feature not in set(found)]
    rest = shares(covariance[kept][:, kept])
    assert rest is not None  # the median is above 0, or there are no outliers
    truncated = moments.count <= len(covariance)
    cut = (
        f"There are fewer tokens ({moments.count}) than it takes for {len(covariance)} dimensions: the spectrum is truncated. At most "
        f"{moments.count - 1} directions can be seen, and the true numbers of directions may be greater."
    )
    few = (
        f"There are {moments.count} tokens for {len(covariance)} dimensions. With fewer than {ENOUGH} for each, the numbers of directions come out "
        "too small: give more examples."
    )
    return {
        "name": name,
        "dimension": len(covariance),
        "samples": moments.count,
        "truncated": truncated,
        "note": cut if truncated else few if moments.count < ENOUGH * len(covariance) else "",
        "variance": {"with": _variance(every), "without": _variance(rest)},
        "outliers": found,
        "participation_ratio": participation_ratio(every),
    }


def _variance(parts: Tensor) -> dict[str, Any]:
    return {
        "dimension": len(parts),
        "k": all_directions(parts),
        "cumulative": curve(parts),
        "participation_ratio": participation_ratio(parts),
    }
