"""`--engine lm-eval`: the model in the hands of lm-evaluation-harness, which scores the choices by their log-likelihood.

Its test sets, prompts and numbers of shots are its own; figures are those of its task definitions, not of our prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, first_line
from slicefine.evaluation import models, results
from slicefine.evaluation.models import Source
from slicefine.evaluation.results import Results
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import Task
from slicefine.training import record as records

TASKS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_iqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "openbookqa": "openbookqa",
    "gsm8k": "gsm8k",
}


def evaluate(settings: Settings, source: Source, folder: Path) -> Results:
    """Let the harness evaluate the model; writes `results.json`.

    Raises `SliceFineError` for tasks that it does not have, and if `folder` has results already.
    """
    names = harness_names(settings.chosen_tasks)
    if Results.read(folder) is not None and not settings.overwrite:
        raise SliceFineError(f"{folder} has results already. {results.OTHER_FOLDER}")
    model = models.load_model(source, models.load_config(source))
    result = Results(
        suite=settings.chosen_suite.name,
        engine=settings.engine,
        model=settings.model,
        base=source.base,
        weights=models.fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        limit=settings.limit,
    )
    started, began = records.now(), time.perf_counter()
    result.tasks = ask(
        model, models.load_tokenizer(source), names, batch_size=settings.batch_size, limit=settings.limit
    )
    result.average = results.average(result.tasks)
    result.status = "finished"
    result.sessions.append(
        {
            "started": started,
            "ended": records.now(),
            "seconds": round(time.perf_counter() - began, 3),
            "batch_size": settings.batch_size,
            "versions": records.versions() | {"lm_eval": version("lm_eval")},
            "commit": records.commit(),
            "hardware": records.hardware(),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder)
    return result


def harness_names(tasks: Sequence[Task]) -> dict[str, str]:
    """Our name -> the harness's name. Raises `SliceFineError` with the tasks that it does not have."""
    absent = [task.name for task in tasks if task.name not in TASKS]
    if absent:
        there = [task.name for task in tasks if task.name in TASKS]
        fix = (
            f"Name those that it has: --tasks {' '.join(there)}." if there else "Evaluate them with --engine generate."
        )
        raise SliceFineError(f"lm-evaluation-harness has no task for {', '.join(absent)}. {fix}")
    return {task.name: TASKS[task.name] for task in tasks}


def ask(
    model: Any, tokenizer: Any, tasks: Mapping[str, str | dict[str, Any]], *, batch_size: int, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores of a loaded model, by our name of the task.

    Args:
        tasks: Our name -> the harness's name, or its definition of a task.

    Raises `SliceFineError` if the harness does not get its test sets.
    """
    # Not checked: the extra `eval` may be missing where types are checked, and the harness's own are lost in its decorators.
    harness: Any = import_module("lm_eval")
    HFLM: Any = import_module("lm_eval.models.huggingface").HFLM  # noqa: N806 -- a class

    try:
        found = harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.values()),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except OSError as error:  # an unreachable hub, a data set that is not there
        raise SliceFineError(
            f"lm-evaluation-harness did not load its test sets: {first_line(error)}. Check the network."
        ) from error
    assert found is not None  # only a process other than the first gets None
    names = {ours: theirs if isinstance(theirs, str) else theirs["task"] for ours, theirs in tasks.items()}
    return {ours: _scores(found["results"][name], found["n-samples"][name]) for ours, name in names.items()}


def _scores(scores: Mapping[str, Any], samples: Mapping[str, int]) -> dict[str, Any]:
    """The harness's metrics, keyed `metric,filter`, as an accuracy with its interval."""
    metrics = {key.partition(",")[0]: value for key, value in reversed(list(scores.items())) if "_stderr" not in key}
    accuracy = metrics.get("acc", metrics.get("exact_match"))
    if accuracy is None:
        raise SliceFineError(f"lm-evaluation-harness gave no accuracy, but {', '.join(metrics)}.")
    questions = samples["effective"]
    normalised = {"acc_norm": metrics["acc_norm"]} if "acc_norm" in metrics else {}
    return results.proportion(round(accuracy * questions), questions) | normalised
