"""How every model of a comparison is made: one architecture, device and precision, with the same weights for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from slicefine.benchmarking.attaching import Attached, attach, sized
from slicefine.benchmarking.methods import FULL, MASKS, Method
from slicefine.benchmarking.models import BUILT_BY, Architecture, batch_of, build
from slicefine.benchmarking.settings import Settings
from slicefine.benchmarking.timing import refuse_too_large
from slicefine.errors import SliceFineError
from slicefine.training.checkpointing import enable_checkpointing

ROOM = 0.5
"""Share of the free memory that weights, gradients and moments of all methods together may take: activations need the rest."""
SHARD = "2GB"
"""Size of the files that a model is written in: one at a time is in the memory of the host."""
NEVER = 10**9
"""`slide_every` of slices that stay where they are."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An architecture on a device."""

    of: Architecture
    device: str
    dtype: torch.dtype
    checkpointing: bool
    compile: bool
    seed: int

    @classmethod
    def of_settings(cls, settings: Settings, of: Architecture) -> Setup:
        """The setup of one architecture, with what the settings leave open."""
        device = device_of(settings)
        dtype = settings.dtype or ("bfloat16" if device == "cuda" else "float32")
        return cls(
            of=of,
            device=device,
            dtype=getattr(torch, dtype),
            checkpointing=settings.checkpointing,
            compile=settings.compile,
            seed=settings.seed,
        )

    def base(self) -> Any:
        """A new model without any method, in training mode; the same weights every time."""
        if self.device == "cpu":
            refuse_too_large(self.weights, self.device)
        model = build(self.of, dtype=self.dtype, device=self.device, seed=self.seed)
        if self.checkpointing:
            enable_checkpointing(model)
        return model

    def attach(self, method: Method, *, slide_every: int, total_steps: int = 1000) -> Attached:
        """A new model, ready to be trained by `method`; a depth window changes at every step. Raises `SliceFineError` with the reason if it cannot be."""
        attached = attach(
            method,
            self.base(),
            task=self.of.task,
            heads=self.of.heads,
            slide_every=slide_every,
            total_steps=total_steps,
            seed=self.seed,
            depth_every=1,
        )
        if self.compile:
            attached.model.compile()
        return attached

    def eager(self) -> Setup:
        """The same without torch.compile."""
        return dataclasses.replace(self, compile=False)

    def save(self, model: Any, folder: Path) -> None:
        """Write a model of this architecture, without an adapter, as users do."""
        model.save_pretrained(folder, max_shard_size=SHARD)

    def load(self, folder: Path) -> Any:
        """A model that `save` has written, loaded by transformers alone, file by file onto the device."""
        loader = getattr(transformers, BUILT_BY[self.of.task])
        return loader.from_pretrained(folder, dtype=self.dtype, device_map=self.device)

    def batch(self, number: int) -> dict[str, Any]:
        """The batch of round `number`; the same for all methods."""
        return batch_of(self.of, dtype=self.dtype, device=self.device, seed=self.seed + number)

    def sized(self, methods: Sequence[Method], reference: Method) -> list[Method]:
        """`methods` with ranks that bring what they train nearest to what `reference` does; `reference` itself as it is."""
        return sized(methods, reference, build(self.of, device="meta"), self.of.heads)

    @property
    def weights(self) -> int:
        """Bytes of the weights of the base."""
        return sum(p.numel() for p in build(self.of, device="meta").parameters()) * self.dtype.itemsize

    def bytes_of(self, methods: Sequence[Method]) -> int:
        """Weights of a model for each method, with gradients and two moments where the method has them for all weights."""
        return self.weights * sum(4 if one.kind in (FULL, *MASKS) else 1 for one in methods)


def device_of(settings: Settings) -> str:
    """Where to measure. Raises `SliceFineError` if a GPU is asked for and there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SliceFineError("`--device cuda` needs a GPU that torch can use; there is none. Leave it out, or use cpu.")
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
