"""`SliceFineConfig`: the settings of an adapter, and what a saved adapter says of itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from slicefine.errors import SliceFineError, did_you_mean, pattern_problems, raise_all
from slicefine.slicing import COUPLED, Layout, Schedule, Window
from slicefine.tuner import artifact
from slicefine.tuner.seal import Seal

BIASES = ("none", "slicefine_only")
ALL_LINEAR = "all-linear"
DEPTH_EVERY = 25
"""Optimizer steps of each turn of a depth window, where nothing else is said."""
HOW_TO_LOAD = """\
## How to load this adapter

It holds slices of the base model's own weights (SliceFine). PEFT learns of the method when `slicefine` is imported (`pip install slicefine`):

```python
import slicefine
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


class SliceFineType(str, enum.Enum):  # noqa: UP042 -- as PEFT's own, whose hash and repr its mappings rely on
    """PEFT's name for the method. A `str` enum like PEFT's own: transformers' loader asks for its `.value`."""

    SLICEFINE = "SLICEFINE"


@dataclass
class SliceFineConfig(PeftConfig):
    """Train one sliding slice of every targeted weight (SliceFine, ICML 2026).

    Raises `SliceFineError` that lists all problems at once.

    Args:
        r: Rank: rows or columns in a slice.
        axis: `"row"` (output features), `"column"` (input features), `"alternate"` (row, column, row, ...), or `"coupled"`: the same hidden
            features on both sides, rows of the weights that write them and columns of the weight that reads them. Weights without such a
            partner train rows.
        slide_every: Optimizer steps per position; None = the slice never moves (RoCoFT).
        order: `"sweep"` (adjacent blocks) or `"random"` (all blocks once, in a new seeded order on every pass).
        seed: Seed of the random order.
        target_modules: Names or suffixes of the layers to train, a regular expression, or `"all-linear"`: all `nn.Linear` but
            the output head. Convolutions and embeddings are trained if they are named. None if there are `target_parameters` alone.
        target_parameters: Names or suffixes of parameters to train that are no layer's weight, such as the matrices of all experts of a
            mixture in one, `["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`; of two dimensions or three.
        exclude_modules: Names, suffixes or a regular expression of layers to leave alone.
        layers_to_transform: Index or indices of the blocks to train; all if None.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in, e.g. `"layers"`.
        modules_to_save: Modules to train in full and save with the adapter, e.g. a new classifier head.
        bias: `"none"`, or `"slicefine_only"`: the biases of targeted layers are trained in full.
        couplings: With `axis="coupled"`, name of a target -> where the hidden features are in it. Found when the adapter is attached, and
            saved with it; for a model whose inputs its configuration does not tell, `slicefine.couplings(model, config, batch)` gives them.
        depth_window: Indices of blocks: each in turn is the lowest one that is trained. Below it nothing is trained and backpropagation
            ends, which saves time and, in that turn, memory. With `[0, 2, 4]` all blocks are trained for a third of the run.
        depth_every: Optimizer steps of each turn.
        depth_stack: Name of the list of blocks, found when the adapter is attached, and saved with it.
        init_weights: False adds noise to the first slice. For tests only.
        step: Set by saving: optimizer steps made. For readers; each layer's own are in its seal.
        seals: Set by saving: per target, what the base and the file must be; see `seal.py`.
        heads: Set by saving: digests of the modules trained in full.
    """

    r: int = field(default=1, metadata={"help": "Rank: rows or columns in a slice."})
    axis: str = field(default="alternate", metadata={"help": "row, column, alternate or coupled."})
    slide_every: int | None = field(
        default=500, metadata={"help": "Optimizer steps per position; None = the slice never moves."}
    )
    order: str = field(default="sweep", metadata={"help": "sweep or random."})
    seed: int = field(default=0, metadata={"help": "Seed of the random order."})
    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR, metadata={"help": "Names, suffixes or a regular expression of layers, or all-linear."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names or suffixes of parameters that are no layer's weight: experts, say."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of layers to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the blocks to train; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter."}
    )
    bias: str = field(default="none", metadata={"help": "none or slicefine_only."})
    couplings: dict[str, str] | None = field(
        default=None, metadata={"help": "With axis=coupled: where the hidden features are; found when None."}
    )
    depth_window: list[int] | None = field(
        default=None,
        metadata={"help": "Indices of blocks, each in turn the lowest one that is trained; None = all are."},
    )
    depth_every: int = field(default=DEPTH_EVERY, metadata={"help": "Optimizer steps of each turn of depth_window."})
    depth_stack: str | None = field(
        default=None, metadata={"help": "With depth_window: name of the list of blocks; found when None."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False adds noise to the first slice. For tests only."})
    step: int = field(default=0, metadata={"help": "Set by saving: optimizer steps made."})
    seals: dict[str, str] | None = field(
        default=None, metadata={"help": "Set by saving: what the base and the file must be."}
    )
    heads: dict[str, str] | None = field(
        default=None, metadata={"help": "Set by saving: digests of the modules trained in full."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._saving, self._saved_as = False, dict[str, Any]()
        self.peft_type = SliceFineType.SLICEFINE  # pyright: ignore[reportAttributeAccessIssue] -- PEFT's enum is closed
        problems = self.schedule.problems()
        if self.bias not in BIASES:
            problems.append(
                f"`bias` is one of {', '.join(BIASES)}; got {self.bias!r}.{did_you_mean(self.bias, BIASES)}"
            )
        if not self.target_modules and not self.target_parameters:
            problems.append(
                f"`target_modules` names the layers to train; got {self.target_modules!r}. Use {ALL_LINEAR!r}."
            )
        for name in ("target_modules", "exclude_modules"):
            problems += pattern_problems(name, getattr(self, name))
        if self.target_parameters and self.target_modules is None:
            self.target_modules = []  # None would let PEFT look for a default
        if isinstance(self.target_parameters, str):
            problems.append(
                f"`target_parameters` is a list of names; got {self.target_parameters!r}. Write [{self.target_parameters!r}]."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append(
                f"`layers_pattern` says where `layers_to_transform` counts; got layers_pattern={self.layers_pattern!r} "
                "alone. Give both or neither."
            )
        if (
            isinstance(self.target_modules, str)
            and self.layers_to_transform is not None
            and self.target_modules != ALL_LINEAR
        ):
            problems.append(
                "`layers_to_transform` works with a list of names; with a regular expression, put the indices into the "
                f"expression; got target_modules={self.target_modules!r}."
            )
        problems += self._coupling_problems() + self._window_problems()
        if not isinstance(self.step, int) or self.step < 0:
            problems.append(
                f"`step` counts optimizer steps and is written by saving; got {self.step!r}. Leave it alone."
            )
        for target, text in (self.seals or {}).items():
            try:
                Seal.parse(text)
            except SliceFineError as error:
                problems.append(f"{target}: {error}")
        raise_all(problems, "SliceFineConfig")

    @property
    def schedule(self) -> Schedule:
        """The part of the settings that decides every position; of one weight, see `schedule_of`."""
        return Schedule(r=self.r, axis=self.axis, slide_every=self.slide_every, order=self.order, seed=self.seed)

    def schedule_of(self, target: str) -> Schedule:
        """What decides every position in the weight of `target`."""
        text = (self.couplings or {}).get(target)
        schedule = self.schedule.along(None if text is None else Layout.parse(text))
        block = block_of(target, self.depth_stack) if self.depth_window else None
        if block is None:
            return schedule
        return replace(schedule, window=Window(tuple(self.depth_window or ()), self.depth_every, block))

    def _coupling_problems(self) -> list[str]:
        if self.couplings is None:
            return []
        form = "names of targets with texts such as 'row 0+384'"
        if not isinstance(self.couplings, dict):
            return [
                f"`couplings` is a dictionary, {form}; got {self.couplings!r}. Leave it out, and partners are found."
            ]
        found = []
        if self.axis != COUPLED:
            found.append(f"`couplings` are for axis='coupled'; got axis={self.axis!r}. Leave them out.")
        for target, text in self.couplings.items():
            if not isinstance(target, str) or not isinstance(text, str):
                found.append(f"`couplings` has {form}; got {target!r}: {text!r}. Leave it out, and partners are found.")
                continue
            try:
                Layout.parse(text)
            except SliceFineError as error:
                found.append(f"`couplings`: {target}: {error}")
        return found

    def _window_problems(self) -> list[str]:
        found = []
        window = self.depth_window
        if window is not None and not (isinstance(window, list | tuple) and window and all(map(_is_index, window))):
            found.append(
                f"`depth_window` is a list of indices of blocks, from 0 on, such as [0, 2, 4]; got {window!r}."
            )
        if not _is_index(self.depth_every) or self.depth_every < 1:
            found.append(f"`depth_every` is a number of optimizer steps, at least 1; got {self.depth_every!r}.")
        elif window is None and self.depth_every != DEPTH_EVERY:
            found.append(f"`depth_every` is for `depth_window`, which is None; got {self.depth_every!r}. Leave it out.")
        if self.depth_stack is not None and window is None:
            found.append(f"`depth_stack` is for `depth_window`, which is None; got {self.depth_stack!r}. Leave it out.")
        return found

    def describe(self, *, step: int, seals: dict[str, str], heads: dict[str, str]) -> None:
        """Say what the file holds beside which this configuration is saved next; said in that one file alone."""
        self._saved_as = {"step": step, "seals": seals, "heads": heads}

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in sorted order, so that saving twice writes the same file."""
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        return fields | (self._saved_as if self._saving else {})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; a model card in the folder gets a paragraph on how the adapter is loaded."""
        self._saving = True
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self._saving, self._saved_as = False, {}
        card = Path(save_directory, "README.md")
        if card.is_file() and HOW_TO_LOAD.splitlines()[0] not in (text := card.read_text(encoding="utf-8")):
            card.write_text(f"{text.rstrip()}\n\n{HOW_TO_LOAD}", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SliceFineConfig:
        """As PEFT's. The adapter beside the configuration is checked as a whole here, before anything touches the model.

        Raises `SliceFineError` if its values are missing, truncated, altered or not in safetensors format.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):
            raise SliceFineError(
                f"{pretrained_model_name_or_path} holds a {type(config).__name__}, not a {cls.__name__}. "
                "Load it with `PeftConfig.from_pretrained`."
            )
        if config.seals is not None:  # else it is a configuration alone
            download, _, _ = cls._split_kwargs(kwargs)
            file = artifact.locate(pretrained_model_name_or_path, subfolder, **download)
            artifact.check_file(file, config.schedule_of, config.seals, config.heads)
        return config


def block_of(target: str, stack: str | None) -> int | None:
    """Index of the block of the list `stack` that `target` is in; None if it is in none."""
    if stack is None or not target.startswith(f"{stack}."):
        return None
    index = target.removeprefix(f"{stack}.").partition(".")[0]
    return int(index) if index.isdecimal() else None


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
