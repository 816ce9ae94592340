"""The map of a model: a cell for each weight, blocks downwards and kinds of weights across, with what was trained drawn in it.

A touched row of a weight is a horizontal line of its cell, a touched column a vertical one, to scale; the slice that was
active last stands out. The more the touched entries moved, the more colour the cell has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, SERIES, css
from slicefine.reporting.svg import NARROW, WIDE, root, text_of
from slicefine.reporting.text import brief, finite, median, percent, shorten
from slicefine.reporting.thinning import spaced

MOST_KINDS = 14
"""Kinds of weights that have columns of their own; of more, cells follow each other."""
MOST_WEIGHTS = 512
"""Cells that are drawn."""
GAP = 5
LEFT = 34
DEEPEST = 0.62
"""Opacity of the weight that moved most."""
THINNEST = 1.0
"""Pixels of a touched row or column, at least."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What `slices.json` says of one weight."""

    name: str
    shape: tuple[int, int]
    block: int | None
    """Index of the block that it is in; None outside of all."""
    kind: str
    """Its name within a block."""
    axis: str
    active: list[tuple[int, int]]
    """First index and width of what was trained last, along `axis`."""
    rows: list[tuple[int, int]]
    """First index and number of touched rows."""
    columns: list[tuple[int, int]]
    update: float | None
    """`||now - original|| / ||original||` over what was touched."""
    share: float | None
    """Of its entries that were touched."""


def weights(content: dict[str, Any]) -> list[Weight]:
    """The weights of `slices.json`; those without a shape are left out."""
    found = []
    for item in content.get("weights", []):
        shape = item.get("shape") or []
        if len(shape) < 2 or not all(isinstance(size, int) and size > 0 for size in shape[:2]):
            continue
        block = item.get("block") if isinstance(item.get("block"), int) else None
        touched = item.get("touched") or {}
        found.append(
            Weight(
                name=str(item["name"]),
                shape=(shape[0], shape[1]),
                block=block,
                kind=_kind(str(item["name"]), block),
                axis=str(item.get("axis", "row")),
                active=_pairs(item.get("active")),
                rows=_pairs(touched.get("row")),
                columns=_pairs(touched.get("column")),
                update=finite(item.get("update")),
                share=finite(item.get("share")),
            )
        )
    return found


def _pairs(found: Any) -> list[tuple[int, int]]:
    return [(int(first), int(width)) for first, width in found or []]


