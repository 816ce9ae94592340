"""Finished runs are kept, found again, and never mistaken for others."""

import dataclasses
import json

import pytest

from slicefine.benchmarking.cells import VERSION, Cell, Cells, Outcome
from slicefine.errors import SliceFineError

CELL = Cell(task="trec", method="SliceFine-5RC", learning_rate=3e-3, seed=0, steps=500, final=True)
SETTINGS = {"recipe": {"data.max_length": 64}, "examples": [{"train": {"fingerprint": "sha256:1"}}]}
OUTCOME = Outcome(
    active=10, touched=30, head=2, added=0, total=100, steps=500, loss=0.25, scores={"accuracy": 0.9},
    curve=[{"step": 500, "loss": 0.3, "accuracy": 0.8}], predicted=[0, 1], labels=[0, 0], seconds=1.5,
)  # fmt: skip


def test_what_is_kept_is_read_back(tmp_path):
    cells = Cells(tmp_path / "new")
    assert cells.read(CELL, SETTINGS) is None
    cells.keep(CELL, SETTINGS, OUTCOME)
    assert cells.read(CELL, SETTINGS) == OUTCOME
    assert [path.name for path in cells.folder.iterdir()] == [cells.path(CELL, SETTINGS).name]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"learning_rate": 1e-3}, {"steps": 499}, {"final": False}, {"method": "LoRA-r8"}]
)
def test_another_run_is_not_taken_for_it(tmp_path, change):
    cells = Cells(tmp_path)
    cells.keep(CELL, SETTINGS, OUTCOME)
    assert cells.read(dataclasses.replace(CELL, **change), SETTINGS) is None


def test_other_examples_or_settings_are_another_run(tmp_path):
    cells = Cells(tmp_path)
    cells.keep(CELL, SETTINGS, OUTCOME)
    assert cells.read(CELL, SETTINGS | {"recipe": {"data.max_length": 65}}) is None
    assert cells.read(CELL, SETTINGS | {"examples": [{"train": {"fingerprint": "sha256:2"}}]}) is None


def test_a_file_of_another_version_or_a_damaged_one_is_named_with_what_to_do(tmp_path):
    cells = Cells(tmp_path)
    cells.keep(CELL, SETTINGS, OUTCOME)
    path = cells.path(CELL, SETTINGS)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"version": VERSION + 1}), encoding="utf-8")
    with pytest.raises(
        SliceFineError, match=f"version {VERSION + 1}; this slicefine reads version {VERSION}"
    ) as caught:
        cells.read(CELL, SETTINGS)
    assert str(path) in str(caught.value)
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    with pytest.raises(SliceFineError, match="not the file of a finished run"):
        cells.read(CELL, SETTINGS)
