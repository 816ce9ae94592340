"""From a run to an ordinary model: a folder that plain transformers loads, with nothing added."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.training.folder import ADAPTER
from slicefine.training.tasks import TASKS, Task, get_task

KINDS = {"merged": "an ordinary model folder, the slices in their places"}


def export(run: str | Path, kind: str, out: str | Path) -> Path:
    """Write the trained model to the new folder `out`; returns it.

    Args:
        run: Run folder, or adapter folder with the model's `config.json` and the tokenizer beside the adapter.
        kind: `"merged"`.
        out: Folder to make; nothing is written there unless all of it is.

    Raises `SliceFineError` for an unknown kind, a folder that is no run, an `out` with files in it, or another base
    model than the adapter was trained on.
    """
    if kind not in KINDS:
        raise SliceFineError(
            f"A run is exported as one of {', '.join(KINDS)}; got {kind!r}.{did_you_mean(kind, KINDS)}"
        )
    adapter, out = _adapter_folder(Path(run)), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SliceFineError(f"An export goes into a new or empty folder; {out} has something in it. Name another.")
    settings = {}
    for name in ("adapter_config.json", "config.json"):
        try:
            settings |= json.loads((adapter / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise SliceFineError(
                f"{adapter / name} is not complete JSON ({error}). Copy or save the adapter again."
            ) from error
    task = _task_of(settings.get("task_type"), adapter)
    name = settings.get("base_model_name_or_path")
    try:
        base = task.load_base(name, adapter)
    except (OSError, ValueError) as error:
        raise SliceFineError(
            f"The base model {name!r}, which {adapter / 'adapter_config.json'} names, did not load: {str(error).splitlines()[0]} Put it back "
            "there, or write its new place into the file."
        ) from error
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue]

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _adapter_folder(run: Path) -> Path:
    folder = run / ADAPTER if (run / ADAPTER).is_dir() else run
    missing = [name for name in ("adapter_config.json", "config.json") if not (folder / name).is_file()]
    if not missing:
        return folder
    if (run / "record.json").is_file():
        raise SliceFineError(
            f"Only a finished run is exported; {run} has no adapter yet. Finish it with `slicefine train --resume`."
        )
    fix = (
        "Write it with `model.config.save_pretrained(folder)`: it holds the classes and the number format."
        if missing == ["config.json"]
        else "Name a run folder that `slicefine train` made, or an adapter folder."
    )
    raise SliceFineError(
        f"{run} is not a run or an adapter that can be exported: no {' and no '.join(missing)} in {folder}. {fix}"
    )


def _task_of(task_type: str | None, adapter: Path) -> Task:
    tasks = {task.PEFT_TASK_TYPE: task for task in map(get_task, TASKS)}
    if task_type not in tasks:
        raise SliceFineError(
            f"Adapters with a task_type of {', '.join(tasks)} can be exported; {adapter / 'adapter_config.json'} has "
            f"{task_type!r}."
        )
    return tasks[task_type]
