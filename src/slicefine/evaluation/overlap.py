"""Training examples that are in the labelled sets a classifier is scored on.

Texts are the same as in `contamination.normalised`, of pairs both; images and clips if they have the same bytes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.evaluation import inputs
from slicefine.evaluation.contamination import SHOWN, Contamination
from slicefine.evaluation.inputs import Examples
from slicefine.evaluation.labelled import Labelled
from slicefine.evaluation.sets import local
from slicefine.evaluation.settings import Settings
from slicefine.training.data import SUFFIXES
from slicefine.training.named import NAMED
from slicefine.training.recipe import DataSettings
from slicefine.training.record import RunRecord

SECONDS_BEFORE_BAR = 3.0


def check(
    sets: Sequence[Labelled], settings: Settings, run: Path | None, trained: DataSettings | None, task: str, config: Any
) -> Contamination | None:
    """Look for the examples of the sets among those of `--train_data`, or of the run; None if neither is known.

    Raises `SliceFineError` if any are found and that is not allowed; for training examples that are gone, or were changed.
    A split that is published with the training split is never refused: the figures of others are made on all of it.
    """
    if settings.train_data:
        base = trained or sets[0].of.data
        named = NAMED[base.name] if base.name else None
        training = [local(Path(name), base, named) for name in settings.train_data]
    else:
        training = [trained] if trained and trained.train and _is_there(trained.train, run) else []
    if not training:
        return None
    result = Contamination(sources=[str(data.train) for data in training], tasks=[found.name for found in sets])
    rows: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for data in training:
        examples = inputs.read(task, data, config)
        if run and not settings.train_data:
            _refuse_changed(examples, run)
        for found in sets:
            here, there = _same(examples, found)
            rows[found.name] += len(here)
            hit[found.name] += len(set(there))
            result.examples += [
                f"{examples.table.places[one]} -> {found.examples.table.places[other]}"
                for one, other in zip(here, there, strict=True)
            ]
    result.examples = result.examples[:SHOWN]
    result.rows = {name: count for name, count in rows.items() if count}
    result.questions = {name: hit[name] for name in result.rows}
    own = [found.name for found in sets if not any(_published(data, found.of.data) for data in training)]
    if not settings.allow_contamination and any(name in result.rows for name in own):
        result.refuse("examples that it is scored on", "test examples")
    return result


def _same(training: Examples, found: Labelled) -> tuple[list[int], list[int]]:
    """Rows of the training examples that are an example of the set, and the first such row there of each."""
    scored = set(found.rows)
    rows: dict[str, int] = {}
    for row, identity in enumerate(found.examples.identities(training)):
        if identity is not None and row in scored:
            rows.setdefault(identity, row)
    bar = tqdm(
        training.identities(found.examples),
        total=len(training.table.rows),
        desc="looking for test examples in the training examples",
        delay=SECONDS_BEFORE_BAR,
    )
    pairs = [(row, rows[identity]) for row, identity in enumerate(bar) if identity in rows]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _is_there(source: str, run: Path | None) -> bool:
    if Path(source).exists() or not (Path(source).is_absolute() or Path(source).suffix.lower() in SUFFIXES):
        return True  # or a data set of the hub
    warnings.warn(
        f"The training examples of {run}, {source}, are not there any more: whether test examples are among them cannot be "
        "checked. Name the file or folder with --train_data.",
        SliceFineWarning,
        stacklevel=3,
    )
    return False


def _refuse_changed(examples: Examples, run: Path) -> None:
    known = RunRecord.read(run).data.get("train", {}).get("fingerprint", "")
    # Those of the hub depend on the columns that are read.
    if known.startswith("sha256:") and known != examples.table.fingerprint:
        raise SliceFineError(
            f"The training examples, {examples.table.source}, were changed since the model was trained: whether test examples were "
            "among them cannot be checked. Put them back, or name the file or folder that has them with --train_data."
        )


def _published(training: DataSettings, scored: DataSettings) -> bool:
    same = (training.train, training.subset) == (scored.train, scored.subset)
    return same and training.train_split != scored.train_split
