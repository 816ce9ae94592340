"""The weights that SliceFine would train, one in memory at a time: of a model in files, which is not loaded, or of a model in memory.

Of files, the model is built from its `config.json` without values (on the meta device). It tells which weights there are, their shapes, which
are stored turned and where heads are; their names in the files are found as transformers finds them when it loads.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slicefine.analysis.heads import Heads, find_heads
from slicefine.errors import SliceFineError, first_line, listed, raise_all
from slicefine.slicing import Shape
from slicefine.training.export_source import BaseFiles
from slicefine.training.hub import model_problem
from slicefine.tuner import SliceFineConfig
from slicefine.tuner.base_layers import Place
from slicefine.tuner.config import ALL_LINEAR
from slicefine.tuner.targets import find_targets, weight_name

DOWNLOADED = (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, "model*.safetensors")
"""What is fetched of a model of the hub."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of values, by the names of safetensors, that are what they seem: smaller ones have a scale somewhere else."""

SAMPLES = 64
"""Values of a parameter by which models are told apart."""
FILE_SAMPLES, SAMPLE_BYTES = 4096, 64
"""How many pieces of a file, and how long."""


class Weights(ABC):
    """Weights by the names of their layers."""

    def __init__(self, name: str, places: Mapping[str, Place], model: nn.Module, device: torch.device) -> None:
        self.name = name
        """Of the model."""
        self.device = device
        """Where weights are read to."""
        self.shapes: dict[str, Shape] = {target: place.shape for target, place in places.items()}
        """`(d_out, d_in)` of each weight that can be read, in the order of the model."""
        self.heads: dict[str, Heads] = find_heads(model, places)
        """Where the heads are, of those weights that have some."""
        self.left_out: dict[str, str] = {}
        """Weights that cannot be read -> why."""
        self._places = places

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The weight `name`, `(d_out, d_in)`, fp32; it may be the model's own, and is not to be changed."""

    @abstractmethod
    def samples(self) -> Iterator[bytes]:
        """Some of the bytes of all weights, by which two models are told apart; quick, however large the model is."""

    def close(self) -> None:  # noqa: B027 -- most hold nothing
        """Give back the memory of what was read last."""

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        self.left_out |= reasons
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in reasons}


