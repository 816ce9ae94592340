"""Conversations through the tokenizer's chat template.

Where the template marks what the assistant writes (`{% generation %}`), or is one of those that TRL knows with such marks,
all turns of the assistant are learned. Otherwise the last one is: what the template adds to the conversation without it.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from slicefine.errors import SliceFineError

ASSISTANT = "assistant"
OTHER = "\ue000"
"""A text that no conversation begins or ends with (Unicode's private use)."""
NEVER_ENDS = "the tuned model may not stop after its answer. Put the end-of-turn token into the assistant's part of the chat template"


def message_problems(messages: Any) -> list[str]:
    """What is wrong with the column `messages` of a row."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return [
            f"'messages' is a list of objects with role and content; got {repr(messages)[:40]}. (A CSV file cannot hold one.)"
        ]
    if not messages:
        return ["'messages' is empty."]
    problems = [
        f"message {number} has role and content, both texts; got {repr(message)[:60]}."
        for number, message in enumerate(messages, 1)
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str)
    ]
    if problems:
        return problems
    last = messages[-1]
    if last["role"] != ASSISTANT:
        return [
            f"a conversation ends with the assistant's turn, which is learned; this one ends with {last['role']!r}."
        ]
    if not last["content"].strip():
        return ["the last turn of the assistant is empty."]
    return []


class Chat:
    """The chat template of a tokenizer."""

    notes: list[str]
    """What is learned, and what to know of the template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        """Raises `SliceFineError` if there is no template."""
        self._tokenizer = tokenizer
        template: Any = tokenizer.chat_template
        if not template:
            raise SliceFineError(
                f"Conversations need a chat template; the tokenizer of {model} has none. Take an instruction-tuned model, put "
                "a template into the tokenizer (`chat_template.jinja`), or write the data as prompt and completion."
            )
        added: Any = tokenizer.get_added_vocab  # declared as an attribute
        self._special = {*added().values(), *tokenizer.all_special_ids}
        self._without_end = 0
        self._template = None
        self._marked = has_generation_markers(template)
        if not self._marked:
            try:
                self._template = get_training_chat_template(tokenizer)
            except (
                ValueError,
                TemplateError,
                TypeError,
            ):  # a template that TRL does not know, or that refuses its trial messages
                self._template = None
            self._marked = self._template is not None
        if self._marked:
            how = " (TRL's version of the chat template, which marks them)" if self._template else ""
            self.notes = [f"Conversations: all turns of the assistant are learned{how}."]
            if not is_chat_template_stop_token_trained(tokenizer, chat_template=self._template):
                self.notes.append(
                    "What the chat template marks as the assistant's does not end with a special token, so no end of turn is "
                    f"learned: {NEVER_ENDS}, before {{% endgeneration %}}."
                )
        else:
            self.notes = [
                "Conversations: the chat template does not mark the assistant's turns, so the last one is learned alone."
            ]
        if "strftime_now" in str(template):
            self.notes.append(
                "The chat template writes the day's date into every conversation: a run that is resumed on another day goes on with "
                "that day's."
            )

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int], list[int] | None]:
        """All tokens; those before the last turn; and which of all are the assistant's, where the template says so.

        Raises `SliceFineError` if the template refuses the conversation or leaves the assistant out of it.
        """
        try:
            whole = self._apply(messages, return_assistant_tokens_mask=self._marked)
            prompt = None if self._marked else self._apply(messages[:-1], add_generation_prompt=True)
            start, turn = self._last_turn(messages)
        except TemplateError as error:
            raise SliceFineError(f"the chat template of the tokenizer refuses the conversation: {error}.") from error
        ids = whole["input_ids"]
        if prompt is None and not any(whole["assistant_masks"]):
            raise SliceFineError("the chat template marks nothing as the assistant's. It is not one for this data.")
        self._refuse_incomplete(messages[-1]["content"], turn)
        if prompt is None:
            mask = whole["assistant_masks"]
            last = whole.char_to_token(start + len(turn.rstrip()) - 1)
            if last is not None and not mask[last]:
                raise SliceFineError("the chat template does not mark the assistant's last turn as the assistant's.")
            return ids, [], mask
        last = next((token for token in reversed(ids) if str(self._tokenizer.decode([token])).strip()), None)
        self._without_end += last not in self._special
        return ids, prompt["input_ids"], None

    def end_notes(self) -> list[str]:
        """Say in how many of the conversations encoded so far no end of the last turn is learned."""
        if not self._without_end:
            return []
        return [
            f"In {self._without_end} conversations no special token follows the assistant's last turn, so no end of turn is "
            f"learned: {NEVER_ENDS}."
        ]

    def _last_turn(self, messages: list[dict[str, Any]]) -> tuple[int, str]:
        """Where in the text of a conversation its last turn begins, and what is there: what changes if the turn does.

        To search for the turn would not do: "yes" is in "say yes" as well.
        """
        text = self._apply(messages, tokenize=False)
        other = self._apply([*messages[:-1], messages[-1] | {"content": OTHER}], tokenize=False)
        start = _same(text, other)
        after = _same(text[start:][::-1], other[start:][::-1])
        return start, text[start : len(text) - after]

    def _refuse_incomplete(self, content: str, turn: str) -> None:
        """Raise `SliceFineError` if `turn`, the text of the last turn, lacks a part of its `content`."""
        # Templates strip white space, and write reasoning their own way.
        parts = ["".join(part.split()) for part in re.split(r"</?think>", content)]
        lacking = [part not in "".join(turn.split()) for part in parts]
        if lacking[-1] or not turn.strip():
            raise SliceFineError("the chat template leaves out the assistant's last turn. It is not one for this data.")
        if any(lacking):
            raise SliceFineError(
                "the chat template removes the reasoning (<think>...</think>) from the assistant's last turn. Take a template "
                "that keeps it, or remove it from the data."
            )

    def _apply(self, messages: list[dict[str, Any]], *, tokenize: bool = True, **settings: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=tokenize, return_dict=tokenize, chat_template=self._template, **settings
        )


def _same(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
