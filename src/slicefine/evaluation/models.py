"""From the name that was given to a model that generates or classifies: runs, adapters, model folders and names of the hub."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slicefine.errors import SliceFineError, first_line
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import LABELLED, SUITES
from slicefine.training import record as records
from slicefine.training.folder import ADAPTER, how_to_finish
from slicefine.training.heads import new_modules
from slicefine.training.hub import model_problem
from slicefine.training.named import NAMED
from slicefine.training.record import RunRecord

AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "video-classification": AutoModelForVideoClassification,
}
"""Task -> the class of transformers that loads a model with the head for it."""
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForVideoClassification": "video-classification",
}
"""What the name of a class of transformers has in it -> task."""
GENERATE = ("ForCausalLM", "LMHead", "ForConditionalGeneration")
"""What the names of classes of language models have in them."""
TASK_TYPES = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "text-classification"}
"""PEFT's names of tasks; it has none for images and clips."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from."""

    name: str
    """As it was given."""
    base: str
    """Folder, or hub name, of the model; for an adapter, of its base."""
    adapter: Path | None = None
    run: Path | None = None
    """The run that it is of, where recipe and record are."""
    task_type: str | None = None
    """What the adapter says of its task; a key of `TASK_TYPES`."""
    revision: str | None = None
    """Branch, tag or commit of the base on the hub; None = its main branch."""

    @property
    def options(self) -> dict[str, Any]:
        """How everything of the base is loaded. If nothing is said of code, transformers asks on the terminal."""
        return {"revision": self.revision or "main", "trust_remote_code": False}


def find(name: str) -> Source:
    """What `name` is. Raises `SliceFineError` if it is nothing that can be evaluated."""
    folder = Path(name)
    kinds = "A run folder, an adapter folder, a model folder or the name of a model on the hub is evaluated"
    if not folder.exists():
        if problem := model_problem(name):
            raise SliceFineError(f"{kinds}. {problem.replace('`model.name`', 'The model')}")
        return Source(name=name, base=name)
    if (folder / ADAPTER / "adapter_config.json").is_file():
        return _adapter(name, folder / ADAPTER, folder)
    if (folder / records.FILE).is_file():
        raise SliceFineError(f"A finished run is evaluated; {folder} has no adapter yet. {how_to_finish(folder)}")
    if (folder / "adapter_config.json").is_file():
        around = (path for path in folder.resolve().parents if (path / records.FILE).is_file())
        return _adapter(name, folder, next(around, None))
    if (folder / "config.json").is_file():
        return Source(name=name, base=name)
    raise SliceFineError(f"{kinds}; {name} has no adapter_config.json and no config.json in it.")


def _adapter(name: str, adapter: Path, run: Path | None) -> Source:
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SliceFineError(f"{path} is not complete JSON ({error}). Copy or save the adapter again.") from error
    if settings.get("task_type") not in (*TASK_TYPES, None):
        raise SliceFineError(
            f"Language models and classifiers are evaluated (task_type {', '.join(TASK_TYPES)} or null); {path} has "
            f"{settings['task_type']!r}."
        )
    base = settings.get("base_model_name_or_path")
    if not base:
        raise SliceFineError(f"{path} does not name the base model. Write it into `base_model_name_or_path`.")
    if problem := model_problem(base):
        raise SliceFineError(
            f"The base model of {name}: {problem.replace('`model.name`', 'the model')} Put it back there, or write its new "
            f"place into {path}."
        )
    return Source(
        name=name,
        base=base,
        adapter=adapter,
        run=run,
        task_type=settings.get("task_type"),
        revision=settings.get("revision"),
    )


def task_of(source: Source, config: Any) -> str:
    """What the model does, a key of `AUTO`: as run, adapter or configuration say; a language model where none does."""
    if source.run:
        return RunRecord.read(source.run).task
    if source.task_type:
        return TASK_TYPES[source.task_type]
    for head, task in HEADS.items():
        if any(head in name for name in config.architectures or ()):
            return task
    # The configuration beside an adapter names the class of the base, which may have no head.
    if type(config) in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING:
        return "video-classification"
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "image-classification"
    return "causal-lm"


