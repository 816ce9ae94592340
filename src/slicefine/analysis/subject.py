"""What is analysed: a pretrained model with a task, its examples, copies to train for a few steps, and a twin with random weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from slicefine.errors import SliceFineError
from slicefine.training.recipe import Recipe
from slicefine.training.tasks import get_task
from slicefine.training.trainer import make_arguments, make_trainer
from slicefine.tuner import SliceFineConfig
from slicefine.tuner.base_layers import Place
from slicefine.tuner.config import ALL_LINEAR
from slicefine.tuner.targets import find_targets

Split = Literal["train", "validation"]
Batch = dict[str, Tensor]


class Subject:
    """A model and examples of its task, as `slicefine train` would have them.

    Args:
        recipe: Resolved; its slices and the length of its run are not used.
        seed: Of the new head, and of the twin's weights.
        untrained: Whether the model gets random weights in place of the pretrained ones.

    Raises `SliceFineError` for what is wrong with data or model.
    """

    def __init__(self, recipe: Recipe, *, seed: int = 0, untrained: bool = False) -> None:
        task = get_task(recipe.task)
        examples = task.read(recipe.data)
        transformers.set_seed(seed)
        prepared = task.prepare(recipe, examples)
        self.recipe, self.name = recipe, recipe.model.name
        self.data: dict[str, Any] = examples.summary()
        self.notes = prepared.notes
        self.new_modules = prepared.new_modules
        """Names of the modules without pretrained values: trained in full in short runs, and never counted as slices."""
        self.device = torch.device(torch.accelerator.current_accelerator() or "cpu")
        self._pretrained = _still(prepared.model).to(self.device)  # pyright: ignore[reportArgumentType] -- transformers' annotation of `to` has no devices
        self.model: PreTrainedModel = self.untrained(seed) if untrained else self._pretrained
        """In eval mode; no parameter wants a gradient."""
        if not self.places:
            raise SliceFineError(
                f"An analysis looks at linear layers with pretrained weights; {type(self.model).__name__} has none beside its new head."
            )
        with tempfile.TemporaryDirectory() as folder:
            arguments = make_arguments(recipe, task, Path(folder), report_to="none", save_strategy="no")
            # TRL changes the forward pass of the model that it is given.
            trainer = make_trainer(task, prepared, self.copy(), arguments, [])
        self._sets: dict[str, Any] = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
        self._collate: Any = trainer.data_collator

    @property
    def places(self) -> dict[str, Place]:
        """Name -> weight of everything that "all-linear" trains in `model`, new modules left out."""
        return places_of(self.model, self.new_modules)

    def count(self, split: Split) -> int:
        """How many examples there are."""
        return len(self._sets[split])

    def batches(self, split: Split, *, size: int, count: int, seed: int) -> list[Batch]:
        """`count` batches of `size` examples on the device: drawn without replacement, and again from the start where there are too few."""
        examples = self._sets[split]
        if not len(examples):
            raise SliceFineError(f"An analysis needs examples; there is none to {split}.")
        generator, order = torch.Generator().manual_seed(seed), list[int]()
        while len(order) < size * count:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen = [order[at : at + size] for at in range(0, size * count, size)]
        return [self._batch([examples[number] for number in numbers]) for numbers in chosen]

    def examples(self, split: Split, *, count: int, seed: int) -> list[Batch]:
        """`count` batches of one example each, or as many as there are, all different."""
        return self.batches(split, size=1, count=min(count, self.count(split)), seed=seed)

    def _batch(self, examples: list[Any]) -> Batch:
        made: Mapping[str, Any] = self._collate(examples)
        return {key: value.to(self.device) for key, value in made.items() if isinstance(value, Tensor)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar computed in fp32 whatever the weights are: 16 bits are coarser than what a slice changes."""
        output = cast(Any, model)(**batch)
        if output.loss.dtype == torch.float32:
            return output.loss
        # transformers computes that of a classifier in the dtype of its logits.
        logits, labels = output.logits.float(), batch["labels"]
        if labels.is_floating_point():
            return F.mse_loss(logits.squeeze(-1), labels.float())
        return F.cross_entropy(logits, labels)

    def copy(self) -> PreTrainedModel:
        """A copy of `model` with the same bits, in eval mode."""
        return copy.deepcopy(self.model)

    def untrained(self, seed: int) -> PreTrainedModel:
        """A model of the same shapes and dtype whose weights are drawn as its own class draws them, in eval mode.

        The new head has the same values, so that a task begins alike.
        """
        pretrained = self._pretrained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin: PreTrainedModel = type(pretrained)(copy.deepcopy(pretrained.config))
        twin = _still(twin).to(dtype=pretrained.dtype, device=self.device)  # pyright: ignore[reportCallIssue]
        for name in self.new_modules:
            twin.get_submodule(name).load_state_dict(pretrained.get_submodule(name).state_dict())
        return twin


def places_of(model: PreTrainedModel, new_modules: list[str] | None = None) -> dict[str, Place]:
    """Name -> weight of every linear layer of `model` but the output layer and `new_modules`."""
    found = find_targets(model, SliceFineConfig(target_modules=ALL_LINEAR))
    within = tuple(f"{module}." for module in new_modules or ())
    return {name: place for name, place in found.items() if not f"{name}.".startswith(within)}


def _still(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    return model.eval()
