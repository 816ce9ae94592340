"""The colours of charts. They are drawn in stand-ins, each of which becomes a variable of the page's style sheet: the same
drawing is light, dark and printed.
"""

from __future__ import annotations

INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{number:02x}" for number in range(1, 9))
"""Of things that have no order; the first is ours."""
RAMP = tuple(f"#0103{number:02x}" for number in range(1, 8))
"""Of things in an order: the first is near the paper, the last stands out."""
GOOD, FAIR, BAD = "#010401", "#010402", "#010403"

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "card",
    **{colour: f"s{number}" for number, colour in enumerate(SERIES, 1)},
    **{colour: f"r{number}" for number, colour in enumerate(RAMP, 1)},
    GOOD: "good",
    FAIR: "fair",
    BAD: "bad",
}
"""Stand-in -> name of the variable, without its two dashes."""


def css(colour: str) -> str:
    """The value in a style sheet that a stand-in stands for."""
    return f"var(--{VARIABLES[colour]})"


def series(number: int) -> str:
    """The colour of the series `number`, from 0; they begin again after the last."""
    return SERIES[number % len(SERIES)]


def ramp(number: int, of: int) -> str:
    """The colour of item `number` of `of` in an order, from 0."""
    return RAMP[-1] if of < 2 else RAMP[round(number * (len(RAMP) - 1) / (of - 1))]
