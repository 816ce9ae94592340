"""Which examples a smoke test takes: spread over a few classes, or over all rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

CLASSES = 8


def common(train: Sequence[Hashable], validation: Iterable[Hashable]) -> set[Hashable]:
    """The few classes that have most training examples, those that are validated first: one example of a class would teach nothing."""
    validated, counts = set(validation), Counter(train)
    return set(sorted(counts, key=lambda label: (label not in validated, -counts[label], str(label)))[:CLASSES])


def spread(labels: Sequence[Hashable], classes: set[Hashable], count: int) -> list[int]:
    """About `count` row numbers, as many of each of the `classes` where it has them: the first rows may all be of one class."""
    rows = defaultdict[Hashable, list[int]](list)
    for row, label in enumerate(labels):
        if label in classes:
            rows[label].append(row)
    return sorted(row for of in rows.values() for row in evenly(of, max(2, count // len(rows))))


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows, or all if they are fewer, evenly spaced."""
    return [rows[number * len(rows) // count] for number in range(count)] if count < len(rows) else list(rows)
