"""The saved adapter: what is in the file, and how a file is checked before it may change anything.

Per target there are, under the target's name:

    slicefine_weight    fp32, (width, length, *kernel)           the master, the active slice in its corner
    slicefine_row       base dtype, (rows, d_in, *kernel)        final values of the touched rows, by rising index
    slicefine_column    base dtype, (columns, d_out, *kernel)    final values of the touched columns, by rising index
    slicefine_bias      fp32, (d_out,)                           the trained bias, if there is one
    slicefine_seal      uint8, (192,)                            what all this must be, see `seal.py`

`kernel` is empty for the weight of a linear layer.

Which rows and columns those are follows from the configuration and the step in the seal. `adapter_config.json` holds the seals as
well, so that the base can be checked, and room be made, before the file is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slicefine.errors import SliceFineError, by_text, first_line, raise_all
from slicefine.slicing import SLICE_AXES, Region, Schedule, Shape
from slicefine.tuner.seal import Seal, bytes_of

PREFIX = "slicefine_"
PEFT_ROOT = "base_model.model."
SEAL = f"{PREFIX}seal"


@dataclass(frozen=True)
class LayerValues:
    """The saved state of one layer; shapes and dtypes as in the module's table."""

    seal: Seal
    region: Region
    """Of the weight, what `values` replace."""
    master: Tensor
    values: dict[str, Tensor]
    bias: Tensor | None


@dataclass(frozen=True)
class Target:
    """What must be known of a layer to check what a file holds for it."""

    shape: Shape
    bias: bool
    """Whether its bias is trained."""
    schedule: Schedule
    original: Callable[[str, tuple[int, ...]], Tensor]
    """`original(axis, indices)` -> the base's values there, `(len(indices), length)`."""


def seal(
    schedule: Schedule,
    step: int,
    region: Region,
    original: Callable[[str, tuple[int, ...]], Tensor],
    *,
    master: Tensor,
    values: dict[str, Tensor],
    bias: Tensor | None,
) -> tuple[Seal, dict[str, Tensor]]:
    """The seal of a layer and what goes into the file, by the last part of the key; arguments as in `Seal.of`."""
    parts = {f"{PREFIX}weight": master} | {PREFIX + axis: tensor for axis, tensor in values.items()}
    if bias is not None:
        parts[f"{PREFIX}bias"] = bias
    made = Seal.of(schedule, step, region, original, parts)
    return made, parts | {SEAL: made.tensor()}


def head_digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A digest of name, dtype, shape and bytes for each tensor of the modules trained in full."""
    return {
        bare(key): hashlib.blake2b(
            f"{bare(key)} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + bytes_of(tensor), digest_size=16
        ).hexdigest()
        for key, tensor in sorted(tensors.items())
        if not is_ours(key)
    }


def locate(folder: str | os.PathLike[str], subfolder: str | None, **download: Any) -> Path:
    """The file with the values of the adapter in a local folder, or of a repository of the hub, which is downloaded.

    Raises `SliceFineError` if there is none.
    """
    path = Path(folder, subfolder) if subfolder else Path(folder)
    if not path.is_dir():
        try:
            return Path(hf_hub_download(str(folder), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download))
        except LocalEntryNotFoundError as error:
            raise SliceFineError(
                f"{SAFETENSORS_WEIGHTS_NAME} of {folder} is not in the cache, and the hub cannot be reached: {first_line(error)}. A pickle is never opened."
            ) from error
        except EntryNotFoundError as error:
            raise SliceFineError(
                f"A slicefine adapter keeps its values in {SAFETENSORS_WEIGHTS_NAME}; {folder} has none. A pickle is never opened. Save the "
                "adapter again with `save_pretrained`."
            ) from error
    file = path / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        pickled = (
            f" {WEIGHTS_NAME} beside it is a pickle, which is never opened." if (path / WEIGHTS_NAME).exists() else ""
        )
        raise SliceFineError(
            f"A slicefine adapter keeps its values in {SAFETENSORS_WEIGHTS_NAME}; there is none in {path}.{pickled} "
            "Save the adapter again with `save_pretrained`."
        )
    return file


def check_file(
    file: Path, schedule_of: Callable[[str], Schedule], seals: dict[str, str], heads: dict[str, str] | None
) -> None:
    """Raise `SliceFineError` if `file` does not hold what the configuration beside it says: schedules by target, `seals`, `heads`."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise SliceFineError(
            f"{file} is not a complete safetensors file ({error}). It is truncated or damaged: copy or save it again."
        ) from error
    found = _by_target({key: tensor for key, tensor in tensors.items() if is_ours(key)})
    problems = {}
    for name in seals.keys() & found.keys():
        try:
            seal = _seal_in(found[name])
            values = {part: tensor for part, tensor in found[name].items() if part != SEAL}
            other = _OTHER if str(seal) != seals[name] else None
            problems[name] = other or seal.settings_problem(schedule_of(name)) or seal.values_problem(values)
        except SliceFineError as error:
            problems[name] = str(error)
    given, held = heads or {}, head_digests(tensors)
    problems |= {key: _OTHER for key in given.keys() & held.keys() if given[key] != held[key]}
    problems |= dict.fromkeys((seals.keys() | given) - (found.keys() | held), "the file has nothing for it.")
    # Of other tensors there may be more: PEFT adds embeddings of another size than the base's after the configuration was described.
    problems |= dict.fromkeys(found.keys() - seals.keys(), "the configuration has nothing for it.")
    raise_all(
        by_text({name: problem for name, problem in problems.items() if problem}),
        f"{file} does not hold what adapter_config.json beside it says. One of the two was altered, or they are from different "
        "adapters: copy or save both again",
    )


