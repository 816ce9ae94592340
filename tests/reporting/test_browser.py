"""The pages in a real browser: wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
import reported

from slicefine.reporting.run import write

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="chromium is not installed: apt-get install chromium")
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.browser() as opened:
        yield opened


def check(browser: chromium.Browser, page: Path, width: int, *, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.value("document.readyState") == "complete"
    assert browser.value("document.documentElement.scrollWidth") <= browser.value(
        "document.documentElement.clientWidth"
    )
    assert browser.value("document.documentElement.clientWidth") == width
    assert browser.complaints == []
    assert browser.requests == []
    assert browser.value("document.scripts.length") == 0
    # One form of each chart is shown, and it is as wide as its box.
    shown = browser.value(
        "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('.wide, .narrow')].filter(d => d.offsetHeight > 20).map(d => d.className).join())"
    )
    assert set(shown) == {"narrow" if width < 640 else "wide"}
    paper, ink = (browser.value(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (brightness(paper) < brightness(ink)) == dark


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.parametrize("kind", list(reported.MAKE))
def test_every_page_at_two_widths_light_and_dark(kind: str, browser: chromium.Browser, pages: dict[str, Path]) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            check(browser, pages[kind], width, dark=dark)


def test_a_script_in_a_name_stays_text(browser: chromium.Browser, tmp_path: Path) -> None:
    run = reported.training(
        tmp_path / "run", model=reported.EVIL, notes=[reported.EVIL, "<img src=x onerror=alert(2)>"]
    )
    slices = reported.slices()
    slices["weights"][0]["name"] = reported.EVIL
    reported.write(run, "slices.json", slices)
    evaluation = reported.classification_results()
    task = evaluation["tasks"].pop("test.jsonl")
    task["classes"] = {reported.EVIL: task["classes"]["entity"]}
    task["confusion"] = {reported.EVIL: {reported.EVIL: 79, "<b>": 3}}
    scored = reported.classification(tmp_path / "scored", tasks={reported.EVIL: task}, sets={})
    for page in (write([run]), write([scored])):
        for width in WIDTHS:
            check(browser, page, width, dark=False)
            assert reported.EVIL in browser.value("document.body.innerText")
            assert browser.value("document.querySelectorAll('img, b:not(.eyebrow b)').length") == 0


def test_names_without_an_end_do_not_widen_the_page(browser: chromium.Browser, tmp_path: Path) -> None:
    long = "wwwwwwwwww" * 40
    run = reported.training(tmp_path / long[:200], model=long, notes=[long], status="failed", error=long)
    plans = [reported.plan(tmp_path / name / long[:200]) for name in "ab"]
    for page in (write([run]), write(plans, tmp_path / "both.html")):
        for width in WIDTHS:
            check(browser, page, width, dark=False)


def test_it_prints_light_with_everything_open(
    browser: chromium.Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(pages["training"], width=1280, dark=True, media="print")
    assert brightness(browser.value("getComputedStyle(document.body).backgroundColor")) == 3 * 255
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.paper(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
