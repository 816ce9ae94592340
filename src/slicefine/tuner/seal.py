"""The seal of a saved layer: what its values, its schedule and its base must be for the file to be loaded.

One line of text per target, in `adapter_config.json` and, filled up with spaces, in the file:

    1:step:settings:dtype:exact:rounded:values

The version of the format; the optimizer steps that the layer had made; the settings that decided its positions; the dtype of the base; digests of the base's
original values in the touched rows and columns, once of the exact bytes and once rounded to bf16; a digest of what was saved.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slicefine.errors import SliceFineError
from slicefine.slicing import SLICE_AXES, Region, Schedule
from slicefine.slicing.budget import SEAL_BYTES

FORMAT = 1
_FORM = re.compile(
    rf"{FORMAT}:(\d{{1,18}}):([^:]{{1,80}}):(float16|bfloat16|float32|float64)((?::[0-9a-f]{{32}}){{3}})"
)


@dataclass(frozen=True, slots=True)
class Seal:
    """The parts of a seal; `str(seal)` is its text."""

    step: int
    settings: str
    dtype: str
    exact: str
    rounded: str
    values: str

    def __str__(self) -> str:
        return f"{FORMAT}:{self.step}:{self.settings}:{self.dtype}:{self.exact}:{self.rounded}:{self.values}"

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        step: int,
        region: Region,
        original: Callable[[str, tuple[int, ...]], Tensor],
        saved: dict[str, Tensor],
    ) -> Seal:
        """The seal of a layer.

        Args:
            schedule, step: how the layer was trained, and for how many optimizer steps.
            region: the rows and columns that follow from the two.
            original: `original(axis, indices)` -> the base's values there, `(len(indices), length)`.
            saved: the tensors that go into the file, by the last part of their key.
        """
        dtype, exact, rounded = _digests_of_base(region, original)
        return cls(step, str(schedule), dtype, exact, rounded, digest_of_values(step, str(schedule), dtype, saved))

    @classmethod
    def parse(cls, text: str) -> Seal:
        """Read the text of a seal. Raises `SliceFineError` if it has another form."""
        form = _FORM.fullmatch(text)
        version = re.match(r"(\d+):", text)
        if version and int(version[1]) > FORMAT:
            raise SliceFineError(
                f"it was saved by a newer slicefine, in format {version[1]}; this one reads format {FORMAT}. Upgrade slicefine."
            )
        if form is None:
            raise SliceFineError(
                f"the line that says what was saved (`format:step:settings:dtype:exact:rounded:values`) cannot be read; got {text[:60]!r}. It is "
                "damaged: copy or save the adapter again."
            )
        return cls(int(form[1]), form[2], form[3], *form[4].removeprefix(":").split(":"))

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Seal:
        """Read a seal from the tensor of a file: its text, one byte an entry."""
        if tensor.dtype != torch.uint8 or tensor.shape != (SEAL_BYTES,):
            raise SliceFineError(
                f"the line that says what was saved is uint8 of shape ({SEAL_BYTES},); got {tensor.dtype} of shape {tuple(tensor.shape)}. "
                "It is damaged: copy or save the adapter again."
            )
        return cls.parse(bytes(tensor.tolist()).decode("ascii", "replace").rstrip())

    def tensor(self) -> Tensor:
        """The text as it stands in the file, uint8, `(SEAL_BYTES,)`."""
        return torch.tensor(list(str(self).ljust(SEAL_BYTES).encode()), dtype=torch.uint8)

    def base_problem(self, region: Region, original: Callable[[str, tuple[int, ...]], Tensor]) -> str | None:
        """What is wrong with a base whose values in `region` are `original(axis, indices)`; None if it is the right one.

        A base in another dtype is recognised by its values rounded to bf16.
        """
        dtype, exact, rounded = _digests_of_base(region, original)
        if (exact == self.exact) if dtype == self.dtype else (rounded == self.rounded):
            return None
        why = (
            ""
            if dtype == self.dtype
            else f" It was trained in {self.dtype}, this base is in {dtype}: load it in {self.dtype}."
        )
        return (
            "the adapter was trained on a base with other values in the rows and columns it replaces. Load the base model it was trained on."
            + why
        )

    def settings_problem(self, schedule: Schedule) -> str | None:
        """What is wrong with loading the layer for `schedule`."""
        if str(schedule) == self.settings:
            return None
        return (
            f"it was trained with {self.settings}, and is to be loaded with {schedule}. Load it with the configuration that was saved "
            "with it."
        )

    def values_problem(self, saved: dict[str, Tensor]) -> str | None:
        """What is wrong with the tensors of a file."""
        if any(_rounds(getattr(torch, self.dtype), tensor.dtype) for tensor in saved.values()):
            return None  # a loader has rounded the values to the dtype of the base; there is nothing left to compare
        if digest_of_values(self.step, self.settings, self.dtype, saved) == self.values:
            return None
        return "what the file holds is not what was saved. It was altered: copy or save it again."


def _rounds(saved: torch.dtype, held: torch.dtype) -> bool:
    """Whether values of dtype `saved` are rounded when they are held as `held`."""
    return torch.promote_types(saved, held) != held


def _digests_of_base(region: Region, original: Callable[[str, tuple[int, ...]], Tensor]) -> tuple[str, str, str]:
    exact, rounded = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    dtype = torch.float32
    for axis in SLICE_AXES:
        values = original(axis, region.along(axis))
        dtype = values.dtype
        exact.update(bytes_of(values))
        rounded.update(bytes_of(values.to(torch.bfloat16)))
    return str(dtype).removeprefix("torch."), exact.hexdigest(), rounded.hexdigest()


def digest_of_values(step: int, settings: str, dtype: str, saved: dict[str, Tensor]) -> str:
    """The last part of a seal. Values are digested in fp32 at least, so that a loader may widen them."""
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{step} {settings} {dtype}\n".encode())
    wide = torch.promote_types(getattr(torch, dtype), torch.float32)
    for part in sorted(saved):
        state.update(f"{part} {tuple(saved[part].shape)}\n".encode())
        state.update(bytes_of(saved[part].to(wide)))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor, in the order of its entries."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
