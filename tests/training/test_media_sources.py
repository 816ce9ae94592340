"""Where images and their labels come from, and what is wrong with a source."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from pictures import COLORS, folder, picture, table

from slicefine import SliceFineError
from slicefine.training.images import IMAGES
from slicefine.training.media_sources import MediaTable, read_sources
from slicefine.training.recipe import DataSettings


def read(train: Any, **settings: Any) -> dict[str, MediaTable]:
    return read_sources(DataSettings(train=str(train), **settings), "image", IMAGES)


def refusal(train: Any, **settings: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        read(train, **settings)
    return str(error.value)


def labels(found: MediaTable) -> list[Any]:
    return [row["label"] for row in found.labels.rows]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    found = read(folder(tmp_path, 2))
    assert set(found) == {"train"}
    assert found["train"].items == [tmp_path / c / n for c in COLORS for n in ("0.png", "1.jpg")]
    assert found["train"].labels.places == [str(path) for path in found["train"].items]
    assert labels(found["train"]) == [c for c in COLORS for _ in range(2)]
    assert found["train"].problems == {}
    assert found["train"].notes == []


@pytest.mark.parametrize("given", ["validation", "val", "valid", "dev"])
@pytest.mark.parametrize("present", ["validation", "val", "valid"])
def test_splits_below_a_folder_by_any_usual_name(given: str, present: str, tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / present, 1)
    found = read(tmp_path, validation=given)
    assert [len(found[name].items) for name in ("train", "validation")] == [6, 3]
    assert found["validation"].labels.source == str(tmp_path / present)


def test_another_split_or_folder_or_table(tmp_path: Path) -> None:
    folder(tmp_path / "all" / "train", 2)
    folder(tmp_path / "all" / "test", 1)
    folder(tmp_path / "all" / "extra", 3)
    folder(tmp_path / "other", 1)
    table(tmp_path / "table", 2)
    assert len(read(tmp_path / "all", validation="test")["validation"].items) == 3
    assert len(read(tmp_path / "all", validation=str(tmp_path / "other"))["validation"].items) == 3
    assert len(read(tmp_path / "all", validation=str(tmp_path / "table" / "rows.jsonl"))["validation"].items) == 6
    assert len(read(tmp_path / "table" / "rows.jsonl", validation=str(tmp_path / "other"))["validation"].items) == 3
    assert len(read(tmp_path / "all", train_split="extra")["train"].items) == 9
    said = refusal(tmp_path / "all", validation="tset")
    assert f"a split below {tmp_path / 'all'} (there are: extra, test), or a fraction; got 'tset'" in said
    assert "Did you mean 'test'?" in said
    assert "no folder of the split 'exrta'" in refusal(tmp_path / "all", train_split="exrta")


def test_a_split_that_is_not_used_is_said(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "val", 1)
    (note,) = read(tmp_path, validation=0.5)["train"].notes
    assert "val is not used" in note
    assert note.endswith("To validate on it: --data.validation val")


def test_a_test_split_that_is_not_used_is_said(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "test", 1)
    (note,) = read(tmp_path, validation=0.5)["train"].notes
    assert note.startswith(f"{tmp_path / 'test'} is not used: ")
    assert note.endswith("--data.validation test")
    assert read(tmp_path, validation="test")["train"].notes == []
    assert read(tmp_path, validation=0.5, train_split="test")["train"].notes == []


def test_columns_that_a_folder_does_not_have_are_said(tmp_path: Path) -> None:
    folder(tmp_path / "all", 2)
    table(tmp_path / "table", 2)
    rows = tmp_path / "table" / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"image"', '"img"'))
    given = DataSettings(train=str(tmp_path / "all"), label="class")
    (image, label) = read_sources(given, "img", IMAGES)["train"].notes
    assert image == f"`data.image` ('img') is the column of a table, and is not used: {tmp_path / 'all'} is a folder."
    assert "`data.label` ('class')" in label
    given = DataSettings(train=str(tmp_path / "all"), validation=str(rows))
    assert read_sources(given, "img", IMAGES)["train"].notes == []


def test_train_may_be_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        picture("red", 0).save(tmp_path / name / "0.png")
    assert labels(read(tmp_path)["train"]) == ["bus", "train"]


def test_numbered_folders_are_classes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    from slicefine.training.labels import number

    for name in ("10", "9", "0"):
        (tmp_path / name).mkdir()
        for n in range(2):
            picture("red", n).save(tmp_path / name / f"{n}.png")
    assert number({"train": read(tmp_path)["train"].labels}, "label", where="Data").classes == ["0", "9", "10"]


def test_hidden_files_are_passed_over_and_others_are_named(tmp_path: Path) -> None:
    folder(tmp_path, 1)
    (tmp_path / ".git").mkdir()
    (tmp_path / "red" / ".DS_Store").write_text("x")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "red" / "notes.txt").write_text("x")
    (tmp_path / "red" / "noending").write_text("x")
    (tmp_path / "red" / "UPPER.JPG").write_bytes((tmp_path / "red" / "0.png").read_bytes())
    found = read(tmp_path)["train"]
    assert [found.items[row].name for row in found.problems] == ["noending", "notes.txt"]  # pyright: ignore
    assert [problem.partition(" is not")[0] for problem in found.problems.values()] == [
        "the suffix (none)",
        "the suffix .txt",
    ]
    (note,) = found.notes
    assert note.endswith("files beside the class folders are not used: README.md.")


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is empty. The images of a class go into a folder" in refusal(tmp_path / "empty")

    flat = tmp_path / "flat"
    flat.mkdir()
    picture("red", 0).save(flat / "0.png")
    assert "has files (0.png) and no class folder" in refusal(flat)
    (flat / "rows.csv").write_text("image,label\n")
    assert "If rows.csv names the images and their labels, set `data.train` to it." in refusal(flat)

    root = folder(tmp_path / "root", 1)
    (root / "none").mkdir()
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("x")
    (root / "deep" / "deeper").mkdir(parents=True)
    picture("red", 0).save(root / "loose.png")
    said = refusal(root)
    for problem in (
        f"{root} has images beside the class folders, of no class: loose.png",
        f"the class folder {root / 'none'} is empty",
        f"the class folder {root / 'text'} has no image (a.txt)",
        f"the class folder {root / 'deep'} has folders in it (deeper)",
    ):
        assert problem in said


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_table_of_paths(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in table(tmp_path, 2).read_text().splitlines()]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    monkeypatch.chdir("/")  # paths are relative to the table
    found = read(path)["train"]
    assert found.items == [tmp_path / row["image"] for row in rows]
    assert labels(found) == [row["label"] for row in rows]
    assert found.problems == {}
    assert found.labels.places[0].endswith("(files/blue/0.png)")


def test_a_column_that_a_table_does_not_have(tmp_path: Path) -> None:
    rows = table(tmp_path, 2)
    rows.write_text(rows.read_text().replace('"image"', '"img"'))
    said = refusal(rows)
    assert "no column 'image'; there are 'img', 'label'" in said
    assert "Name the right one with --data.image." in said


def test_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"image": "gone.png", "label": "a"}, {"image": None, "label": "a"}, {"image": 3, "label": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(read(path)["train"].problems.values()) == [
        f"there is no file {tmp_path / 'gone.png'}.",
        "'image' is the path of a file; got null.",
        "'image' is the path of a file; got 3.",
    ]
    path.write_text('{"picture": "a.png", "label": "a"}')
    assert "no column 'image'; there are 'picture', 'label'." in refusal(path)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_fingerprint_changes_with_the_files(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[Path, Path]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        if kind == "folder":
            return folder(place, 2), place
        return table(place, 2), place / "files"

    source, files = made()
    again, _ = made()
    first = read(source)["train"].labels.fingerprint
    assert first.startswith("sha256:")
    assert read(again)["train"].labels.fingerprint == first  # of copies in other places
    os.utime(files / "red" / "0.png", (1, 1))
    assert read(source)["train"].labels.fingerprint == first
    with (files / "red" / "0.png").open("ab") as file:
        file.write(b"0")
    assert read(source)["train"].labels.fingerprint != first
    source, files = made()
    (files / "red" / "0.png").unlink()
    assert read(source)["train"].labels.fingerprint != first
    if kind == "folder":
        source, files = made()
        (files / "red" / "0.png").rename(files / "blue" / "2.png")
        assert read(source)["train"].labels.fingerprint != first


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    """A data set with images, saved and loaded as one of the hub is."""
    folder(tmp_path / "files", 2)
    paths = sorted(str(path) for path in (tmp_path / "files").glob("*/*"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLORS)), "more": datasets.Value("int32")}
    )
    rows = {
        "image": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
        "label": [n // 2 for n in range(6)],
        "more": [1] * 6,
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: made)
    return made


def test_a_hub_data_set_stays_where_it_is(hub: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    found = read("owner/pictures")["train"]
    assert found.labels.rows == [{"label": n // 2} for n in range(6)]  # and no image
    assert found.labels.class_names == {"label": list(COLORS)}
    assert found.labels.places[2] == "owner/pictures, split train, row 3"
    assert len(found.items) == 6
    assert isinstance(found.items[0], bytes)
    assert found.items[0][:4] == b"\x89PNG"


def test_a_column_without_images(hub: datasets.Dataset) -> None:
    with pytest.raises(SliceFineError, match=r"'more' of owner/pictures, split train, holds no images but Value"):
        read_sources(DataSettings(train="owner/pictures"), "more", IMAGES)
