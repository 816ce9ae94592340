"""The recipe of a run: typed settings, read from YAML, overridden from the command line, checked all at once.

The line under each field is its `--help`. Nothing heavy is imported here (no torch), so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from slicefine.errors import SliceFineError, raise_all
from slicefine.slicing import Schedule
from slicefine.training import recipe_checks as checks
from slicefine.training import schema
from slicefine.training.data import names_a_split
from slicefine.training.named import NAMED
from slicefine.training.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The pretrained model."""

    name: str
    """Hub name, or folder, of the pretrained model and its tokenizer"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto = as they are stored"""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )
    """How attention is computed, by transformers' names; null = as transformers chooses"""
    architecture: str | None = None
    """Its model_type in transformers, e.g. llama; for a smoke test (see train) where the model cannot be had"""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The examples: .jsonl, .json, .csv or .parquet files, folders of images or clips, or a data set of the hub."""

    train: str | None = None
    """File (.jsonl, .json, .csv, .parquet), folder of images or clips, or hub name, of the training examples; null = as name says"""
    name: str | None = None
    """A data set of the paper: sst2, pets, ucf101, ... (see docs/training.md): its metrics and, from the hub, its source and columns"""
    validation: float | str | None = None
    """File, split of the hub data set, or fraction of the training examples to split off (0 to 1); null = the split that name says, else 0.1"""
    subset: str | None = None
    """Configuration of a hub data set, e.g. sst2 of glue"""
    train_split: str = "train"
    """Split of a hub data set to train on"""
    text: str = "text"
    """Column of the text"""
    max_length: int = 256
    """Longest input in tokens; what is longer is cut at its end"""
    text_pair: str | None = None
    """text-classification: column of the second text, for pairs; null = single texts"""
    label: str = "label"
    """Column of the label: an integer or a string, or for a regression any number"""
    label_kind: Literal["class", "number"] = "class"
    """text-classification: number = regression on a label that is a number"""
    image: str = "image"
    """image-classification: column of the path, in a table"""
    video: str = "video"
    """video-classification: column of the path, in a table"""
    on_error: Literal["fail", "skip"] = "fail"
    """image-, video-classification: what to do with files that cannot be read: fail (naming all), or skip (counted and named)"""
    augmentation: list[str] | None = None
    """image-, video-classification: changes to training examples: crop, flip, color; null = none"""
    num_frames: int | None = None
    """video-classification: frames of a clip that the model sees, evenly spaced; null = as many as the model takes"""
    format: Literal["auto", "instruction", "prompt", "chat", "text"] = "auto"
    """causal-lm: what the columns are; auto = as their names say"""
    packing: bool = False
    """causal-lm: put several training examples into one sequence of max_length tokens"""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """causal-lm: what packing does to long examples: bfd cuts, bfd_split splits, wrapped joins all and cuts anywhere"""
    fully_cut: Literal["drop", "error"] = "drop"
    """causal-lm: an example of which max_length leaves nothing to learn: drop (counted and named), or error"""

    def __post_init__(self) -> None:
        if self.validation is None and not self.by_name:
            object.__setattr__(self, "validation", 0.1)

    @property
    def by_name(self) -> bool:
        """Whether source, splits and columns are those of the data set `name`."""
        return self.train is None and self.name is not None


@dataclass(frozen=True, kw_only=True)
class SliceSettings:
    """What is trained: the settings of SliceFineConfig."""

    r: int = 5
    """Rank: rows or columns in a slice"""
    axis: Literal["row", "column", "alternate", "coupled"] = "alternate"
    """row (output features), column (input features), alternate, or coupled (the same hidden features on both sides)"""
    slide_every: int | None = 500
    """Optimizer steps per position; null = the slice never moves"""
    order: Literal["sweep", "random"] = "sweep"
    """sweep (adjacent positions) or random (all positions once, then again in a new order)"""
    seed: int = 0
    """Seed of the random order"""
    depth_window: list[int] | None = None
    """Indices of blocks, each in turn the lowest one that is trained, e.g. [0, 2, 4]; null = all are"""
    depth_every: int = 25
    """Optimizer steps of each turn of depth_window"""
    depth_stack: str | None = None
    """Name of the list of blocks that depth_window counts in; null = the only one"""
    target_modules: str | list[str] = "all-linear"
    """Names or suffixes of layers, a regular expression, or all-linear"""
    target_parameters: list[str] | None = None
    """Names or suffixes of parameters that are no layer's weight, e.g. mlp.experts.down_proj"""
    exclude_modules: str | list[str] | None = None
    """Names or suffixes, or a regular expression, of layers to leave alone"""
    layers_to_transform: int | list[int] | None = None
    """Index or indices of the blocks to train; null = all"""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks that layers_to_transform counts in"""
    modules_to_save: list[str] | None = None
    """Further modules to train in full and save (new layers, e.g. the classifier, always are)"""
    bias: Literal["none", "slicefine_only"] = "none"
    """slicefine_only = train the biases of the targeted layers too"""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is trained: names as in transformers' TrainingArguments."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW"""
    num_train_epochs: float = 3.0
    """Passes over the training examples"""
    max_steps: int = -1
    """Length of the run in optimizer steps, in place of num_train_epochs; -1 = as num_train_epochs says"""
    per_device_train_batch_size: int = 16
    """Examples per forward pass in training"""
    per_device_eval_batch_size: int = 64
    """Examples per forward pass in validation"""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step"""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    """Shape of the learning rate over the run"""
    warmup_steps: float = 0.06
    """Optimizer steps until the peak learning rate; below 1 = fraction of the run"""
    weight_decay: float = 0.0
    """AdamW's weight decay; above 0 it shrinks pretrained weights"""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to; 0 = no clipping"""
    eval_steps: int | None = None
    """Optimizer steps between validations; null = at the end of each epoch"""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; null = at the end of each epoch"""
    save_total_limit: int | None = 2
    """Checkpoints to keep; null = all"""
    logging_steps: int = 10
    """Optimizer steps between logs"""
    seed: int = 42
    """Seed of the new layers, the order of examples and dropout"""
    bf16: bool = False
    """Compute in bfloat16 (autocast)"""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time"""
    dataloader_num_workers: int = 0
    """Processes that prepare batches; 0 = the main one"""
    report_to: str | list[str] = "tensorboard"
    """Where logs go: tensorboard (into the run folder), none, or other trackers that transformers knows"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run."""

    task: str
    """What the model learns: text-classification, image-classification, video-classification or causal-lm"""
    model: ModelSettings
    data: DataSettings
    output: str
    """Run folder, made by the run"""
    slice: SliceSettings = field(default_factory=SliceSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a YAML recipe; `overrides` maps dotted keys (`"slice.r"`) to values that win over the file's.

        Raises `SliceFineError` with every problem of the file and of the values.
        """
        return cls.of(schema.read_yaml(Path(path)), overrides, f"Recipe {path}")

    @classmethod
    def of(cls, content: dict[Any, Any], overrides: Mapping[str, Any] | None, where: str) -> Recipe:
        """The recipe that YAML `content` is, by sections or by dotted keys; as `load`, with `where` to begin messages."""
        given, problems = schema.flatten(cls, content)
        given |= overrides or {}
        values: dict[str, Any] = {}
        for key, value in given.items():
            try:
                values[key] = schema.typed(cls, key, value)
            except SliceFineError as error:
                problems.append(str(error))
        required = [key for key, setting in schema.settings(cls).items() if setting.default is schema.REQUIRED]
        problems += [f"`{key}` is missing: {_help(key)}." for key in required if key not in given]
        # What is missing or of another type has been noted; a stand-in lets the other values be checked with it.
        recipe = cls.from_flat(dict.fromkeys(required, next(iter(TASKS))) | values)
        raise_all(problems + recipe.problems(task_known="task" in values), where)
        return recipe

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from dotted keys; what is not named keeps its default."""
        nested: dict[str, Any] = {section: {} for section in schema.sections(cls)}
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (nested[section] if section else nested)[name] = value
        return cls(**nested | {section: kind(**nested[section]) for section, kind in schema.sections(cls).items()})

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted key."""
        values: dict[str, Any] = {}
        for key in schema.settings(Recipe):
            section, _, name = key.rpartition(".")
            values[key] = getattr(getattr(self, section) if section else self, name)
        return values

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults written out; `Recipe.load` reads it back to an equal recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def resolved(self) -> Recipe:
        """The same recipe with absolute paths, so that it means the same from any working directory, and with what
        `data.name` stands for. The values must have been checked (`problems`)."""
        flat = self.flat()
        if self.data.name:
            named = NAMED[self.data.name]
            flat["data.label_kind"] = named.label_kind
            if self.data.by_name:
                validation = {} if self.data.validation is None else {"data.validation": self.data.validation}
                flat |= {f"data.{name}": value for name, value in named.settings.items()} | validation
        local = {
            key: str(Path(value).resolve())
            for key, value in flat.items()
            if key in ("model.name", "data.train", "data.validation")
            and isinstance(value, str)
            and Path(value).exists()
            and not (key == "data.validation" and flat["data.train"] and names_a_split(value, flat["data.train"]))
        }
        return Recipe.from_flat({**flat, **local, "output": str(Path(self.output).resolve())})

    def problems(self, *, task_known: bool = True) -> list[str]:
        """Everything that is wrong with the values, one sentence each; empty if nothing is.

        `task_known`: False if `task` is a stand-in, by which no other setting can be judged.
        """
        return checks.problems(self, schema.settings(Recipe), task_known=task_known)

    @property
    def slice_schedule(self) -> Schedule:
        """Where the slices will be."""
        given = dataclasses.asdict(self.slice)
        names = [item.name for item in dataclasses.fields(Schedule) if item.name in given]
        return Schedule(**{name: given[name] for name in names})


def _help(key: str) -> str:
    return schema.settings(Recipe)[key].help
