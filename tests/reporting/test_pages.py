"""What a page of each kind says, and that it says it safely."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reported
from paging import Tags, text_of

from slicefine.reporting.run import write

FROM_ELSEWHERE = re.compile(r"""(?:src|href|action|data)\s*=\s*["'](?!#|data:,)|url\((?!#)|@import|https?:""")


def page_of(tmp_path: Path, make: Callable[..., Path], **changes: Any) -> str:
    return text_of(write([make(tmp_path / "run", **changes)]))


# ---------------------------------------------------------------- of every kind


@pytest.mark.parametrize("kind", list(reported.MAKE))
def test_a_page_is_whole_and_needs_nothing_else(kind: str, pages: dict[str, Path]) -> None:
    content = pages[kind].read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    tags = Tags(content)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & tags.names
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert not FROM_ELSEWHERE.search(content)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html.unescape(content)
    assert pages[kind].stat().st_size < 1_500_000
    assert [path for path in pages[kind].parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", list(reported.MAKE))
def test_every_chart_has_words(kind: str, pages: dict[str, Path]) -> None:
    content = pages[kind].read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", content, flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert figure.count('role="img"') == 2
        assert figure.count("<desc") == 2
        assert len(re.findall(r"<figcaption>(.*?)</figcaption>", figure, flags=re.DOTALL)[0]) > 30


@pytest.mark.parametrize(
    "kind", [kind for kind in reported.MAKE if kind != "analysis"]
)  # by the same code, and the slowest
def test_the_same_records_are_the_same_bytes(kind: str, pages: dict[str, Path], tmp_path: Path) -> None:
    again = write([reported.MAKE[kind](tmp_path / kind)])
    assert again.read_bytes() == pages[kind].read_bytes()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", list(reported.MAKE))
def test_what_comes_from_outside_is_text(kind: str, tmp_path: Path) -> None:
    """Every text of every record becomes a script, one kind of record at a time."""

    def spoiled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            made = {name: spoiled(inner, name) for name, inner in value.items()}
            return made | {reported.EVIL: next(iter(made.values()))} if made else made
        if isinstance(value, list):
            return [spoiled(inner, key) for inner in value]
        if isinstance(value, str) and key not in ("status", "kind", "axis", "choice", "theme"):
            return value + reported.EVIL
        return value

    named = reported.MAKE[kind](tmp_path / "run")
    for file in (named if named.is_dir() else named.parent).iterdir():
        if file.suffix == ".json":
            file.write_text(json.dumps(spoiled(json.loads(file.read_text()))))
        elif file.suffix == ".jsonl":
            lines = [json.dumps(spoiled(json.loads(line))) for line in file.read_text().splitlines()]
            file.write_text("\n".join(lines) + "\n")
        else:
            file.write_text(file.read_text() + f"# {reported.EVIL}")
    content = write([named]).read_text()
    assert "<script" not in content.lower()
    assert Tags(content).open == []
    assert html.escape(reported.EVIL) in content


@pytest.mark.parametrize("kind", ["generation", "benchmark", "plan"])
def test_names_in_drawings_are_text(kind: str, tmp_path: Path) -> None:
    """Drawn this time, with names that are drawn."""
    named = reported.MAKE[kind](tmp_path / "run")
    file = named if named.is_file() else next(named.glob("*.json"))
    names = ("gsm8k", "SliceFine-5R", "LoRA-r8")
    content = file.read_text()
    for name in names:
        content = content.replace(f'"{name}"', json.dumps(f"{name} {reported.EVIL}"))
    file.write_text(content)
    page = write([named]).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in "".join(re.findall(r"<text .*?</text>", page))


# ---------------------------------------------------------------- training


def test_a_training_run(pages: dict[str, Path]) -> None:
    said = text_of(pages["training"])
    assert (
        "all-MiniLM-L6-v2, tuned for text classification: in 640 steps that trained 0.46 % of its parameters at a time, accuracy on the "
        "validation set improved from 19.2 % to 93.0 %."
    ) in said
    assert "New head 2,310" in said
    assert "7 moves of the slices: one every 80 steps." in said
    assert "Moved most: bert.encoder.layer.5" in said
    assert "1.03 times the frozen limit (1.01 to 1.07 within a round)" in said
    assert "The largest part: saved for backward, 151.0 MiB" in said
    assert "slide_every: 80" in said
    assert reported.COMMIT["hash"] in said
    content = pages["training"].read_text()
    loss = content[content.index('id="loss-wide-title"') :]
    assert len(re.findall(r"stroke: var\(--muted\); stroke-opacity: 0.5", loss[: loss.index("</svg>")])) == 14


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"status": "failed", "error": "The loss is nan"}, "This run failed after step 640 of 640: The loss is nan"),
        ({"status": "interrupted", "steps": 80}, "This run was interrupted after step 80 of 640."),
        ({"status": "running"}, "This run is still going on, or was ended from outside"),
    ],
)
def test_a_run_without_an_end_says_so_first(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    said = page_of(tmp_path, reported.training, **changes)
    assert says in said
    assert said.index(says) < said.index("all-MiniLM-L6-v2, tuned for")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({}, "has made 640 steps that trained 0.46 % of its parameters at a time; it has not been scored."),
        ({"before": {"loss": 2.0}}, "before them its loss on the validation set was 2.000."),
        ({"after": {"loss": 2.0}}, "has a loss of 2.000 on the validation set after 640 steps"),
        ({"before": {"loss": 2.0}, "after": {"loss": 2.5}}, "loss on the validation set got worse, from 2.000 to 2.500."),
        ({"before": {"loss": 2.5}, "after": {"loss": 2.0}}, "loss on the validation set improved from 2.500 to 2.000."),
        ({"before": {"accuracy": 0.5}, "after": {"accuracy": 0.4}}, "accuracy on the validation set got worse, from 50.0 % to 40.0 %."),
        ({"before": {"accuracy": 0.5}, "after": {"accuracy": 0.5}}, "accuracy on the validation set stayed at 50.0 %."),
        ({"before": {"mse": 1.0}, "after": {"mse": 0.5}}, "mean squared error on the validation set improved from 1.000 to 0.500."),
    ],
)  # fmt: skip
def test_the_verdict_of_a_run(metrics: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in page_of(tmp_path, reported.training, metrics=metrics)


@pytest.mark.usefixtures("undrawn")
def test_a_record_alone_is_enough(tmp_path: Path) -> None:
    reported.write(tmp_path / "run", "record.json", reported.record())
    said = text_of(write([tmp_path / "run"]))
    assert "There is no history.json beside this record, so there are no curves" in said
    assert "Made by slicefine report from record.json, and from nothing else." in said


def test_a_log_of_any_length_is_a_small_page(tmp_path: Path) -> None:
    folder = reported.training(tmp_path / "run")
    reported.write(folder, "history.json", reported.history(100_000, every=1, moves_every=10))
    page = write([folder])
    assert page.stat().st_size < 400_000
    assert "80 of the moves are drawn, evenly spaced." in text_of(page)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("logged", "smoothed"), [(59, False), (60, True)])
