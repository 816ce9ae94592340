"""What a model got wrong in an evaluation, with what was asked and expected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting.page import Case, Cases, Cell, Prose, Section, Table
from slicefine.reporting.records import Record
from slicefine.reporting.text import finite, metric, percent, plural

SHOWN = 20
"""Examples that are shown."""
SHORT, WHOLE = 220, 6000
"""Characters of a text that are shown at once, and at all."""


def _wrong(record: Record) -> list[Mapping[str, Any]]:
    answers = [item for item in record.parts.get("answers.jsonl", []) if item.get("right") is False]
    predictions = [
        item for item in record.parts.get("predictions.jsonl", []) if item.get("label") != item.get("predicted")
    ]
    return answers or predictions


def section(record: Record) -> Section:
    """The examples that a model got wrong: those it was surest of, where it says so."""
    wrong = _wrong(record)
    title = "The worst examples"
    read = [name for name in ("answers.jsonl", "predictions.jsonl") if name in record.parts]
    if not read:
        return Section(
            title=title, blocks=[Prose(text="There are no answers beside this record: this engine does not keep them.")]
        )
    if not wrong:
        return Section(title=title, blocks=[Prose(text="None is wrong.")])
    if read[0] == "answers.jsonl":
        shown = _spread(wrong)
        note = f"{len(shown)} of {plural(len(wrong), 'wrong answer')}, the first of each task in turn. Texts open to their full length."
        return Section(title=title, blocks=[Cases(cases=[_answer(item) for item in shown], note=note)])
    if isinstance(wrong[0].get("label"), str):
        scored = any(finite(item.get("score")) is not None for item in wrong)
        shown = (
            sorted(wrong, key=lambda item: -(finite(item.get("score")) or 0.0))[:SHOWN] if scored else _spread(wrong)
        )
        how = "those that the model was surest of" if scored else "the first of each set in turn"
    else:
        shown = sorted(wrong, key=lambda item: -abs(_difference(item)))[:SHOWN]
        how = "those that are farthest off"
    what = "wrong prediction" if isinstance(wrong[0].get("label"), str) else "prediction"
    note = f"{len(shown)} of {plural(len(wrong), what)}: {how}."
    cases = [_prediction(item) for item in shown]
    if any(case.texts for case in cases):
        return Section(title=title, blocks=[Cases(cases=cases, note=note)])
    rows = [
        [
            Cell(text=case.place),
            Cell(text=case.expected, strong=True),
            Cell(text=case.given, strong=True),
            Cell(text=case.note),
        ]
        for case in cases
    ]
    return Section(
        title=title, words=note, blocks=[Table(title="", columns=["where", "expected", "given", "how sure"], rows=rows)]
    )


def _spread(wrong: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first of each task in turn."""
    by_task: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in wrong:
        by_task[str(item.get("task"))].append(item)
    found = []
    for number in range(SHOWN):
        found += [items[number] for items in by_task.values() if number < len(items)]
    return found[:SHOWN]


def _difference(item: Mapping[str, Any]) -> float:
    return (finite(item.get("predicted")) or 0.0) - (finite(item.get("label")) or 0.0)


def _answer(item: Mapping[str, Any]) -> Case:
    given = item.get("answer")
    return Case(
        place=f"{item.get('task')}, row {item.get('row')}",
        expected=str(item.get("gold")),
        given="no answer found" if given is None else str(given),
        note="" if item.get("ended", True) else "cut at the longest length",
        texts=[_text("asked", _question(str(item.get("prompt", "")))), _text("output", str(item.get("output", "")))],
    )


def _question(prompt: str) -> str:
    """What is asked, without the words that every prompt of the published protocol begins and ends with."""
    return prompt.partition("### Instruction:")[2].partition("### Response:")[0].strip() or prompt


def _prediction(item: Mapping[str, Any]) -> Case:
    score = finite(item.get("score"))
    numbers = not isinstance(item.get("label"), str)
    note = (
        f"off by {abs(_difference(item)):.3g}" if numbers else "" if score is None else f"probability {percent(score)}"
    )
    shown = metric if numbers else lambda _, value: str(value)
    return Case(
        place=str(item.get("place") or f"{item.get('task')}, row {item.get('row')}"),
        expected=shown("", item.get("label")),
        given=shown("", item.get("predicted")),
        note=note,
        texts=[_text(name, str(item[name])) for name in ("text", "text_pair") if item.get(name)],
    )


def _text(name: str, text: str) -> tuple[str, str, str]:
    """Name, beginning, and the whole where it is longer."""
    flat = " ".join(text.split())
    if len(flat) <= SHORT:
        return name, flat or "(nothing)", ""
    beginning = f"{flat[:SHORT]}\u2026"
    whole = (
        text
        if len(text) <= WHOLE
        else f"{text[: WHOLE // 2]}\n[\u2026 {len(text) - WHOLE:,} characters \u2026]\n{text[-WHOLE // 2 :]}"
    )
    return name, beginning, whole
