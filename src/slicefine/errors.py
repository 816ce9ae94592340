"""The two things slicefine says when something is wrong: an error that stops, a warning that does not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

SHOWN = 20
"""Problems that one message lists."""
NAMED = 3
"""Names that one problem lists."""


class SliceFineError(ValueError):
    """A rule is broken. The message states the rule, the value received, where, and the fix.

    It is a `ValueError`, as PEFT and transformers raise for a wrong setting, so existing handlers see it.
    """


class SliceFineWarning(UserWarning):
    """Something will go on, but probably not as the user means it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'row'?"`` for the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(names: Iterable[str], shown: int = NAMED) -> str:
    """`"a, b, c and 4 more"`"""
    every = list(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


def first_line(error: BaseException) -> str:
    """What an error says, as a sentence without its full stop; the name of its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return said.rstrip(".")


def by_text(problems: Mapping[str, str]) -> list[str]:
    """Problems by the name of what has them -> one problem per text, with the names that share it."""
    names: dict[str, list[str]] = {}
    for name, problem in sorted(problems.items()):
        names.setdefault(problem, []).append(name)
    return [f"{listed(shared)}: {problem}" for problem, shared in names.items()]


def raise_all(problems: list[str], where: str) -> None:
    """Raise one `SliceFineError` that lists every problem found in `where`; do nothing if there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise SliceFineError(f"{where}: {problems[0]}")
    lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems[:SHOWN], 1))
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise SliceFineError(f"{where}: {len(problems)} problems\n{lines}{more}")


def pattern_problems(setting: str, value: object) -> list[str]:
    """What is wrong with a text that is to be a regular expression; nothing with what is no text."""
    if not isinstance(value, str):
        return []
    try:
        re.compile(value)
    except re.error as error:
        return [
            f"`{setting}` is a list of names, or a regular expression; {value!r} is none ({error}). Any name that ends in query is '.*query'."
        ]
    return []
