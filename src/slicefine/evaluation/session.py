"""Where an evaluation writes to, and the account of one session of it, whatever it asks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from slicefine.errors import SliceFineError
from slicefine.evaluation import results
from slicefine.evaluation.models import Source
from slicefine.evaluation.results import Outcome
from slicefine.evaluation.settings import Settings
from slicefine.training import record as records
from slicefine.training.folder import ADAPTER, refuse_unwritable

FOLDER = "evaluation"
ANSWERS = ("answers.jsonl", "predictions.jsonl")
Kind = TypeVar("Kind", bound=Outcome)


def process_problems() -> list[str]:
    """What is wrong with how this process was started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return []
    return [f"`slicefine evaluate` runs in one process; WORLD_SIZE is {processes}. Start it without torchrun."]


def output_folder(settings: Settings, source: Source, name: str) -> Path:
    """Where answers go: `--output`, or `evaluation/<name>` in the run. Raises `SliceFineError` if they cannot go there."""
    if settings.output:
        folder = Path(settings.output)
    elif source.run and source.adapter and source.adapter.resolve() == (source.run / ADAPTER).resolve():
        folder = source.run / FOLDER / name
    else:
        raise SliceFineError(
            f"The answers of a run go into its folder; {settings.model} is no run. Name a folder with --output."
        )
    refuse_unwritable(folder)
    if folder.exists() and not folder.is_dir():
        raise SliceFineError(f"`--output` is a folder; {folder} is a file. Name another.")
    if (
        folder.is_dir()
        and (others := {path.name for path in folder.iterdir()})
        and not others & {*ANSWERS, results.FILE}
    ):
        raise SliceFineError(
            f"`--output` is a new or empty folder, or that of an evaluation; {folder} has other files in it. Name another."
        )
    return folder


def saved(kind: type[Kind], folder: Path) -> Kind | None:
    """The results in `folder` that a session goes on with. Raises `SliceFineError` for answers without results."""
    found = kind.read(folder)
    orphans = [name for name in ANSWERS if (folder / name).is_file()]
    if found is None and orphans:
        raise SliceFineError(
            f"{folder} has {orphans[0]} but no {results.FILE}: whose answers they are is not known. {results.OTHER_FOLDER}"
        )
    return found


def clear(folder: Path) -> None:
    """Make the folder; drop the answers that are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ANSWERS:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def session(
    result: Outcome, folder: Path, *, batch_size: int, counts: str, per_second: str
) -> Iterator[dict[str, Any]]:
    """Write the results when a session begins and when it ends, however it does.

    Args:
        counts: Name of what is counted, beside `per_second`; both begin at 0 and are raised by the caller.
        per_second: Name of the count whose speed is told, the last word of it: `tokens_per_second` for `generated_tokens`.

    Ctrl-C ends it with the status `"interrupted"` and is not raised.
    """
    this: dict[str, Any] = {
        "started": records.now(),
        "batch_size": batch_size,
        counts: 0,
        per_second: 0,
        "versions": records.versions(),
        "commit": records.commit(),
        "hardware": records.hardware(),
    }
    result.sessions.append(this)
    result.write(folder)
    began = time.perf_counter()
    try:
        yield this
        result.status = "finished"
    except KeyboardInterrupt:
        result.status = "interrupted"
    except BaseException:
        result.status = "failed"
        raise
    finally:
        seconds = time.perf_counter() - began
        speed = f"{per_second.rpartition('_')[2]}_per_second"
        this |= {"ended": records.now(), "seconds": round(seconds, 3), speed: round(this[per_second] / seconds, 1)}
        result.write(folder)
