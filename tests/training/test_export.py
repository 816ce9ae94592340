from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exporting
import pytest
import tiny
import torch
from jsonargparse import ArgumentParser
from peft import PeftModel
from transformers import ASTConfig, ASTModel, AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTModel

from slicefine import SliceFineError, SliceFineWarning
from slicefine.cli import export as cli
from slicefine.training.export import KINDS, export
from slicefine.training.recipe import Recipe
from slicefine.training.run import train


@pytest.fixture
def run(settings: dict[str, Any]) -> Path:
    train(Recipe.from_flat(settings | {"training.max_steps": 5}))
    return Path(settings["output"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter without biases and heads; to be read only."""
    return exporting.trained_adapter(tmp_path_factory.mktemp("llama"), tiny.llama())


@pytest.fixture
def no_tokenizer() -> Iterator[None]:
    """The adapters made here have none, which is said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is no tokenizer", SliceFineWarning)
        yield


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_kinds_are_those_that_the_command_line_names() -> None:
    parser = ArgumentParser()
    cli.add(parser)
    assert f"--as {'|'.join(KINDS)}" in parser.format_usage()
    assert all(f"{kind}:" in parser.format_help() for kind in KINDS)


def test_exporting_a_run_reads_it_and_its_base_and_changes_nothing(
    run: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = Path(settings["model.name"])
    before = exporting.fingerprints(run), exporting.fingerprints(base)
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Left out, as asked", SliceFineWarning)
            export(run, kind, tmp_path / kind, drop_biases_and_heads=kind == "lora")
        assert (exporting.fingerprints(run), exporting.fingerprints(base)) == before
        tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / kind, base)]
        assert tokenizers[0] == tokenizers[1]

    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(
        entries(tmp_path / "slices")
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "slices" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    export(tmp_path / "slices", "merged", tmp_path / "again")
    assert exporting.fingerprints(tmp_path / "again") == exporting.fingerprints(tmp_path / "merged")


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize("kind", KINDS)
def test_exporting_twice_writes_the_same_bytes(kind: str, llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(llama, kind, tmp_path / name)
    assert exporting.fingerprints(tmp_path / "one") == exporting.fingerprints(tmp_path / "two")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["bit", "truncated", "configuration alone", "NaN"])
def test_a_damaged_adapter_is_refused(kind: str, damage: str, llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(llama, adapter)
    file = adapter / "adapter_model.safetensors"
    if damage == "bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        says = "does not hold what adapter_config.json beside it says"
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
        says = "not a complete safetensors file"
    elif damage == "NaN":
        model = PeftModel.from_pretrained(exporting.base_of(llama), str(llama), is_trainable=True)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        layer.slicefine_weight["default"].data[0, 0] = torch.nan
        for destination, source in layer.pending_writes("default"):
            destination.copy_(source)
        with pytest.warns(SliceFineWarning, match="saved with NaN"):
            model.save_pretrained(adapter)
        says = r"Only finite values are exported; .*up_proj\.slicefine_weight"
    else:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seals": None}))
        says = "a configuration alone, and nothing trained"
    before = entries(tmp_path)
    with pytest.raises(SliceFineError, match=says):
        export(adapter, kind, tmp_path / "out")
    assert entries(tmp_path) == before


@pytest.mark.usefixtures("no_tokenizer")
def test_into_an_empty_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(llama, "merged", tmp_path / "out") == tmp_path / "out"
    assert "model.safetensors" in entries(tmp_path / "out")


def test_into_a_relative_folder_below_new_ones(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(llama, "slices", "new/folders/out") == Path("new/folders/out")
    assert entries(tmp_path / "new" / "folders") == ["out"]


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("merge", {}, r"one of merged, lora, slices; got 'merge'\. Did you mean 'merged'\?"),
        ("merged", {"drop_biases_and_heads": True}, "only lora leaves biases and heads out; merged has all of them"),
        ("slices", {"verify": False}, "slices are always checked"),
    ],
)
def test_a_wrong_kind_and_settings_it_has_no_use_for(
    kind: str, options: dict[str, Any], says: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(SliceFineError, match=says):
        export(llama, kind, tmp_path / "out", **options)


def test_out_is_taken(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(SliceFineError, match=f"a new or empty folder; .*{name} has something in it"):
            export(llama, "merged", tmp_path / name)
    assert entries(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file/x/out", r"out is below .*file, a file\. Name another"),
        ("new/" + "a" * 300, r"cannot be one: .*File name too long"),
        ("a" * 300 + "/out", r"cannot be one: .*File name too long"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_place_where_nothing_can_be_made(kind: str, out: str, says: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SliceFineError, match=says):
        export(llama, kind, tmp_path / out)
    assert entries(tmp_path) == ["file"]


def test_the_longest_name_that_there_is(llama: Path, tmp_path: Path) -> None:
    export(llama, "slices", tmp_path / "new" / ("a" * 255))
    assert entries(tmp_path / "new") == ["a" * 255]


def test_what_cannot_be_removed_does_not_hide_the_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(SliceFineError, match="failed, and nothing of it is left: not here"):
        export(llama, "slices", tmp_path / "new" / "out")


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_into_the_folder_that_a_link_names(target: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    assert export(llama, "slices", tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out").is_symlink()
    assert "adapter_config.json" in entries(tmp_path / target)


def test_a_mount_point_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(SliceFineError, match=r"disk is a mount point, which cannot be replaced\. Name a folder in it"):
        export(llama, "slices", tmp_path / "disk")
    export(llama, "slices", tmp_path / "disk" / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_with_code_of_its_own(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked for on the terminal, where somebody would say yes."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    adapter = shutil.copytree(llama, tmp_path / "adapter")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "tokenization_mine.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(
        SliceFineError, match=r"tokenizer in .*adapter comes with code of its own, .* --trust_remote_code"
    ):
        export(adapter, kind, tmp_path / "out", verify=True)
    assert entries(tmp_path) == ["adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_out_within_the_run_is_refused(kind: str, llama: Path) -> None:
    with pytest.raises(SliceFineError, match=r"leaves the run as it is; .* Name a folder outside of it"):
        export(llama, kind, llama / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SliceFineError, match=r"The export takes [\d,]{5,} bytes; .* has 1,234 free\. Make room"):
        export(llama, kind, tmp_path / "new" / "out")
    assert entries(tmp_path) == []


def test_the_space_asked_for_is_the_space_taken(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    taken = (llama.parent / "base" / "model.safetensors").stat().st_size
    with pytest.raises(SliceFineError) as error:
        export(llama, "merged", tmp_path / "out")
    needed = int(str(error.value).split()[3].replace(",", ""))
    assert 0.8 * taken < needed <= taken


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize("kind", ["merged", "lora"])
def test_ctrl_c_leaves_nothing(kind: str, llama: Path, tmp_path: Path) -> None:
    """Sent when the writing begins, and again when all is written and compared."""
    lines: list[str] = []
    export(llama, kind, tmp_path / "whole", say=lines.append)
    for moment in lines:

        def interrupt(line: str, moment: str = moment) -> None:
            if line == moment:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            export(llama, kind, tmp_path / "new" / "out", say=interrupt)
        assert entries(tmp_path) == ["whole"]
    assert len(lines) == 2


def test_what_is_no_run(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"nothing is not a run or an adapter .* Name a run folder"):
        export(tmp_path / "nothing", "merged", tmp_path / "out")
    shutil.copytree(llama, tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").unlink()
    with pytest.raises(SliceFineError, match=r"no config\.json in .*`model\.config\.save_pretrained\(folder\)`"):
        export(tmp_path / "adapter", "merged", tmp_path / "out")


def test_a_task_that_cannot_be_exported(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
    config = tmp_path / "adapter" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaModel"]}))
    with pytest.raises(
        SliceFineError, match=r"task_type of CAUSAL_LM, SEQ_CLS, .* can be exported, and classif.* has None"
    ):
        export(path.parent, "merged", tmp_path / "out")


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize("shards", ["1GB", "5KB"])
def test_a_base_in_the_cache_of_the_hub(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama(), shards=shards)
    path = adapter / "adapter_config.json"
    export(adapter, "merged", tmp_path / "local")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "owner/name"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SliceFineError, match=r"base model 'owner/name', .* did not load"):
        export(adapter, "merged", tmp_path / "out")
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (tmp_path / "base").rename(repository / "snapshots" / ("0" * 40))
    for kind in ("merged", "lora"):
        export(adapter, kind, tmp_path / kind)
    assert exporting.differing(tmp_path / "merged", tmp_path / "local") == []


def test_a_model_of_images_is_compared_too(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    adapter = exporting.trained_adapter(tmp_path, ViTModel(config), task="FEATURE_EXTRACTION", steps=0)
    said: list[str] = []
    with pytest.warns(SliceFineWarning, match="There is no image processor beside the adapter"):
        export(adapter, "merged", tmp_path / "out", say=said.append)
    assert "The logits of the exported model are those of the trained one, bit by bit" in said
    assert exporting.differing(tmp_path / "out", tmp_path / "base") == []


@pytest.mark.usefixtures("no_tokenizer")
def test_a_model_of_sounds_is_exported_without_comparison(tmp_path: Path) -> None:
    config = ASTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_length=32, num_mel_bins=16
    )
    adapter = exporting.trained_adapter(tmp_path, ASTModel(config), task="FEATURE_EXTRACTION", steps=0)
    with pytest.raises(SliceFineError, match=r"ASTModel takes input_values\. Export it with --no_verify"):
        export(adapter, "merged", tmp_path / "out")
    export(adapter, "merged", tmp_path / "out", verify=False)
    assert exporting.differing(tmp_path / "out", tmp_path / "base") == []


def test_a_failed_write_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(SliceFineError, match="failed, and nothing of it is left: No space"):
        export(llama, "merged", tmp_path / "out")
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("no_tokenizer")
def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    """Its code is run if that is allowed, and goes into the export."""
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    for folder in (tmp_path / "base", adapter):
        config = json.loads((folder / "config.json").read_text()) | {
            "model_type": "mine",
            "auto_map": {
                "AutoConfig": "configuration_mine.MyConfig",
                "AutoModelForCausalLM": "modeling_mine.MyLlama",
            },
        }
        (folder / "configuration_mine.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        )
        (folder / "modeling_mine.py").write_text(
            "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MyConfig\n\n\n"
            "class MyLlama(LlamaForCausalLM):\n    config_class = MyConfig\n"
        )
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SliceFineError, match=r"code of its own, .* allow it with --trust_remote_code\."):
        export(adapter, "merged", tmp_path / "out")
    export(adapter, "merged", tmp_path / "out", trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MyLlama"
    assert {"modeling_mine.py", "configuration_mine.py"} <= set(entries(tmp_path / "out"))