def refuse_other_suite(settings: Settings, task: str, source: Source, config: Any) -> None:
    """Raise `SliceFineError` unless the suite is one for models of this `task`."""
    fitting = [name for name in LABELLED if NAMED[LABELLED[name][0]].task == task] or list(SUITES)
    if settings.suite in fitting or (settings.suite is None and task != "causal-lm"):
        return
    headless = [name for name in config.architectures or () if not any(word in name for word in GENERATE)]
    if task == "causal-lm" and settings.classifies and headless and source.adapter is None:
        raise SliceFineError(
            f"A classifier is scored with the head that it was trained with; {settings.model}, a {headless[0]}, has no classification head. "
            f"Train one (`slicefine train` with --model.name {settings.model}), and evaluate the run."
        )
    what = "a language model" if task == "causal-lm" else f"for {task}"
    given = f"got --suite {settings.suite}" if settings.suite else "there is no --suite"
    own = " or ".join(f"--suite {name}" for name in fitting)
    labelled = ", or --data with labelled examples" if task != "causal-lm" else ""
    raise SliceFineError(
        f"A model is scored on what it does: {settings.model} is {what}; {given}. Give {own}{labelled}."
    )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the adapter, or that of the model."""
    beside = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    place = str(source.adapter) if beside else source.base
    try:
        return AutoTokenizer.from_pretrained(place, **source.options)
    except (OSError, ValueError) as error:
        raise SliceFineError(f"The tokenizer in {place} did not load: {_reason(error)}") from error


def load_image_processor(source: Source) -> BaseImageProcessor:
    """The processor saved beside the adapter, or that of the model; the version that works with Pillow."""
    beside = source.adapter is not None and (source.adapter / "preprocessor_config.json").is_file()
    place = str(source.adapter) if beside else source.base
    try:
        return AutoImageProcessor.from_pretrained(place, backend="pil", **source.options)
    except (OSError, ValueError) as error:
        raise SliceFineError(f"The image processor in {place} did not load: {_reason(error)}") from error


def load_config(source: Source) -> Any:
    """The model's configuration: that saved beside the adapter, which knows the dtype, or that of the model."""
    beside = source.adapter is not None and (source.adapter / "config.json").is_file()
    place = str(source.adapter) if beside else source.base
    try:
        return AutoConfig.from_pretrained(place, **source.options)
    except (OSError, ValueError) as error:
        raise SliceFineError(f"The configuration in {place} did not load: {_reason(error)}") from error


def load_model(source: Source, config: Any, task: str = "causal-lm") -> PreTrainedModel:
    """The model, its adapter merged, on the accelerator if there is one; in the dtype that `config` says.

    Raises `SliceFineError` if it does not load, and if a head would be left with random weights.
    """
    classifies = task != "causal-lm"
    try:
        loaded: Any = AUTO[task].from_pretrained(
            source.base,
            config=config,
            dtype=config.dtype or "auto",
            output_loading_info=True,
            # The files of the base may have a head for other classes, in place of which the adapter has its own.
            ignore_mismatched_sizes=classifies and source.adapter is not None,
            **source.options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SliceFineError(f"The model {source.base!r} did not load: {_reason(error)}") from error
    model, report = loaded
    random = new_modules(report) if classifies else []
    if source.adapter is not None:
        adapted = PeftModel.from_pretrained(model, str(source.adapter))
        trained = [
            name.removeprefix("base_model.model.")
            for name, module in adapted.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        ]
        random = [name for name in random if not any(f"{name}.".startswith(f"{own}.") for own in trained)]
        model = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
    if random:
        raise SliceFineError(
            f"A classifier is scored with the head that it was trained with; {source.name} has no values for {', '.join(random)}. "
            "Train it first (`slicefine train`), or name a model that has them."
        )
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # pyright: ignore[reportArgumentType] -- transformers wraps `to`
    return model.eval()


def fingerprint(model: PreTrainedModel) -> str:
    """Of the names, shapes and bytes of all weights; some seconds for billions of them."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, value = item
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        made = hashlib.blake2b(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        made.update(content.data)
        return made.digest()

    whole = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        for part in pool.map(digest, sorted(model.state_dict().items())):
            whole.update(part)
    return whole.hexdigest()


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model reads and writes at most, together; None if nothing limits them."""
    text = config.get_text_config()
    known = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    limits = [int(limit) for limit in known if limit and limit < 1e9]  # tokenizers without a limit say 1e30
    return min(limits, default=None)


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is not run here."
    return f"{first_line(error)}."
