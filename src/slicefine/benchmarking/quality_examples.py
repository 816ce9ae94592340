"""The examples of a comparison: those that judge are neither trained on nor choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from slicefine.benchmarking.suite import QualityTask
from slicefine.errors import SliceFineError
from slicefine.evaluation.contamination import normalised
from slicefine.training.tasks import get_task

MOST_SEEN = 0.1
"""Share of the examples that judge which may be known from training: public sets have a few such, of 1 % to 2 %."""


def judging(task: QualityTask) -> tuple[dict[str, Any], int | None]:
    """Where the examples come from, and how many of those that judge are trained on or choose; None where they are no labelled texts.

    Texts are the same as for `slicefine evaluate`: the same words and numbers in the same order, of pairs both.

    Raises `SliceFineError` if those that judge are the others, or more than a tenth of them are among the others.
    """
    module = get_task(task.recipe.task)
    known, judges = module.read(task.recipe.data), module.read(task.judging.data)
    choose, judge = known.summary(), judges.summary()
    source = judge["validation"]["source"]
    for name, said in (("train", "trained on"), ("validation", "those that choose")):
        if judge["validation"]["fingerprint"] == choose[name]["fingerprint"]:
            raise SliceFineError(
                f"the examples that judge ({source}) are those {said} ({choose[name]['source']}), byte for byte. "
                "Name others as `test`."
            )
    sources = {"choose": choose, "judge": judge}
    if task.recipe.task != "text-classification":
        return sources, None
    texts = {text for examples in (known.train, known.validation) for text in _texts(examples)}
    seen = [text in texts for text in _texts(judges.validation)]
    if sum(seen) > MOST_SEEN * len(seen):
        raise SliceFineError(
            f"at most {MOST_SEEN:.0%} of the examples that judge may be among those that are trained on or choose; {sum(seen)} of the "
            f"{len(seen)} in {source} are, by their words. Leave them out of {task.recipe.data.train}, or name other examples as `test`."
        )
    return sources, sum(seen)


def _texts(examples: Dataset) -> Iterator[str]:
    """What is the same for two examples that are the same."""
    columns = [examples[name] for name in ("text", "text_pair") if name in examples.column_names]
    for texts in zip(*columns, strict=True):
        yield "\n".join(normalised(text) or text.strip() for text in texts)
