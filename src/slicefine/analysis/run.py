"""`slicefine analyze`: the stages one after the other, each kept as soon as it is finished, and the verdicts on them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from slicefine.analysis import advice, balance, energy, global_winner, winners
from slicefine.analysis.record import AnalysisRecord
from slicefine.analysis.settings import ADVICE, BALANCE, ENERGY, GLOBAL, WINNERS, AnalysisSettings
from slicefine.analysis.subject import Subject
from slicefine.analysis.verdict import verdicts
from slicefine.analysis.weights import LoadedWeights, StoredWeights, Weights
from slicefine.errors import SliceFineError
from slicefine.training import record as records
from slicefine.training.folder import refuse_unwritable
from slicefine.training.recipe import Recipe

Say = Callable[[int, int, str], None]
ADVICE_FROM = (ENERGY, WINNERS)
"""Stages that the advice goes by."""


def analyze(settings: AnalysisSettings, model: str, recipe: Recipe | None, command: str) -> AnalysisRecord:
    """Analyse a model, and write `analysis.json` into the folder `settings.output` after every stage.

    What the folder has of the same analysis already is not found again. Ctrl-C ends it with the status `"interrupted"`; finished stages
    are kept.

    Args:
        model: Folder, or name on the hub.
        recipe: Its task and examples, for the stages that need them; None = the spectral balance alone, of files that are read one weight at
            a time.

    Raises `SliceFineError`, before anything is written, for what is wrong with model, data or folder, and for stages that need examples
    where there are none.
    """
    folder = Path(settings.output)
    refuse_unwritable(folder)
    saved = AnalysisRecord.read(folder)
    if recipe is None and (needing := [stage for stage in settings.stages if stage != BALANCE]):
        raise SliceFineError(
            f"The stages {', '.join(needing)} need examples: name a recipe, or --data.train FILE. Without, there is --stages {BALANCE}."
        )
    subject = None if recipe is None else Subject(recipe.resolved(), seed=settings.seed, untrained=settings.untrained)
    weights = _weights(settings, model, subject)
    record = _new(settings, model, subject, weights, command)
    if saved is not None:
        saved.refuse_other(record, folder)
        record.stages, record.seconds, record.made = saved.stages, saved.seconds, saved.made
    record.verdicts = verdicts(record.stages, record.failed)
    record.write(folder)
    try:
        for stage in settings.stages:
            if stage in record.stages:  # of those that are kept, `made` says where they come from
                continue
            _run(stage, settings, subject, weights, record)
            if stage in ADVICE_FROM:  # a kept advice knows nothing of it
                record.stages.pop(ADVICE, None)
            record.verdicts = verdicts(record.stages, record.failed)
            record.write(folder)
        record.status = "finished"
    except KeyboardInterrupt:
        record.status = "interrupted"
    except BaseException:
        record.status = "failed"
        raise
    finally:
        weights.close()
        record.ended = records.now()
        record.write(folder)
    return record


def _weights(settings: AnalysisSettings, model: str, subject: Subject | None) -> Weights:
    if subject is not None:
        return LoadedWeights(subject.model, subject.places, name=model)
    if not settings.untrained:
        return StoredWeights(model, device=torch.accelerator.current_accelerator() or "cpu")
    config = StoredWeights(model).config  # a model that cannot be read has no twin
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LoadedWeights(transformers.AutoModel.from_config(config, trust_remote_code=False), name=model)


def _new(
    settings: AnalysisSettings, model: str, subject: Subject | None, weights: Weights, command: str
) -> AnalysisRecord:
    known: dict[str, Any] = {"name": str(Path(model).resolve()) if Path(model).exists() else model}
    known |= {"class": None, "parameters": None, "fingerprint": _fingerprint(weights)}
    if subject is not None:
        known["class"] = type(subject.model).__name__
        known["parameters"] = sum(parameter.numel() for parameter in subject.model.parameters())
    return AnalysisRecord(
        model=known,
        untrained=settings.untrained,
        task=None if subject is None else subject.recipe.task,
        data={} if subject is None else subject.data,
        notes=[] if subject is None else list(subject.notes),
        recipe={} if subject is None else _of_recipe(subject),
        settings={**dataclasses.asdict(settings), "stages": list(settings.stages), "ranks": list(settings.ranks)},
        command=command,
        started=records.now(),
        versions=records.versions(),
        commit=records.commit(),
        hardware=records.hardware(),
    )


def _of_recipe(subject: Subject) -> dict[str, Any]:
    """Settings of model and data; what lies at their paths has digests."""
    paths = ("model.name", "data.train")
    settings = {
        key: value
        for key, value in subject.recipe.flat().items()
        if key.startswith(("model.", "data.")) and key not in paths
    }
    if isinstance(settings["data.validation"], str):
        del settings["data.validation"]
    return settings


def _fingerprint(weights: Weights) -> str:
    """A digest of values from all over the model."""
    digest = hashlib.sha256()
    for part in weights.samples():
        digest.update(part)
    return digest.hexdigest()[:16]


def _run(
    stage: str, settings: AnalysisSettings, subject: Subject | None, weights: Weights, record: AnalysisRecord
) -> None:
    began = time.perf_counter()
    with _bar(stage) as say:
        try:
            record.stages[stage] = _finite(_found(stage, settings, subject, weights, record.stages, say))
        except SliceFineError as error:
            record.failed[stage] = str(error)
        except Exception as error:  # the other stages may have something to say
            said = str(error).strip().splitlines()
            record.failed[stage] = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    record.seconds[stage] = round(time.perf_counter() - began, 2)
    record.made[stage] = {"at": records.now(), "commit": record.commit, "versions": record.versions}


def _found(
    stage: str,
    settings: AnalysisSettings,
    subject: Subject | None,
    weights: Weights,
    earlier: dict[str, dict[str, Any]],
    say: Say,
) -> dict[str, Any]:
    if stage == BALANCE:
        return balance.run(weights, settings, say)
    assert subject is not None
    if stage == ADVICE:
        return advice.run(subject, settings, say, earlier)
    return {ENERGY: energy, WINNERS: winners, GLOBAL: global_winner}[stage].run(subject, settings, say)


def _finite(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON has no form for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _bar(stage: str) -> Iterator[Say]:
    with tqdm(
        desc=stage, leave=False, bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} {remaining} left"
    ) as bar:

        def say(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield say
