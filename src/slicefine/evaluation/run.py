"""One evaluation, from a name and a suite to `answers.jsonl` and `results.json`.

Everything that can be wrong is found before the model is loaded, and nothing is written before all of it is right.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from tqdm import tqdm

from slicefine.errors import SliceFineError, SliceFineWarning, listed, raise_all
from slicefine.evaluation import classification, contamination, models, questions, results, scoring
from slicefine.evaluation.answers import Answer, Answers
from slicefine.evaluation.contamination import Contamination, TrainingSet
from slicefine.evaluation.generation import Generator, Ids, batches, encode
from slicefine.evaluation.models import Source
from slicefine.evaluation.questions import Question, Questions
from slicefine.evaluation.results import Outcome, Results
from slicefine.evaluation.session import clear, output_folder, process_problems, saved, session
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import Task, get_suite

MANY_EMPTY = 0.1
SHOWN = 5
Key = tuple[str, int]


def evaluate(settings: Settings) -> Outcome:
    """Ask the model every question, or classify every example, that has no answer in the output folder yet.

    Ctrl-C keeps the answers of finished batches and returns results with the status `"interrupted"`; the same settings go on.

    Raises `SliceFineError` for what is wrong with settings, model, test sets or output folder, before the folder is changed.
    """
    raise_all(settings.problems() + process_problems(), "Evaluation")
    source = models.find(settings.model)
    config = models.load_config(source)
    task = models.task_of(source, config)
    models.refuse_other_suite(settings, task, source, config)
    if settings.classifies:
        return classification.evaluate(settings, source, config, task)
    if settings.engine == "lm-eval":
        from slicefine.evaluation import harness

        return harness.evaluate(settings, source, output_folder(settings, source, f"{settings.suite}-lm-eval"))
    return _generate(settings, source, config)


def _generate(settings: Settings, source: Source, config: Any) -> Results:
    folder = output_folder(settings, source, settings.chosen_suite.name)
    asked = questions.read(settings.chosen_tasks, settings.data, settings.limit)
    checked = _contamination(settings, source, asked)
    tokenizer = models.load_tokenizer(source)
    tokens = _encoded(asked, tokenizer)
    _refuse_too_long(tokens, models.context_length(config, tokenizer), settings)

    known = {
        "suite": settings.suite,
        "engine": settings.engine,
        "max_new_tokens": settings.longest_answer,
        "num_beams": settings.num_beams,
    }
    earlier = None if settings.overwrite else saved(Results, folder)
    if earlier:
        earlier.refuse_other(settings.model, folder, **known)
    answers = Answers(folder) if earlier else None
    if answers:
        every = [question for found in asked.values() for question in found]
        answers.refuse_others(every, {key: len(ids) for key, ids in tokens.items()})

    model = models.load_model(source, config)
    known |= {"weights": models.fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    if earlier:
        earlier.refuse_other(settings.model, folder, **known)
    generate = Generator(model, tokenizer, max_new_tokens=settings.longest_answer, num_beams=settings.num_beams)

    if answers is None:
        clear(folder)
        answers = Answers(folder)
    result = Results(
        **known,
        model=settings.model,
        base=source.base,
        data=settings.data,
        limit=settings.limit,
        contamination=contamination.with_earlier(
            dataclasses.asdict(checked) if checked else None, earlier.contamination if earlier else None, asked
        ),
        tasks=earlier.tasks if earlier else {},
        sessions=earlier.sessions if earlier else [],
    )
    _summarise(result, asked, answers)
    with session(
        result, folder, batch_size=settings.batch_size, counts="answers", per_second="generated_tokens"
    ) as this:
        _answer(settings, asked, tokens, generate, answers, this)
    if result.status == "interrupted":
        answers = Answers(folder)  # Ctrl-C may have come when a batch was written and not counted yet
    _summarise(result, asked, answers)
    result.write(folder)
    _warn_of_silence(result)
    return result


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
    named = listed((f"{task}, row {row}: {length} tokens" for length, (task, row) in too_long), SHOWN)
    longest = context - too_long[0][0]
    fix = (
        f"--max_new_tokens {longest} would fit; shorter answers may be cut before their end."
        if longest > 0
        else "Leave their tasks out with --tasks, or evaluate a model with a longer context. Nothing is ever cut."
    )
    raise SliceFineError(
        f"A prompt and its answer of up to {answer} tokens fit into the model's context of {context} tokens; {len(too_long)} "
        f"of {len(tokens)} do not ({named}). {fix}"
    )


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
