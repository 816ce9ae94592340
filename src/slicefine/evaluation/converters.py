"""The data sets of the hub, in LLM-Adapters' form: where each is, and what a row of it becomes.

The wording is that of LLM-Adapters' files, down to its spaces. Rows of math sets are questions as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A data set of the hub that is, or holds, a published test set."""

    name: str
    subset: str | None = None
    splits: tuple[str, ...]
    """Splits that together are the published test set."""
    convert: Callable[[Row], Row]
    """From a row to `instruction` and `answer`."""
    revision: str | None = None
    """Branch, where the main one is not made of data files."""
    data_dir: str | None = None
    """Folder of the files, in place of a subset."""


def boolq(row: Row) -> Row:
    """google/boolq: question, answer (bool); the passage is not shown."""
    return {
        "instruction": f"Please answer the following question with true or false, question: {row['question']}?\n\n"
        "Answer format: true/false",
        "answer": "true" if row["answer"] else "false",
    }


def piqa(row: Row) -> Row:
    """goal, sol1, sol2, label (0, 1)."""
    return {
        "instruction": f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\nAnswer format: solution1/solution2",
        "answer": f"solution{int(row['label']) + 1}",
    }


def social_i_qa(row: Row) -> Row:
    """context, question, answerA, answerB, answerC, label ("1", "2", "3")."""
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _choose(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def hellaswag(row: Row) -> Row:
    """activity_label, ctx_a, ctx_b, endings, label ("0" to "3")."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
    return {
        "instruction": "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {context}\n\n{_numbered('Ending', row['endings'])}\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "answer": f"ending{int(row['label']) + 1}",
    }


def winogrande(row: Row) -> Row:
    """sentence, option1, option2, answer ("1", "2")."""
    return {
        "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{_numbered('Option', [row['option1'], row['option2']])} Answer format: option1/option2",
        "answer": f"option{int(row['answer'])}",
    }


def arc(row: Row) -> Row:
    """question, choices (text, label: letters or digits), answerKey."""
    return _choose(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def openbookqa(row: Row) -> Row:
    """question_stem, choices (text, label), answerKey."""
    return arc(row | {"question": row["question_stem"]})


def gsm8k(row: Row) -> Row:
    """question, answer (a chain of thought that ends in `#### 1,234`)."""
    return {"instruction": row["question"], "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


def multiarith(row: Row) -> Row:
    """question, final_ans."""
    return {"instruction": row["question"], "answer": str(row["final_ans"])}


def lila(row: Row) -> Row:
    """allenai/lila: input, output_answer."""
    return {"instruction": row["input"], "answer": str(row["output_answer"])}


def svamp(row: Row) -> Row:
    """Body, Question, Answer."""
    body = row["Body"].strip()
    stop = "" if body.endswith((".", "?", "!")) else "."
    return {"instruction": f"{body}{stop} {row['Question'].strip()}", "answer": str(row["Answer"])}


def _choose(question: str, choices: Sequence[str], right: int) -> Row:
    names = [f"answer{number}" for number in range(1, len(choices) + 1)]
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{_numbered('Answer', choices)}\n\n"
        f"Answer format: {'/'.join(names)}",
        "answer": f"answer{right + 1}",
    }


def _numbered(word: str, texts: Sequence[str]) -> str:
    return " ".join(f"{word}{number}: {text}" for number, text in enumerate(texts, 1))


# Where the first home of a set is a loading script, which `datasets` no longer runs, its files are taken from where
# lm-evaluation-harness takes them, or from the branch that the hub converts them on.
_CONVERTED = "refs/convert/parquet"
_ALL = ("train", "validation", "test")
HUB_SETS = {
    "boolq": HubSet(name="google/boolq", splits=("validation",), convert=boolq),
    "piqa": HubSet(name="baber/piqa", splits=("validation",), convert=piqa),
    "social_i_qa": HubSet(name="lighteval/siqa", splits=("validation",), convert=social_i_qa),
    "hellaswag": HubSet(name="Rowan/hellaswag", splits=("validation",), convert=hellaswag),
    "winogrande": HubSet(name="allenai/winogrande", subset="winogrande_xl", splits=("validation",), convert=winogrande),
    "arc-easy": HubSet(name="allenai/ai2_arc", subset="ARC-Easy", splits=("test",), convert=arc),
    "arc-challenge": HubSet(name="allenai/ai2_arc", subset="ARC-Challenge", splits=("test",), convert=arc),
    "openbookqa": HubSet(name="allenai/openbookqa", subset="main", splits=("test",), convert=openbookqa),
    "multiarith": HubSet(name="ChilleD/MultiArith", splits=("train", "test"), convert=multiarith),
    "gsm8k": HubSet(name="openai/gsm8k", subset="main", splits=("test",), convert=gsm8k),
    "addsub": HubSet(name="allenai/lila", data_dir="addsub", revision=_CONVERTED, splits=_ALL, convert=lila),
    "singleeq": HubSet(name="allenai/lila", data_dir="singleq", revision=_CONVERTED, splits=_ALL, convert=lila),
    "svamp": HubSet(name="ChilleD/SVAMP", splits=("train", "test"), convert=svamp),
}
