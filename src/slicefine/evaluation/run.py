"""One evaluation, from a name and a suite to `answers.jsonl` and `results.json`.

Everything that can be wrong is found before the model is loaded, and nothing is written before all of it is right.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slicefine.errors import SliceFineError, SliceFineWarning, raise_all
from slicefine.evaluation import answers as store
from slicefine.evaluation import contamination, models, questions, results, scoring
from slicefine.evaluation.answers import Answer, Answers
from slicefine.evaluation.contamination import Contamination, TrainingSet
from slicefine.evaluation.generation import Generator, Ids, batches, encode
from slicefine.evaluation.models import Source
from slicefine.evaluation.questions import Question, Questions
from slicefine.evaluation.results import Results
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import Task, get_suite
from slicefine.training import record as records
from slicefine.training.folder import ADAPTER

FOLDER = "evaluation"
MANY_EMPTY = 0.1
SHOWN = 5
Key = tuple[str, int]


def evaluate(settings: Settings) -> Results:
    """Ask the model every question of the suite that is not answered in the output folder yet.

    Ctrl-C keeps the answers of finished batches and returns results with the status `"interrupted"`; the same settings go on.

    Raises `SliceFineError` for what is wrong with settings, model, test sets or output folder, before the folder is changed.
    """
    raise_all(settings.problems() + _process_problems(), "Evaluation")
    source = models.find(settings.model)
    folder = output_folder(settings, source)
    if settings.engine == "lm-eval":
        from slicefine.evaluation import harness

        return harness.evaluate(settings, source, folder)

    asked = questions.read(settings.chosen_tasks, settings.data, settings.limit)
    checked = _contamination(settings, source, asked)
    config, tokenizer = models.load_config(source), models.load_tokenizer(source)
    tokens = _encoded(asked, tokenizer)
    _refuse_too_long(tokens, models.context_length(config, tokenizer), settings)

    known = {
        "suite": settings.suite,
        "engine": settings.engine,
        "max_new_tokens": settings.longest_answer,
        "num_beams": settings.num_beams,
    }
    saved = None if settings.overwrite else _saved(folder)
    if saved:
        saved.refuse_other(settings.model, folder, **known)
    answers = Answers(folder) if saved else None
    if answers:
        every = [question for found in asked.values() for question in found]
        answers.refuse_others(every, {key: len(ids) for key, ids in tokens.items()})

    model = models.load_model(source, config)
    known |= {"weights": models.fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    if saved:
        saved.refuse_other(settings.model, folder, **known)
    generate = Generator(model, tokenizer, max_new_tokens=settings.longest_answer, num_beams=settings.num_beams)

    folder.mkdir(parents=True, exist_ok=True)
    if answers is None:
        (folder / store.FILE).unlink(missing_ok=True)
        answers = Answers(folder)
    result = Results(
        **known,
        model=settings.model,
        base=source.base,
        data=settings.data,
        limit=settings.limit,
        contamination=contamination.with_earlier(
            dataclasses.asdict(checked) if checked else None, saved.contamination if saved else None, asked
        ),
        tasks=saved.tasks if saved else {},
        sessions=saved.sessions if saved else [],
    )
    _summarise(result, asked, answers)
    with _session(result, folder, settings) as session:
        _answer(settings, asked, tokens, generate, answers, session)
    if result.status == "interrupted":
        answers = Answers(folder)  # Ctrl-C may have come when a batch was written and not counted yet
    _summarise(result, asked, answers)
    result.write(folder)
    _warn_of_silence(result)
    return result


def output_folder(settings: Settings, source: Source) -> Path:
    """Where answers go: `--output`, or `evaluation/<suite>` in the run."""
    name = settings.suite if settings.engine == "generate" else f"{settings.suite}-{settings.engine}"
    if settings.output:
        folder = Path(settings.output)
    elif source.run and source.adapter and source.adapter.resolve() == (source.run / ADAPTER).resolve():
        folder = source.run / FOLDER / name
    else:
        raise SliceFineError(
            f"The answers of a run go into its folder; {settings.model} is no run. Name a folder with --output."
        )
    ours = {store.FILE, results.FILE}
    if folder.exists() and not folder.is_dir():
        raise SliceFineError(f"`--output` is a folder; {folder} is a file. Name another.")
    if folder.is_dir() and (others := {path.name for path in folder.iterdir()}) and not others & ours:
        raise SliceFineError(
            f"`--output` is a new or empty folder, or that of an evaluation; {folder} has other files in it. Name another."
        )
    return folder


def _process_problems() -> list[str]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return []
    return [f"`slicefine evaluate` runs in one process; WORLD_SIZE is {processes}. Start it without torchrun."]


def _contamination(settings: Settings, source: Source, asked: Questions) -> Contamination | None:
    training = [TrainingSet(source=name) for name in settings.train_data]
    if not training and source.run:
        training = [found] if (found := contamination.of_run(source.run)) else []
    if not training:
        return None
    checked = contamination.check(asked, training)
    if not settings.allow_contamination:
        checked.refuse()
    return checked


def _encoded(asked: Questions, tokenizer: Any) -> dict[Key, Ids]:
    every = [question for found in asked.values() for question in found]
    ids = encode(tokenizer, [question.prompt for question in every])
    return {question.key: tokens for question, tokens in zip(every, ids, strict=True)}


def _refuse_too_long(tokens: dict[Key, Ids], context: int | None, settings: Settings) -> None:
    if context is None:
        return
    answer = settings.longest_answer
    too_long = sorted((len(ids), key) for key, ids in tokens.items() if len(ids) + answer > context)[::-1]
    if not too_long:
        return
    named = ", ".join(f"{task}, row {row}: {length} tokens" for length, (task, row) in too_long[:SHOWN])
    more = f", and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else ""
    longest = context - too_long[0][0]
    fix = (
        f"--max_new_tokens {longest} would fit; shorter answers may be cut before their end."
        if longest > 0
        else "Leave their tasks out with --tasks, or evaluate a model with a longer context. Nothing is ever cut."
    )
    raise SliceFineError(
        f"A prompt and its answer of up to {answer} tokens fit into the model's context of {context} tokens; {len(too_long)} "
        f"of {len(tokens)} do not ({named}{more}). {fix}"
    )


def _saved(folder: Path) -> Results | None:
    saved = Results.read(folder)
    if saved is None and (folder / store.FILE).is_file():
        raise SliceFineError(
            f"{folder} has {store.FILE} but no {results.FILE}: whose answers they are is not known. {results.OTHER_FOLDER}"
        )
    return saved


@contextmanager
def _session(result: Results, folder: Path, settings: Settings) -> Iterator[dict[str, Any]]:
    """Write the results when it begins and when it ends, however it does."""
    session: dict[str, Any] = {
        "started": records.now(),
        "batch_size": settings.batch_size,
        "answers": 0,
        "generated_tokens": 0,
        "versions": records.versions(),
        "commit": records.commit(),
        "hardware": records.hardware(),
    }
    result.sessions.append(session)
    result.write(folder)
    began = time.perf_counter()
    try:
        yield session
        result.status = "finished"
    except KeyboardInterrupt:
        result.status = "interrupted"
    except BaseException:
        result.status = "failed"
        raise
    finally:
        seconds = time.perf_counter() - began
        session |= {
            "ended": records.now(),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(session["generated_tokens"] / seconds, 1),
        }
        result.write(folder)


def _answer(
    settings: Settings,
    asked: Questions,
    tokens: dict[Key, Ids],
    generate: Generator,
    answers: Answers,
    session: dict[str, Any],
) -> None:
    """Generate what is missing, task by task, that with the longest prompt first."""
    order = sorted(settings.chosen_tasks, key=lambda task: -max(len(tokens[q.key]) for q in asked[task.name]))
    for task in order:
        every = asked[task.name]
        missing = [question for question in every if question.key not in answers.found]
        with tqdm(total=len(every), initial=len(every) - len(missing), desc=task.name, unit="q") as bar:
            bar.set_postfix_str(_running(every, answers), refresh=False)
            for batch in batches([len(tokens[question.key]) for question in missing], settings.batch_size):
                chosen = [missing[index] for index in batch]
                written = generate([tokens[question.key] for question in chosen])
                new = [
                    _scored(task, question, len(tokens[question.key]), output)
                    for question, output in zip(chosen, written, strict=True)
                ]
                answers.append(new)
                session["answers"] += len(new)
                session["generated_tokens"] += sum(answer.output_tokens for answer in new)
                bar.set_postfix_str(_running(every, answers), refresh=False)
                bar.update(len(new))


def _scored(task: Task, question: Question, prompt_tokens: int, output: Any) -> Answer:
    answer = scoring.extract(task, scoring.response(output.text))
    return Answer(
        task=task.name,
        row=question.row,
        prompt=question.prompt,
        prompt_tokens=prompt_tokens,
        output=output.text,
        output_tokens=output.tokens,
        ended=output.ended,
        answer=answer,
        gold=question.gold,
        right=scoring.is_right(task, answer, question.gold),
    )


def _given(every: list[Question], answers: Answers) -> list[Answer]:
    return [answers.found[question.key] for question in every if question.key in answers.found]


def _running(every: list[Question], answers: Answers) -> str:
    given = _given(every, answers)
    if not given:
        return ""
    share = sum(answer.right for answer in given) / len(given)
    return f"accuracy {100 * share:.1f} %, unanswered {sum(answer.answer is None for answer in given)}"


def _summarise(result: Results, asked: Questions, answers: Answers) -> None:
    """Of all tasks that have answers, those of earlier sessions too."""
    counts = {name: scores.get("asked") for name, scores in result.tasks.items()}
    counts |= {name: len(every) for name, every in asked.items()}
    given = {
        task.name: _given(asked[task.name], answers)
        if task.name in asked
        else [answer for answer in answers.found.values() if answer.task == task.name]
        for task in get_suite(result.suite).tasks
    }
    result.tasks = {name: results.scores(found) | {"asked": counts.get(name)} for name, found in given.items() if found}
    whole = result.tasks.keys() >= asked.keys() and all(s["questions"] == s["asked"] for s in result.tasks.values())
    result.average = results.average(result.tasks) if whole else None


def _warn_of_silence(result: Results) -> None:
    silent = {
        name: scores["empty"]
        for name, scores in result.tasks.items()
        if scores["empty"] > MANY_EMPTY * scores["questions"]
    }
    if silent:
        counts = ", ".join(f"{name} {count} of {result.tasks[name]['questions']}" for name, count in silent.items())
        warnings.warn(
            f"The model wrote nothing at all in answer to many questions ({counts}); they count as wrong. Usually it was tuned "
            "on another prompt than this one, or on examples that end at once.",
            SliceFineWarning,
            stacklevel=3,
        )
