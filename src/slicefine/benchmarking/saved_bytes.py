"""The memory of a training step, counted on the graph that really runs, with tensors that have a shape and no values.

The model is made on the meta device and every operation is run by torch's fake tensors: what is saved for backward, what
else is alive at the highest moment, and which gradients are made come from the code of the model, of the method and of
autograd. No formula knows an architecture. The same count on real tensors gives the same bytes (see docs/planning.md).

A storage is counted once, however many tensors look at it: a saved view keeps its whole storage alive.

Fake tensors are said to be on the CPU, for which torch has all it needs on every machine. What differs on a GPU is put in its
place by `_as_on_gpu`: the kernels of attention and dropout, and what autocast computes in fp32.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from slicefine.tuner.layer import SliceLayer

aten = torch.ops.aten
FLASH_HEAD = 256
"""Widest head that flash attention takes."""
BLOCK = 512
"""CUDA's allocator rounds a tensor up to so many bytes."""
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", as far as models use them.
FP32_ON_GPU = (
    "__pow__", "__rpow__", "__rtruediv__", "binary_cross_entropy_with_logits", "cross_entropy", "cumprod", "cumsum", "exp",
    "expm1", "group_norm", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "mse_loss", "nll_loss",
    "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss", "softmax", "softplus", "sum",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that forward and backward of one batch take, beside the parameters and buffers of the model."""

    saved: int
    """Saved for backward at the end of the forward pass, parameters and buffers left out."""
    saved_logits: int
    """The part of `saved` that is as wide as the vocabulary."""
    gradients: int
    """Gradients of parameters at the end of the backward pass."""
    peak: int
    """The most that is alive at once, in blocks of the allocator."""
    at_peak: dict[str, int]
    """`peak` by what it is: `activations` (saved for backward), `logits`, `gradients`, and `temporary`, all else."""


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
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # what torch wraps around every call otherwise, for compiled code
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._answer(func, args[0])
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
        if (total := sum(self._now.values())) > self.peak:
            self.peak, self.at_peak = total, dict(self._now)

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
            self._see(parameter.grad)
            self._becomes(_key(parameter.grad), "gradients")

    def saved(self) -> tuple[int, int]:
        """Bytes that are saved now, and those of them that are logits."""
        logits = sum(self._bytes[key] for key in self._saved if self._kinds[key] == "logits")
        return sum(self._bytes[key] for key in self._saved), logits


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
        model: Its parameters and buffers are not counted; gradients that it has are dropped. Fake (see `fake`) or real.
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
                parameter.grad = torch.zeros_like(parameter)
                live.accumulated(parameter)
        stack.enter_context(live)
        with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor):
            loss = loss_of()
            saved, saved_logits = live.saved()
            loss.backward()
    del loss
    gradients = sum(p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return StepMemory(saved=saved, saved_logits=saved_logits, gradients=gradients, peak=live.peak, at_peak=live.at_peak)


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


# ---------------------------------------------------------------- tensors without values


@contextmanager
def fake(model: nn.Module, *, gpu: bool) -> Iterator[None]:
    """Within this context the model, which is on the meta device, computes with fake tensors, and so does all else.

    Args:
        model: Its parameters are put back at the end.
        gpu: As on an NVIDIA GPU with tensor cores (Ampere or later), else as on a CPU.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants that a module computed with numpy
    made: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                present = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
                stack.callback(held.update, present)
                for name, tensor in present.items():
                    if id(tensor) not in made:
                        made[id(tensor)] = _faked(mode, tensor)
                    held[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType] -- of a parameter a parameter is made
        for module in model.modules():
            if isinstance(module, SliceLayer) and module.installed is not None:
                module.has_followed(module.installed)  # there are no values that could differ
        # transformers makes all masks for fake tensors, as it does for a compiler; here it is to do as in training.
        stack.enter_context(patch.object(import_utils, "is_fake_tensor", lambda _: False))
        # What torch logs of an operation that fails is in the error.
        stack.enter_context(patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True))
        stack.enter_context(mode)
        if gpu:
            stack.enter_context(_as_on_gpu())
        yield


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    made = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Attention, dropout and autocast as on a GPU; for fake tensors, which have no values that could be wrong."""
    with ExitStack() as stack:
        for owner in (torch, F, Tensor):
            for name in FP32_ON_GPU:
                if callable(usual := getattr(owner, name, None)):
                    stack.enter_context(patch.object(owner, name, _in_fp32(usual)))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(patch.object(F, "dropout", _dropout))
        yield


def _in_fp32(usual: Callable[..., Any]) -> Callable[..., Any]:
    """`usual` as autocast on a GPU runs it."""

    @functools.wraps(usual)
    def widened(*args: Any, **kwargs: Any) -> Any:
        below = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutocastCPU)
        if below or not torch.is_autocast_enabled("cpu"):  # below: torch's own, within an operation
            return usual(*args, **kwargs)
        return usual(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return widened


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One byte an entry is saved; on a CPU it is a number of the dtype of `x`."""
    return aten.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that `scaled_dot_product_attention` picks on a GPU, whose tensors for backward are those of that kernel.

    Flash where there is no mask and 16 bits, else memory-efficient; with fewer heads of keys than of queries that one has no
    kernel, and the attention matrix is saved. Shapes `(batch, heads, tokens, head)`.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    same_head = query.shape[-1] == value.shape[-1]
    if attn_mask is None and half and same_head and query.shape[-1] <= FLASH_HEAD:
        head = query.shape[-1]
        padding = -head % 8
        padded = (F.pad(tensor, (0, padding)) if padding else tensor for tensor in (query, key, value))
        attended = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
        return attended[..., :head] if padding else attended
    if enable_gqa or (attn_mask is not None and attn_mask.requires_grad):
        return torch._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the memory-efficient kernel takes it: numbers to add, rows of a multiple of 16, the same for all heads."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    length = mask.shape[-1]
    if padding := -length % 16:
        mask = F.pad(mask, (0, padding))[..., :length]
    return mask.expand(*query.shape[:-1], key.shape[-2])
