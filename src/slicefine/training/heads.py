"""Classifiers as transformers loads them: which layers are new, and what becomes of a head that the files have already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from slicefine.errors import SliceFineError, first_line, listed, raise_all
from slicefine.training.recipe import ModelSettings


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier."""

    model: PreTrainedModel
    trained_in_full: list[str]
    """Modules without pretrained values, and the head."""
    notes: list[str]


def load_classifier(
    auto: Any,
    settings: ModelSettings,
    config: PretrainedConfig,
    why_not: Callable[[Exception], str],
    check: Callable[[dict[str, tuple[int, ...]]], None] = lambda resized: None,
) -> Classifier:
    """Load the model with a head for the classes of `config`.

    Args:
        auto: The class of transformers that loads it.
        settings: The model.
        config: Its configuration, with the classes of the task.
        why_not: What to say if it does not load.
        check: Takes the parameters of another size than in the files, with the size that they have now, and may raise.

    Raises `SliceFineError` if it does not load, or something other than its head has another size than its configuration says.
    """
    try:
        model, report = auto.from_pretrained(
            settings.name,
            config=config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head for other classes; the rest is looked at below
            trust_remote_code=False,
        )
    except ImportError as error:  # of flash attention
        raise SliceFineError(f"`model.attn_implementation`: {first_line(error)}.") from error
    except (OSError, ValueError) as error:
        raise SliceFineError(why_not(error)) from error
    check({key: tuple(made) for key, _, made in report["mismatched_keys"]})
    notes = replaced_head(report, settings.name, config.num_labels or 0) or _kept_head(settings.name, config)
    return Classifier(model, _trained_in_full(model, report), notes)


def load_base_classifier(auto: Any, name: str, folder: Path) -> PreTrainedModel:
    """The model `name` by the class `auto`, with the head and the dtype that `config.json` in `folder` says."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return auto.from_pretrained(
        name, config=config, dtype=config.dtype, ignore_mismatched_sizes=True, trust_remote_code=False
    )


def new_modules(report: dict[str, Any]) -> list[str]:
    """Modules without pretrained values, from what `from_pretrained(..., output_loading_info=True)` tells."""
    keys = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    return sorted({key.rpartition(".")[0] for key in keys})


def _trained_in_full(model: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    new = new_modules(report)
    kept = [
        head for head in SEQ_CLS_HEAD_NAMES if hasattr(model, head) and not any(n.split(".")[0] == head for n in new)
    ]
    return sorted([*new, *kept])


def _kept_head(name: str, config: PretrainedConfig) -> list[str]:
    """A note if training begins with the head of other classes."""
    stored = PretrainedConfig.get_config_dict(name)[0].get("id2label") or {}
    others, classes = [str(label) for label in stored.values()], [*(config.id2label or {}).values()]
    if len(others) != len(classes) or others == classes or all(label.startswith("LABEL_") for label in others):
        return []
    return [f"Training begins with the head in the files of {name}, whose {len(others)} classes are {listed(others)}."]


def replaced_head(loaded: dict[str, Any], name: str, outputs: int) -> list[str]:
    """A note if the head in the files of the model `name` was replaced by one with `outputs`; empty if it was not.

    The model must be loaded with `ignore_mismatched_sizes=True`. Raises `SliceFineError` if anything else has another size.
    """
    mismatched = [(key, tuple(stored), tuple(made)) for key, stored, made in loaded["mismatched_keys"]]
    raise_all(
        [
            f"{key} has shape {stored} in the files, {made} in the model that its config.json describes."
            for key, stored, made in sorted(mismatched)
            if made[0] != outputs or stored[1:] != made[1:]
        ],
        f"`model.name` {name!r} is damaged",
    )
    sizes = sorted({stored[0] for _, stored, _ in mismatched})
    return [
        f"The head of {size} classes in the files of {name} was replaced by a new one of {outputs}." for size in sizes
    ]
