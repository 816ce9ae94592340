"""`merged`: an ordinary model folder, written from the base's files without a model in memory.

One tensor after the other is read, changed where it was trained, and written: what is held at a time is a piece of a tensor, or
the whole of one that has slices. Files are cut as those of the base are.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import TensorSpec
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slicefine.errors import raise_all
from slicefine.training.export_source import BaseFiles, Source, saved_names
from slicefine.tuner import artifact


@dataclass(frozen=True)
class Output:
    """One tensor of the exported model."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    """Its values, cut along the first dimension."""

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Plan = dict[str, list[Output]]
"""File name -> its tensors."""


def plan(source: Source) -> Plan | None:
    """What goes into which file; None if the base must be loaded for it. Reads names and shapes only.

    Raises `SliceFineError` for a parameter that neither the base nor the adapter has values for.
    """
    files = source.files
    origins = files and _origins(source, files)
    if files is None or origins is None:
        return None
    state = source.skeleton.state_dict()
    keys = saved_names(source.skeleton, origins)
    outputs: dict[Path, list[Output]] = {file: [] for file in files.files}
    for name, origin in origins.items():
        file = files.tensors.file_of[files.key_of[origin]] if origin else files.files[-1]
        values = partial(_values, source, files, name, origin)
        outputs[file].append(Output(keys[name], tuple(state[name].shape), state[name].dtype, values))
    for key, names in files.converted.items():
        # Saving would make of these what they were before loading.
        dtype = state[names[0]].dtype
        copied = partial(files.pieces, key, dtype)
        outputs[files.tensors.file_of[key]].append(Output(key, files.tensors.shapes[key], dtype, copied))
    filled = [tensors for tensors in outputs.values() if tensors]
    if len(filled) == 1:
        return {SAFE_WEIGHTS_NAME: filled[0]}
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    return {f"{stem}-{n:05d}-of-{len(filled):05d}.{suffix}": tensors for n, tensors in enumerate(filled, 1)}


def size(planned: Plan) -> int:
    """Bytes of all tensors."""
    return sum(output.nbytes for outputs in planned.values() for output in outputs)


def write(source: Source, planned: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Write the model into `folder`: the files of `planned`, and what transformers writes beside them.

    Raises `SliceFineError` if the base is not the one that the adapter was trained on.
    """
    skeleton = source.skeleton
    skeleton.config = copy.deepcopy(skeleton.config)
    tied = _tied(skeleton)
    if source.trained.heads.keys() & {*tied, *tied.values()}:
        skeleton.config.tie_word_embeddings = False  # as PEFT does when it merges: one of the two was trained
    skeleton.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()  # of no tensors
    for number, (file, outputs) in enumerate(planned.items(), 1):
        say(f"Writing {file} ({number} of {len(planned)})")
        _write_safetensors(folder / file, outputs)
    if len(planned) > 1:
        index = {
            "metadata": {"total_parameters": skeleton.num_parameters(), "total_size": size(planned)},
            "weight_map": {output.key: file for file, outputs in planned.items() for output in outputs},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def load_and_write(source: Source, folder: Path) -> None:
    """The same by way of a whole model in memory."""
    model = source.load_trained().merge_and_unload()
    model.generation_config = (
        source.skeleton.generation_config
    )  # that of the base is copied: not all can be written again
    model.save_pretrained(folder)


def _origins(source: Source, files: BaseFiles) -> dict[str, str | None] | None:
    """What to write -> the name whose values in the base's files it begins with, None for one that the adapter brings.

    None instead of all if the model has something that loading makes up.
    """
    model, heads = source.skeleton, source.trained.heads
    tied = _tied(model)
    made = {name for names in files.converted.values() for name in names}
    origins: dict[str, str | None] = {}
    missing = []
    for name in model.state_dict():
        if name in made or name in (model._keys_to_ignore_on_save or ()):
            continue
        partners = [tied.get(name, name), *(target for target, of in tied.items() if of == name)]
        stored = [other for other in (name, *partners) if other in files.key_of]
        if name in heads:
            origins[name] = None
        elif name in tied and tied[name] not in heads and not {name, tied[name]} <= files.key_of.keys():
            continue  # loading takes the other one for it
        elif stored:
            origins[name] = stored[0]
        else:
            missing.append(name)
    parameters = dict(model.named_parameters())
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))
    raise_all(
        [
            f"{name}: neither the base model nor the adapter has values for it. Train it in full (`modules_to_save`)."
            for name in missing
            if name in parameters and not optional.search(name)
        ],
        f"The model in {source.trained.folder} cannot be put together",
    )
    return None if missing or heads.keys() & made else origins


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Name -> the name of which loading takes the values for it."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _values(source: Source, files: BaseFiles, name: str, origin: str | None) -> Iterator[Tensor]:
    """The trained values of the parameter `name`."""
    trained = source.trained
    dtype = source.skeleton.state_dict()[name].dtype
    layer, _, part = name.rpartition(".")
    bias = f"{artifact.PEFT_ROOT}{layer}.{artifact.PREFIX}bias"
    if origin is None:
        yield trained.tensors.read(trained.heads[name]).to(dtype)
    elif target := source.target_of.get(name):
        stored, weight, values = source.read(files, origin, target)
        trained.patch(values, weight)
        yield stored
    elif part == "bias" and bias in trained.tensors.file_of:
        yield trained.tensors.read(bias).to(dtype)
    else:
        yield from files.pieces(files.key_of[origin], dtype)


def _write_safetensors(path: Path, outputs: list[Output]) -> None:
    """Write a safetensors file one tensor after the other; the library's own writer wants all of them in memory."""
    # Wide entries first, as the library does it, so that all are aligned.
    ordered = sorted(outputs, key=lambda output: (-output.dtype.itemsize, output.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in ordered:
        begin, end = end, end + output.nbytes
        name = str(output.dtype).removeprefix("torch.")
        code = TensorSpec(dtype=name, shape=output.shape, data_ptr=0, data_len=output.nbytes).dtype
        header[output.key] = {"dtype": code, "shape": output.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in ordered:
            for piece in output.pieces():
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
