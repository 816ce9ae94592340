"""The loss of fixed batches, computed again and again from the middle of a model on.

While one block's weights change, what the blocks below it give for a batch does not. It is recorded once, and then handed out in their
place: they are not run. Their outputs are the same bits, so the loss and its gradients are as well. That is checked on the first batch
rather than believed, since a model may be built otherwise than as a stack; where it does not hold, everything is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.analysis.losses import gradients
from slicefine.analysis.subject import Batch, Subject

_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")
TOLERANCE = 1e-4
"""Of losses and gradients, relative: kernels of a GPU may sum in another order each time."""


def block_of(name: str) -> int | None:
    """Index of the block that the target `name` is in; None if it is in none."""
    found = _BLOCK.fullmatch(name)
    return int(found[2]) if found else None


def kind_of(name: str) -> str:
    """What the target `name` is called in its block, the same in all blocks; its whole name if it is in none."""
    found = _BLOCK.fullmatch(name)
    return found[3] if found else name


def list_of(names: Iterable[str]) -> str | None:
    """Name of the list of blocks that the targets `names` are in; None if they are in none, or in several."""
    lists = {found[1] for name in names if (found := _BLOCK.fullmatch(name))}
    return lists.pop() if len(lists) == 1 else None


def stack_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The blocks, from the lowest, that the targets `names` are in; empty if they are in no list of blocks, or in several."""
    name = list_of(names)
    return [] if name is None else list(model.get_submodule(name).children())


class Resumed:
    """The loss of `model` on batches, with `skipped` taken as they are.

    Args:
        skipped: The blocks that are not run again, from the lowest. The weights of what is below the last of them must not change.
        trained: Weights that will be trained, at least one if anything is skipped: none may be below.
    """

    def __init__(
        self, subject: Subject, model: nn.Module, skipped: Sequence[nn.Module] = (), trained: Sequence[Tensor] = ()
    ) -> None:
        self._subject, self._model = subject, model
        self.skipped = list(skipped)
        """Empty if everything has to be computed."""
        self._trained = list(trained)
        self._kept: dict[int, tuple[Batch, Any]] = {}
        self._checked = not self.skipped

    def loss(self, batch: Batch) -> Tensor:
        """As `Subject.loss`."""
        if not self._checked:
            self._checked = True
            if not self._is_faithful(batch):
                self.skipped, self._kept = [], {}
        if not self.skipped:
            return self._subject.loss(self._model, batch)
        with self._stood_in(self._output(batch)):
            return self._subject.loss(self._model, batch)

    def _output(self, batch: Batch) -> Any:
        """Of the last block that is skipped."""
        if id(batch) not in self._kept:
            outputs: list[Any] = []
            handle = self.skipped[-1].register_forward_hook(lambda block, given, output: outputs.append(output))
            try:
                with torch.no_grad():
                    self._subject.loss(self._model, batch)
            finally:
                handle.remove()
            self._kept[id(batch)] = batch, outputs[-1]  # the batch too: else another one might get its identity
        return self._kept[id(batch)][1]

    @contextmanager
    def _stood_in(self, output: Any) -> Iterator[None]:
        # All of them give what the last one does: what those below it give reaches nothing.
        for block in self.skipped:
            vars(block)["forward"] = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for block in self.skipped:
                vars(block).pop("forward", None)

    def _is_faithful(self, batch: Batch) -> bool:
        """Whether loss and gradients are those of the whole model."""

        def whole(batch: Batch) -> Tensor:
            return self._subject.loss(self._model, batch)

        loss, expected = gradients(whole, self._trained, batch)
        try:
            with self._stood_in(self._output(batch)):
                resumed, found = gradients(whole, self._trained, batch)
        except Exception:  # a model whose blocks do more than hand on their output
            return False
        if not all(bool(part.isfinite().all()) for part in (*expected, *found)):
            return False
        pairs = zip(expected, found, strict=True)
        alike = all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(a.abs().max())) for a, b in pairs)
        return alike and math.isclose(loss, resumed, rel_tol=TOLERANCE)
