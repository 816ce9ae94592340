"""What a training step needs, from its graph alone: no value of a weight or an activation is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from slicefine.benchmarking.fake_tensors import fake
from slicefine.benchmarking.methods import Method
from slicefine.benchmarking.saved_bytes import StepMemory, count
from slicefine.benchmarking.setups import NEVER, Setup

MOMENTS = 2
"""Numbers that AdamW keeps for each that is trained, in the same dtype."""
ADAM_STEP = 4
"""Bytes of AdamW's own step count, one for every tensor."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes, where nothing else is said."""

    active: int
    """Parameters trained at a step, heads left out."""
    step: StepMemory
    moments: int
    weights: int
    """Parameters and buffers, masters and adapters among them."""

    @property
    def total(self) -> int:
        """At the highest moment of a step."""
        return self.weights + self.moments + self.step.peak


def needed(setup: Setup, method: Method) -> Need:
    """What a training step by `method` needs on a CPU. Raises `SliceFineError` with the reason if the method cannot be attached."""
    attached = dataclasses.replace(setup.eager(), device="meta").attach(method, slide_every=NEVER)
    model = attached.model
    weights = size([*model.parameters(), *model.buffers()])
    with fake(model, gpu=False), dense_deltas():
        batch = setup.batch(0)
        step = count(model, lambda: model(**batch).loss)
    moments = MOMENTS * step.reached + ADAM_STEP * len(attached.trainable)
    return Need(active=attached.counts.active, step=step, moments=moments, weights=weights)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes, every storage once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


class _Spread(torch.autograd.Function):
    """Numbers `values` `(n,)` at the places `indices` `(2, n)` of a matrix of zeros."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        places = indices.long()
        ctx.save_for_backward(places, values)
        return values.new_zeros(tuple(shape)).index_put((places[0], places[1]), values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        places, _ = ctx.saved_tensors
        return None, grads[0][places[0], places[1]], None


@contextmanager
def dense_deltas() -> Iterator[None]:
    """Within this context the sparse matrices that SHiRA adds to weights are dense, and save for backward what the sparse ones do.

    A sparse tensor has no storage that could be counted, and there is no backward pass for one without values.
    """
    with patch.object(torch, "sparse_coo_tensor", _Spread.apply):
        yield
