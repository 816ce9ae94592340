from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, Trainer

from slicefine import SliceFineError, SliceFineWarning
from slicefine.training.export import export
from slicefine.training.folder import last_checkpoint, refuse_other_data
from slicefine.training.progress import StepTimer
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train

ROOT = Path(__file__).parents[2]
PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
batch = AutoTokenizer.from_pretrained(folder)(["ball soup", "moon star star"], padding=True, return_tensors="pt")
torch.save((model(**batch).logits, model.config.id2label), out)
assert not {name for name in sys.modules if name.split(".")[0] in ("slicefine", "peft")}
"""


def override(settings: dict[str, Any], **values: Any) -> Recipe:
    return Recipe.from_flat(settings | {key.replace("__", "."): value for key, value in values.items()})


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT) -> None:
    """Send ourselves SIGINT, as Ctrl-C does, or another signal, when `step` optimizer steps have been made in this process."""
    end_step = StepTimer.on_step_end

    def on_step_end(self: StepTimer, *args: Any, **kwargs: Any) -> None:
        end_step(self, *args, **kwargs)
        if len(self.seconds) == step:
            signal.raise_signal(number)

    monkeypatch.setattr(StepTimer, "on_step_end", on_step_end)


def trained_logits(folder: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Logits of the base model with the adapter of a run on top."""
    base = AutoModelForSequenceClassification.from_pretrained(settings["model.name"], num_labels=3)
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    with torch.no_grad():
        return model(**tokenizer(["ball soup", "moon star star"], padding=True, return_tensors="pt")).logits