def test_means_are_spoken_of_where_they_are_drawn(logged: int, smoothed: bool, tmp_path: Path) -> None:
    folder = reported.training(tmp_path / "run")
    reported.write(folder, "history.json", reported.history(logged, every=1))
    assert ("Faint: as it was logged; strong: the mean of 3 neighbours." in text_of(write([folder]))) == smoothed


@pytest.mark.usefixtures("undrawn")
def test_a_model_in_a_folder_that_says_nothing_has_the_one_above(tmp_path: Path) -> None:
    for make, model in ((reported.training, "/m/minilm/model"), (reported.analysis, {"name": "/m/minilm/model"})):
        page = write([make(tmp_path / make.__name__, model=model)])
        assert "minilm/model" in text_of(page)
        assert "/minilm/model, tuned" not in text_of(page)
    assert "<h1>minilm/model</h1>" in page.read_text()


# ---------------------------------------------------------------- evaluations


def test_an_evaluation_of_a_classifier(pages: dict[str, Path]) -> None:
    said = text_of(pages["classification"])
    assert "runs/trec: accuracy 94.4 % (92.0 to 96.1 %) on test.jsonl, 500 examples." in said
    assert "6 classes, the hardest first" in said
    assert said.index("entity 84.0 % 79 94") < said.index("description 98.6 % 136 138")
    worst = said[said.index("The worst examples") :]
    sure = [float(found) for found in re.findall(r"probability ([\d.]+)", worst)]
    assert len(sure) == 20
    assert sure == sorted(sure, reverse=True)


