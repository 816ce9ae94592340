from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slicefine
from slicefine.cli.main import main
from slicefine.training import schema
from slicefine.training.recipe import Recipe


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("slicefine: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    nothing = capsys.readouterr().out
    assert nothing == help_of(capsys)
    for verb in ("train", "evaluate", "plan", "bench", "export", "recipes", "demo"):
        assert re.search(rf"^ +{verb} +\S", nothing, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"slicefine {slicefine.__version__}\n"


def test_help_is_instant_and_imports_no_torch() -> None:
    command = [sys.executable, "-m", "slicefine.cli.main", "--help"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    code = (
        "import sys; from slicefine.cli.main import main; main([]); "
        "sys.exit(bool({'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_of_train_names_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no hyphenation
    text = " ".join(help_of(capsys, "train").split())
    for setting in schema.settings(Recipe).values():
        # A list has a second flag, `--key+`, which appends to it.
        found = re.search(rf"--{re.escape(setting.key)}[ ,](?:(?! --(?!{re.escape(setting.key)}\+)).)*", text)
        assert found, setting.key
        entry = found[0]
        assert setting.help in entry, setting.key
        if setting.default is schema.REQUIRED:
            assert "default" not in entry, setting.key
        else:
            shown = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
            assert f"default: {shown})".lower() in entry.lower(), setting.key


def test_the_flags_of_train_are_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"--([\w.]+)", help_of(capsys, "train")))
    assert flags == {"help", "resume", "allow_inexact_resume", "smoke", "section.setting", *schema.settings(Recipe)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["trian"],
            "There is no verb 'trian'; there are train, evaluate, plan, analyze, bench, export, report, recipes, demo. Did you mean 'train'?",
        ),
        (["--verison"], "There is no argument '--verison' here. Did you mean '--version'?"),
        (
            ["train", "r.yaml", "--lr", "1e-3"],
            "There is no argument '--lr' here. Did you mean '--training.learning_rate'?",
        ),
        (["train", "r.yaml", "--training.lr", "1"], "'--training.lr' here. Did you mean '--training.learning_rate'?"),
        (
            ["train", "vit-base-pet"],
            "There is no recipe 'vit-base-pet'. Did you mean 'vit-base-pets'? A recipe is a YAML file, or",
        ),
        (["train", "r.yaml", "--r", "3"], "There is no argument '--r' here."),
        (["train", "r.yaml", "--training.bf16"], "--training.bf16 takes a value: --training.bf16 VALUE"),
        (["train"], "RECIPE is missing."),
        (["train", "a.yaml", "--slice.rr", "3"], "no argument '--slice.rr' here. Did you mean '--slice.r'?"),
        (["train", "a.yaml", "--slice.rr=3"], "no argument '--slice.rr' here. Did you mean '--slice.r'?"),
        (["train", "a.yaml", "--learning_rate", "3"], "Did you mean '--training.learning_rate'?"),
        (["train", "a.yaml", "--slice.r", "many"], "`slice.r` is a whole number; got many."),
        (["train", "a.yaml", "--slice.slide_every", "None"], "a whole number or null; got None. Write null."),
        (
            ["train", "a.yaml", "--slice.axis=rows"],
            "is one of row, column, alternate, coupled; got rows. Did you mean 'row'?",
        ),
        (["train", "a.yaml", "--slice.r"], "--slice.r takes a value: --slice.r VALUE"),
        (["train", "absent.yaml"], "there is none at absent.yaml"),
        (["train", "a.yaml", "b.yaml"], "no argument 'b.yaml' here"),
        (["export", "run"], "OUT is missing."),
        (["export", "run", "out", "--az", "merged"], "no argument '--az' here. Did you mean '--as'?"),
        (["export", "run", "out", "--as", "merge"], "one of merged, lora, slices; got 'merge'. Did you mean 'merged'?"),
        (["export", "absent", "out"], "absent is not a run or an adapter"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in error_of(capsys, *arguments)


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "load", interrupt)
    assert main(["train", "a.yaml"]) == 130
    assert capsys.readouterr().err == "slicefine: interrupted\n"


def test_without_the_extra(tmp_path: Path) -> None:
    """What a bare `pip install slicefine` says."""
    code = (
        "import sys; sys.modules['jsonargparse'] = None; sys.modules['yaml'] = None; "
        "from slicefine.cli.main import main; sys.exit(main(['train', 'a.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "slicefine: error: The command line needs jsonargparse: pip install 'slicefine[train]'\n"