def test_from_recipe_to_plain_transformers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.from_flat(settings)
    record = train(recipe)
    folder = tmp_path / "run"

    assert record == RunRecord.read(folder)
    assert (record.status, record.steps, record.planned_steps, record.moves) == ("finished", 12, 12, 2)
    assert record.parameters["added"] == 0
    assert record.parameters["touched"] == record.parameters["planned"]
    assert record.modules_to_save == ["classifier"]
    assert set(record.metrics["before"]) == set(record.metrics["after"]) == {"loss", "accuracy", "f1_macro"}
    assert record.timings["train_seconds"] > 12 * record.timings["step_seconds_mean"] * 0.9 > 0
    assert record.data["train"]["examples"] == 36
    assert record.data["classes"] == ["food", "space", "sport"]
    assert record.artifact_bytes == sum(file.stat().st_size for file in (folder / "adapter").glob("adapter_*"))
    assert record.versions["torch"] == torch.__version__
    assert record.hardware["cores"] == os.cpu_count()
    assert Recipe.load(folder / "recipe.yaml") == recipe.resolved()
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "history.json",
        "logs",
        "recipe.yaml",
        "record.json",
        "slices.json",
    ]
    assert not any(Path.cwd().iterdir())  # TensorBoard writes here if nobody tells it where

    out = export(folder, "merged", tmp_path / "model")
    subprocess.run([sys.executable, "-c", PLAIN, str(out), str(tmp_path / "logits")], check=True)
    logits, id2label = torch.load(tmp_path / "logits")
    assert torch.equal(logits, trained_logits(folder, settings))
    assert id2label == {0: "food", 1: "space", 2: "sport"}

    events = EventAccumulator(str(folder / "logs")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/accuracy", "train/slicefine/moves", "train/slicefine/update_norm_max"} <= tags
    assert "train/slicefine/update_norm/bert.encoder.layer.0.attention.self.query" in tags
    assert [event.value for event in events.Scalars("train/slicefine/moves")] == [0, 0, 1, 1, 2, 2, 3]


def test_the_artifact_and_exported_model_are_of_the_trained_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    train(Recipe.from_flat(settings))
    export(tmp_path / "run" / "adapter", "merged", tmp_path / "model")  # an adapter folder will do
    base = load_file(Path(settings["model.name"]) / "model.safetensors")
    trained = load_file(tmp_path / "model" / "model.safetensors")
    query = "encoder.layer.0.attention.self.query.weight"
    changed = (base[query] != trained[f"bert.{query}"]).nonzero()
    # Two rows, then two columns, then the next two rows: axis = alternate, r = 2, positions at steps 0, 4 and 8.
    assert set(changed[:, 0].tolist()) == set(range(32))
    assert {tuple(index) for index in changed.tolist()} <= {
        (i, j) for i in range(32) for j in range(32) if i < 4 or j < 2
    }
    assert torch.equal(base["embeddings.word_embeddings.weight"], trained["bert.embeddings.word_embeddings.weight"])


def test_learns(settings: dict[str, Any]) -> None:
    record = train(
        override(
            settings,
            slice__slide_every=20,
            slice__r=8,
            training__learning_rate=2e-2,
            training__num_train_epochs=20,
            training__eval_steps=200,
            training__save_steps=200,
            training__report_to="none",
        )
    )
    assert record.metrics["before"]["accuracy"] < 0.6
    assert record.metrics["after"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("stop", "changed"),
    [(7, {}), (6, {}), (6, {"training.save_steps": 4}), (8, {"training.eval_steps": 4, "training.save_steps": 4})],
    ids=["within an epoch", "end of an epoch", "end of an epoch, no checkpoint due", "checkpoint and validation due"],
)
def test_interrupted_and_resumed_is_bit_identical(
    stop: int,
    changed: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings |= changed
    whole = override(settings, output=str(tmp_path / "whole"), slice__order="random")
    train(whole)
    torch.manual_seed(1234)  # nothing outside of the checkpoint decides how a run goes on

    recipe = override(settings, slice__order="random")
    with monkeypatch.context() as patch:
        interrupt_at(stop, patch)
        record = train(recipe)
    folder = tmp_path / "run"
    assert (record.status, record.steps) == ("interrupted", stop)
    assert RunRecord.read(folder).status == "interrupted"
    assert (folder / "checkpoints" / f"checkpoint-{stop}").is_dir()
    assert not (folder / "adapter").exists()
    assert "Stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    with pytest.raises(SliceFineError, match=r"holds another run \(interrupted\)\. Go on with it with --resume"):
        train(recipe)
    with pytest.raises(SliceFineError, match="has no adapter yet"):
        export(folder, "merged", tmp_path / "model")

    record = train(Recipe.load(folder / "recipe.yaml"), resume=True)
    assert (record.status, record.steps, record.resumed_from) == ("finished", 12, [stop])
    assert record.metrics == RunRecord.read(tmp_path / "whole").metrics
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (folder / "adapter" / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes(), name

    with pytest.raises(SliceFineError, match="is finished; nothing is left to resume"):
        train(recipe, resume=True)
    with pytest.raises(
        SliceFineError, match=r"cannot be made longer.*12 steps.*--output.*slicefine export .*--model\.name"
    ):
        train(override(settings, slice__order="random", training__num_train_epochs=3), resume=True)


def test_a_scheduler_ends_a_run_as_ctrl_c_does(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt_at(3, monkeypatch, signal.SIGTERM)
    recipe = Recipe.from_flat(settings)
    record = train(recipe)
    assert (record.status, record.steps) == ("interrupted", 3)
    assert (Path(recipe.output) / "checkpoints" / "checkpoint-3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_stops_at_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(3, monkeypatch)
    save = Trainer._save_checkpoint

    def on_save(self: Trainer, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", on_save)
    recipe = Recipe.from_flat(settings)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    record = RunRecord.read(Path(recipe.output))
    assert (record.status, record.steps) == ("interrupted", 3)
    with pytest.raises(SliceFineError, match="goes on from a checkpoint; there is none"):
        train(recipe, resume=True)


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(7, monkeypatch)
    train(Recipe.from_flat(settings))
    folder = Path(settings["output"])
    (folder / "checkpoints" / "checkpoint-9").mkdir()
    assert last_checkpoint(folder) == folder / "checkpoints" / "checkpoint-7"


def test_resume_refuses_another_run(settings: dict[str, Any], data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_flat(settings)
    with pytest.raises(SliceFineError, match=r"there is none in .*run\. Start it without --resume"):
        train(recipe, resume=True)
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        train(recipe)
    before = sorted(Path(recipe.output).rglob("*")), (Path(recipe.output) / "record.json").read_bytes()

    with pytest.raises(SliceFineError) as error:
        train(override(settings, slice__r=3, training__learning_rate=1.0), resume=True)
    assert f"goes on with the same recipe, {recipe.resolved().output}/recipe.yaml. Give that one" in str(error.value)
    assert "2 problems" in str(error.value)  # and none of them is how to mend them
    assert "`slice.r` was 2 and is 3 now." in str(error.value)
    assert "`training.learning_rate` was 0.005 and is 1.0 now." in str(error.value)
    with data_file.open("a") as file:
        file.write('{"text": "ball", "label": "sport"}\n')
    rows = len(data_file.read_text().splitlines())
    with pytest.raises(SliceFineError) as error:
        train(recipe, resume=True)
    was = RunRecord.read(Path(recipe.output)).data
    assert sum(was[name]["examples"] for name in ("train", "validation")) == rows - 1
    assert f"train: {was['train']['examples']} examples, now {was['train']['examples'] + 1}; validation: " in str(
        error.value
    )
    assert "sha256" not in str(error.value)
    assert before == (sorted(Path(recipe.output).rglob("*")), (Path(recipe.output) / "record.json").read_bytes())


LOST_OPTIMIZER = "the optimizer's moments and the learning rate start anew (transformers loads both or neither)"


@pytest.mark.parametrize(
    ("gone", "lost"),
    [
        (["optimizer.pt"], [LOST_OPTIMIZER]),
        (["scheduler.pt"], [LOST_OPTIMIZER]),
        (["rng_state.pth"], ["dropout draws other numbers"]),
        (["optimizer.pt", "rng_state.pth"], [LOST_OPTIMIZER, "dropout draws other numbers"]),
    ],
    ids=["optimizer", "scheduler", "random state", "two"],
)
def test_an_inexact_resume_is_asked_for(
    settings: dict[str, Any], gone: list[str], lost: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_flat(settings)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        train(recipe)
    checkpoint = Path(settings["output"]) / "checkpoints" / "checkpoint-5"
    for name in gone:
        (checkpoint / name).unlink()
    record_file = Path(settings["output"]) / "record.json"
    before = sorted(Path(settings["output"]).rglob("*")), record_file.read_bytes()
    said = f"{checkpoint} has no {' and no '.join(gone)}: {', and '.join(lost)}"

    with pytest.raises(SliceFineError) as error:
        train(recipe, resume=True)
    assert said in str(error.value)
    assert "--allow_inexact_resume" in str(error.value)
    assert before == (sorted(Path(settings["output"]).rglob("*")), record_file.read_bytes())

    with pytest.warns(SliceFineWarning, match=f"{re.escape(said)}. The run will end differently") as warned:
        record = train(recipe, resume=True, allow_inexact_resume=True)
    assert sum(issubclass(warning.category, SliceFineWarning) for warning in warned) == 1
    assert (record.status, record.resumed_from) == ("finished", [5])


def test_only_a_resume_can_be_inexact(recipe: Recipe) -> None:
    with pytest.raises(SliceFineError, match="a new run has no use for it"):
        train(recipe, allow_inexact_resume=True)


def test_used_output(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_flat(settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(SliceFineError, match=r"is a new or empty folder; .*run has other files in it"):
        train(recipe)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.raises(SliceFineError, match=r"run is a file\. Choose another with --output"):
        train(recipe)


def test_output_that_cannot_be_written_is_refused_before_anything_is_read(settings: dict[str, Any]) -> None:
    settings |= {"data.train": "/absent.jsonl"}
    with pytest.raises(
        SliceFineError, match=r"`--output` is a folder that can be written; nothing can be made in /proc/x"
    ):
        train(override(settings, output="/proc/x"))
    with pytest.raises(SliceFineError, match=r"nothing can be made in .*config.json/run \(Not a directory\)"):
        train(override(settings, output=f"{settings['model.name']}/config.json/run"))


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ({"examples": 36}, {"examples": 37}, "train: 36 examples, now 37"),
        ({"examples": 36, "skipped": 1}, {"examples": 36}, "train: 1 files left out, now 0"),
        ({"source": "a", "examples": 3}, {"source": "b", "examples": 4}, "train: from a, now b, 3 examples, now 4"),
        (
            {"fingerprint": "a", "examples": 3},
            {"fingerprint": "b", "examples": 3},
            "train: 3 examples as before, but others",
        ),
        (["a", "b"], ["a", "c", "d"], "train: 2, now 3, without 'b' and with 'c', 'd'"),
        (["a", "b"], ["b", "a"], "train: 2, now 2, in another order"),
    ],
)
def test_what_differs_of_the_data_is_said_in_words(was: Any, now: Any, says: str, tmp_path: Path) -> None:
    saved = RunRecord(task="text-classification", model="m", seed=0, started="", data={"train": was})
    refuse_other_data(saved, {"train": was}, tmp_path)
    with pytest.raises(SliceFineError) as error:
        refuse_other_data(saved, {"train": now}, tmp_path)
    assert f"({says}" in str(error.value)


def test_no_more_processes_prepare_batches_than_there_are_cores(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slicefine.training.record.usable_cores", lambda: 1)
    record = train(
        override(settings, slice__slide_every=1, training__dataloader_num_workers=640, training__max_steps=2)
    )  # torch warns of more
    assert "Processes that prepare batches: 1, not 640; as many as there are cores." in record.notes


@pytest.mark.parametrize(
    ("settings_changed", "says"),
    [
        ({"data.train": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"data.text": "txt"}, "no column 'txt'; there are 'text', 'label'. Did you mean 'text'?"),
        ({"data.max_length": 1000}, "at most what"),
        ({"model.name": "/absent/model"}, "`model.name` is a folder with a pretrained model and its tokenizer, or"),
        ({"model.name": "./absent"}, "there is no folder ./absent."),
        ({"model.name": "."}, "; . has no config.json in it."),
        ({"slice.target_modules": ["qery"]}, "Did you mean 'query'?"),
        ({"slice.layers_pattern": "layer"}, "`layers_pattern` says where"),
        ({"training.report_to": "tensorbord"}, "Did you mean 'tensorboard'?"),
        ({"training.learning_rate": -1.0}, "`training.learning_rate` is above 0; got -1.0."),
        ({"task": "clasification"}, "Did you mean 'text-classification'?"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(
    settings: dict[str, Any],
    tmp_path: Path,
    settings_changed: dict[str, Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SliceFineError) as error:
        train(Recipe.from_flat(settings | settings_changed))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_transformers_refuses(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # bf16 on a GPU that is not there
    with pytest.raises(SliceFineError, match=r"`training`: transformers refuses these settings: .*bf16"):
        train(override(settings, training__bf16=True))
    assert not (tmp_path / "run").exists()


def test_bad_data_is_found_before_the_model_is_loaded(
    settings: dict[str, Any], data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    recipe = override(settings, model__name=str(tmp_path / "model"))
    with pytest.raises(SliceFineError, match=r"did not load: .*config\.json"):
        train(recipe)
    data_file.write_text("{")
    with pytest.raises(SliceFineError, match=r"train\.jsonl:1: not valid JSON"):
        train(recipe)


def test_a_hub_out_of_reach_is_found_at_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask it for most of a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(SliceFineError, match=r"nor a model downloaded before, and the hub .* cannot be reached: "):
        train(Recipe.from_flat(settings | {"model.name": "nobody/nothing"}))
    assert time.perf_counter() - began < 5


def test_one_process_only(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SliceFineError, match="runs in one process; WORLD_SIZE is 2"):
        train(recipe)


def test_a_failure_is_on_record(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer, *args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(MemoryError):
        train(recipe)
    record = RunRecord.read(Path(recipe.output))
    assert (record.status, record.error) == ("failed", "MemoryError")
    with pytest.raises(SliceFineError, match=r"has no adapter yet. It failed \(MemoryError\)\. Start another run"):
        export(recipe.output, "merged", Path(recipe.output).with_name("model"))


def test_new_layers_are_trained_in_full(settings: dict[str, Any], tmp_path: Path) -> None:
    """A model whose files lack the pooler: a slice of a random weight would be lost on the next load."""
    folder = tmp_path / "headless"
    shutil.copytree(settings["model.name"], folder)
    BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).save_pretrained(folder)
    recipe = override(settings, model__name=str(folder))
    record = train(recipe)
    assert record.modules_to_save == ["bert.pooler.dense", "classifier"]
    out = export(recipe.output, "merged", tmp_path / "model")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    exported = load_file(out / "model.safetensors")
    for part in ("weight", "bias"):
        assert torch.equal(exported[f"bert.pooler.dense.{part}"], adapter[f"base_model.model.bert.pooler.dense.{part}"])


@pytest.mark.parametrize("changed", [{}, {"training.max_steps": 5}, {"training.gradient_accumulation_steps": 4}])
def test_planned_steps_are_those_trainer_makes(settings: dict[str, Any], changed: dict[str, Any]) -> None:
    record = train(Recipe.from_flat(settings | {"training.num_train_epochs": 1.5, "slice.slide_every": 1} | changed))
    assert record.planned_steps == record.steps


def test_variants(settings: dict[str, Any], tmp_path: Path) -> None:
    """bf16 weights and autocast, checkpointing, accumulation, trained biases, workers, fewer layers, no moves."""
    record = train(
        override(
            settings,
            model__dtype="bfloat16",
            slice__axis="row",
            slice__slide_every=None,
            slice__bias="slicefine_only",
            slice__target_modules=["query", "value"],
            slice__layers_to_transform=[1],
            training__bf16=True,
            training__activation_checkpointing=True,
            training__gradient_accumulation_steps=2,
            training__dataloader_num_workers=1,
            training__report_to="none",
            training__learning_rate=5e-2,
        )
    )
    assert record.parameters["active"] == 2 * (2 * 32 + 32)
    assert not (tmp_path / "run" / "logs").exists()
    out = export(tmp_path / "run", "merged", tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_too_short_for_its_schedule(settings: dict[str, Any]) -> None:
    with pytest.warns(
        SliceFineWarning, match=r"ends after 12 optimizer steps and the slices move every 500.*slide_every=1 "
    ):
        train(override(settings, slice__slide_every=500))


def test_the_demo_recipe_runs(settings: dict[str, Any]) -> None:
    """Two steps with a tiny model, and everything else as the recipe says. (Those in `recipes/`: see test_shipped.py.)"""
    small = {key: settings[key] for key in ("model.name", "data.train", "data.validation", "data.max_length", "output")}
    path = ROOT / "src" / "slicefine" / "demo" / "recipe.yaml"
    assert train(Recipe.load(path, small | {"training.max_steps": 2, "slice.slide_every": 1})).status == "finished"
