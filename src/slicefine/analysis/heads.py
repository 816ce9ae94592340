"""Where the heads of attention are in the weights: a head is a group of rows of what writes its features, and of columns of what reads them.

Found by the names that transformers gives to the layers of its attention modules, and by the size of a head that the modules know. Models
that name them otherwise have no known heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from slicefine.slicing import COLUMN, ROW, SLICE_AXES
from slicefine.tuner.base_layers import Place

FUSED = ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv", "in_proj")
"""Names of layers that write query, key and value, whose heads are all rows of one weight."""
WRITE = (
    "q_proj", "k_proj", "v_proj", "query", "key", "value", "query_proj", "key_proj", "value_proj", "q_lin", "k_lin", "v_lin", "q", "k", "v",
    "pos_query_proj", "pos_key_proj", *FUSED,
)  # fmt: skip
"""Names of layers whose rows are those of heads."""
READ = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "Wo", "proj")
"""Names of layers whose columns are those of heads."""
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
"""What attention modules call the size of a head."""


class Heads(NamedTuple):
    """The heads in a weight."""

    axis: str
    """`"row"` or `"column"`"""
    size: int
    """Rows or columns of a head."""
    count: int
    """Heads, those of query, key and value together where one weight has them all."""
    fused: bool = False
    """Whether it has: then heads of query, key and value are compared with one another."""


def find_heads(model: nn.Module, places: Mapping[str, Place]) -> dict[str, Heads]:
    """Name of a target -> its heads, for the targets `places` of `model` that are layers of attention."""
    return {name: heads for name, place in places.items() if (heads := _heads_of(model, name, place)) is not None}


def _heads_of(model: nn.Module, name: str, place: Place) -> Heads | None:
    *path, last = name.split(".")
    axis = ROW if last in WRITE else COLUMN if last in READ else None
    size = None if axis is None else _head_size(model, path)
    if axis is None or size is None:
        return None
    count, rest = divmod(place.shape[SLICE_AXES.index(axis)], size)
    return None if rest else Heads(axis, size, count, last in FUSED)


def _head_size(model: nn.Module, path: list[str]) -> int | None:
    """The size of a head in the attention module on `path`, which is below the list of blocks; None if there is none, or it does not say."""
    blocks = max((number + 1 for number, part in enumerate(path) if part.isdecimal()), default=0)
    depth = next((number + 1 for number in range(blocks, len(path)) if "att" in path[number].lower()), None)
    if depth is None:
        return None
    inside = model.get_submodule(".".join(path[:depth])).modules()
    sizes = (getattr(module, size, None) for module in inside for size in SIZES)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)
