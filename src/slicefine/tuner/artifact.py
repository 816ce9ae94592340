"""The saved adapter: what is in the file, and how a file is checked before it may change anything.

Per target there are, under the target's name:

    slicefine_weight    fp32, (width, length)             the master, the active slice in its corner
    slicefine_row       base dtype, (rows, d_in)          final values of the touched rows, by rising index
    slicefine_column    base dtype, (columns, d_out)      final values of the touched columns, by rising index
    slicefine_bias      fp32, (d_out,)                    the trained bias, if there is one
    slicefine_step      int64, ()                         optimizer steps made

Which rows and columns those are follows from the configuration and the step. `adapter_config.json` holds the step, a digest of
the values, and per target a fingerprint of the base's original bytes in the same places.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slicefine.errors import SliceFineError
from slicefine.slicing import SLICE_AXES, Region, Schedule, Shape

PREFIX = "slicefine_"
PEFT_ROOT = "base_model.model."


@dataclass(frozen=True)
class LayerValues:
    """The saved state of one layer; shapes and dtypes as in the module's table."""

    step: int
    master: Tensor
    values: dict[str, Tensor]
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the file, by the last part of the key."""
        parts = {f"{PREFIX}weight": self.master, f"{PREFIX}step": torch.tensor(self.step)}
        parts |= {PREFIX + axis: values for axis, values in self.values.items()}
        if self.bias is not None:
            parts[f"{PREFIX}bias"] = self.bias
        return parts


def digests_of(tensors: dict[str, Tensor]) -> dict[str, str]:
    """One digest for all that is ours (`"slices"`), and one for each tensor of a head, by its name."""
    heads = {_bare(key): digest_of({key: tensor}) for key, tensor in tensors.items() if not is_ours(key)}
    return {"slices": digest_of({key: tensor for key, tensor in tensors.items() if is_ours(key)})} | heads


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes; PEFT's root prefix in a name does not count."""
    state = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors, key=_bare):
        tensor = tensors[key]
        state.update(f"{_bare(key)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


def fingerprint(step: int, region: Region, read: Callable[[str, tuple[int, ...]], Tensor]) -> str:
    """`step:dtype:digest:digest` of the base's original values in `region`; `read(axis, indices)` gives them.

    The step is that of the layer, which decides the region.

    The first digest is of the exact bytes. The second, of the values rounded to bf16, recognises the same base in fp32
    where it was trained in bf16, or the other way round.
    """
    exact, rounded = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    dtype = torch.float32
    for axis in SLICE_AXES:
        values = read(axis, region.along(axis))
        dtype = values.dtype
        exact.update(_bytes(values))
        rounded.update(_bytes(values.to(torch.bfloat16)))
    return f"{step}:{str(dtype).removeprefix('torch.')}:{exact.hexdigest()}:{rounded.hexdigest()}"


def step_of(fingerprint: str) -> int:
    """Optimizer steps that the layer of a fingerprint had made."""
    return int(fingerprint.split(":")[0])


def fingerprint_problem(target: str, expected: str, found: str) -> str | None:
    """What is wrong with a base whose fingerprint is `found` where the adapter was trained on `expected`."""
    _, expected_dtype, *expected_digests = expected.split(":")
    _, found_dtype, *found_digests = found.split(":")
    which = 0 if expected_dtype == found_dtype else 1
    if expected_digests[which] == found_digests[which]:
        return None
    other = (
        "" if expected_dtype == found_dtype else f" (it was trained in {expected_dtype}, this base is in {found_dtype})"
    )
    return (
        f"{target}: the adapter was trained on a base with other values in the rows and columns it replaces{other}. Load the "
        "base model it was trained on, in the same dtype."
    )


def check_folder(folder: str | os.PathLike[str], subfolder: str | None, digest: dict[str, str] | None) -> None:
    """Raise `SliceFineError` if the adapter in a local folder cannot be what was saved.

    Hub names, and folders that hold a configuration alone (no `digest`), are passed over.
    """
    path = Path(folder, subfolder) if subfolder else Path(folder)
    file = path / SAFETENSORS_WEIGHTS_NAME
    if digest is None or not path.is_dir():
        return
    if not file.exists():
        pickled = (
            f" {WEIGHTS_NAME} beside it is a pickle, which is never opened." if (path / WEIGHTS_NAME).exists() else ""
        )
        raise SliceFineError(
            f"A slicefine adapter keeps its values in {SAFETENSORS_WEIGHTS_NAME}; there is none in {path}.{pickled} "
            "Save the adapter again with `save_pretrained`."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise SliceFineError(
            f"{file} is not a complete safetensors file ({error}). It is truncated or damaged: copy or save it again."
        ) from error
    found = digests_of(tensors)
    other = sorted(name for name in digest if found.get(name) != digest[name])
    if other:
        raise SliceFineError(
            f"{file} does not hold the values that were saved: the digests of {', '.join(other)} are not those in adapter_config.json "
            f"beside it. The file was altered, or the two files are from different adapters: copy or save both again."
        )


def is_ours(key: str) -> bool:
    """Whether a key of a state dict is one of the table's, and not a module to save."""
    return key.rpartition(".")[2].startswith(PREFIX)


def parse(
    state_dict: dict[str, Tensor], targets: dict[str, tuple[Shape, bool]], schedule: Schedule
) -> dict[str, LayerValues]:
    """Turn the tensors of a file into one `LayerValues` per target, or raise `SliceFineError` with all that is wrong.

    Args:
        state_dict: keys `[base_model.model.]<target>.slicefine_<part>`; others must have been taken out.
        targets: target name -> (shape of the weight, whether a bias is trained).
        schedule: decides which shapes the tensors must have.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        target, _, part = _bare(key).rpartition(".")
        found.setdefault(target, {})[part] = tensor
    problems = [
        f"{target}: the model trains no such layer with this adapter." for target in found.keys() - targets.keys()
    ]
    problems += [f"{target}: the file has nothing for it." for target in targets.keys() - found.keys()]
    parsed = {}
    for target in found.keys() & targets.keys():
        shape, bias = targets[target]
        try:
            parsed[target] = parse_layer(found[target], shape, bias, schedule)
        except SliceFineError as error:
            problems.append(f"{target}: {error}")
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise SliceFineError(f"The file does not fit the adapter; nothing was loaded.\n{shown}{more}")
    return parsed


def parse_layer(parts: dict[str, Tensor], shape: Shape, bias: bool, schedule: Schedule) -> LayerValues:
    """The same for one target of `shape`; `parts` maps the last part of the key to the tensor."""
    step_tensor = parts.get(f"{PREFIX}step")
    if step_tensor is None or step_tensor.dtype != torch.int64 or step_tensor.ndim or int(step_tensor) < 0:
        raise SliceFineError(f"`{PREFIX}step` is one int64 number of at least 0; got {_describe(step_tensor)}.")
    step = int(step_tensor)
    region = Region.of(schedule.touched(step, shape))
    expected = {
        f"{PREFIX}weight": schedule.widest(shape),
        f"{PREFIX}row": (len(region.rows), shape[1]),
        f"{PREFIX}column": (len(region.columns), shape[0]),
        f"{PREFIX}step": (),
    } | ({f"{PREFIX}bias": (shape[0],)} if bias else {})
    for part in sorted(parts.keys() | expected.keys()):
        tensor = parts.get(part)
        if part not in expected:
            raise SliceFineError(f"`{part}` is not part of this adapter.")
        if tensor is None or tuple(tensor.shape) != expected[part]:
            raise SliceFineError(f"`{part}` has shape {expected[part]} after {step} steps; got {_describe(tensor)}.")
        if part == f"{PREFIX}step":
            continue
        if not tensor.is_floating_point():
            raise SliceFineError(f"`{part}` holds floating-point numbers; got {_describe(tensor)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise SliceFineError(f"`{part}` holds finite numbers; got NaN or Inf.")
    return LayerValues(
        step=step,
        master=parts[f"{PREFIX}weight"],
        values={axis: parts[PREFIX + axis] for axis in SLICE_AXES},
        bias=parts.get(f"{PREFIX}bias"),
    )


def _bare(key: str) -> str:
    return key.removeprefix(PEFT_ROOT)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
