"""Files are checked before training, left out when that is asked for, and opened anew whenever they are needed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import COLORS, folder, noise, table
from torch.utils.data import DataLoader

from slicefine import SliceFineError
from slicefine.training import media
from slicefine.training.images import IMAGES, check_image
from slicefine.training.media import Examples, MediaDataset
from slicefine.training.media_sources import Item
from slicefine.training.recipe import DataSettings


def read(train: Path, **settings: Any) -> Examples:
    return media.read(DataSettings(train=str(train), **settings), column="image", kind=IMAGES, check=check_image)


def refusal(train: Path, **settings: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        read(train, **settings)
    return str(error.value)


def test_a_fraction_is_split_off_class_by_class(tmp_path: Path) -> None:
    found = read(folder(tmp_path, 8), validation=0.25)
    assert found.classes == sorted(COLORS)
    for part, count in ((found.train, 6), (found.validation, 2)):
        assert sorted(part.labels) == [n for n in range(3) for _ in range(count)]
        for number in range(len(part)):
            item = part.item(number)
            assert isinstance(item, Path)
            assert item.parent.name == found.classes[part.labels[number]]
            assert part.places[number] == str(item)
    assert not {*found.train.rows} & {*found.validation.rows}
    assert found.summary()["train"]["examples"] == 18
    assert found.summary()["validation"] == {
        "source": "0.25 of train",
        "fingerprint": found.summary()["train"]["fingerprint"],
        "examples": 6,
    }
    assert read(tmp_path, validation=0.25).train.rows == found.train.rows


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_files_that_cannot_be_used_are_named_all_at_once(kind: str, tmp_path: Path) -> None:
    source = folder(tmp_path, 4) if kind == "folder" else table(tmp_path, 4)
    files = tmp_path if kind == "folder" else tmp_path / "files"
    (files / "red" / "0.png").write_bytes(b"")
    (files / "blue" / "1.jpg").write_bytes(b"no image")
    said = refusal(source)
    assert "2 of 12 images cannot be used. To leave out such files, counted and named: --data.on_error skip\n" in said
    assert "red/0.png" in said
    assert "it is empty" in said
    assert "blue/1.jpg" in said
    assert "it is not an image" in said


def test_many_of_them_are_counted(tmp_path: Path) -> None:
    folder(tmp_path, 8)
    for path in [*tmp_path.glob("red/*"), *tmp_path.glob("blue/*")]:
        path.write_bytes(b"")
    said = refusal(tmp_path)
    assert "16 of 24 images cannot be used" in said
    assert "and 6 more like these." in said


def test_files_that_cannot_be_used_are_left_out_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path / "train", 4)
    folder(tmp_path / "val", 2, first=4)
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"")
    (tmp_path / "train" / "red" / "notes.txt").write_text("x")
    (tmp_path / "val" / "blue" / "5.jpg").write_bytes(b"x")
    found = read(tmp_path, validation="val", on_error="skip")
    assert (len(found.train), len(found.validation)) == (11, 5)
    assert sorted(found.train.labels) == [0] * 4 + [1] * 4 + [2] * 3
    assert found.summary()["train"]["skipped"] == 2
    assert found.summary()["validation"]["skipped"] == 1
    (train, validation) = found.notes
    said, *lines = train.splitlines()
    assert said == "2 of 13 images of the train set are left out, because they cannot be used:"
    assert "red/0.png: it is empty" in lines[0]
    assert "red/notes.txt: the suffix .txt is not that of a known image file" in lines[1]
    assert "blue/5.jpg: it is not an image" in validation


def test_the_note_of_many_names_the_first_ten(tmp_path: Path) -> None:
    folder(tmp_path, 14)
    for path in sorted(tmp_path.glob("red/*"))[:12]:
        path.write_bytes(b"")
    note = read(tmp_path, on_error="skip").notes[0]
    assert len(note.splitlines()) == 12
    assert note.endswith("\n  and 2 more like these.")


def test_validation_files_that_are_training_files_are_counted(tmp_path: Path) -> None:
    folder(tmp_path / "train", 4)
    folder(tmp_path / "val", 2, first=4)
    assert read(tmp_path, validation="val").notes == []
    content = (tmp_path / "train" / "red" / "1.jpg").read_bytes()
    for name in ("again.jpg", "and again.jpg"):
        (tmp_path / "val" / "red" / name).write_bytes(content)
    (tmp_path / "train" / "red" / "as large.jpg").write_bytes(content + b"x")
    (tmp_path / "val" / "red" / "as large.jpg").write_bytes(content + b"y")
    (note,) = read(tmp_path, validation="val").notes
    assert note.startswith("2 of 9 validation files are training files too, byte by byte, the first: ")
    assert f"{tmp_path / 'val/red/again.jpg'} is {tmp_path / 'train/red/1.jpg'}." in note


def test_only_files_of_the_same_size_are_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "train", 4)
    folder(tmp_path / "val", 2, first=4)
    for number, path in enumerate(sorted(tmp_path.glob("*/*/*"))):
        path.write_bytes(path.read_bytes() + bytes(5000 * number))  # of sizes that differ
    monkeypatch.setattr(Path, "read_bytes", None)
    assert read(tmp_path, validation="val").notes == []


def test_nothing_left_or_a_class_lost_is_an_error_even_then(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "val", 1)
    for path in (tmp_path / "train" / "red").iterdir():
        path.write_bytes(b"")
    said = refusal(tmp_path, validation="val", on_error="skip")
    assert "of the class 'red', no image can be used for training" in said
    folder(tmp_path / "train", 2)
    for path in (tmp_path / "val").glob("*/*"):
        path.write_bytes(b"")
    said = refusal(tmp_path, validation="val", on_error="skip")
    assert f"no image of the validation set, {tmp_path / 'val'}, can be read" in said


def test_labels_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "val", 1)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "rde")
    said = refusal(tmp_path, validation="val")
    assert "val/rde/0.png: label 'rde' is not among the 3 classes of the training examples" in said


def test_every_file_is_checked_once_by_several_threads(tmp_path: Path) -> None:
    import threading

    folder(tmp_path, 6)
    seen: list[Item] = []
    together = threading.Barrier(2, timeout=20)  # breaks unless two files are checked at the same time

    def check(item: Item) -> None:
        seen.append(item)
        together.wait()

    media.read(DataSettings(train=str(tmp_path)), column="image", kind=IMAGES, check=check)
    assert sorted(map(str, seen)) == sorted(str(path) for path in tmp_path.glob("*/*"))


@pytest.fixture
def dataset(tmp_path: Path) -> MediaDataset:
    return MediaDataset(read(folder(tmp_path, 4), validation=0.25).train, noise, seed=3)


def test_what_is_drawn_depends_on_seed_epoch_and_example_alone(dataset: MediaDataset) -> None:
    def drawn() -> list[list[float]]:
        return [dataset[n]["x"].tolist() for n in range(len(dataset))]

    first = drawn()
    assert len({tuple(x) for x in first}) == len(dataset)
    torch.manual_seed(5)
    random.seed(5)
    assert drawn() == first
    dataset.set_epoch(1)
    second = drawn()
    assert not {tuple(x) for x in first} & {tuple(x) for x in second}
    dataset.set_epoch(0)
    assert drawn() == first
    assert MediaDataset(dataset.part, noise, seed=4)[0]["x"].tolist() != first[0]


@pytest.mark.parametrize("context", [None, "spawn"])
def test_it_does_not_matter_how_many_processes_load(context: str | None, dataset: MediaDataset) -> None:
    dataset.set_epoch(2)
    alone = [batch["x"].tolist() for batch in DataLoader(dataset, batch_size=2)]
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
    assert [batch["x"].tolist() for batch in loader] == alone


def test_a_file_that_is_gone_later_is_named(dataset: MediaDataset) -> None:
    def gone(item: Item, draw: random.Random) -> dict[str, Any]:
        raise FileNotFoundError("no such file")

    broken = MediaDataset(dataset.part, gone, seed=0)
    with pytest.raises(SliceFineError, match=r"blue/0\.png: it was readable when it was checked, and is not any more"):
        broken[0]
