"""What an export is made of: a trained adapter, and the files of its base model, read a piece at a time.

No model is built for reading. A model without values (on the meta device) tells the names, shapes and dtypes, and the names in
the base's files are brought to those by the functions with which transformers loads.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from slicefine.errors import SliceFineError, first_line, listed, raise_all
from slicefine.kernel import vectors
from slicefine.slicing import SLICE_AXES
from slicefine.tuner import SliceFineConfig, artifact
from slicefine.tuner.base_layers import Place, present_values
from slicefine.tuner.seal import Seal
from slicefine.tuner.targets import find_targets, weight_name

CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
"""PEFT's `task_type` -> the class that loads the model."""
ENDINGS: dict[str, Any] = {
    "ForImageClassification": AutoModelForImageClassification,
    "ForVideoClassification": AutoModelForVideoClassification,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
"""The same where there is no `task_type`: how the name of the model's class ends, in its `config.json`."""
PIECE = 2**25
"""Bytes that are read at a time where a tensor is only copied."""


class Tensors:
    """The tensors of some safetensors files by their keys, read a piece at a time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 -- not a mapping
                    self.file_of[key] = file
                    self.shapes[key] = tuple(handle.get_slice(key).get_shape())
        self._open: tuple[Path, Any] | None = None
        self._read = 0

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A copy of a tensor, or of entries `start` to `stop` of its first dimension."""
        file = self.file_of[key]
        # What has been read through a file's mapping stays in memory until the mapping goes.
        if self._open is None or self._open[0] != file or self._read >= PIECE:
            self.close()
            self._open = file, safe_open(file, framework="pt").__enter__()
        tensor = self._open[1].get_tensor(key)
        copy = (tensor[start:stop] if tensor.dim() else tensor).clone(memory_format=torch.contiguous_format)
        self._read += copy.nbytes
        return copy

    def close(self) -> None:
        """Give the memory back."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
        self._open, self._read = None, 0


class Trained:
    """A trained adapter in a folder, checked as a whole.

    Raises `SliceFineError` if the file is not what was saved, or holds NaN or Inf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = SliceFineConfig.from_pretrained(str(folder))
        if self.config.seals is None:
            raise SliceFineError(
                f"{folder / 'adapter_config.json'} is a configuration alone, and nothing trained. Save the adapter with `save_pretrained`."
            )
        self.seals = {name: Seal.parse(text) for name, text in self.config.seals.items()}
        self.tensors = Tensors([folder / SAFETENSORS_WEIGHTS_NAME])
        self.heads = {
            artifact.bare(key): key
            for key in self.tensors.file_of
            if not artifact.is_ours(key) and not any(part in key for part in (".original_module.", ".modules_to_save."))
        }
        """Tensors of the modules trained in full, and embeddings of another size: name in the model -> key in the file."""
        bad = [key for key in self.tensors.file_of if not _finite(self.tensors.read(key))]
        if bad:
            raise SliceFineError(
                f"Only finite values are exported; {self.tensors.file_of[bad[0]]} has NaN or Inf in {listed(bad, 5)}. "
                "Train again with a lower learning rate or gradient clipping."
            )

    def layer(self, name: str, weight: Tensor, *, bias: bool) -> artifact.LayerValues:
        """What was trained in the target `name` of a base whose weight there is `weight` `(d_out, d_in, *kernel)`.

        `bias`: whether the layer has one. Raises `SliceFineError` if this is not the base that it was trained on.
        """
        target = artifact.Target(
            tuple(weight.shape),
            bias and self.config.bias != "none",
            self.config.schedule_of(name),
            functools.partial(present_values, weight),
        )
        own = [key for key in self.tensors.file_of if artifact.bare(key).rpartition(".")[0] == name]
        parts = {key: self.tensors.read(key) for key in own if artifact.is_ours(key)}
        return artifact.parse(parts, {name: target})[name]

    def patch(self, values: artifact.LayerValues, weight: Tensor) -> None:
        """Put what was trained into `weight` `(d_out, d_in, *kernel)`."""
        for axis in SLICE_AXES:
            index = torch.tensor(values.region.along(axis), dtype=torch.int64)
            vectors(weight, axis).index_copy_(0, index, values.values[axis].to(weight.dtype))


class BaseFiles:
    """The base model's values under the names of the loaded model, read from its safetensors files."""

    def __init__(self, files: list[Path], skeleton: PreTrainedModel) -> None:
        self.files = files
        self.tensors = Tensors(files)
        self.key_of: dict[str, str] = {}
        """Name in the loaded model -> key in the files, where the two hold the same values."""
        self.converted: dict[str, list[str]] = {}
        """Key in the files -> names in the loaded model, where loading makes other tensors of it (fused experts, say)."""
        self._dtypes = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        prefix, state = skeleton.base_model_prefix, skeleton.state_dict()
        for key in sorted(self.tensors.file_of, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                continue
            if pattern is None:
                self.key_of.setdefault(name, key)
            else:
                first, *others = next(c.target_patterns for c in converters if pattern in c.source_patterns)
                self.converted[key] = [name, *(name.replace(first, other) for other in others)]
        # What transformers notes when it loads, and asks for when it saves.
        vars(skeleton)["_weight_conversions"] = [conversion for conversion in conversions if conversion.was_used()]

    def read(self, name: str) -> Tensor:
        """The values of `name`, in the dtype of the loaded model."""
        return self.tensors.read(self.key_of[name]).to(self._dtypes[name])

    def pieces(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor `key` in `dtype`, a piece at a time."""
        shape = self.tensors.shapes[key]
        length = shape[0] if shape else 1
        step = max(1, PIECE * length // max(1, math.prod(shape) * dtype.itemsize))
        for start in range(0, length, step):
            yield self.tensors.read(key, start, start + step).to(dtype)


class LoadedBase:
    """The same from a loaded model, where the files cannot be read by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state = model.state_dict()

    def read(self, name: str) -> Tensor:
        """The values of `name`, in the dtype of the loaded model."""
        return self._state[name].clone()


@dataclass
class Source:
    """All that an export reads."""

    trained: Trained
    name: str
    """Folder or hub name of the base model."""
    model_class: Any
    model_config: Any
    dtype: torch.dtype
    """That of the base in training."""
    skeleton: PreTrainedModel
    """The model on the meta device."""
    places: dict[str, Place]
    """Target -> where its weight is in the skeleton."""
    files: BaseFiles | None
    """None: the base is read by loading it, because of `why_not`."""
    why_not: str
    trust: dict[str, Any]
    """Arguments of transformers' loaders about code that comes with a model."""
    revision: str | None
    """Of the base, on the hub."""

    def load_base(self) -> PreTrainedModel:
        """The base model as it was in training, new layers with random values."""
        try:
            return self.model_class.from_pretrained(
                self.name,
                config=self.model_config,
                dtype=self.dtype,
                revision=self.revision or "main",
                ignore_mismatched_sizes=bool(
                    self.trained.heads
                ),  # a head of another size was replaced by a trained one
                **self.trust,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _not_loaded(self.name, self.trained.folder, error) from error

    def load_trained(self) -> PeftModel:
        """The base model with the adapter."""
        return PeftModel.from_pretrained(self.load_base(), str(self.trained.folder)).eval()  # pyright: ignore[reportArgumentType]

    def find(self, file: str) -> Path | None:
        """The file of this name beside the adapter, or else beside the base."""
        for place in (str(self.trained.folder), self.name):
            found = cached_file(
                place,
                file,
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if found:
                return Path(found)
        return None

    @functools.cached_property
    def target_of(self) -> dict[str, str]:
        """Name of each parameter that has slices -> the target that it is the weight of."""
        return {weight_name(target, self.places[target]): target for target in self.trained.seals}

    def read(self, base: BaseFiles | LoadedBase, name: str, target: str) -> tuple[Tensor, Tensor, artifact.LayerValues]:
        """The parameter `name` of the base as it is stored, the same as `(d_out, d_in, *kernel)`, a view, and what was trained of it.

        Raises `SliceFineError` if this is not the base that `target` was trained on.
        """
        place = self.places[target]
        stored = base.read(name)
        weight = place.oriented(stored)
        return stored, weight, self.trained.layer(target, weight, bias=place.bias is not None)


def open_source(adapter: Path, settings: dict[str, Any], *, trust_remote_code: bool) -> Source:
    """Check the adapter and find its base.

    Args:
        adapter: Folder of the adapter, with the model's `config.json`.
        settings: What its `adapter_config.json` says.
        trust_remote_code: Run model code that comes with the model, as in transformers.

    Raises `SliceFineError` for a damaged adapter, a base that is not there, or one with other layers.
    """
    name, model_class = settings.get("base_model_name_or_path"), _model_class(adapter, settings.get("task_type"))
    trained = Trained(adapter)
    trust = {"trust_remote_code": trust_remote_code}  # without a word, transformers would ask on the terminal
    revision = settings.get("revision")
    try:
        config = AutoConfig.from_pretrained(adapter, **trust)
        dtype = getattr(torch, str(config.dtype or next(iter(trained.seals.values())).dtype).removeprefix("torch."))
        with torch.device("meta"):
            skeleton = model_class.from_config(config, dtype=dtype, **trust)
        _keep_wide(skeleton, dtype)
        found = _safetensors_of(name, config, revision)
        files = BaseFiles(found, skeleton) if found else None
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(name, adapter, error) from error
    places = find_targets(skeleton, trained.config)
    raise_all(
        _layer_problems(trained, skeleton, places), f"{adapter} does not fit the model that its config.json describes"
    )
    why_not = "its weights are not stored as safetensors"
    if files:
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        odd = [
            f"{key} has shape {files.tensors.shapes[key]} in the file, {shapes[parameter]} in the model."
            for parameter, key in files.key_of.items()
            if files.tensors.shapes[key] != shapes[parameter] and parameter not in trained.heads
        ]
        raise_all(odd, f"The base model {name!r} is not the one that {adapter / 'config.json'} describes")
        absent = [target for target in trained.seals if weight_name(target, places[target]) not in files.key_of]
        if absent:
            files, why_not = None, f"{absent[0]} has no tensor of its own in its files"
    return Source(trained, str(name), model_class, config, dtype, skeleton, places, files, why_not, trust, revision)


def _model_class(adapter: Path, task_type: str | None) -> Any:
    """The class that loads the model. Raises `SliceFineError` if neither its task nor its class is one that is known."""
    if task_type in CLASSES:
        return CLASSES[task_type]
    named = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8")).get("architectures") or [""]
    ending = next((ending for ending in ENDINGS if named[0].endswith(ending)), None)
    if task_type is None and ending:
        return ENDINGS[ending]
    raise SliceFineError(
        f"Adapters with a task_type of {', '.join(CLASSES)} can be exported, and classifiers of images and clips; "
        f"{adapter / 'adapter_config.json'} has {task_type!r}, and `architectures` in config.json is {named}. Write the `task_type` into adapter_config.json."
    )


def saved_names(skeleton: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The keys under which transformers' `save_pretrained` would write parameters. The files must have been read."""
    state = skeleton.state_dict()
    chosen = {name: state[name] for name in names}
    keys = {id(tensor): key for key, tensor in revert_weight_conversion(skeleton, chosen).items()}
    return {name: keys[id(tensor)] for name, tensor in chosen.items()}


def _not_loaded(name: str | None, adapter: Path, error: Exception) -> SliceFineError:
    if "trust_remote_code" in str(error):
        return SliceFineError(
            f"The model in {adapter} comes with code of its own, which is not run unasked. Read it, then allow it with --trust_remote_code."
        )
    return SliceFineError(
        f"The base model {name!r}, which {adapter / 'adapter_config.json'} names, did not load: {first_line(error)}. Put it "
        "back there, or write its new place into the file."
    )


def _safetensors_of(name: str | None, config: Any, revision: str | None) -> list[Path] | None:
    """The safetensors files of the base `name`, downloaded if need be; None if transformers must load it."""
    if name is None:
        raise ValueError("no name is given.")
    cached_file(name, CONFIG_NAME, revision=revision)  # raises if there is no model of this name
    if getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None):
        return None
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if found := cached_file(name, SAFE_WEIGHTS_NAME, **options):
        return [Path(found)]
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options):
        return [Path(file) for file in get_checkpoint_shard_files(name, index, revision=revision)[0] or []]
    return None


def _keep_wide(skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that transformers keeps in another dtype than `dtype` theirs, as loading does."""
    kept = skeleton._get_dtype_plan(dtype)
    if not kept:
        return
    pattern, of_group, _ = build_glob_alternation(list(kept))
    for name in skeleton.state_dict():
        if (found := pattern.search(name)) and found.lastgroup:
            tensor = skeleton.get_parameter_or_buffer(name)
            tensor.data = tensor.data.to(kept[of_group[found.lastgroup]])


def _layer_problems(trained: Trained, skeleton: PreTrainedModel, places: dict[str, Place]) -> list[str]:
    state = skeleton.state_dict()
    problems = []
    for name, seal in trained.seals.items():
        if name not in places:
            problems.append(f"{name}: the adapter trains it, the model has no such layer.")
        elif (dtype := str(places[name].stored.dtype).removeprefix("torch.")) != seal.dtype:
            problems.append(
                f"{name}: it was trained in {seal.dtype}, config.json says {dtype}. Write the dtype of the training into config.json."
            )
    for name, key in trained.heads.items():
        shape = trained.tensors.shapes[key]
        if name not in state:
            problems.append(f"{name}: the adapter has values for it, the model has no such parameter.")
        elif tuple(state[name].shape) != shape:
            problems.append(f"{name}: the adapter has shape {shape}, the model {tuple(state[name].shape)}.")
    return problems


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
