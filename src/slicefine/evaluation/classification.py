"""One evaluation of a classifier, to `predictions.jsonl` and `results.json`.

Everything that can be wrong is found before the model is loaded, and nothing is written before all of it is right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from slicefine.errors import SliceFineError, raise_all
from slicefine.evaluation import contamination, labelled, models, overlap, predictions, sets
from slicefine.evaluation.contamination import Contamination
from slicefine.evaluation.generation import batches
from slicefine.evaluation.labelled import Labelled
from slicefine.evaluation.models import Source
from slicefine.evaluation.predictions import Prediction, Predictions, Scores
from slicefine.evaluation.session import clear, output_folder, saved, session
from slicefine.evaluation.settings import Settings
from slicefine.training import record as records
from slicefine.training.folder import RECIPE
from slicefine.training.recipe import DataSettings, Recipe


def evaluate(settings: Settings, source: Source, config: Any, task: str) -> Scores:
    """Predict every example that has no prediction in the output folder yet. As `run.evaluate`."""
    recipe = Recipe.load(source.run / RECIPE) if source.run and (source.run / RECIPE).is_file() else None
    trained = recipe.resolved().data if recipe else None
    classes = [] if config.num_labels == 1 else labelled.classes_of(config)
    chosen = sets.choose(settings, trained)
    if settings.suite is None and trained is None and not classes:
        chosen = [_of_numbers(one) for one in chosen]
    chosen = [sets.under_its_own_name(one, len(classes)) if classes else one for one in chosen]
    raise_all(labelled.head_problems(config, chosen), f"{settings.model} does not fit the data")
    folder = output_folder(settings, source, settings.suite or chosen[0].name)
    asked = {one.name: labelled.read(one, task, config, settings.limit) for one in chosen}
    checked = overlap.check(list(asked.values()), settings, source.run, trained, task, config)

    known: dict[str, Any] = {"suite": settings.suite, "task": task, "classes": classes}
    earlier = None if settings.overwrite else saved(Scores, folder)
    if earlier:
        earlier.refuse_other(settings.model, folder, **known)
        _refuse_other_data(earlier, asked, folder)
    found = Predictions(folder) if earlier else None

    processor = next(iter(asked.values())).examples.processor(source)
    model = models.load_model(source, config, task)
    known |= {"weights": models.fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    if earlier:
        earlier.refuse_other(settings.model, folder, **known)

    if found is None:
        clear(folder)
        found = Predictions(folder)
    result = _result(known, settings, source, asked, checked, earlier)
    _summarise(result, asked, found)
    workers = min(recipe.training.dataloader_num_workers, records.usable_cores()) if recipe else 0
    with session(result, folder, batch_size=settings.batch_size, counts="batches", per_second="examples") as this:
        for one in asked.values():
            _predict(one, classes, source, processor, model, found, this, workers)
    if result.status == "interrupted":
        found = Predictions(folder)  # Ctrl-C may have come when a batch was written and not counted yet
    _summarise(result, asked, found)
    result.write(folder)
    return result


def _of_numbers(one: sets.LabelledSet) -> sets.LabelledSet:
    data: DataSettings = dataclasses.replace(one.data, label_kind="number")
    return dataclasses.replace(one, data=data)


def _result(
    known: dict[str, Any],
    settings: Settings,
    source: Source,
    asked: dict[str, Labelled],
    checked: Contamination | None,
    earlier: Scores | None,
) -> Scores:
    titles = {name: {"title": one.of.title, **one.source} for name, one in asked.items()}
    return Scores(
        **known,
        model=settings.model,
        base=source.base,
        data=settings.data,
        limit=settings.limit,
        contamination=contamination.with_earlier(
            dataclasses.asdict(checked) if checked else None, earlier.contamination if earlier else None, asked
        ),
        sets=(earlier.sets if earlier else {}) | titles,
        tasks=earlier.tasks if earlier else {},
        sessions=earlier.sessions if earlier else [],
    )


def _refuse_other_data(earlier: Scores, asked: dict[str, Labelled], folder: Path) -> None:
    raise_all(
        [
            f"{name}: {earlier.sets[name]['source']} ({earlier.sets[name]['fingerprint'][:19]}) was predicted, and "
            f"{one.source['source']} ({one.source['fingerprint'][:19]}) is asked for now."
            for name, one in asked.items()
            if name in earlier.sets and earlier.sets[name]["fingerprint"] != one.source["fingerprint"]
        ],
        f"{folder} has predictions for other examples; start anew with --overwrite, or name another --output. What differs",
    )


def _predict(
    one: Labelled,
    classes: list[str],
    source: Source,
    processor: Any,
    model: PreTrainedModel,
    found: Predictions,
    session: dict[str, Any],
    workers: int,
) -> None:
    """Predict what is missing of a set, the longest texts first."""
    missing = [row for row in one.rows if (one.name, row + 1) not in found.found]
    if not missing:
        return
    inputs = one.examples.inputs(source, processor, model, missing)
    order = list(batches(inputs.lengths, session["batch_size"]))
    loader = DataLoader(inputs.dataset, batch_sampler=order, collate_fn=inputs.collator, num_workers=workers)
    done = len(one.rows) - len(missing)
    with tqdm(total=len(one.rows), initial=done, desc=one.name, unit="ex") as bar:
        for numbers, batch in zip(order, loader, strict=True):
            outputs = _outputs(model, batch)
            new = [
                _prediction(one, missing[number], classes, output)
                for number, output in zip(numbers, outputs, strict=True)
            ]
            found.append(new)
            session["batches"] += 1
            session["examples"] += len(new)
            bar.update(len(new))


@torch.inference_mode()
def _outputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits `(examples, outputs)`, float32, on the CPU. Raises `SliceFineError` if the batch does not fit into memory."""
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if name != "labels"
    }
    try:
        outputs = model(**given).logits.float().cpu()
    except torch.OutOfMemoryError as error:
        count = len(next(iter(given.values())))
        raise SliceFineError(
            f"A batch of {count} examples does not fit into memory. Give a smaller --batch_size; the same command goes on with "
            "the predictions there are."
        ) from error
    if not outputs.isfinite().all():
        raise SliceFineError(
            f"The model puts out NaN or infinity ({model.dtype}): nothing can be predicted. Train it again with a lower learning rate, or "
            "in a number format with a larger range."
        )
    return outputs


def _prediction(one: Labelled, row: int, classes: list[str], output: torch.Tensor) -> Prediction:
    number, table = int(output.argmax()), one.examples.table
    return Prediction(
        task=one.name,
        row=row + 1,
        place=table.places[row],
        label=one.labels[row],
        predicted=classes[number] if classes else float(output[0]),
        score=float(output.softmax(-1)[number]) if classes else None,
        **{name: predictions.kept(table.rows[row][column]) for name, column in one.texts.items()},
    )


def _summarise(result: Scores, asked: dict[str, Labelled], found: Predictions) -> None:
    """Of the sets that are asked for; those of earlier sessions stay as they are."""
    for name, one in asked.items():
        keys = [(name, row + 1) for row in one.rows]
        given = [found.found[key] for key in keys if key in found.found]
        result.tasks.pop(name, None)
        if given:
            result.tasks[name] = predictions.scores(given, one.of.data, result.classes) | {"asked": len(keys)}
    whole = result.tasks.keys() >= asked.keys() and all(s["examples"] == s["asked"] for s in result.tasks.values())
    result.average = predictions.average(result.tasks) if whole else None
