"""Tiny configurations of any architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def shrunk(config: Any, more: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A configuration of the same kind with few and small layers, and with what `more` makes of its values."""
    parts = {name: shrunk(part, more) for name, part in vars(config).items() if name in config.sub_configs and part}
    names = {config.attribute_map.get(name, name): value for name, value in SMALL.items()}
    values = config.to_dict()
    small: dict[str, Any] = {name: value for name, value in names.items() if isinstance(values.get(name), int)}
    if values.get("layer_types"):  # one of each kind: some models have another kind every sixth layer
        small["layer_types"] = (list(dict.fromkeys(values["layer_types"])) * 2)[: SMALL["num_hidden_layers"]]
    for name in (
        "quantization_config",
        "out_features",
        "out_indices",
        "stage_names",
    ):  # the last three name blocks that are gone
        values.pop(name, None)
    return type(config).from_dict(
        values | small | more(values) | {name: part.to_dict() for name, part in parts.items()}
    )
