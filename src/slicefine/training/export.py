"""From a run to something that others can use: an ordinary model, a LoRA adapter, or the slices alone.

Nothing is written unless all of it is, and the run is only read.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import GENERATION_CONFIG_NAME

from slicefine.errors import SliceFineError, SliceFineWarning, did_you_mean, raise_all
from slicefine.training import export_check, export_lora, export_merged
from slicefine.training.export_source import LoadedBase, Source, Trained, open_source
from slicefine.training.folder import ADAPTER, how_to_finish

KINDS = {
    "merged": "an ordinary model folder, the slices in their places",
    "lora": "a PEFT LoRA adapter that is the slices exactly",
    "slices": "the slicefine adapter alone",
}
TOKENS_IN_FILE, PIXELS_IN_FILE = "tokenizer_config.json", "preprocessor_config.json"
PROCESSORS: dict[str, Any] = {TOKENS_IN_FILE: AutoTokenizer, PIXELS_IN_FILE: AutoImageProcessor}
"""The file by which it is known -> what loads it."""
COPIED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "config.json", GENERATION_CONFIG_NAME, "README.md")


def export(
    run: str | Path,
    kind: str,
    out: str | Path,
    *,
    verify: bool = True,
    drop_biases_and_heads: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the trained model to the new folder `out`; returns it.

    Args:
        run: Run folder, or adapter folder with the model's `config.json` beside the adapter.
        kind: One of `KINDS`.
        out: Folder to make; nothing is written there unless all of it is.
        verify: Compare the logits of what was written with those of the trained model. Needs memory for one model at a time; writing
            `merged` from safetensors files needs hardly any.
        drop_biases_and_heads: With `lora`, leave out what else was trained.
        trust_remote_code: Run the code of a base model that brings its own, as in transformers.
        say: Takes what was found and is being done, a line at a time.

    Raises `SliceFineError` for an unknown kind, a setting that the kind has no use for, a folder that is no run, an `out` with files in it or
    within the run, a disk that is too small, a damaged adapter, NaN, another base model than the adapter was trained on, trained
    biases, heads or layers that LoRA cannot hold, and an export that does not compute what the trained model does.
    """
    raise_all(_setting_problems(kind, verify, drop_biases_and_heads), "Export")
    adapter, place = _adapter_folder(Path(run)), Path(os.path.realpath(out))
    _refuse_place(place, Path(run), shown=out)
    settings = _settings(adapter)
    if kind == "slices":
        Trained(adapter)
        _refuse_small_disk(place, sum((adapter / name).stat().st_size for name in COPIED if (adapter / name).exists()))
        with _all_or_nothing(place) as folder:
            _write_slices(adapter, folder, trust_remote_code=trust_remote_code)
        return Path(out)
    source = open_source(adapter, settings, trust_remote_code=trust_remote_code)
    if verify and source.skeleton.main_input_name not in (export_check.TOKENS_IN, export_check.PIXELS_IN):
        raise SliceFineError(
            f"Exports of models that take tokens or pixels can be compared with the trained model; {type(source.skeleton).__name__} takes "
            f"{source.skeleton.main_input_name}. Export it with --no_verify."
        )
    if kind == "merged":
        _merged(source, place, verify, say)
    else:
        _lora(source, place, verify, drop_biases_and_heads, say)
    return Path(out)


def _merged(source: Source, place: Path, verify: bool, say: Callable[[str], None]) -> None:
    planned = export_merged.plan(source)
    _refuse_small_disk(
        place, export_merged.size(planned) if planned else sum(t.nbytes for t in source.skeleton.state_dict().values())
    )
    with _all_or_nothing(place) as folder:
        if planned:
            export_merged.write(source, planned, folder, say)
        else:
            _warn_of_loading(source)
            export_merged.load_and_write(source, folder)
        generation = source.find(GENERATION_CONFIG_NAME)
        if generation and source.skeleton.can_generate():
            shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
        _write_processor(source, folder)
        if verify:
            export_check.verify(source, folder)
            say("The logits of the exported model are those of the trained one, bit by bit")


def _lora(source: Source, place: Path, verify: bool, drop: bool, say: Callable[[str], None]) -> None:
    export_lora.refuse_what_lora_lacks(source, drop=drop)
    if source.files is None:
        _warn_of_loading(source)
    found = export_lora.factors(source, source.files or LoadedBase(source.load_base()))
    _refuse_small_disk(place, export_lora.size(found))
    export_lora.say_ranks(source, found, say, drop=drop)
    with _all_or_nothing(place) as folder:
        export_lora.write(source, found, folder, drop=drop)
        _write_processor(source, folder)
        if verify:
            export_lora.verify(source, folder, say)


def _write_slices(adapter: Path, folder: Path, *, trust_remote_code: bool) -> None:
    for name in COPIED:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    for name, loader in PROCESSORS.items():
        if (adapter / name).is_file():
            _copy_processor(loader, adapter, folder, trust_remote_code=trust_remote_code)
    Trained(folder)


