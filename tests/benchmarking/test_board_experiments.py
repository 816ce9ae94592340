"""Our experiments for PEFT's public comparison: they are what they are said to be, and they run there."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parrot
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slicefine import SliceFineConfig, SliceFineWarning, parameter_counts
from slicefine.benchmarking.models import MODELS, build
from slicefine.slicing.budget import active_size, artifact_size
from slicefine.tuner import active_slices

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "benchmarks" / "metamathqa"
EXPERIMENTS = SHIPPED / "experiments" / "slicefine"
COLUMNS, FIVE_RC = "llama-3.2-3B-rank80-columns", "llama-3.2-3B-5RC-all-linear"
STEPS = 5000
PAGE = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- the folders


def test_the_folders_are_what_the_script_writes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("write_experiments", SHIPPED / "write_experiments.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)

    def contents(folder: Path) -> dict[str, Any]:
        read = {
            str(file.relative_to(folder)): json.loads(file.read_text())
            for file in folder.rglob("*.*")
            if file.is_file()
        }
        for values in read.values():
            values.pop("peft_version", None)  # who wrote it, not what it says
        return read

    assert contents(EXPERIMENTS) == contents(tmp_path)
    assert {path.parent.name for path in EXPERIMENTS.glob("*/adapter_config.json")} == {COLUMNS, FIVE_RC}


def on_the_real_shapes(name: str) -> PeftModel:
    base = build(MODELS["llama-3.2-3b"], device="meta", dtype=torch.bfloat16)
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert isinstance(config, SliceFineConfig)
    return get_peft_model(base, config)


def test_80_columns_are_as_many_parameters_as_lora_has_there() -> None:
    model = on_the_real_shapes(COLUMNS)
    lora = get_peft_model(
        build(MODELS["llama-3.2-3b"], device="meta", dtype=torch.bfloat16),
        LoraConfig(r=32, target_modules=["q_proj", "v_proj"]),
    )
    # As in the board's results/lora--llama-3.2-3B-rank32.json.
    assert lora.get_nb_trainable_parameters() == (9_175_040, 3_221_924_864)
    assert model.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()
    counts = parameter_counts(model, steps=STEPS)
    assert counts.active == 9_175_040
    assert counts.added == 0


@pytest.mark.parametrize(("name", "column"), [(COLUMNS, 1), (FIVE_RC, 2)])
def test_the_page_says_how_large_they_are(name: str, column: int) -> None:
    model = on_the_real_shapes(name)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    said = {row[0]: row[column] for row in rows}
    schedule = model.active_peft_config.schedule
    shapes = [piece.shape for piece in _weights(model)]
    assert len(shapes) == (56 if name == COLUMNS else 28 * 7)
    active = list(dict.fromkeys(sum(active_size(schedule, s, step) for s in shapes) for step in range(0, STEPS, 625)))
    assert [int(n.replace(",", "")) for n in re.findall(r"[\d,]{5,}", said["trained at a step"])] == active
    assert said["`num_trainable_params` there"] == f"{model.get_nb_trainable_parameters()[0]:,}"
    assert said["trained in the whole run"] == f"{parameter_counts(model, steps=STEPS).planned:,}"
    size = sum(artifact_size(schedule, shape, STEPS, itemsize=2) for shape in shapes)
    assert said["file after 5,000 steps"] == f"{size / 1e6:.1f} MB"
    positions = [schedule.touched(STEPS, shape) for shape in shapes]
    assert {len(found) for found in positions} == {8}
    assert {sum(piece.width for piece in found) for found in positions} == {
        int(re.findall(r"\d+", said["rank as a LoRA"])[-1])
    }
    training = json.loads((EXPERIMENTS / name / "training_params.json").read_text())
    assert training["optimizer_kwargs"] == {"lr": float(said["learning rate"]), "weight_decay": 0}


def _weights(model: PeftModel) -> list[torch.Tensor]:
    base = model.get_base_model()
    return [base.get_submodule(name).weight for name in active_slices(model)]


# ---------------------------------------------------------------------- a run

Run = Callable[..., dict[str, Any]]
BOARD_NAME = "experiments/slicefine"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentences = ["the answer is true", "is the answer false", "the correct answer is true"]
    tokenizer = parrot.make_tokenizer(sentences)
    torch.manual_seed(0)
    config = parrot.config_of(tokenizer, hidden_size=32, initializer_range=0.3)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    return parrot.save(tmp_path_factory.mktemp("llama") / "model", LlamaForCausalLM(config), tokenizer)


@pytest.fixture
def there(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the comparison, our experiments copied into it and cut to the size of the tiny model."""
    folder = tmp_path / "MetaMathQA"
    shutil.copytree(Path(__file__).parent / "board_harness", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_llama, folder / "model")
    shutil.copytree(EXPERIMENTS, folder / BOARD_NAME)
    for name in (COLUMNS, FIVE_RC):
        change(folder / BOARD_NAME / name / "adapter_config.json", r=2, slide_every=3)
    monkeypatch.chdir(folder)
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.fixture
def run(there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs an experiment there, in this process; settings change its training_params.json."""
    monkeypatch.syspath_prepend(str(there))

    def run(name: str, saved: Path, **settings: Any) -> dict[str, Any]:
        change(there / BOARD_NAME / name / "training_params.json", **settings)
        return runpy.run_path("run.py")["main"](f"{BOARD_NAME}/{name}", str(saved))

    yield run
    sys.modules.pop("utils", None)


VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "amp": {"use_amp": True},
    "amp, float32": {"use_amp": True, "dtype": "float32"},
    "checkpointing": {"use_gc": True},
    "adapters as the base": {"autocast_adapter_dtype": False},
}
CASES = {
    f"{name}: {variant}": (name, settings) for name in (COLUMNS, FIVE_RC) for variant, settings in VARIANTS.items()
}
CASES[f"{FIVE_RC}: compile"] = (FIVE_RC, {"compile": True})  # columns are one of its two graphs; tracing takes seconds


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# the board's script calls transformers by its old names
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES.keys())
def test_a_run(name: str, settings: dict[str, Any], run: Run, there: Path) -> None:
    torch._dynamo.reset()
    result = run(name, there / "saved", **settings)
    assert [look["step"] for look in result["metrics"]] == [4, 8, 12]
    of_base, before, after = result["other text"]
    assert before == of_base, "before training the model is the base"
    assert after != before
    assert result["total"] - result["trainable"] == sum(p.numel() for p in base_model(there).parameters())

    saved = json.loads((there / "saved" / "adapter_config.json").read_text())
    assert saved["step"] == 12
    assert result["file_size"] == (there / "saved" / "adapter_model.safetensors").stat().st_size
    noted = result["peft_config"]
    assert (noted["peft_type"], noted["r"], noted["slide_every"]) == ("SLICEFINE", 2, 3)
    assert json.loads((there / "results" / f"slicefine--{name}.json").read_text()) == result

    loaded = PeftModel.from_pretrained(base_model(there, settings.get("dtype", "bfloat16")), str(there / "saved"))
    assert {len(schedule_of(loaded).touched(saved["step"], weight.shape)) for weight in _weights(loaded)} == {4}
    harness = runpy.run_path("run.py")
    there_settings = json.loads((there / "default_training_params.json").read_text()) | settings
    assert (
        harness["generate"](loaded.eval(), AutoTokenizer.from_pretrained("model"), there_settings)
        == result["predictions"]
    )
    assert harness["loss_on_other_text"](loaded, AutoTokenizer.from_pretrained("model")) == after


def base_model(folder: Path, dtype: str = "bfloat16") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))


def schedule_of(model: PeftModel) -> Any:
    return model.active_peft_config.schedule


@pytest.mark.parametrize("name", [COLUMNS, FIVE_RC])
def test_evaluation_in_the_midst_changes_nothing(name: str, run: Run, there: Path) -> None:
    often = run(name, there / "often", eval_steps=1)
    once = run(name, there / "once", eval_steps=12)
    assert often["losses"] == once["losses"]
    first, second = (load_file(there / folder / "adapter_model.safetensors") for folder in ("often", "once"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "kwargs", [{"lr": 1e-4, "weight_decay": 0.1}, {"lr": 1e-4}], ids=["its default", "torch's own"]
)
def test_weight_decay_there_is_warned_of(kwargs: dict[str, float], run: Run, there: Path) -> None:
    with pytest.warns(SliceFineWarning, match="weight_decay=0"):
        run(COLUMNS, there / "saved", optimizer_kwargs=kwargs, max_steps=2, eval_steps=2)


def test_the_command_of_the_page_runs_there(there: Path) -> None:
    found = re.findall(r'^(python -c ".*") (run\.py .*)$', PAGE, re.MULTILINE)
    assert len(found) == 1
    ours, theirs = found[0]
    assert theirs == f"run.py -v {BOARD_NAME}/{COLUMNS}"
    code = re.fullmatch(r'python -c "(.*)"', ours)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1], *theirs.split()], cwd=there, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "slicefine" in done.stderr.lower(), "-v reaches the script"
    assert (there / "results" / f"slicefine--{COLUMNS}.json").is_file()