class LoadedWeights(Weights):
    """The weights of a model in memory, on the device where they are.

    Args:
        model: Any model; it is not changed.
        places: The weights; None = all linear layers of its backbone.
        name: Of the model.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place] | None = None, *, name: str = "") -> None:
        places = backbone_places(model) if places is None else places
        devices = [place.stored.device for place in places.values() if not place.stored.is_meta]
        super().__init__(name or type(model).__name__, places, model, devices[0] if devices else torch.device("cpu"))
        self._model = model
        self._leave_out(
            {name: "it has no values (meta device)" for name, place in places.items() if place.stored.is_meta}
        )

    def read(self, name: str) -> Tensor:
        return self._places[name].matrix.detach().to(self.device, torch.float32)

    def samples(self) -> Iterator[bytes]:
        for name, parameter in self._model.named_parameters():
            yield name.encode()
            if not parameter.is_meta:
                values = parameter.detach().reshape(-1)
                yield values[:: len(values) // SAMPLES + 1].to("cpu", torch.float32).numpy().tobytes()


class StoredWeights(Weights):
    """The weights of a model in safetensors files, read when they are asked for.

    Args:
        name: A folder with `config.json` and safetensors files, or a model of the hub, of which those files are fetched.
        device: Where weights are read to.

    Raises `SliceFineError` if there is no such model, or its files are in another format, damaged, quantized or of another model.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        folder = _find(name)
        files = _safetensors_of(folder)
        skeleton = build_without_values(folder)
        places = backbone_places(skeleton)
        self._paths = files
        super().__init__(name, places, skeleton, torch.device(device))
        self.config = skeleton.config
        """Of the model."""
        try:
            self._files = BaseFiles(files, skeleton)
        except (SafetensorError, OSError) as error:
            raise SliceFineError(
                f"The weights in {folder} cannot be read: {error}. Download or save the model again."
            ) from error
        self._refuse_other_shapes(folder)
        types = _types(files)
        reasons = {target: why for target in places if (why := self._why_not(target, types)) is not None}
        self._leave_out(reasons)
        if not self.shapes:
            raise SliceFineError(
                f"An analysis reads the linear weights of a model; of the {len(places)} of {type(skeleton).__name__}, as {folder / CONFIG_NAME} describes "
                f"it, none can be read from the files. {listed(f'{target}: {why}' for target, why in reasons.items())}"
            )

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        return place.oriented(self._files.read(weight_name(name, place))).to(self.device)

    def samples(self) -> Iterator[bytes]:
        for path in self._paths:
            size = path.stat().st_size
            yield f"{path.name} {size}".encode()
            with path.open("rb") as file:
                for at in range(0, size, max(size // FILE_SAMPLES, SAMPLE_BYTES)):
                    file.seek(at)
                    yield file.read(SAMPLE_BYTES)

    def close(self) -> None:
        self._files.tensors.close()

    def _refuse_other_shapes(self, folder: Path) -> None:
        problems = []
        for target, place in self._places.items():
            key = self._files.key_of.get(weight_name(target, place))
            stored, described = self._files.tensors.shapes.get(key or ""), tuple(place.stored.shape)
            if stored is not None and stored != described:
                problems.append(f"{key} has shape {stored} in the files, {described} by {CONFIG_NAME}.")
        raise_all(problems, f"The weights in {folder} are not those of the model that its {CONFIG_NAME} describes")

    def _why_not(self, target: str, types: Mapping[str, str]) -> str | None:
        """Why a weight cannot be read; None if it can."""
        name = weight_name(target, self._places[target])
        key = self._files.key_of.get(name)
        if key is None:
            made_of = [key for key, names in self._files.converted.items() if name in names]
            if made_of:
                return f"loading makes it of other tensors ({listed(made_of)}); load the model to analyse it"
            return "the files have no values for it: a new layer"
        return None if types[key] in FLOATS else f"it is stored as {types[key]}, which is quantized"


def backbone_places(model: nn.Module) -> dict[str, Place]:
    """Name -> weight of all that `target_modules="all-linear"` would train in `model`, heads left out.

    Which layers a task replaces is not known here: of a model with a head, those inside of its base model are taken.
    """
    found = find_targets(model, SliceFineConfig(target_modules=ALL_LINEAR))
    prefix = model.base_model_prefix if isinstance(model, PreTrainedModel) else ""
    if not prefix or not hasattr(model, prefix):
        return found
    return {name: place for name, place in found.items() if name.startswith(f"{prefix}.")}


def build_without_values(folder: Path) -> PreTrainedModel:
    """The model that `config.json` in `folder` describes, on the meta device, of the class that it names.

    Raises `SliceFineError` if transformers knows no such model, or it is quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise SliceFineError(
            f"transformers {transformers.__version__} cannot read {folder / CONFIG_NAME}: {first_line(error)}."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise SliceFineError(
            f"An analysis reads weights in bf16, fp16 or fp32; {folder} is quantized. Name the model it was made from."
        )
    named = (getattr(config, "architectures", None) or [""])[0]
    made: Any = getattr(transformers, named, None) if named else None
    known = isinstance(made, type) and issubclass(made, PreTrainedModel)
    try:
        with torch.device("meta"):
            return made(config) if known else AutoModel.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError, ImportError, KeyError, RuntimeError) as error:
        raise SliceFineError(
            f"transformers {transformers.__version__} builds no model from {folder / CONFIG_NAME} ({config.model_type}): {first_line(error)}."
        ) from error


def _find(name: str) -> Path:
    """The folder of the model `name`, its files fetched if need be. Raises `SliceFineError` if there is none."""
    folder = Path(name)
    if folder.is_file():
        raise SliceFineError(
            f"A model is a folder with a {CONFIG_NAME}, or a name on the hub; {name} is a file. Give its folder, {folder.parent}."
        )
    if problem := model_problem(name):
        raise SliceFineError(problem)
    if folder.is_dir():
        return folder
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SliceFineError(
            f"There is no folder {name!r}, and a model of that name was not downloaded: {first_line(error)}."
        ) from error
    return Path(found)


def _safetensors_of(folder: Path) -> list[Path]:
    """The files with the weights. Raises `SliceFineError` if some are not there, or there are none in this format."""
    if (single := folder / SAFE_WEIGHTS_NAME).is_file():
        return [single]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise SliceFineError(_no_safetensors(folder))
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SliceFineError(
            f"{index} names the file of each tensor in a `weight_map`; this one does not. Download it again."
        ) from error
    files = [folder / str(file) for file in named]
    absent = [file.name for file in files if file.parent != folder or not file.is_file()]
    if absent or not files:
        raise SliceFineError(
            f"{index} names files in its own folder; {listed(absent) or 'it names none'}: not there. Download the model again."
        )
    return files


def _no_safetensors(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter, and no model. `slicefine export {folder} --as merged` makes a model of it."
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
    there = f"it has {listed(others)} instead" if others else "it has no weights"
    return (
        f"Weights are read from safetensors files, one at a time and without running what a pickle may hold; {folder} has no {SAFE_WEIGHTS_NAME}: "
        f"{there}. transformers converts a model that you trust: "
        f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{folder}').save_pretrained('converted')\""
    )


def _types(files: list[Path]) -> dict[str, str]:
    """Key -> type of its values, by the name that safetensors has for it."""
    types: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            types |= {key: handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118 -- not a mapping
    return types
