"""What a page consists of, and how it becomes HTML. Whatever text is put into it, it is shown as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from slicefine.reporting.palette import css
from slicefine.reporting.text import DASH, decimal, finite, unbroken

TEMPLATES = Path(__file__).parent / "templates"
GOOD, FAIR, BAD, PLAIN = "good", "fair", "bad", "plain"
"""Tones of a verdict or a notice."""
MANY = 12
"""Rows from which on a table that is not the point of its section is folded."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, with a word of explanation."""

    name: str
    value: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What has to be known before anything else."""

    tone: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Paragraphs. What stands between two ` is code."""

    BLOCK: ClassVar = "prose"
    text: str
    tone: str = PLAIN
    """Other than plain: set apart."""

    @property
    def paragraphs(self) -> list[list[tuple[bool, str]]]:
        """Of each, pieces of text, and whether they are code."""
        return [pieces(part) for part in self.text.split("\n\n") if part.strip()]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A list of sentences."""

    BLOCK: ClassVar = "listing"
    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A file as it is."""

    BLOCK: ClassVar = "code"
    title: str
    text: str
    folded: bool = True


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of a table."""

    text: str
    tone: str = ""
    """A verdict, if there is one."""
    shade: float = 0.0
    """How much of the accent is behind it, 0 to 1."""
    strong: bool = False
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first of a row names it."""

    BLOCK: ClassVar = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False

    @property
    def right(self) -> list[bool]:
        """Which columns are numbers, and stand on the right."""
        cells = [[row[number].text for row in self.rows] for number in range(len(self.columns))]
        return [number > 0 and all(map(_like_a_number, column)) for number, column in enumerate(cells)]


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a chart's legend."""

    name: str
    colour: str
    """A stand-in of `palette.py`."""
    mark: str = "line"
    """line, dashed, dotted, dashdot, thin, dot, open, band or bar"""

    @property
    def css(self) -> str:
        return css(self.colour)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, in a wide and a narrow form."""

    BLOCK: ClassVar = "chart"
    key: str
    """In the names of its parts; unique in a page."""
    title: str
    words: str
    """What it shows, with the main figures."""
    wide: str
    """SVG, as `svg.py` makes it."""
    narrow: str
    legend: Sequence[Key] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """An example that a model got wrong."""

    place: str
    expected: str
    given: str
    note: str = ""
    """How sure it was, say."""
    texts: Sequence[tuple[str, str, str]] = ()
    """Name, beginning, and the whole where that is longer."""


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Examples that a model got wrong."""

    BLOCK: ClassVar = "cases"
    cases: Sequence[Case]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of one property."""

    property: str
    verdict: str
    tone: str
    figure: str
    threshold: str
    words: str
    claim: str
    """The poster's."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Verdicts, one a property."""

    BLOCK: ClassVar = "verdicts"
    verdicts: Sequence[Verdict]


Block = Prose | Listing | Code | Table | Chart | Cases | Verdicts


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    blocks: Sequence[Block]
    words: str = ""
    """What it is about."""


@dataclass(kw_only=True)
class Page:
    """A whole page."""

    kind: str
    title: str
    verdict: str
    """In one sentence."""
    subtitle: str = ""
    notice: Notice | None = None
    figures: list[Figure] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    made_from: list[str] = field(default_factory=list)
    """Names of the files that it was made from."""


def html(page: Page) -> str:
    """The page as one file that needs no other. The same page gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    keys = [block.key for section in page.sections for block in section.blocks if isinstance(block, Chart)]
    assert len(keys) == len(set(keys)), f"two charts have the same key: {sorted(keys)}"
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # of charts alone: `svg.py` has escaped what is in them
    environment.filters["pieces"] = pieces
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(page=page, style=Markup(style))


def pieces(text: str) -> list[tuple[bool, str]]:
    """What stands between two ` is code; a single one is itself."""
    parts = unbroken(text).split("`")
    if len(parts) % 2 == 0:
        return [(False, unbroken(text))]
    return [(number % 2 == 1, part) for number, part in enumerate(parts) if part]


def cell(value: Any) -> Cell:
    """A value of a benchmark's table as a cell; what is between two ** stands out, in Markdown as here."""
    if value is None or value == "":
        return Cell(text="")
    if isinstance(value, bool):
        return Cell(text="yes" if value else "no")
    if isinstance(value, int | float):
        return Cell(text=decimal(value) if finite(value) is not None else str(value))
    text = str(value)
    strong = len(text) > 4 and text.startswith("**") and text.endswith("**")
    return Cell(text=text[2:-2] if strong else text, strong=strong, tone={"**missed**": BAD, "met": GOOD}.get(text, ""))


def table(title: str, rows: Sequence[Mapping[str, Any]], *, note: str = "", folded: bool = False) -> Table:
    """Rows with the same keys as a table; columns that no row fills are left out."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in names if any(row.get(key) not in (None, "") for row in rows)]
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    return Table(title=title, columns=columns, rows=cells, note=note, folded=folded)


def _cell(value: Any) -> Cell:
    return value if isinstance(value, Cell) else cell(value)


def _like_a_number(text: str) -> bool:
    return not text or text == DASH or text.lstrip("-+\u2212<")[:1].isdigit()
