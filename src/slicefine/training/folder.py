"""The run folder, and whether a run may begin or go on in it:

recipe.yaml     the recipe, defaults written out, paths absolute
record.json     what ran, on what, how long, and how well
history.json    losses, learning rates and validations, step by step, and the moves
slices.json     where the slices of every weight are and were, and how far what they touched has moved
adapter/        the PEFT adapter, the model's configuration and the tokenizer
checkpoints/    transformers' checkpoints, to resume from
logs/           TensorBoard
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, SliceFineWarning, listed, raise_all
from slicefine.training import record
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord

RECIPE = "recipe.yaml"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
# A resumed run may differ in these and still be the same run.
FREE_TO_CHANGE = {
    "output",
    "training.dataloader_num_workers",
    "training.per_device_eval_batch_size",
    "training.report_to",
    "training.save_total_limit",
}
RNG_STATE = "rng_state.pth"
NEEDED_TO_BE_EXACT = ("optimizer.pt", "scheduler.pt", RNG_STATE)


def refuse_unwritable(folder: Path, flag: str = "--output") -> None:
    """Raise `SliceFineError` unless files can be put into `folder`, which `flag` names, or it can be made."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if place.is_dir() or place != folder:  # that it is a file is said by those who know what it is for
            os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise SliceFineError(
            f"`{flag}` is a folder that can be written; nothing can be made in {folder} ({error.strerror}). Name another."
        ) from error


def refuse_used(folder: Path) -> None:
    """Raise `SliceFineError` unless `folder` is new or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / record.FILE).is_file():
        what = "has other files in it" if folder.is_dir() else "is a file"
        raise SliceFineError(f"`output` is a new or empty folder; {folder} {what}. Choose another with --output.")
    status = RunRecord.read(folder).status
    resume = "Go on with it with --resume, or choose" if last_checkpoint(folder) and status != "finished" else "Choose"
    raise SliceFineError(
        f"`output` is a new or empty folder; {folder} holds another run ({status}). {resume} another with --output."
    )


def remove_empty(folder: Path) -> None:
    """Remove a run folder in which nothing has been written yet."""
    for path in (folder / CHECKPOINTS, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def how_to_finish(folder: Path) -> str:
    """What to do with a run that has no adapter, in a sentence."""
    record = RunRecord.read(folder)
    if record.status == "failed":
        return f"It failed ({record.error}). Start another run with a recipe that is mended."
    return f"Finish it with `slicefine train {folder / RECIPE} --resume`."


def checkpoint_to_resume(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint to go on from. Raises `SliceFineError` if the run in `folder` is over, or not that of `recipe`."""
    if not (folder / RECIPE).is_file():
        raise SliceFineError(
            f"--resume goes on with the run in `output`; there is none in {folder}. Start it without --resume."
        )
    record = RunRecord.read(folder)
    if record.status == "finished":
        raise SliceFineError(
            f"The run in {folder} is finished; nothing is left to resume, and a finished run cannot be made longer: its learning "
            f"rate ends with its {record.steps} steps. Start a longer one with --output, or one that goes on from the trained "
            f"model: `slicefine export {folder} --as merged MODEL_FOLDER`, then --model.name MODEL_FOLDER and --output."
        )
    saved = Recipe.load(folder / RECIPE).flat()
    changed = [
        f"`{key}` was {saved[key]!r} and is {value!r} now."
        for key, value in recipe.flat().items()
        if value != saved[key] and key not in FREE_TO_CHANGE
    ]
    raise_all(
        changed,
        f"--resume goes on with the same recipe, {folder / RECIPE}. Give that one, or start another run with --output. "
        "What differs",
    )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise SliceFineError(
            f"--resume goes on from a checkpoint; there is none in {folder / CHECKPOINTS}. Delete {folder} and start again "
            "without --resume. (`training.save_steps` decides how often checkpoints are written.)"
        )
    return checkpoint


def refuse_inexact(checkpoint: Path, *, allowed: bool) -> None:
    """Raise `SliceFineError` if a file is gone without which a run goes on differently; only warn if that is `allowed`.

    Trainer itself goes on without a word.
    """
    missing = [file for file in NEEDED_TO_BE_EXACT if not (checkpoint / file).is_file()]
    if not missing:
        return
    lost = []
    if missing != [RNG_STATE]:
        lost.append("the optimizer's moments and the learning rate start anew (transformers loads both or neither)")
    if RNG_STATE in missing:
        lost.append("dropout draws other numbers")
    what = f"{checkpoint} has no {' and no '.join(missing)}: {', and '.join(lost)}"
    if not allowed:
        raise SliceFineError(
            f"--resume goes on as if the run had never been stopped; it cannot here. {what}. Put the file back, delete this "
            "checkpoint to go on from an earlier one, or accept the difference with --allow_inexact_resume."
        )
    warnings.warn(
        f"{what}. The run will end differently from one that was never stopped.", SliceFineWarning, stacklevel=2
    )


def refuse_other_data(saved: RunRecord, data: dict[str, Any], folder: Path) -> None:
    """Raise `SliceFineError` unless a run goes on with the examples it began with."""
    changed = [name for name in data if saved.data.get(name) != data[name]]
    if changed:
        what = "; ".join(f"{name}: {_difference(saved.data.get(name), data[name])}" for name in changed)
        raise SliceFineError(
            f"--resume goes on with the same examples; since the run in {folder} began, they changed ({what}). Put the data back, or "
            "start another run with --output."
        )


def _difference(was: Any, now: Any) -> str:
    """What differs between two values of the data in a record, in words."""
    if isinstance(was, list) and isinstance(now, list):
        gone, new = [one for one in was if one not in now], [one for one in now if one not in was]
        named = [f"{word} {listed(map(repr, names))}" for word, names in (("without", gone), ("with", new)) if names]
        return f"{len(was)}, now {len(now)}{', ' + ' and '.join(named) if named else ', in another order'}"
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f"{was!r}, now {now!r}"
    parts = [
        f"{was.get(key) or 0} {called}, now {now.get(key) or 0}"
        for key, called in (("examples", "examples"), ("skipped", "files left out"))
        if was.get(key) != now.get(key)
    ]
    if was.get("source") != now.get("source"):
        parts.insert(0, f"from {was.get('source')}, now {now.get('source')}")
    return ", ".join(parts) or f"{now.get('examples')} examples as before, but others, or changed ones"


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a run. Trainer writes its state last: one without it was cut off."""
    found = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps made when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