def _write_processor(source: Source, folder: Path) -> None:
    """What makes the model's inputs: its tokenizer, or its image processor."""
    name = PIXELS_IN_FILE if source.skeleton.main_input_name == export_check.PIXELS_IN else TOKENS_IN_FILE
    found = source.find(name)
    if found is None:
        what = "image processor" if name == PIXELS_IN_FILE else "tokenizer"
        warnings.warn(
            f"There is no {what} beside the adapter in {source.trained.folder} or with its base model {source.name!r}; the export has none.",
            SliceFineWarning,
            stacklevel=4,
        )
        return
    _copy_processor(PROCESSORS[name], found.parent, folder, **source.trust)


def _copy_processor(loader: Any, place: Path, folder: Path, *, trust_remote_code: bool) -> None:
    settings = {"backend": "pil"} if loader is AutoImageProcessor else {}
    try:
        processor = loader.from_pretrained(place, trust_remote_code=trust_remote_code, **settings)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise SliceFineError(
            f"The {'image processor' if settings else 'tokenizer'} in {place} comes with code of its own, which is not run unasked. Read it, then "
            "allow it with --trust_remote_code."
        ) from error
    processor.save_pretrained(folder)


def _warn_of_loading(source: Source) -> None:
    warnings.warn(
        f"The base model {source.name!r} is loaded as a whole, which needs memory for all of it: {source.why_not}.",
        SliceFineWarning,
        stacklevel=4,
    )


def _setting_problems(kind: str, verify: bool, drop_biases_and_heads: bool) -> list[str]:
    if kind not in KINDS:
        return [f"a run is exported as one of {', '.join(KINDS)}; got {kind!r}.{did_you_mean(kind, KINDS)}"]
    problems = []
    if drop_biases_and_heads and kind != "lora":
        problems.append(f"only lora leaves biases and heads out; {kind} has all of them. Leave the flag out.")
    if not verify and kind == "slices":
        problems.append("slices are always checked; it needs no model. Leave --no_verify out.")
    return problems


def _refuse_place(place: Path, run: Path, *, shown: str | Path) -> None:
    try:
        taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
        there = next(folder for folder in place.parents if folder.exists())
        for name in place.relative_to(there).parts:
            (there / name).exists()  # raises for a name that is too long, also below a folder that is not there yet
    except OSError as error:
        raise SliceFineError(f"An export goes into a new or empty folder; {shown} cannot be one: {error}") from error
    if taken:
        raise SliceFineError(f"An export goes into a new or empty folder; {shown} has something in it. Name another.")
    if not there.is_dir():
        raise SliceFineError(
            f"An export goes into a new or empty folder; {shown} is below {there}, a file. Name another."
        )
    if os.path.ismount(place):
        raise SliceFineError(
            f"An export is renamed to its folder when all of it is there; {shown} is a mount point, which cannot be replaced. Name "
            "a folder in it."
        )
    if place.resolve().is_relative_to(run.resolve()):
        raise SliceFineError(
            f"An export leaves the run as it is; {shown} is within {run}. Name a folder outside of it."
        )


def _refuse_small_disk(place: Path, needed: int) -> None:
    there = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise SliceFineError(
            f"The export takes {needed:,} bytes; {there} has {free:,} free. Make room, or name a folder on another disk."
        )


@contextmanager
def _all_or_nothing(place: Path) -> Iterator[Path]:
    """A temporary folder that becomes `place` if all goes well, and is gone if not."""
    made = [folder for folder in place.parents if not folder.exists()]
    temporary = place.with_name(f".slicefine-export.{os.getpid()}")  # short: the name may be as long as names can be
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, place)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not made yet, or used by others since
                folder.rmdir()
        if isinstance(error, OSError):
            raise SliceFineError(f"The export to {place} failed, and nothing of it is left: {error}") from error
        raise


def _settings(adapter: Path) -> dict[str, Any]:
    for name in ("adapter_config.json", "config.json"):
        try:
            json.loads((adapter / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise SliceFineError(
                f"{adapter / name} is not complete JSON ({error}). Copy or save the adapter again."
            ) from error
    return json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))


def _adapter_folder(run: Path) -> Path:
    folder = run / ADAPTER if (run / ADAPTER).is_dir() else run
    missing = [name for name in ("adapter_config.json", "config.json") if not (folder / name).is_file()]
    if not missing:
        return folder
    if (run / "record.json").is_file():
        raise SliceFineError(f"Only a finished run is exported; {run} has no adapter yet. {how_to_finish(run)}")
    fix = (
        "Write it with `model.config.save_pretrained(folder)`: it holds the classes and the number format."
        if missing == ["config.json"]
        else "Name a run folder that `slicefine train` made, or an adapter folder."
    )
    raise SliceFineError(
        f"{run} is not a run or an adapter that can be exported: no {' and no '.join(missing)} in {folder}. {fix}"
    )
