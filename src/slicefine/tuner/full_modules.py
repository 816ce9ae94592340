"""Modules that are trained in full beside the slices (`modules_to_save`): PEFT's wrappers around them."""

from __future__ import annotations

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def full_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of the modules that are trained in full, by their keys in the file."""
    wrappers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    return {
        f"{name}.{key}": tensor
        for name, wrapper in wrappers.items()
        if adapter_name in wrapper._adapters
        for key, tensor in wrapper.adapter_state_dict(adapter_name, wrapper.state_dict()).items()
    }


def show_full_modules(model: nn.Module, adapter_names: list[str]) -> None:
    """Let modules that are trained in full be those of the adapters named; PEFT keeps to the active one, whatever is merged."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            trains = {parameter: parameter.requires_grad for parameter in module.parameters()}
            module.set_adapter([name for name in adapter_names if name in module._adapters])
            for parameter, requires_grad in trains.items():
                parameter.requires_grad = requires_grad