def test_an_evaluation_of_answers(pages: dict[str, Path]) -> None:
    said = text_of(pages["generation"])
    assert "scores 74.0 on average over 5 sets and 3,822 questions, from 46.4 % (gsm8k) to 91.8 % (multiarith)." in said
    assert "contamination not checked" in said
    assert "12 of 12 wrong answers" in said
    assert "gsm8k, row 2 expected 65 given no answer found" in said
    assert "72 cut at the longest length" in said
    assert "asked Robin has 9 boxes" in said, "without the words that every prompt begins with"


@pytest.mark.usefixtures("undrawn")
def test_texts_of_wrong_predictions_are_shown_as_text(tmp_path: Path) -> None:
    folder = reported.classification(tmp_path / "run")
    line = {"task": "t", "place": "f", "label": "a", "predicted": "b", "score": 0.5}
    lines = [
        line | {"row": 1, "text": f"first {reported.EVIL}", "text_pair": f"second {reported.EVIL} " + "long " * 99},
        line | {"row": 2, "text": "alone", "text_pair": None},
        line | {"row": 3},
    ]
    reported.write(folder, "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = write([folder])
    said = text_of(page)
    assert f"text first {reported.EVIL} text_pair second {reported.EVIL} long" in said
    assert "text alone" in said
    assert said.count("text_pair") == 1
    content = page.read_text()
    assert "<script" not in content
    assert Tags(content).open == []


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_of_numbers(tmp_path: Path) -> None:
    scores = {"metrics": {"pearson": 0.912, "mse": 0.31}, "examples": 3, "asked": 3}
    folder = reported.classification(tmp_path / "run", tasks={"stsb": scores}, classes=[], average=0.9)
    lines = [{"task": "stsb", "row": row, "place": f"f:{row}", "label": 1.0, "predicted": value, "score": None} for row, value in ((1, 1.5), (2, 4.0), (3, 1.0))]  # fmt: skip
    reported.write(folder, "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    said = text_of(write([folder]))
    assert "Pearson correlation 91.2 on stsb, 3 examples" in said
    assert "f:2 1.000 4.000 off by 3 f:1 1.000 1.500 off by 0.5" in said


@pytest.mark.usefixtures("undrawn")
def test_scores_that_flatter_and_scores_that_are_not_whole(tmp_path: Path) -> None:
    dirty = {"sources": ["a"], "tasks": ["gsm8k"], "rows": {"gsm8k": 3}, "questions": {"gsm8k": 2}, "examples": []}
    said = page_of(tmp_path, reported.generation, contamination=dirty)
    assert "The model was trained on examples that it is scored on (gsm8k 2): these scores flatter it." in said
    assert "This evaluation was interrupted" in page_of(tmp_path, reported.generation, status="interrupted")
    assert "has not been scored yet." in page_of(
        tmp_path, reported.generation, status="running", tasks={}, average=None
    )


@pytest.mark.usefixtures("undrawn")
def test_answers_that_are_all_right_and_answers_that_were_not_kept(tmp_path: Path) -> None:
    folder = reported.generation(tmp_path / "run")
    reported.write(folder, "answers.jsonl", json.dumps({"task": "gsm8k", "row": 1, "right": True}) + "\n")
    assert "The worst examples None is wrong." in text_of(write([folder]))
    (folder / "answers.jsonl").unlink()
    assert "There are no answers beside this record" in text_of(write([folder]))


# ---------------------------------------------------------------- analyses


def test_an_analysis(pages: dict[str, Path]) -> None:
    said = text_of(pages["analysis"])
    assert (
        "Of 5 properties of the winning-slice hypothesis, 1 holds, 1 holds partly, 2 fail and 1 was not measured for all-MiniLM-L6-v2 on "
        "text-classification. Advice: r = 5, axis row, 7 moves (confirmed by short runs)."
    ) in said
    assert "Spectral balance fails Groups of rows differ eight times" in said
    assert "found 0.0163 threshold at most 0.01 over rows and columns poster \u03c1 near 0.001" in said
    content = pages["analysis"].read_text()
    drawn = set(re.findall(r'id="([a-z-]+)-wide-title"', content))
    assert drawn == {
        "dispersion", "spectra-row", "spectra-column", "spectra-head", "variance", "ranks", "kernel", "winners", "choices", "gradients",
        "together", "together-curves", "check",
    }  # fmt: skip
    assert "classifier: it has 6 rows, fewer than the 8 groups" in said
    assert (
        "Winners, r = 1 58.0 % 39.0 to 76.0 % (95 % interval) of random slices of rank 1 win alone. Untrained: 8.0 % (2.0 to 26.0 %). "
        "Winners, r = 16 100.0 % 86.0 to 100.0 % (95 % interval) of random slices of rank 16 win alone. Untrained: 33.0 % (18.0 to 53.0 %)."
    ) in said


@pytest.mark.usefixtures("undrawn")
def test_one_rank_is_one_figure(tmp_path: Path) -> None:
    stages = {"winners": reported.winners()}
    stages["winners"]["summary"] |= {"share_by_rank": {"5": [0.5, 0.3, 0.7]}, "share_untrained": {}}
    said = page_of(tmp_path, reported.analysis, stages=stages)
    assert said.count("Winners, r = ") == said.count("of random slices of rank 5 win alone.") == 1
    assert "Untrained:" not in said[: said.index("Verdicts What the theory")]


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_is_a_short_list(tmp_path: Path) -> None:
    first, *others = reported.verdicts()
    reasons = ["The stage energy was not run."] * 2 + ["The model does not return its hidden states.", ""]
    missing = [
        one | {"verdict": "not measured", "figure": None, "words": words}
        for one, words in zip(others, reasons, strict=True)
    ]
    given = {"stages": {"balance": reported.balance()}, "verdicts": [first, *missing]}
    page = write([reported.analysis(tmp_path / "run", **given)])
    said = text_of(page)
    assert "1 fails and 4 were not measured for all-MiniLM-L6-v2" in said
    assert (
        "Not measured: Task energy, Local winners: The stage energy was not run. r = 1 suffices: The model does not return its hidden "
        "states. Global winner"
    ) in said
    assert page.read_text().count('class="pill') == said.count("at most 0.01 over rows and columns") == 1
    beside = text_of(write([page.parent, reported.training(tmp_path / "two")], tmp_path / "both.html"))
    assert beside.count("The stage energy was not run.") == 1
    page = write([reported.analysis(tmp_path / "run", **given | {"verdicts": missing})])
    assert '<ol class="verdicts">' not in page.read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("favoured", "check", "says"),
    [
        (32, [], "not confirmed: short runs favour r = 32"),
        (None, [{"r": 1}, {"r": 5, "loss_before": 1.79, "loss_after": 1.788}],
         "not confirmed: in short runs the loss goes from 1.790 to 1.788"),
        (None, [], "not confirmed by short runs"),
    ],
)  # fmt: skip
def test_advice_that_was_not_confirmed_says_what_was_found_instead(
    favoured: int | None, check: list[dict[str, Any]], says: str, tmp_path: Path
) -> None:
    advice = reported.advice() | {"confirmed": False, "favoured": favoured, "check": check}
    said = page_of(tmp_path, reported.analysis, stages={"advice": advice})
    assert f"Advice: r = 5, axis row, 7 moves ({says})." in said
    assert f"Advised rank r = 5 Axis row, 7 moves; {says}." in said


@pytest.mark.usefixtures("undrawn")
def test_what_has_to_be_known_of_a_stage_stands_above_it(tmp_path: Path) -> None:
    advice = reported.advice() | {"note": "There are too few training examples to keep them apart."}
    said = page_of(tmp_path, reported.analysis, stages={"advice": advice})
    assert said.count(advice["note"]) == 1


@pytest.mark.usefixtures("undrawn")
def test_an_analysis_that_is_not_whole(tmp_path: Path) -> None:
    stages = {"balance": reported.balance()}
    said = page_of(
        tmp_path,
        reported.analysis,
        status="interrupted",
        stages=stages,
        failed={"energy": "The model does not return its hidden states."},
        verdicts=[],
        task=None,
    )
    assert "This analysis was interrupted. Finished stages: balance." in said
    assert "No property of the winning-slice hypothesis has been judged for all-MiniLM-L6-v2 yet." in said
    assert "Task energy It found nothing: The model does not return its hidden states." in said
    assert "Local winners" not in said


@pytest.mark.usefixtures("undrawn")
def test_a_twin_is_said_to_be_one(tmp_path: Path) -> None:
    said = page_of(tmp_path, reported.analysis, untrained=True)
    assert "all-MiniLM-L6-v2, untrained twin" in said
    assert "for it the hypothesis should fail" in said


# ---------------------------------------------------------------- benchmarks and plans


def test_a_benchmark_of_speed(pages: dict[str, Path]) -> None:
    said = text_of(pages["benchmark"])
    assert "Of 2 targets, 1 is met and 1 missed." in said
    assert "over the frozen limit, SliceFine-1R is at 1.026, LoRA-r8 is at 1.227 and full is at 1.464." in said
    assert "prefix prefix tuning needs a decoder" in said, "a method that could not be run keeps its row"
    assert '<span class="pill bad">missed</span>' in pages["benchmark"].read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_benchmark_of_scores(tmp_path: Path) -> None:
    said = text_of(write([reported.benchmark(tmp_path / "run", reported.quality_content())]))
    assert "Mean scores, the best first: full 88.2, LoRA-r8 87.0 and SliceFine-5RC 85.3." in said
    assert "SHiRA 105,600 799,200 0 too little memory" in said


@pytest.mark.usefixtures("undrawn")
def test_less_is_better_of_losses(tmp_path: Path) -> None:
    rows = [
        {"method": name, "code, loss": loss, "Avg.": loss}
        for name, loss in (("full", "2.95 ± 0.01"), ("SliceFine-5RC", "3.74"))
    ]
    content = reported.quality_content(tables=[{"title": "Scores", "rows": rows, "note": ""}])
    said = text_of(write([reported.benchmark(tmp_path / "run", content)]))
    assert "Mean scores, the best first: full 2.950 and SliceFine-5RC 3.740." in said
    assert "mean loss" not in said, "that is in the drawing"


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_shows_its_growth(tmp_path: Path) -> None:
    tables = [
        {
            "title": f"vit, length {size}: training step",
            "rows": [{"method": "LoRA-r8", "/ frozen-limit": size / 100}],
            "note": "",
        }
        for size in (64, 128)
    ]
    said = text_of(
        write([reported.benchmark(tmp_path / "run", reported.speed_content(theme="speed-sweep-length", tables=tables))])
    )
    assert "Growth with length" in said


def test_results_of_the_clone_can_be_read(tmp_path: Path) -> None:
    """Those in benchmarks/, which have no version, from scripts of their own."""
    files = sorted((Path(__file__).parents[2] / "benchmarks").glob("step-time-*.json"))
    page = write([files[0]], tmp_path / "page.html")
    assert "targets" in text_of(page)


def test_a_plan(pages: dict[str, Path]) -> None:
    said = text_of(pages["plan"])
    assert (
        "SliceFine-5RC needs 46.69 GiB at its peak (LoRA-r8 49.82 GiB and full 99.40 GiB), and does not fit into 40.00 GiB; with "
        "--training.activation_checkpointing true it needs 23.44 GiB and does."
    ) in said
    assert "SliceFine-5RC 46.69 GiB -7.69 GiB does not fit" in said


@pytest.mark.usefixtures("undrawn")
def test_a_plan_of_a_depth_window(tmp_path: Path) -> None:
    turns = [{"lowest": 0, "active": 340992}, {"lowest": 4, "active": 120000}]
    said = page_of(tmp_path, reported.plan, turns=turns)
    assert (
        "Depth window 2 turns Parameters trained at a step, by turn: 340,992 from block 0 on, 120,000 from block 4 on."
        in said
    )


@pytest.mark.usefixtures("undrawn")
def test_plans_that_fit_and_plans_that_never_do(tmp_path: Path) -> None:
    assert "whether that fits is not known without the memory" in page_of(
        tmp_path, reported.plan, memory=None, steps=None
    )
    fitting = [{**one, "fits": True} for one in reported.plan_content()["methods"]]
    assert "and fits into 40.00 GiB, as LoRA-r8 and full would." in page_of(tmp_path, reported.plan, methods=fitting)
    smallest = {"settings": {"slice.axis": "column"}, "device": 24374650090}
    said = page_of(tmp_path, reported.plan, changes=[], smallest=smallest)
    assert "whatever the batch, the axis and the checkpointing." in said
    assert (
        "with --slice.axis column it still needs 22.70 GiB beside what is set aside, 22.70 GiB of them weights." in said
    )
