"""Conversations through the tokenizer's chat template.

Where the template marks what the assistant writes (`{% generation %}`), or is one of those that TRL knows with such marks,
all turns of the assistant are learned. Otherwise the last one is: what the template adds to the conversation without it.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from slicefine.errors import SliceFineError

ASSISTANT = "assistant"


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
            ids = whole["input_ids"]
            if self._marked:
                mask = whole["assistant_masks"]
                if not any(mask):
                    raise SliceFineError(
                        "the chat template marks nothing as the assistant's. It is not one for this data."
                    )
                return ids, [], mask
            prompt_ids = self._apply(messages[:-1], add_generation_prompt=True)["input_ids"]
        except TemplateError as error:
            raise SliceFineError(f"the chat template of the tokenizer refuses the conversation: {error}.") from error
        if messages[-1]["content"].strip() not in self._tokenizer.decode(ids):
            raise SliceFineError("the chat template leaves out the assistant's last turn. It is not one for this data.")
        return ids, prompt_ids, None

    def _apply(self, messages: list[dict[str, Any]], **settings: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, chat_template=self._template, **settings
        )
