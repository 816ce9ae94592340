"""A whole analysis: stages in order, each kept, taken up again, refused where it is of something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifiers import reviews, text_model, write_table
from safetensors.torch import load_file, save_file
from torch import Tensor

from slicefine.analysis import energy
from slicefine.analysis import run as runs
from slicefine.analysis.record import AnalysisRecord
from slicefine.analysis.settings import STAGES, AnalysisSettings
from slicefine.analysis.verdict import PROPERTIES
from slicefine.errors import SliceFineError
from slicefine.training.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return text_model(tmp_path / "model")


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    return Recipe.from_flat(
        {
            "task": "text-classification",
            "model.name": str(model),
            "data.train": str(write_table(tmp_path / "rows.jsonl", reviews(range(24)))),
            "data.validation": 0.25,
            "data.max_length": 16,
            "output": str(tmp_path / "unused"),
        }
    )


def settings(folder: Path, **given: Any) -> AnalysisSettings:
    return AnalysisSettings(**{"output": str(folder / "out"), "ranks": (1, 2), "quick": True, "groups": 2} | given)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "analysis.json").read_text())


def test_every_stage_and_a_verdict_on_every_property(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    record = runs.analyze(settings(tmp_path), str(model), recipe, "the command")
    found = read(tmp_path)
    assert (record.status, found["status"], found["kind"], found["version"]) == ("finished", "finished", "analysis", 1)
    assert (tuple(found["stages"]), found["failed"]) == (STAGES, {})
    assert set(found["seconds"]) == set(STAGES)
    assert [verdict["property"] for verdict in found["verdicts"]] == [one.title for one in PROPERTIES]
    assert found["model"]["name"] == str(model.resolve())
    assert found["command"] == "the command"
    assert found["data"]["train"]["examples"] == 36
    assert not (tmp_path / "unused").exists()


def test_without_examples_the_spectra_alone(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match="The stages energy, winners, global, advice need examples"):
        runs.analyze(settings(tmp_path), str(model), None, "")
    assert not (tmp_path / "out").exists()
    runs.analyze(settings(tmp_path, stages=("balance",)), str(model), None, "")
    found = read(tmp_path)
    assert list(found["stages"]) == ["balance"]
    assert found["verdicts"][0]["verdict"] != "not measured"
    assert found["verdicts"][2]["words"] == "The stage energy was not run."


def test_a_twin_with_random_weights_is_another_model(model: Path, tmp_path: Path) -> None:
    runs.analyze(settings(tmp_path, stages=("balance",)), str(model), None, "")
    first = read(tmp_path)
    with pytest.raises(
        SliceFineError, match=r"has another analysis: the model's digest was .* untrained was False and is True now"
    ):
        runs.analyze(settings(tmp_path, stages=("balance",), untrained=True, seed=3), str(model), None, "")
    assert read(tmp_path) == first
    twin = tmp_path / "twin"
    runs.analyze(settings(twin, stages=("balance",), untrained=True, seed=3), str(model), None, "")
    assert read(twin)["untrained"]
    assert read(twin)["model"]["fingerprint"] != first["model"]["fingerprint"]


def test_ctrl_c_keeps_finished_stages_and_the_same_command_goes_on(
    recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(tmp_path, stages=("balance", "energy"))

    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(energy, "run", interrupted)
        assert runs.analyze(wanted, str(model), recipe, "").status == "interrupted"
    stopped = read(tmp_path)
    assert list(stopped["stages"]) == ["balance"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.balance, "run", interrupted)  # it is not run again
        assert runs.analyze(wanted, str(model), recipe, "").status == "finished"
    assert read(tmp_path)["stages"]["balance"] == stopped["stages"]["balance"]
    assert list(read(tmp_path)["stages"]) == ["balance", "energy"]


def test_a_stage_that_finds_nothing_leaves_the_others(
    recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> dict[str, Any]:
        raise SliceFineError("There is nothing to see.")

    monkeypatch.setattr(energy, "run", nothing)
    record = runs.analyze(settings(tmp_path, stages=("energy", "balance")), str(model), recipe, "")
    assert (record.status, record.failed) == ("finished", {"energy": "There is nothing to see."})
    assert list(record.stages) == ["balance"]
    assert record.verdicts[2]["words"] == "There is nothing to see."


def test_other_examples_are_refused(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    wanted = settings(tmp_path, stages=("balance",))
    runs.analyze(wanted, str(model), recipe, "")
    write_table(tmp_path / "rows.jsonl", reviews(range(30)))
    with pytest.raises(SliceFineError, match=r"has another analysis: the data was .*Name another --output"):
        runs.analyze(wanted, str(model), recipe, "")


def test_other_settings_of_the_data_are_refused(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    wanted = settings(tmp_path, stages=("balance",))
    runs.analyze(wanted, str(model), recipe, "")
    shorter = Recipe.from_flat(recipe.flat() | {"data.max_length": 4})
    with pytest.raises(SliceFineError, match=r"has another analysis: data\.max_length was \d+ and is 4 now\."):
        runs.analyze(wanted, str(model), shorter, "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{oops", "is not the record of an analysis"),
        ('{"version": 9}', "is of version 9; this slicefine reads version 1"),
        ("{}", "is not the record of an analysis"),
    ],
)
def test_a_record_that_cannot_be_read(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text(text)
    with pytest.raises(SliceFineError, match=says):
        AnalysisRecord.read(tmp_path)


def test_all_that_is_wrong_with_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SliceFineError) as error:
        AnalysisSettings(
            output=str(tmp_path / "file"), stages=("ballance",), groups=1, draws=0, ranks=(0, 5, 5), seed=-1
        )
    for part in (
        "7 problems",
        "got 'ballance'. Did you mean 'balance'?",
        "`--groups` is at least 2; got 1.",
        "is a file",
    ):
        assert part in str(error.value), part


def test_what_goes_wrong_otherwise_is_a_reason_too(
    recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise ValueError("You have to specify decoder_input_ids")

    monkeypatch.setattr(energy, "run", broken)
    monkeypatch.setattr(runs.balance, "run", lambda *_: {"summary": {}, "weights": [float("nan"), 1.0]})
    record = runs.analyze(settings(tmp_path, stages=("energy", "balance")), str(model), recipe, "")
    assert record.failed == {"energy": "ValueError: You have to specify decoder_input_ids"}
    assert read(tmp_path)["stages"]["balance"]["weights"] == [None, 1.0]
    assert set(read(tmp_path)["made"]) == {"energy", "balance"}


def test_stages_run_in_their_own_order(tmp_path: Path) -> None:
    assert settings(tmp_path, stages=("advice", "balance", "advice", "winners")).stages == (
        "balance",
        "winners",
        "advice",
    )


def test_advice_is_given_again_where_what_it_goes_by_is_new(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    runs.analyze(settings(tmp_path, stages=("advice",)), str(model), recipe, "")
    assert any("were not measured" in reason for reason in read(tmp_path)["stages"]["advice"]["reasons"])
    runs.analyze(settings(tmp_path, stages=("energy",)), str(model), recipe, "")
    assert list(read(tmp_path)["stages"]) == ["energy"]
    runs.analyze(settings(tmp_path, stages=("winners", "advice")), str(model), recipe, "")
    found = read(tmp_path)["stages"]
    assert set(found) == {"energy", "winners", "advice"}
    assert not any("not measured" in reason for reason in found["advice"]["reasons"])
    assert found["advice"]["check_moves"] > 0


def changed(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("with_examples", [True, False])
def test_a_model_with_other_weights_in_the_middle_is_another_one(
    with_examples: bool, recipe: Recipe, model: Path, tmp_path: Path
) -> None:
    def scale(tensors: dict[str, Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("attention.output.dense.weight"))
        tensors[name] = 2 * tensors[name]

    other = changed(model, tmp_path / "other", scale)
    wanted = settings(tmp_path, stages=("balance",))
    of_it = {path: Recipe.from_flat(recipe.flat() | {"model.name": str(path)}) for path in (model, other)}
    runs.analyze(wanted, str(model), of_it[model] if with_examples else None, "")
    with pytest.raises(SliceFineError, match="has another analysis: the model's digest was"):
        runs.analyze(wanted, str(other), of_it[other] if with_examples else None, "")


def test_weights_that_are_not_finite_are_said(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("attention.output.dense.weight"))
        tensors[name][0, 0] = float("nan")

    other = changed(model, tmp_path / "other", spoil)
    spoilt = Recipe.from_flat(recipe.flat() | {"model.name": str(other)})
    record = runs.analyze(settings(tmp_path), str(other), spoilt, "")
    assert {"winners", "global", "advice"} <= set(record.failed)
    for stage in ("winners", "global", "advice"):
        assert "before any step it is nan. Look for NaN in the weights" in record.failed[stage]
    assert len(read(tmp_path)["verdicts"]) == len(PROPERTIES)


def test_short_runs_of_a_new_head_in_float16_are_refused(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    half = Recipe.from_flat(recipe.flat() | {"model.dtype": "float16"})
    record = runs.analyze(settings(tmp_path, stages=("global",)), str(model), half, "")
    assert "got float16. Set --model.dtype bfloat16 or float32." in record.failed["global"]
