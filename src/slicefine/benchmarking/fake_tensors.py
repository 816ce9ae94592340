"""Tensors that have a shape and no values, so that the graph of any model runs in no memory.

torch's fake tensors are said to be on the CPU, for which torch has all it needs on every machine. What differs on a GPU is put in its
place by `_as_on_gpu`: the kernels of attention and dropout, and what autocast computes in fp32. What fake tensors lack is put there as
well: products of experts in other types than bf16, and other kinds of tensors, as the tuner makes of a weight that is read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.utils import import_utils

from slicefine.tuner.layer import SliceLayer

aten = torch.ops.aten
FLASH_HEAD = 256
"""Widest head that flash attention takes."""
ALIGNMENT = 16
"""Bytes; rows that grouped products make begin at a multiple of them."""
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", as far as models use them.
FP32_ON_GPU = (
    "__pow__", "__rpow__", "__rtruediv__", "binary_cross_entropy_with_logits", "cross_entropy", "cumprod", "cumsum", "exp",
    "expm1", "group_norm", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "mse_loss", "nll_loss",
    "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss", "softmax", "softplus", "sum",
)  # fmt: skip


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
        stack.enter_context(patch.object(FakeTensor, "as_subclass", _as_subclass))
        # What torch logs of an operation that fails is in the error.
        stack.enter_context(patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True))
        stack.enter_context(mode)
        if gpu:
            stack.enter_context(_as_on_gpu())
        yield


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    made = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _as_subclass(tensor: Tensor, cls: type[Tensor]) -> Tensor:
    """`Tensor.as_subclass`, which would make a new Python object of a tensor that has to stay a fake one."""
    made = aten.alias(tensor)
    made.__class__ = _fake_kind(cls)
    return made


@functools.cache
def _fake_kind(cls: type[Tensor]) -> type[Tensor]:
    bases: tuple[Any, ...] = (cls, FakeTensor)
    return type(cls.__name__, bases, {})


def grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What `torch._grouped_mm` gives for fake tensors of any type, as it is stored: rows begin at multiples of 16 bytes.

    torch says so of bf16 alone. Shapes: of a token and an expert each `(pairs, d_in)` and `(experts, d_in, d_out)`, for instance; as many
    groups as `offs` has where both have two dimensions. How many pairs an expert has does not matter.
    """
    batch = () if a.dim() != b.dim() else (len(a),) if offs is None else (len(offs),)
    shape = (*batch, a.shape[-2], b.shape[-1])
    numbers = ALIGNMENT // a.itemsize
    row = -(-shape[-1] // numbers) * numbers
    return a.new_empty_strided(shape, (*(shape[-2] * row for _ in batch), row, 1))


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
