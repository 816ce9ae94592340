"""Numbers and names as a reader wants them. Signs stay with their numbers: the space before a unit does not break."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

NO_BREAK = "\u00a0"
_SIGNS = re.compile(r"(?<=\d) (?=%)|(?<=\b[a-zA-Z]) (?== [\d-])|(?<=\b[a-zA-Z] =) (?=[\d-])")
GENERIC = re.compile(
    r"(adapter|base|best|checkpoint|export|exported|final|last|latest|merged|model|output|pretrained|run|snapshot|weight)s?|"
    r"(checkpoint|epoch|step)[-_]?\d+|[0-9a-f]{40}",
    re.IGNORECASE,
)
"""Names of folders that do not say which model is in them."""
DASH = "\u2013"
"""Stands where there is nothing to say."""
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "f1_macro": "macro F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "token_accuracy": "token accuracy",
    "mse": "mean squared error",
    "perplexity": "perplexity",
    "loss": "loss",
}
HUNDREDTHS = {"accuracy", "f1", "f1_macro", "matthews_correlation", "pearson", "spearman", "token_accuracy"}
"""Metrics that are shares or correlations, and shown in hundredths."""
LOWER_IS_BETTER = {"loss", "mse", "perplexity"}


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond the range of floats
        return None


def decimal(value: Any) -> str:
    """A number with three or four digits that tell, as in the tables of a benchmark; a dash for what is no number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    number = finite(value)
    if number is None:
        return DASH
    if number == 0:
        return "0"
    return f"{number:.4g}" if abs(number) < 0.1 else f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}"


def brief(value: Any) -> str:
    """A number with the three digits that a sentence can bear; a dash for what is no number."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def count(value: Any) -> str:
    """`1,234,567`"""
    number = finite(value)
    return DASH if number is None else f"{round(number):,}"


def percent(value: Any) -> str:
    """A share, 0 to 1, as `93.0 %`; small ones with two digits that tell."""
    number = finite(value)
    if number is None:
        return DASH
    points = 100 * number
    if 0 < abs(points) < 1:
        return f"{points:.2g}{NO_BREAK}%"
    return f"{points:.1f}{NO_BREAK}%"


def interval(ends: Any) -> str:
    """Two shares as `91.2 to 94.1 %`; a dash if there are not two."""
    if not isinstance(ends, Sequence) or len(ends) != 2 or None in (finite(ends[0]), finite(ends[1])):
        return DASH
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}{NO_BREAK}%"


def duration(seconds: Any) -> str:
    """`3 min 12 s`; below a minute with a decimal, below a second in milliseconds."""
    number = finite(seconds)
    if number is None:
        return DASH
    if number < 1:
        return f"{1000 * number:.3g}{NO_BREAK}ms"
    if number < 60:
        return f"{number:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s" if rest else f"{minutes}{NO_BREAK}min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{NO_BREAK}h {minutes}{NO_BREAK}min"


def size(number: Any) -> str:
    """Bytes in the unit that suits them: `21.92 GiB`."""
    value = finite(number)
    if value is None:
        return DASH
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while abs(value) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    if not unit:
        return f"{value:.0f}{NO_BREAK}bytes"
    return f"{value:.{2 if abs(value) < 100 else 1}f}{NO_BREAK}{units[unit]}"


def plural(number: Any, word: str) -> str:
    """`1 move`, `7 moves`"""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def metric_name(name: str) -> str:
    """The name of a score in words."""
    return METRICS.get(name, name.replace("_", " "))


def metric(name: str, value: Any) -> str:
    """A score as it is read: shares and correlations in hundredths, all else as it is."""
    number = finite(value)
    if number is None:
        return DASH
    if name in HUNDREDTHS:
        unit = "" if "correlation" in metric_name(name) else f"{NO_BREAK}%"
        return f"{100 * number:.1f}{unit}"
    return decimal(number)


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, cut in the middle, where names differ least."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (longest - 1 - head) :]}"


def base_name(model: str) -> str:
    """What a model is called in a sentence: the whole name of the hub; of a path the last part, and those before a part that says nothing."""
    parts = [part for part in model.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if not parts or (len(parts) <= 2 and not model.startswith(("/", ".", "~"))):
        return model
    first = len(parts) - 1
    while first and GENERIC.fullmatch(parts[first]):
        first -= 1
    return "/".join(parts[first:])


def device(name: Any) -> str:
    """A device in a sentence."""
    return {"cpu": "the CPU", "cuda": "the GPU", "gpu": "the GPU"}.get(str(name), str(name) if name else "the device")


def unbroken(text: str) -> str:
    """`text` whose signs stay with their numbers at the end of a line: `r = 5`, `90 %`."""
    return _SIGNS.sub(NO_BREAK, text)


def joined(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`"""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def median(values: Sequence[float]) -> float | None:
    """The middle value; None of none."""
    if not values:
        return None
    order, half = sorted(values), len(values) // 2
    return order[half] if len(order) % 2 else (order[half - 1] + order[half]) / 2
