"""The memory of a training step, counted on the graph that really runs, with tensors that have a shape and no values.

The model is made on the meta device and every operation is run by torch's fake tensors: what is saved for backward, what
else is alive at the highest moment, and which gradients are made come from the code of the model, of the method and of
autograd. No formula knows an architecture. The same count on real tensors gives the same bytes (see docs/planning.md).

A storage is counted once, however many tensors look at it: a saved view keeps its whole storage alive.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from slicefine.benchmarking.fake_tensors import aten, grouped_product

BLOCK = 512
"""CUDA's allocator rounds a tensor up to so many bytes."""
FORWARD, HEAD, LAYERS = PARTS = ("forward", "backward until a parameter gets its gradient", "the rest of backward")
"""Of a step. What is alive in each grows with the number of layers in its own way."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that forward and backward of one batch take, beside the parameters and buffers of the model."""

    saved: int
    """Saved for backward at the end of the forward pass, parameters and buffers left out."""
    saved_logits: int
    """The part of `saved` that is as wide as the vocabulary."""
    logits: int
    """The most that is as wide as the vocabulary at once, in blocks of the allocator."""
    gradients: int
    """Gradients of parameters at the end of the backward pass; one that is a view keeps its whole storage."""
    reached: int
    """Parameters that get a gradient."""
    blocks: dict[str, int]
    """`activations`: `saved`, and `gradients`, in blocks of the allocator."""
    highest: dict[str, dict[str, int]]
    """Part of the step (`PARTS`) -> the most that is alive at once, in blocks of the allocator, by what it is: `activations` (saved for
    backward), `logits`, `gradients`, and `temporary`, all else."""

    @property
    def at_peak(self) -> dict[str, int]:
        """What is alive at the highest moment, by what it is."""
        return max(self.highest.values(), key=lambda alive: sum(alive.values()))

    @property
    def peak(self) -> int:
        """The most that is alive at once, in blocks of the allocator."""
        return sum(self.at_peak.values())


# ---------------------------------------------------------------- counting


class _Live(TorchDispatchMode):
    """Knows every storage that operations have made and that is still alive; works with fake and with real tensors."""

    def __init__(self, own: Iterable[Tensor], widths: frozenset[int], padded: bool) -> None:
        super().__init__()
        self._own = {_key(tensor) for tensor in own}
        self._widths, self._padded = widths, padded
        self._kinds: dict[int, str] = {}
        self._bytes: dict[int, int] = {}
        self._saved: set[int] = set()
        self._watched: dict[int, Any] = {}
        self._now: Counter[str] = Counter()
        self.logits = 0
        self.highest: dict[str, dict[str, int]] = {part: {} for part in PARTS}
        self.part = FORWARD
        self.reached: set[int] = set()
        """Parameters that have got a gradient."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # what torch wraps around every call otherwise, for compiled code
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._answer(func, args[0])
        if func is aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            func = grouped_product
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _answer(self, func: Any, asked: Tensor) -> Any:
        """A model that asks for a truth value wants to know whether all tokens count, to do without a mask."""
        if asked.dtype is torch.bool:
            return not self._padded
        return func(asked)

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._own or key in self._bytes:
            return
        storage = tensor.untyped_storage()
        self._bytes[key] = storage.nbytes()
        wide = tensor.dim() > 1 and tensor.shape[-1] in self._widths
        self._kinds[key] = "logits" if wide else "temporary"
        self._watched[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))
        self._now[self._kinds[key]] += _blocks(self._bytes[key])
        self.logits = max(self.logits, self._now["logits"])
        highest = self.highest[self.part]
        if sum(self._now.values()) > sum(highest.values()):
            highest.update(self._now)

    def _gone(self, key: int) -> None:
        self._now[self._kinds.pop(key)] -= _blocks(self._bytes.pop(key))
        self._saved.discard(key)
        del self._watched[key]

    def _becomes(self, key: int, kind: str) -> None:
        if self._kinds[key] == "temporary":
            self._now["temporary"] -= _blocks(self._bytes[key])
            self._now[kind] += _blocks(self._bytes[key])
            self._kinds[key] = kind

    def save(self, tensor: Tensor) -> Tensor:
        """As the hook of autograd that is called with what is saved."""
        key = _key(tensor)
        if key not in self._own:
            self._see(tensor)
            self._saved.add(key)
            self._becomes(key, "activations")
        return tensor

    def accumulated(self, parameter: Tensor) -> None:
        """As the hook that is called when a parameter has got its gradient."""
        if parameter.grad is not None:
            self._has(parameter.grad)
            self.reached.add(id(parameter))
            self.part = LAYERS

    def _has(self, gradient: Tensor) -> None:
        self._see(gradient)
        self._becomes(_key(gradient), "gradients")

    def begin_with_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give all parameters a gradient, as batches before have."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            self._has(parameter.grad)

    def end_without(self, parameters: Iterable[Tensor]) -> None:
        """Take back gradients of `parameters` that no batch gives them: they were there at every moment."""
        for parameter in parameters:
            assert parameter.grad is not None
            for highest in filter(None, self.highest.values()):
                highest["gradients"] -= _blocks(parameter.grad.untyped_storage().nbytes())
            parameter.grad = None

    def saved(self) -> tuple[int, int, int]:
        """Bytes that are saved now, those of them that are logits, and all of them in blocks."""
        sizes = [self._bytes[key] for key in self._saved]
        logits = sum(self._bytes[key] for key in self._saved if self._kinds[key] == "logits")
        return sum(sizes), logits, sum(map(_blocks, sizes))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def count(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    *,
    widths: frozenset[int] = frozenset(),
    padded: bool = False,
    accumulating: bool = False,
) -> StepMemory:
    """Run forward and backward, and count.

    Args:
        model: Its parameters and buffers are not counted; gradients that it has are dropped. Fake (see `fake_tensors.fake`) or real.
        loss_of: The forward pass; must keep nothing itself.
        widths: Numbers in the last dimension of what is to be called logits.
        padded: What a fake model is told if it asks whether some tokens are padding.
        accumulating: Gradients of a batch before are there, to which those of this one are added.
    """
    model.zero_grad(set_to_none=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    live = _Live([*model.parameters(), *model.buffers()], widths, padded)
    with _without_collector(), ExitStack() as stack:
        for parameter in trained:
            stack.callback(parameter.register_post_accumulate_grad_hook(live.accumulated).remove)
        if accumulating:
            live.begin_with_gradients(trained)
        stack.enter_context(live)
        with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor):
            loss = loss_of()
            saved, saved_logits, in_blocks = live.saved()
            live.part = HEAD
            loss.backward()
    del loss
    if accumulating:
        live.end_without(parameter for parameter in trained if id(parameter) not in live.reached)
    reached = [p for p in trained if p.grad is not None]
    gradients = [p.grad.untyped_storage().nbytes() for p in reached if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return StepMemory(
        saved=saved,
        saved_logits=saved_logits,
        logits=live.logits,
        gradients=sum(gradients),
        reached=sum(p.nbytes for p in reached),
        blocks={"activations": in_blocks, "gradients": sum(map(_blocks, gradients))},
        highest=live.highest,
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without the search for cycles of objects, which finds none here and takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
