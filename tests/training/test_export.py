from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from slicefine import SliceFineError
from slicefine.training.export import export
from slicefine.training.recipe import Recipe
from slicefine.training.run import train


@pytest.fixture
def run(settings: dict[str, Any]) -> Path:
    train(Recipe.from_flat(settings | {"training.max_steps": 5}))
    return Path(settings["output"])


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_into_an_empty_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(run, "merged", tmp_path / "out") == tmp_path / "out"
    assert "model.safetensors" in entries(tmp_path / "out")


def test_unknown_kind(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"exported as one of merged; got 'merge'\. Did you mean 'merged'\?"):
        export(run, "merge", tmp_path / "out")


def test_out_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(SliceFineError, match=f"a new or empty folder; .*{name} has something in it"):
            export(run, "merged", tmp_path / name)
    assert entries(tmp_path / "out") == ["mine"]


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"nothing is not a run or an adapter .* Name a run folder"):
        export(tmp_path / "nothing", "merged", tmp_path / "out")
    (run / "adapter" / "config.json").unlink()
    with pytest.raises(SliceFineError, match=r"no config\.json in .*`model\.config\.save_pretrained\(folder\)`"):
        export(run / "adapter", "merged", tmp_path / "out")


def test_a_task_that_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(SliceFineError, match=r"task_type of SEQ_CLS can be exported; .* has 'CAUSAL_LM'"):
        export(run, "merged", tmp_path / "out")


def test_another_base_model_leaves_nothing(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(settings["model.name"], other)
    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    model.save_pretrained(other)
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(other)}))
    before = entries(tmp_path)
    with pytest.raises(SliceFineError, match="trained on a base with other values"):
        export(run, "merged", tmp_path / "out")
    assert entries(tmp_path) == before


def test_a_failed_write_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: Path, **kwargs: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    before = entries(tmp_path)
    with pytest.raises(OSError, match="No space"):
        export(run, "merged", tmp_path / "out")
    assert entries(tmp_path) == before
