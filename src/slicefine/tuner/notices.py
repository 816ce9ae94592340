"""Warnings when an adapter is attached: what differs from what was asked for, and what was likely meant."""

from __future__ import annotations

import warnings

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from slicefine.errors import SHOWN, SliceFineWarning, listed
from slicefine.slicing import ALTERNATE
from slicefine.tuner import coupling, targets
from slicefine.tuner.base_layers import BASE_LAYERS, Place
from slicefine.tuner.config import SliceFineConfig

MANY_EXPERTS = 0.1
"""Share of a model that is not left out without a word."""


def warn_of_adjustments(config: SliceFineConfig, found: dict[str, Place]) -> None:
    narrow = targets.clamped(found, config)
    if narrow:
        shapes = listed((f"{name} {shape}" for name, shape in narrow.items()), SHOWN)
        warnings.warn(
            f"r={config.r} is more than some weights have rows or columns; their slices are as wide as the weight: {shapes}.",
            SliceFineWarning,
            stacklevel=2,
        )
    heads = [name for name in found if name in SEQ_CLS_HEAD_NAMES]
    if heads and targets.names_all_linear(config):
        warnings.warn(
            f"The head {heads[0]!r} is sliced like any other layer. If it is new, its random values are in no file and the adapter will "
            f"fit no other copy of the model: train it in full with modules_to_save={heads!r}, or say what the model is for with "
            "task_type='SEQ_CLS'.",
            SliceFineWarning,
            stacklevel=2,
        )
    lonely = coupling.uncoupled(list(found), config)
    if lonely:
        hint = " Random tokens or images do not reach every layer (a vision tower, say); a batch of yours may: "
        hint += "`config.couplings = slicefine.couplings(model, config, batch)`."
        warnings.warn(
            f"axis='coupled': {len(lonely)} of {len(found)} weights have no partner among the others, and train rows: {listed(lonely, SHOWN)}."
            + (hint if len(lonely) > 1 else ""),  # one is a pooler or a head, which has none
            SliceFineWarning,
            stacklevel=2,
        )
    if config.axis == ALTERNATE and config.slide_every is None:
        warnings.warn(
            "axis='alternate' changes the axis at every move, and slide_every=None never moves: only rows will be trained. "
            "Set axis='row' or axis='column', or a number of steps for slide_every.",
            SliceFineWarning,
            stacklevel=2,
        )


def warn_of_experts(model: nn.Module, config: SliceFineConfig) -> None:
    """Most of a mixture of experts may be in parameters that are no layers, and so are not among all linear layers."""
    if not targets.names_all_linear(config) or config.target_parameters:
        return
    of_layers = {id(p) for m in model.modules() if isinstance(m, BASE_LAYERS) for p in m.parameters()}
    experts = {
        n: p for n, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in of_layers
    }
    share = sum(p.numel() for p in experts.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if share > MANY_EXPERTS:
        names = sorted({".".join(name.split(".")[-2:]) for name in experts})
        warnings.warn(
            f"{share:.0%} of the model are parameters of three dimensions (of experts, say) that are no layers ({listed(experts)}), so target_modules='all-linear' "
            f"trains none of them. Train them with target_parameters={names!r}, or name the layers that are meant.",
            SliceFineWarning,
            stacklevel=3,
        )
