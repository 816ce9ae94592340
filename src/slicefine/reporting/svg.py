"""Drawings as SVG inside of a page: made by matplotlib in stand-in colours, then given the page's colours and fonts, names
that no other drawing of the page has, and a title and a description for those who do not see it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from slicefine.reporting.palette import INK, MUTED, PAPER, RULE, SERIES, VARIABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDE, NARROW = 720, 304
"""Widths of a drawing, in CSS pixels: on a screen, and on a phone."""
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d+")
_LINK = re.compile(r"url\(#([^)]+)\)")
_KEPT = ("fill", "stroke", "opacity", "text-anchor", "font-size", "font-weight")
"""What is kept of matplotlib's styles: properties that begin so."""
_LENGTHS = ("d", "x", "y", "width", "height", "transform", "points")
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are untrusted, and may have a $
    "font.size": 12.0,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11.0,
    "axes.titlesize": 12.0,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.major.size": 4.0,
    "xtick.minor.size": 0.0,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 6 / 72,
    "figure.constrained_layout.w_pad": 3 / 72,
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0.0,
    "hatch.color": PAPER,
}


def drawing(key: str, draw: Callable[[Figure], None], *, width: int, height: int, title: str, words: str) -> str:
    """The SVG of what `draw` puts into an empty figure, for a page.

    Args:
        key: Begins every name in it; no other drawing of a page may have the same.
        width: In CSS pixels, like `height`; lengths and font sizes in the figure are too.
        title: Of the drawing; `words` say what it shows.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    settings: Any = {**SETTINGS, "axes.prop_cycle": _cycle(), "svg.hashsalt": key}
    with rc_context(settings), _quiet():
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _themed(ElementTree.fromstring(file.getvalue()), key, title, words)


def root(key: str, *, width: float, height: float, title: str, words: str) -> ElementTree.Element:
    """An empty drawing of so many CSS pixels, to be filled by hand; see `text_of`."""
    made = ElementTree.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}"})
    _describe(made, key, title, words)
    return made


def text_of(made: ElementTree.Element) -> str:
    """A drawing as text. What comes from outside is escaped."""
    return ElementTree.tostring(made, encoding="unicode")


def _describe(made: ElementTree.Element, key: str, title: str, words: str) -> None:
    made.set("role", "img")
    made.set("aria-labelledby", f"{key}-title {key}-words")
    for number, (tag, text) in enumerate((("title", title), ("desc", words))):
        element = ElementTree.Element(tag, {"id": f"{key}-{'title' if tag == 'title' else 'words'}"})
        element.text = text
        made.insert(number, element)


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=SERIES)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of letters that matplotlib's font lacks (those of the reader's browser are used), crowded layouts, and
    numbers that are beyond all measure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _themed(drawn: ElementTree.Element, key: str, title: str, words: str) -> str:
    _plain_names(drawn)
    for parent in list(drawn.iter()):
        for child in list(parent):
            # The style in there is meant for the drawing, and would be that of the whole page.
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    linked = list(dict.fromkeys(name for element in drawn.iter() for name in _links(element)))
    names = {name: f"{key}-{number}" for number, name in enumerate(linked)}
    for element in drawn.iter():
        if element.tag != "tspan":
            element.tail = None
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.attrib = _attributes(element, names)
    box = drawn.attrib["viewBox"]
    drawn.attrib.clear()
    drawn.set("viewBox", box)
    _shorten(drawn)
    _describe(drawn, key, title, words)
    return text_of(drawn)


def _attributes(element: ElementTree.Element, names: Mapping[str, str]) -> dict[str, str]:
    """The attributes of an element in the page's colours, with names of the page, and without those that do nothing."""
    found = {}
    for attribute, value in element.attrib.items():
        if attribute == "id":
            found |= {"id": names[value]} if value in names else {}
        elif attribute == "href":
            found["href"] = f"#{names[value[1:]]}"
        elif attribute == "style":
            kept = [part.strip() for part in value.split(";") if part.strip().startswith(_KEPT)]
            found["style"] = _colours(_relinked("; ".join(kept), names))
        elif attribute in ("clip-path", "fill", "stroke"):
            found[attribute] = _colours(_relinked(value, names))
        elif attribute == "transform" and value.startswith("rotate(-0 "):
            continue
        else:
            found[attribute] = _rounded(value) if attribute in _LENGTHS else value
    return found


def _shorten(element: ElementTree.Element) -> None:
    """Take out groups that say nothing, and say once what all marks of a group have in common."""
    children: list[ElementTree.Element] = []
    for child in element:
        _shorten(child)
        if child.tag == "g" and not child.attrib:
            children += list(child)
        elif child.tag not in ("g", "defs") or len(child):
            children.append(child)
    element[:] = children
    marks = [child for child in element if child.tag == "use"]
    styles = {mark.get("style") for mark in marks}
    if element.tag == "g" and len(marks) == len(element) > 1 and len(styles) == 1 and "style" not in element.attrib:
        element.set("style", styles.pop() or "")
        for mark in marks:
            mark.attrib.pop("style", None)


def _rounded(value: str) -> str:
    """A tenth of a pixel is enough."""
    return " ".join(_NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value).split())


def _plain_names(drawn: ElementTree.Element) -> None:
    """Without name spaces: in a page an `svg` needs none."""
    for element in drawn.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        if (link := element.attrib.pop(f"{{{XLINK}}}href", None)) is not None:
            element.set("href", link)


def _links(element: ElementTree.Element) -> list[str]:
    names = [name for value in element.attrib.values() for name in _LINK.findall(value)]
    return [*names, element.attrib["href"][1:]] if "href" in element.attrib else names


def _relinked(value: str, names: Mapping[str, str]) -> str:
    return _LINK.sub(lambda found: f"url(#{names[found[1]]})", value)


def _colours(value: str) -> str:
    return _COLOUR.sub(lambda found: f"var(--{VARIABLES[found[0]]})", value)