def _kind(name: str, block: int | None) -> str:
    return name if block is None else re.split(rf"(?:^|\.){block}\.", name, maxsplit=1)[-1]


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Kind -> as much of its end as no other kind ends with."""
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in kinds if other != kind]
        found[kind] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), kind)
    return found


def model_map(every: Sequence[Weight]) -> Chart:
    """The map."""
    title = "Map of the model: what was trained, and how far it moved"
    words = _words(every)
    drawn = {
        form: text_of(_drawn(every, f"map-{form}", width, title, words))
        for form, width in (("wide", WIDE), ("narrow", NARROW))
    }
    legend = [
        Key(name="touched rows and columns", colour=INK),
        Key(name="active at the end", colour=SERIES[0]),
        Key(name="the more colour, the farther it moved", colour=SERIES[1], mark="band"),
    ]
    return Chart(key="map", title=title, words=words, legend=legend, **drawn)


def _words(every: Sequence[Weight]) -> str:
    moved = [weight for weight in every if weight.update is not None]
    shares = [weight.share for weight in every if weight.share is not None]
    text = f"{len(every)} weights; each cell is one, its rows from top to bottom and its columns from left to right."
    if moved:
        most, least = (pick(moved, key=lambda weight: weight.update or 0.0) for pick in (max, min))
        middle = median([weight.update for weight in moved if weight.update is not None])
        text += (
            f" Moved most: {most.name} ({brief(most.update)} of its size); least: {least.name} ({brief(least.update)}); "
            f"median {brief(middle)}."
        )
    if len(every) > MOST_WEIGHTS:
        text += f" Of so many about {MOST_WEIGHTS} are drawn; the table has all of them."
    if shares:
        text += f" Touched: {percent(min(shares))} to {percent(max(shares))} of a weight's entries."
    return text


def _drawn(every: Sequence[Weight], key: str, width: int, title: str, words: str) -> ElementTree.Element:
    """Rows of cells. The kinds of weights are named above them, standing upright where there is little room."""
    narrow = width == NARROW
    inside = [weight for weight in every if weight.block is not None]
    kinds = list(dict.fromkeys(weight.kind for weight in inside))
    if not inside or len(kinds) > MOST_KINDS:
        return _flow(every, key, width, title, words)
    outside = [weight for weight in every if weight.block is None]
    labels = short_kinds([*kinds, *(weight.kind for weight in outside)])
    every_block = sorted({weight.block for weight in inside if weight.block is not None})
    blocks = spaced(every_block, max(2, MOST_WEIGHTS // len(kinds)))
    cell = (width - LEFT) / len(kinds)
    longest = max(len(labels[kind]) for kind in kinds)
    upright = cell < 86
    head = 14 + 6.2 * min(longest, 24) if upright else 14 + 14 * max(labels[kind].count(".") + 1 for kind in kinds)
    tall = max(16.0, min(44.0 if not narrow else 34.0, 900 / len(blocks)))
    below = 20 + math.ceil(len(outside) / len(kinds)) * (tall + 18) - 12 if outside else 0
    made = root(key, width=width, height=head + len(blocks) * tall + below, title=title, words=words)
    for number, kind in enumerate(kinds):
        _head(made, labels[kind], LEFT + number * cell, head, cell, upright)
    most = _most(every)
    for place, block in enumerate(blocks):
        top = head + place * tall
        _text(made, str(block), LEFT - 10, top + (tall - GAP) / 2 + 4, anchor="end")
        for weight in inside:
            if weight.block == block:
                _cell(made, weight, LEFT + kinds.index(weight.kind) * cell, top, cell - GAP, tall - GAP, most)
    for number, weight in enumerate(outside):
        row, column = divmod(number, len(kinds))
        top = head + len(blocks) * tall + 20 + row * (tall + 18)
        left = LEFT + column * cell
        _text(made, shorten(labels[weight.kind], int((cell if len(outside) > 1 else width - LEFT) / 6.4)), left, top)
        _cell(made, weight, left, top + 6, cell - GAP, tall - GAP, most)
    return made


def _flow(every: Sequence[Weight], key: str, width: int, title: str, words: str) -> ElementTree.Element:
    """Cells one after the other, for models whose weights do not repeat."""
    across = 12 if width == WIDE else 6
    cell, tall = width / across, 40.0
    made = root(
        key, width=width, height=math.ceil(min(len(every), MOST_WEIGHTS) / across) * tall + 4, title=title, words=words
    )
    most = _most(every)
    for number, weight in enumerate(every[:MOST_WEIGHTS]):
        row, column = divmod(number, across)
        _cell(made, weight, column * cell, row * tall, cell - GAP, tall - GAP, most)
    return made


def _most(every: Sequence[Weight]) -> float:
    return max((weight.update for weight in every if weight.update is not None), default=0.0)


def _head(made: ElementTree.Element, label: str, left: float, head: float, cell: float, upright: bool) -> None:
    if upright:
        x, y = left + cell / 2 + 1, head - 8
        _text(made, shorten(label, 24), x, y, transform=f"rotate(-90 {x:.1f} {y:.1f})")
        return
    parts = label.split(".")
    for number, part in enumerate(parts):
        dot = "." if number < len(parts) - 1 else ""
        _text(made, shorten(part, max(6, int(cell / 6.4))) + dot, left, head - 8 - 14 * (len(parts) - 1 - number))


def _cell(
    made: ElementTree.Element, weight: Weight, left: float, top: float, width: float, tall: float, most: float
) -> None:
    group = ElementTree.SubElement(made, "g", {"transform": f"translate({left:.1f} {top:.1f})"})
    ElementTree.SubElement(
        group, "title"
    ).text = f"{weight.name}, {weight.shape[0]} x {weight.shape[1]}: moved {brief(weight.update)}, touched {percent(weight.share)}"
    frame = {"width": f"{width:.1f}", "height": f"{tall:.1f}", "rx": "2"}
    ElementTree.SubElement(group, "rect", {**frame, "style": "fill: var(--faint)"})
    if weight.update and most > 0:
        style = f"fill: {css(SERIES[1])}; fill-opacity: {DEEPEST * weight.update / most:.3f}"
        ElementTree.SubElement(group, "rect", {**frame, "style": style})
    d_out, d_in = weight.shape
    for pieces, size, along in ((weight.rows, d_out, "row"), (weight.columns, d_in, "column")):
        path = _bars(pieces, size, along, width, tall)
        if path:
            ElementTree.SubElement(group, "path", {"d": path, "style": f"fill: {css(INK)}; fill-opacity: .6"})
    size = d_out if weight.axis == "row" else d_in
    if active := _bars(weight.active, size, weight.axis, width, tall, thinnest=2.4):
        style = f"fill: {css(SERIES[0])}; stroke: var(--card); stroke-width: .8; paint-order: stroke"
        ElementTree.SubElement(group, "path", {"d": active, "style": style})
    ElementTree.SubElement(group, "rect", {**frame, "style": "fill: none; stroke: var(--rule)"})


def _bars(
    pieces: Sequence[tuple[int, int]], size: int, along: str, width: float, tall: float, thinnest: float = THINNEST
) -> str:
    """One path of all rows or columns; what would be nearer together than a pixel is drawn as one."""
    length = tall if along == "row" else width
    drawn: list[list[float]] = []
    for first, count in sorted(pieces):
        thick = min(length, max(thinnest, count / size * length))
        start = min(max(0.0, (first + count / 2) / size * length - thick / 2), length - thick)
        if drawn and start < drawn[-1][1] + 1:
            drawn[-1][1] = max(drawn[-1][1], start + thick)
        else:
            drawn.append([start, start + thick])
    if along == "row":
        return " ".join(f"M0 {start:.1f}h{width:.1f}V{end:.1f}H0z" for start, end in drawn)
    return " ".join(f"M{start:.1f} 0V{tall:.1f}H{end:.1f}V0z" for start, end in drawn)


def _text(
    made: ElementTree.Element, text: str, x: float, y: float, *, anchor: str = "start", transform: str | None = None
) -> None:
    more = {"transform": transform} if transform else {}
    style = f"font-size: 11px; text-anchor: {anchor}; fill: var(--muted)"
    ElementTree.SubElement(made, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "style": style, **more}).text = text