_OTHER = "the file holds something else."


def is_ours(key: str) -> bool:
    """Whether a key of a state dict is one of the table's, and not a module to save."""
    return key.rpartition(".")[2].startswith(PREFIX)


def bare(key: str) -> str:
    """A name without the root that PEFT puts before those of the base model."""
    return key.removeprefix(PEFT_ROOT)


def parse(state_dict: dict[str, Tensor], targets: dict[str, Target]) -> dict[str, LayerValues]:
    """Turn the tensors of a file into one `LayerValues` per target, or raise `SliceFineError` with all that is wrong.

    Args:
        state_dict: keys `[base_model.model.]<target>.slicefine_<part>`; others must have been taken out.
        targets: what the adapter trains, by name.
    """
    found = _by_target(state_dict)
    problems = dict.fromkeys(found.keys() - targets.keys(), "the model trains no such layer with this adapter.")
    problems |= dict.fromkeys(targets.keys() - found.keys(), "the file has nothing for it.")
    parsed = {}
    for name in found.keys() & targets.keys():
        try:
            parsed[name] = _parse_layer(found[name], targets[name])
        except SliceFineError as error:
            problems[name] = str(error)
    raise_all(by_text(problems), "The file does not fit the adapter; nothing was loaded")
    return parsed


def _parse_layer(parts: dict[str, Tensor], target: Target) -> LayerValues:
    seal = _seal_in(parts)
    if problem := seal.settings_problem(target.schedule):
        raise SliceFineError(problem)
    region = Region.of(target.schedule.touched(seal.step, target.shape))
    expected = {
        SEAL: tuple(parts[SEAL].shape),
        f"{PREFIX}weight": target.schedule.widest(target.shape),
        f"{PREFIX}row": (len(region.rows), target.shape[1], *target.shape[2:]),
        f"{PREFIX}column": (len(region.columns), target.shape[0], *target.shape[2:]),
    } | ({f"{PREFIX}bias": (target.shape[0],)} if target.bias else {})
    values = {part: tensor for part, tensor in parts.items() if part != SEAL}
    for part in sorted(parts.keys() | expected.keys()):
        tensor = parts.get(part)
        if part not in expected:
            raise SliceFineError(f"`{part}` is not part of this adapter.")
        if tensor is None or tuple(tensor.shape) != expected[part]:
            raise SliceFineError(
                f"`{part}` has shape {expected[part]} after {seal.step} steps; got {_describe(tensor)}."
            )
        if part == SEAL:
            continue
        if not tensor.is_floating_point():
            raise SliceFineError(f"`{part}` holds floating-point numbers; got {_describe(tensor)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise SliceFineError(f"`{part}` holds finite numbers; got NaN or Inf.")
    if problem := seal.base_problem(region, target.original) or seal.values_problem(values):
        raise SliceFineError(problem)
    return LayerValues(
        seal=seal,
        region=region,
        master=parts[f"{PREFIX}weight"],
        values={axis: parts[PREFIX + axis] for axis in SLICE_AXES},
        bias=parts.get(f"{PREFIX}bias"),
    )


def _by_target(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = bare(key).rpartition(".")
        found.setdefault(name, {})[part] = tensor
    return found


def _seal_in(parts: dict[str, Tensor]) -> Seal:
    if SEAL not in parts:
        raise SliceFineError(f"`{SEAL}` says what the file must hold; got nothing. Save the adapter again.")
    return Seal.from_tensor(parts[SEAL])


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
