"""Counting the bytes that tensors hold: what autograd keeps for backward, and what is alive at all.

Bytes are those of storages, each counted once: a saved view keeps its whole storage alive, and two views of one storage
cost no more than one. All of it works on the meta device, where a tensor has a storage of the right size and no data.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Storages = dict[int, torch.UntypedStorage]


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The storages behind `tensors`, by identity; holding the result keeps them alive, so no identity comes twice."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


def size(found: Storages) -> int:
    """Bytes of `found`."""
    return sum(storage.nbytes() for storage in found.values())


def without(found: Storages, *others: Storages) -> Storages:
    """`found` less the storages of `others`."""
    return {key: storage for key, storage in found.items() if not any(key in other for other in others)}


def state_of(model: nn.Module) -> Storages:
    """Storages of the parameters and buffers of `model`."""
    return storages([*model.parameters(), *model.buffers()])


def alive() -> Storages:
    """Storages of every tensor that Python holds anywhere: on modules, in closures, globals, autograd contexts."""
    gc.collect()
    return storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))


@dataclass(frozen=True)
class Kept:
    """What is kept between forward and backward, in bytes, parameters and buffers left out."""

    saved: int
    """In tensors saved for backward, where autograd, checkpointing and offloading can see them."""
    stashed: int
    """In other tensors that forward made and that are still alive: on autograd contexts, modules, in closures; single
    numbers are left out."""

    @property
    def total(self) -> int:
        return self.saved + self.stashed


def kept_for_backward(model: nn.Module, loss_of: Callable[[], Tensor]) -> Kept:
    """Run `loss_of`, a forward pass through `model`, count what it keeps for backward, then run backward.

    Backward runs to prove that what was counted is enough. `loss_of` must keep nothing itself, and its input must be
    alive already: the input is counted only where it is saved.
    """
    before = alive()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    own = state_of(model)
    seen = without(storages(saved), own)
    stashed = without(alive(), before, seen, own, storages([loss]))
    # A Python number in the arithmetic is a tensor of 8 bytes to autograd, which keeps it without asking the hooks.
    stashed = {key: storage for key, storage in stashed.items() if storage.nbytes() > 8}
    kept = Kept(size(seen), size(stashed))
    loss.backward()
    return kept
