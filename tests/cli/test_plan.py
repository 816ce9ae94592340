"""`slicefine plan` as a user calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planned import EXPERTS, mixtral

from slicefine.benchmarking.models import SMALL
from slicefine.cli.main import main
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import shipped

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture
def recipe_file(settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_flat(settings).to_yaml())
    return path


@pytest.fixture
def config_only(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with the configuration of a model, and nothing else."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text((model_folder / "config.json").read_text())
    return folder


def test_the_configuration_is_all_there_is(config_only: Path, tmp_path: Path) -> None:
    """As a user does: one process. Nothing but our own lines is printed, and nothing is written but what was asked for."""
    flags = ["--memory", "24GiB", "--examples", "48", "--data.max_length", "16", "--output", str(tmp_path / "plan")]
    command = [sys.executable, "-m", "slicefine.cli.main", "plan", str(config_only), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=OFFLINE, cwd=tmp_path)
    assert done.stderr == f"report: {tmp_path / 'plan' / 'report.html'}\n"
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["model", "batch", "slices", "parameters", "run", "as"]
    assert (
        lines[-2] == "In 24.00 GiB, 1.00 GiB of it set aside for what is no tensor: SliceFine-5RC, LoRA-r8, full fit."
    )
    made = json.loads((tmp_path / "plan/plan.json").read_text())
    assert (made["recipe"]["task"], made["steps"], made["recipe"]["data.max_length"]) == ("text-classification", 9, 16)
    assert [method["fits"] for method in made["methods"]] == [True] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "plan"]


def test_the_model_of_a_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--slice.r", "3", "--examples", "36"]) == 0
    assert "r=3 axis=alternate slide_every=4 order=sweep" in (shown := capsys.readouterr().out)
    assert "12 steps, 2 moves" in shown


def test_what_is_planned_is_what_the_run_records(
    recipe_file: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """36 of the 48 examples are for training. Heads are left out: how many classes there are stands in the data."""
    arguments = [str(recipe_file), "--slice.bias", "slicefine_only"]
    assert main(["plan", *arguments, "--examples", "36", "--output", str(tmp_path / "plan")]) == 0
    assert main(["train", *arguments]) == 0
    capsys.readouterr()
    made, record = (
        json.loads((tmp_path / "plan/plan.json").read_text()),
        json.loads((tmp_path / "run/record.json").read_text()),
    )
    assert (made["steps"], made["moves"]) == (record["steps"], record["moves"])
    assert made["parameters"]["planned"] == record["parameters"]["planned"] == record["parameters"]["touched"]
    assert made["parameters"]["added"] == record["parameters"]["added"] == 0


def test_settings_of_the_model_are_flags(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--model.name", "roberta-base-small", "--model.dtype", "bfloat16"]) == 0
    half = capsys.readouterr().out
    assert main(["plan", "roberta-base-small", str(recipe_file)]) == 0
    weights = [
        next(line for line in shown.splitlines() if line.startswith("weights"))
        for shown in (half, capsys.readouterr().out)
    ]
    sizes = [float(line.split()[1]) for line in weights]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


def test_another_model_with_a_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "roberta-base-small", str(recipe_file)]) == 0
    shown = capsys.readouterr().out
    assert "roberta-base-small (roberta)" in shown
    assert "6 x 16 tokens" in shown


@pytest.mark.parametrize("name", ["llama-3.2-3b-small", "roberta-base-small", "vit-base-small", "videomae-base-small"])
def test_models_that_bench_knows_need_no_network(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--training.per_device_train_batch_size", "2", "--device", "cpu"]) == 0
    assert f"{name} (" in capsys.readouterr().out


def test_coupled_slices_and_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--slice.axis",
        "coupled",
        "--slice.depth_window",
        "[0, 3]",
        "--training.max_steps",
        "900",
        "--device",
        "cpu",
    ]
    assert main(["plan", "llama-3.2-3b-small", *flags, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.err  # every weight has its partner
    assert "r=5 axis=coupled slide_every=500 order=sweep, 42 weights" in captured.out
    turns = next(line for line in captured.out.splitlines() if line.startswith("turns"))
    assert re.fullmatch(
        r"turns +[\d,]+ active from block 0, [\d,]+ active from block 3; [\d,]+ in the mean; 25 steps each", turns
    )
    made = json.loads((tmp_path / "plan.json").read_text())
    assert [turn["lowest"] for turn in made["turns"]] == [0, 3]
    assert made["turns"][0]["active"] == 2 * made["turns"][1]["active"] == made["methods"][0]["active"]


def test_experts_are_flags_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    flags = ["--slice.target_parameters", json.dumps(EXPERTS), "--data.max_length", "16", "--training.max_steps", "9"]
    assert main(["plan", str(tmp_path), *flags]) == 0
    shown = capsys.readouterr().out
    assert "(mixtral)" in shown
    assert "12 weights" in shown  # four projections and two groups of experts in each of two layers
    assert "LoRA-r8" in shown


@pytest.mark.parametrize("name", SMALL)
def test_recipes_that_ship_are_planned_for_a_small_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of one model differ in their data alone. Where a model reads images beside texts, the name stands for all of it."""
    recipe = next(recipe for recipe in shipped() if recipe.startswith(name.removesuffix("-small")))
    fewest = ["--training.per_device_train_batch_size", "1", "--device", "cpu"]
    assert main(["plan", name, recipe, *fewest, "--memory", "24GiB"]) == 0
    captured = capsys.readouterr()
    assert f"{name} ({Recipe.load(shipped()[recipe]).model.architecture})" in captured.out
    assert "full fit." in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "There is no config.json in the folder"),
        ({"config.json": '{"model_type": "of-tomorrow"}'}, "of-tomorrow"),
        ({"config.json": "{oops"}, "not a valid JSON file"),
        ({"config.json": '{"hidden_size": 3}'}, "should have a `model_type`"),
    ],
    ids=["no config", "unknown type", "no JSON", "no type"],
)
def test_folders_that_hold_no_model_are_refused(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, written in files.items():
        (tmp_path / name).write_text(written)
    assert main(["plan", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message.lower() in said.lower()
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{config}", "--memory", "-3GiB"], "`--memory` is a number with a unit, above 0: --memory 24GiB."),
        (["{config}", "--memory=-3GiB"], "`--memory` is a number with a unit, above 0; got '-3GiB'."),
        (
            ["{config}", "--training.per_device_train_batch_size", "0"],
            "`training.per_device_train_batch_size` is at least 1; got 0.",
        ),
        (["vit-base-small", "roberta-base-glue-cola"], "has no model of the architecture vit"),
        (["llama-3.2-3b-small", "vit-base-pets"], "has no model of the architecture llama"),
        (["roberta-base-small", "llama-3.2-3b-math"], "a roberta is or has an encoder"),
        (["{config}/config.json"], "is a file. Give its folder, {config}."),
        (["{config}", "--memory", "24"], "`--memory` is a number with a unit, above 0; got '24'. Write 24GiB."),
        (["{config}", "--device", "gpus"], "`--device` is gpu or cpu; got 'gpus'. Did you mean 'gpu'?"),
        (["{config}", "--examples", "0"], "`--examples` is at least 1; got 0."),
        (["{config}", "--examples", "many"], "`--examples` is a whole number; got many."),
        (["{config}", "--output", "{config}/config.json"], "`--output` is a folder; {config}/config.json is a file."),
        (["{config}", "--data.max_length", "65"], "can read, 64 tokens; got 65"),
        (["{config}", "--slice.r", "0", "--training.max_steps", "0"], "Settings: 2 problems"),
        (["{config}", "--task", "speech"], "`task` is one of text-classification"),
        (
            ["{config}", "--slice.axis", "rows"],
            "`slice.axis` is one of row, column, alternate, coupled; got rows. Did you mean 'row'?",
        ),
        (["{config}", "--model.name", "other"], "`--model.name` is what MODEL says already"),
        (["{config}", "no-such-recipe"], "A recipe is a YAML file"),
        (["./nowhere"], "there is no folder ./nowhere"),
        ([], "MODEL is missing"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(
    arguments: list[str], message: str, config_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(word.format(config=config_only) for word in arguments)]) == 2
    assert message.format(config=config_only) in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["plan", "roberta-base-small", "--output", str(tmp_path / "file" / "plan")]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "`--output` is a folder that can be written; nothing can be made in" in said.err


def test_a_model_of_the_hub_needs_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "nobody/nothing"]) == 2
    said = capsys.readouterr().err
    assert "There is no network, no folder 'nobody/nothing'" in said
    assert "llama-3.2-3b" in said
    assert main(["plan", "llama-3.2-3b-mth"]) == 2
    assert "Did you mean 'llama-3.2-3b-math'?" in capsys.readouterr().err
