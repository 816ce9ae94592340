"""The prompt of LLM-Adapters (Hu et al., 2023), the same in training and in evaluation.

It is Alpaca's, without line breaks inside a sentence and without indentation. The published scripts (`finetune.py`,
`commonsense_evaluate.py`, `evaluate.py`) write it inside indented source, so that every line but the first begins with 16
spaces there; what stands behind "request." (a space, none, a stray comment) differs between their versions. A model tuned with
those scripts has seen these spaces; one tuned here has not, and is scored without them.
"""

from __future__ import annotations

RESPONSE = "### Response:"
"""What stands before the answer. The published scorer cuts a text that goes on into another one here."""

_ALONE = "Below is an instruction that describes a task."
_WITH_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context."
_REQUEST = "Write a response that appropriately completes the request. "


def prompt(instruction: str, input: str = "") -> str:
    """The text that a model is to go on from; the answer follows its last line break."""
    if input:
        return f"{_WITH_INPUT} {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n{RESPONSE}\n"
    return f"{_ALONE} {_REQUEST}\n\n### Instruction:\n{instruction}\n\n{RESPONSE}\n"


def instruction_of(text: str) -> str:
    """The instruction, and the input if there is one, of a text that `prompt` made; any other text as it is."""
    head, mark, rest = text.partition("### Instruction:\n")
    if not mark or not head.startswith(_ALONE[:-1]):
        return text
    return rest.partition(RESPONSE)[0].replace("### Input:\n", "").strip()
