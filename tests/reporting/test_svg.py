"""Drawings of a page: its colours and fonts, names of their own, words for those who do not see them, and nothing that is run."""

from __future__ import annotations

import re
import warnings
from typing import Any
from xml.etree import ElementTree

import pytest
import reported

from slicefine.reporting import model_map
from slicefine.reporting.charts import Dot, Line, chart, dots, lines, stacked
from slicefine.reporting.page import Chart
from slicefine.reporting.palette import SERIES
from slicefine.reporting.svg import drawing

AWKWARD = '<script>alert(1)</script> $x_1$ & "q" 中文 \u202e'


def draw(figure: Any) -> None:
    axis = figure.subplots()
    axis.plot([0, 1, 2], [1, 3, 2], color=SERIES[0], marker="o", label=AWKWARD)
    axis.fill_between([0, 1, 2], [0, 1, 1], [2, 4, 3], color=SERIES[1], alpha=0.2)
    axis.set(title=AWKWARD, xlabel="steps")
    axis.legend()


def made(key: str = "one", **changes: Any) -> str:
    return drawing(key, draw, **{"width": 400, "height": 200, "title": AWKWARD, "words": "what it shows", **changes})


def elements(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter())


def test_it_says_what_it_is() -> None:
    root = ElementTree.fromstring(made())
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root.iter()}
    assert [named[name] for name in root.get("aria-labelledby", "").split()] == [AWKWARD, "what it shows"]
    assert root.get("viewBox") == "0 0 400 200"
    assert not {"width", "height", "xmlns"} & set(root.attrib)


def test_its_colours_are_the_pages_and_its_fonts_too() -> None:
    svg = made()
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", svg)) >= {"s1", "s2", "ink", "muted", "rule"}
    assert "font-family" not in svg
    assert not {"style", "metadata", "script", "image"} & {element.tag for element in elements(svg)}


def test_names_are_text() -> None:
    svg = made()
    assert "<script" not in svg
    texts = [element.text for element in elements(svg) if element.tag == "text"]
    assert texts.count(AWKWARD) == 2, "title and legend, dollars and all"


def test_ids_are_its_own_and_links_lead_to_them() -> None:
    both = made("one") + made("two")
    ids = re.findall(r'\bid="([^"]+)"', both)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', both) + re.findall(r"url\(#([^)]+)\)", both)
    assert links
    assert set(links) <= set(ids)


def test_the_same_drawing_is_the_same_text() -> None:
    assert made() == made()


def test_letters_that_the_font_lacks_are_the_readers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()


def test_a_long_line_is_short() -> None:
    points = [(float(step), float(step % 7)) for step in range(100_000)]
    assert (
        len(lines("long", {"loss": [Line(name="a", points=points)]}, title="t", words="w", over="step").wide) < 20_000
    )


def every_chart() -> list[Chart]:
    return [
        lines("lines", {"up": [Line(name=AWKWARD, points=[(1.0, 2.0)]), Line(name="empty", points=[])]}, title="t", words="w", over="o", log_x=True, level=("l", 1.0)),
        lines("none", {"up": []}, title="t", words="w", over="o", counted=True),
        dots("dots", [Dot(name=AWKWARD * 3, value=0.5, low=0.1, high=0.9, group="g", words="w"), Dot(name="b", value=1)], title="t", words="w", label="l", shares=True, line=("one", 1.0)),
        dots("zero", [Dot(name="b", value=0.0)], title="t", words="w", label="l", log=True),
        stacked("stacked", {AWKWARD: [("a", 1.0), ("b", 2.0)], "c": []}, title="t", words="w", label="l", line=("device", 9.0), totals=str),
    ]  # fmt: skip


def test_charts_are_drawn_wide_and_narrow_whatever_is_in_them() -> None:
    for one in every_chart():
        for svg in (one.wide, one.narrow):
            assert ElementTree.fromstring(svg).get("role") == "img", one.key
            assert "<script" not in svg
        assert "0 0 720 " in one.wide
        assert "0 0 304 " in one.narrow


def test_a_key_is_no_way_in() -> None:
    with pytest.raises(AssertionError, match="a key is made of"):
        chart('x"); background: url(//evil', lambda *_: None, title="t", words="w", height=100)


# ---------------------------------------------------------------- the map of a model


def test_the_map_has_a_cell_for_each_weight_and_draws_touched_positions_to_scale() -> None:
    every = model_map.weights(reported.slices())
    chart = model_map.model_map(every)
    root = ElementTree.fromstring(chart.wide)
    cells = {group.findtext("title", "").partition(",")[0]: group for group in root.iter("g")}
    assert list(cells) == [weight.name for weight in every]
    assert len(cells) == 37
    cell = cells[
        "bert.encoder.layer.0.intermediate.dense"
    ]  # 1,536 x 384, rows and columns 0 to 19 touched, columns 15 to 19 active
    width, tall = (float(cell.findall("rect")[0].get(side, "")) for side in ("width", "height"))
    rows, columns, active = (path.get("d", "") for path in cell.findall("path"))
    assert rows == f"M0 0.0h{width:.1f}V1.0H0z", "20 of 1,536 rows are less than a pixel"
    assert columns == f"M0.0 0V{tall:.1f}H{20 / 384 * width:.1f}V0z"
    left, right = (float(number) for number in re.findall(r"M([\d.]+) 0V[\d.]+H([\d.]+)V0z", active)[0])
    assert (left + right) / 2 == pytest.approx(17.5 / 384 * width, abs=0.1)
    # The deepest colour is that of the weight that moved most.
    shades = {name: float(re.findall(r"fill-opacity: ([\d.]+)", group.findall("rect")[1].get("style", ""))[0]) for name, group in cells.items()}  # fmt: skip
    most = max(every, key=lambda weight: weight.update or 0)
    assert max(shades, key=lambda name: shades[name]) == most.name
    assert most.name in chart.words


def test_kinds_are_called_by_as_much_as_tells_them_apart() -> None:
    names = ["attention.self.query", "attention.output.dense", "output.dense", "pooler.dense"]
    assert model_map.short_kinds(names) == {
        "attention.self.query": "query",
        "attention.output.dense": "attention.output.dense",
        "output.dense": "output.dense",
        "pooler.dense": "pooler.dense",
    }


@pytest.mark.parametrize("blocks", [0, 300])
def test_models_of_any_shape_have_a_map(blocks: int) -> None:
    """Without blocks; with so many that some are left out; slices in random order."""
    touched = {"row": [[at, 1] for at in range(0, 512, 2)], "column": []}
    found = {
        "weights": [
            {"name": f"m.{block}.{kind}", "shape": [512, 64], "block": block if blocks else None, "axis": "row", "active": [[7, 1]], "touched": touched, "update": None, "share": 0.5}
            for block in range(blocks or 20)
            for kind in ("up", "down")
        ]
    }  # fmt: skip
    chart = model_map.model_map(model_map.weights(found))
    assert len(chart.wide) + len(chart.narrow) < 1_000_000
    assert ("are drawn" in chart.words) == (blocks == 300)


def test_a_map_without_weights_is_none() -> None:
    assert model_map.weights({"weights": [{"name": "a", "shape": [3]}, {"name": "b", "shape": None}]}) == []
