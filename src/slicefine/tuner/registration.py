"""Make the method known to PEFT.

`peft.utils.register_peft_method` takes only names of PEFT's own enum, so the mappings that it would fill are filled here, and
nowhere else; but for that of `PeftMixedModel`, in which several adapters are active at a time.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from slicefine.tuner.config import SliceFineConfig, SliceFineType
from slicefine.tuner.model import SliceFineModel


def register() -> None:
    """Enter the method into PEFT's mappings. Doing it again changes nothing."""
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, SliceFineConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SliceFineModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SliceFineModel.prefix),
    ]
    for mapping, value in entries:
        mapping[SliceFineType.SLICEFINE] = value
