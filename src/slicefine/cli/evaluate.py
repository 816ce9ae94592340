"""`slicefine evaluate RUN_OR_MODEL --suite commonsense|math|glue|vtab-image|video`, or `--data LABELLED`."""

from __future__ import annotations

import dataclasses
import re
from argparse import ArgumentError
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from slicefine.cli.page import write_page
from slicefine.cli.quiet import quiet
from slicefine.evaluation.settings import ENGINES, Settings
from slicefine.evaluation.suites import LABELLED, NAMES, SUITES
from slicefine.training.extras import require_train

if TYPE_CHECKING:
    from slicefine.evaluation.results import Outcome

NAME = "evaluate"
HELP = (
    "Score a run, an adapter or a plain model: answers of a language model by the published protocol, or a classifier."
)


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = (
        f"slicefine evaluate RUN_OR_MODEL --suite {'|'.join(NAMES)} [--tasks TASK ...] [--data DIR] [--limit N] ...\n"
        "       slicefine evaluate RUN_OR_MODEL --data FILE_OR_FOLDER ..."
    )
    generated = {name: tuple(task.name for task in suite.tasks) for name, suite in SUITES.items()}
    tasks = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in {**generated, **LABELLED}.items())
    published = ", ".join(f"{suite.max_new_tokens} for {name}" for name, suite in SUITES.items())
    parser.add_argument(
        "model",
        type=str,
        metavar="RUN_OR_MODEL",
        help="Run folder, adapter folder, model folder, or a model of the hub",
    )
    parser.add_argument(
        "--suite",
        type=str,
        help=f"What to score: {', '.join(SUITES)} for language models, {', '.join(LABELLED)} for classifiers; "
        "null = the labelled examples of --data",
    )
    parser.add_argument(
        "--tasks",
        type=str,
        nargs="+",
        metavar="TASK",
        help=f"Tasks of the suite; null = all, or for a classifier the one that it was trained for ({tasks})",
    )
    parser.add_argument(
        "--data",
        type=str,
        metavar="PATH",
        help="Folder with a folder for each task, in it test.jsonl, validation.csv, ...; without --suite, a labelled file or a "
        "folder of classes; null = the hub",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="First questions of each task, or of labelled examples so many, evenly spaced; null = all",
    )
    parser.add_argument(
        "--output",
        type=str,
        metavar="DIR",
        help="Folder of answers and results; null = evaluation/<suite, or name of the data> in the run",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=Settings.batch_size,
        metavar="N",
        help="Questions, or examples, per forward pass",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, metavar="N", help=f"Longest answer, in tokens; null = {published}"
    )
    parser.add_argument(
        "--num_beams",
        type=int,
        default=Settings.num_beams,
        metavar="N",
        help="Beams of the search; 1 = greedy (LLM-Adapters use 4)",
    )
    parser.add_argument(
        "--train_data",
        type=str,
        nargs="+",
        metavar="FILE",
        help="Training examples to look for those of the test sets in; null = those of the run",
    )
    parser.add_argument(
        "--allow_contamination", action="store_true", help="Go on if training examples are in the test sets"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Drop the answers there are, and do not go on with them"
    )
    parser.add_argument(
        "--engine", type=str, default=Settings.engine, help=f"{' or '.join(ENGINES)}; lm-eval = lm-evaluation-harness"
    )


def explain(error: ArgumentError) -> str | None:
    """What is wrong with the value of a flag, in our words. All that are not texts are whole numbers."""
    key = re.search(r'Parser key "([\w.]+)"', str(error))
    value = re.search(r"(?:Got|Given) value: (.*)\Z", str(error), re.DOTALL)
    return f"`--{key[1]}` is a whole number; got {value[1]}." if key and value else None


def run(given: Any) -> int:
    """Evaluate and print the table; returns 0, or 130 after Ctrl-C."""
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in vars(given).items() if name in names and value is not None}
    if "tasks" in values:
        values["tasks"] = tuple(part for word in values["tasks"] for part in word.split(",") if part)
    settings = Settings(**values)
    require_train()
    quiet()
    from slicefine.evaluation.run import evaluate

    result = evaluate(settings)
    print(summary(result))
    if result.folder is not None:
        write_page(result.folder)
    return 130 if result.status == "interrupted" else 0


def summary(result: Outcome) -> str:
    """The table, and what to know of how it came about."""
    from slicefine.evaluation.results import FILE

    lines = [result.table(), *(f"\n{table}\n" for table in result.details())] if result.tasks else []
    if result.folder is not None:
        lines.append(f"results: {result.folder / FILE}")
    if result.searched:
        checked = result.contamination["tasks"] if result.contamination else []
        unchecked = ", ".join(task for task in result.tasks if task not in checked)
        if unchecked:
            tasks = f" for {unchecked}" if checked else ""
            lines.append(f"contamination: not checked{tasks} (name the training examples with --train_data)")
    if result.contamination and result.contamination["rows"]:
        counts = ", ".join(f"{task} {count}" for task, count in result.contamination["questions"].items())
        lines.append(f"contaminated: {result.ASKED} that the model was trained on: {counts}")
    lines += result.notes()
    if result.status == "interrupted":
        lines.append("Interrupted; finished answers are kept. The same command goes on.")
    return "\n".join(lines)
