"""What works on a tiny model of an architecture: it is trained, saved, merged and exported, and compared bit by bit."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
import transformers
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from slicefine import SliceFineConfig
from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.kernel import vectors
from slicefine.training.export import export
from slicefine.tuner.layer import SliceLayer

STEPS, SLIDE_EVERY = 20, 7
COLUMNS = "attach", f"{STEPS} steps", "disable", "save, load", "merge", "export merged", "export lora"
ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear"}


class Case(NamedTuple):
    """One row: an architecture and what of it is trained."""

    architecture: str
    settings: dict[str, Any] = ALL_LINEAR
    """Of `SliceFineConfig`."""
    otherwise: dict[str, str] = {}  # noqa: RUF012 -- of a tuple, which nobody changes
    """Column -> the word that is expected where it is not `yes`."""

    def __str__(self) -> str:
        return f"{self.architecture} {' '.join(self.settings_in_words)}"

    @property
    def settings_in_words(self) -> list[str]:
        return [f"`{name}={json.dumps(value)}`" for name, value in self.settings.items() if value is not None]


class Cell(NamedTuple):
    """What was found of one capability: `yes`, or another word and the reason."""

    word: str = "yes"
    reason: str = ""


class Found(NamedTuple):
    """What was found for one row."""

    layers: str
    left_out: str
    """Weights that no slice trains."""
    cells: dict[str, Cell]


class Bench:
    """A base model in a folder, an adapter trained on it, and what the two compute."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.architecture, self.folder = ARCHITECTURES[case.architecture], folder
        self.inputs = self.architecture.inputs()
        self.architecture.build().save_pretrained(folder / "base")
        self.base = self.load("base")
        self.before = self.outputs(self.base)
        head = [self.architecture.head] if self.architecture.head else None
        config = SliceFineConfig(
            r=2, slide_every=SLIDE_EVERY, task_type=self.architecture.task_type, modules_to_save=head, **case.settings
        )
        with warnings.catch_warnings(record=True) as self.warned:
            warnings.simplefilter("always", SliceFineWarning)
            self.model: Any = get_peft_model(copy.deepcopy(self.base), config)
        self.slices = {layer.name: layer for layer in self.model.modules() if isinstance(layer, SliceLayer)}
        self.trained_in_full = {
            key.replace("modules_to_save.default.", "").removeprefix("base_model.model.")
            for key in self.model.state_dict()
            if ".modules_to_save." in key
        }

    def load(self, name: str) -> Any:
        """A model from a folder, in memory of torch's own: fast kernels sum in an order that depends on addresses."""
        return copy.deepcopy(getattr(transformers, self.architecture.kind).from_pretrained(self.folder / name)).eval()

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        return {key: value for key, value in model.eval()(**self.inputs).items() if torch.is_tensor(value)}

    def train(self) -> list[str]:
        """`STEPS` optimizer steps; returns what is wrong with the gradients of slices, compared with full training at every position."""
        optimizer = torch.optim.AdamW(tiny.trainable(self.model), lr=3e-2, weight_decay=0.0)
        wrong, reached = set(), set()
        for step in range(STEPS):
            expected = None if step % SLIDE_EVERY else self.dense_gradients(step)
            self.backward(self.model, step)
            for name, layer in self.slices.items():
                found = layer.slicefine_weight["default"].grad
                if found is not None and bool(found.any()):
                    reached.add((name, step // SLIDE_EVERY))
                if expected is not None and not _is_slice_of(found, expected[self.keys[name]], layer):
                    wrong.add(f"another gradient than in full training: {name}")
            optimizer.step()
            optimizer.zero_grad()
        everywhere = {(name, step // SLIDE_EVERY) for name in self.slices for step in range(STEPS)}
        return sorted(wrong) + [f"no gradient at position {at}: {name}" for name, at in sorted(everywhere - reached)]

    def backward(self, model: Any, step: int) -> None:
        """A loss that everything has a part in: the model's own, if it gives one, or the distance from random logits."""
        torch.manual_seed(step)
        output = model.train()(**self.inputs, **self.architecture.training)
        if (loss := output.get("loss")) is None:
            target = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(3))
            loss = nn.functional.mse_loss(output.logits, target)
        loss.backward()

    def dense_gradients(self, step: int) -> dict[str, Tensor | None]:
        """Those of the same model if all of it is trained, by name of the parameter."""
        model = copy.deepcopy(self.model).merge_and_unload().requires_grad_(True)
        self.backward(model, step)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Target -> name of its parameter in the base."""
        return {name: name if name in self.base.state_dict() else f"{name}.weight" for name in self.slices}

    def left_out(self) -> list[str]:
        """Matrices and larger of which nothing is trained."""
        trained = {*self.keys.values(), *self.trained_in_full}
        return [
            key.removesuffix(".weight") for key, p in self.base.named_parameters() if p.dim() > 1 and key not in trained
        ]

    def changed(self, merged: nn.Module) -> tuple[list[str], list[str]]:
        """Targets that training left as they were, and keys that it changed beyond the touched rows and columns."""
        before, after = self.base.state_dict(), merged.state_dict()
        assert list(before) == list(after)
        differs = {key: before[key] != after[key] for key in before if key not in self.trained_in_full}
        still = [target for target, key in self.keys.items() if not differs[key].any()]
        for target, key in self.keys.items():
            layer = self.slices[target]
            region, matrix = layer.region("default"), layer.place.oriented(differs[key])
            matrix[list(region.rows)] = False
            matrix[:, list(region.columns)] = False
        return still, [key for key, where in differs.items() if where.any()]


def _is_slice_of(found: Tensor | None, whole: Tensor | None, layer: SliceLayer) -> bool:
    if found is None or whole is None:
        return found is whole
    active = layer.state.active
    expected = vectors(layer.place.oriented(whole), active.axis)[[*active.indices]]
    padded = torch.zeros_like(found)
    padded[: expected.shape[0], : expected.shape[1]] = expected
    return torch.allclose(found, padded, rtol=1e-3, atol=1e-6)


def counted(names: Iterable[str]) -> str:
    """The last parts of some names (down to the last that is no number), and how often they occur."""
    counts = Counter(re.findall(r"[^.]+(?:\.\d+)*$", name.removesuffix(".weight"))[0] for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def verdict(**checks: bool) -> Cell:
    """`yes` if all is so, `no` with what is not."""
    failed = [name.replace("_", " ") for name, passed in checks.items() if not passed]
    return Cell("no", f"not so: {', '.join(failed)}") if failed else Cell()


def examine(case: Case, folder: Path) -> Found:
    """Train, disable, save, load, merge and export."""
    try:
        bench = Bench(case, folder)
    except SliceFineError as error:
        return Found("", "", dict.fromkeys(COLUMNS, Cell("")) | {COLUMNS[0]: _refused(error, folder)})
    layers, left_out = f"{len(bench.slices)}: {counted(bench.slices)}", counted(bench.left_out())
    cells = {}

    attached = bench.outputs(bench.model)
    cells["attach"] = verdict(outputs_unchanged=same(attached, bench.before))
    texts = [str(warning.message) for warning in bench.warned if warning.category is SliceFineWarning]
    if texts and cells["attach"].word == "yes":
        cells["attach"] = Cell("warned", _rule(texts[0]))
    wrong = bench.train()
    trained = bench.outputs(bench.model)
    merged = copy.deepcopy(bench.model).merge_and_unload()
    still, beyond = bench.changed(merged)
    cells[COLUMNS[1]] = verdict(learns=not same(trained, attached))
    wrong += [f"not changed: {name}" for name in still] + [f"changed beyond what was touched: {key}" for key in beyond]
    if wrong:
        cells[COLUMNS[1]] = Cell("no", "; ".join(wrong))

    with bench.model.disable_adapter():
        disabled = bench.outputs(bench.model)
    enabled = bench.outputs(bench.model)
    cells["disable"] = verdict(disabled_is_base=same(disabled, bench.before), enabled_is_trained=same(enabled, trained))

    bench.model.save_pretrained(folder / "adapter")
    bench.base.config.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(bench.load("base"), folder / "adapter")
    cells["save, load"] = verdict(loaded_is_trained=same(bench.outputs(loaded), trained))

    unloaded = copy.deepcopy(bench.model).unload()
    cells["merge"] = verdict(
        merged_is_trained=same(bench.outputs(merged), trained),
        unloaded_is_base=same(bench.outputs(unloaded), bench.before) and not tiny.differences(unloaded, bench.base),
    )
    cells["export merged"] = _export_merged(bench, trained)
    cells["export lora"] = _export_lora(bench, merged, trained)
    return Found(layers, left_out, cells)


def _export_merged(bench: Bench, trained: dict[str, Tensor]) -> Cell:
    try:
        _export(bench, "merged")
    except SliceFineError as error:
        return _refused(error, bench.folder)
    return verdict(exported_is_trained=same(bench.outputs(bench.load("merged")), trained))


def _export_lora(bench: Bench, merged: nn.Module, trained: dict[str, Tensor]) -> Cell:
    """LoRA computes the same up to rounding, if the base is given the head that was trained in full."""
    head = bool(bench.trained_in_full)
    try:
        _export(bench, "lora", drop_biases_and_heads=head)
    except SliceFineError as error:
        return _refused(error, bench.folder)
    base = bench.load("base")
    base.load_state_dict({key: merged.state_dict()[key] for key in bench.trained_in_full}, strict=False)
    found = bench.outputs(PeftModel.from_pretrained(base, bench.folder / "lora"))
    for key in trained:
        torch.testing.assert_close(found[key], trained[key], rtol=1e-4, atol=1e-4)
    return Cell("different", HEAD_LEFT_OUT) if head else Cell()


HEAD_LEFT_OUT = (
    "The head was trained in full, which LoRA servers do not take: `--drop_biases_and_heads` leaves it out. With the head put into the base, "
    "the outputs are equal up to rounding."
)


def _export(bench: Bench, kind: str, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is no (tokenizer|image processor)")
        warnings.filterwarnings("ignore", "The base model .* is loaded as a whole")
        warnings.filterwarnings("ignore", "The LoRA adapter is not the whole")
        export(bench.folder / "adapter", kind, bench.folder / kind, **options)


def _refused(error: SliceFineError, folder: Path) -> Cell:
    return Cell("refused", _rule(str(error).replace(f"{folder}{os.sep}", "")))


def _rule(message: str) -> str:
    """What a message begins with, without what was found in this very model; PEFT's go on with sets, in an order that changes."""
    plain = re.sub(r"\s+", " ", re.sub(r" \([^()]*\)", "", message))
    return re.split(r"[.;] ", plain)[0].removesuffix(".") + "."
