"""Several runs side by side: what may be compared, and the page for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from slicefine.errors import SliceFineError
from slicefine.reporting import comparing_analyses, comparing_results, comparing_runs
from slicefine.reporting.page import Page
from slicefine.reporting.records import ANALYSIS, BENCHMARK, EVALUATION, PLAN, TRAINING, Record, names, of_kind
from slicefine.reporting.text import joined

RULE = (
    "Runs of one kind are compared: training runs, evaluations, analyses, benchmarks of one theme, or plans; an analysis may also "
    "stand beside training runs of its model"
)
Named = Mapping[str, Record]
"""What a run is called -> the run."""
PAGES: dict[str, Callable[[Named], Page]] = {
    EVALUATION: comparing_results.evaluations,
    ANALYSIS: comparing_analyses.page,
    BENCHMARK: comparing_results.benchmarks,
    PLAN: comparing_results.plans,
}


def page(records: Sequence[Record]) -> Page:
    """The page of several runs. Raises `SliceFineError` for runs that cannot be compared, with the rule."""
    named = dict(zip(names(records), records, strict=True))
    kinds = Counter(record.kind for record in records)
    if set(kinds) == {TRAINING, ANALYSIS}:
        _refuse_other_models(of_kind(records, TRAINING), of_kind(records, ANALYSIS))
    elif len(kinds) > 1:
        given = joined(
            [f"{number} {kind}{'s' if number > 1 and kind != ANALYSIS else ''}" for kind, number in kinds.items()]
        )
        raise SliceFineError(f"{RULE}; got {given.replace('2 analysis', '2 analyses')}. Make a page of each kind.")
    if TRAINING in kinds:
        return comparing_runs.page(named)
    _refuse_other_themes(named)
    return PAGES[records[0].kind](named)


def _refuse_other_models(runs: Sequence[Record], analyses: Sequence[Record]) -> None:
    for analysis in analyses:
        model = str(analysis.content["model"].get("name"))
        for run in runs:
            if _place(model) != _place(run.content["model"]):
                raise SliceFineError(
                    f"An analysis stands beside runs of its own model: {analysis.file} is of {model}, and {run.file} is of "
                    f"{run.content['model']}. Analyse that model, or leave one of them out."
                )


def _place(model: str) -> str:
    """A model by its name, or where it really is if it is a folder."""
    return os.path.realpath(model) if os.path.exists(model) else model.rstrip("/")


def _refuse_other_themes(named: Named) -> None:
    themes = {name: str(record.content["theme"]) for name, record in named.items() if record.kind == BENCHMARK}
    if len(set(themes.values())) > 1:
        found = ", ".join(f"{name} is of {theme}" for name, theme in themes.items())
        raise SliceFineError(f"Benchmarks of one theme are compared; {found}. Make a page of each theme.")
