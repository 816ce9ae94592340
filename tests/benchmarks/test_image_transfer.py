from __future__ import annotations

import json

import numpy as np
import pytest

TINY = (
    "--seeds 2 --lr 1e-3 1e-2 --pretrain-steps 2 --steps 4 --batch 8 --layers 1 --hidden 16 --intermediate 24 --heads 2"
)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    import image_transfer

    digits = image_transfer.load_digits()
    few = np.concatenate([np.flatnonzero(digits.target == digit)[:10] for digit in range(10)])
    digits.images, digits.target = digits.images[few], digits.target[few]
    monkeypatch.setattr(image_transfer, "load_digits", lambda: digits)


@pytest.mark.usefixtures("few_digits")
def test_it_runs_writes_every_table_and_goes_on_where_it_was(tmp_path, monkeypatch):
    import image_transfer

    arguments = [*TINY.split(), "--cells", str(tmp_path / "cells"), "--output", str(tmp_path / "out")]
    image_transfer.main(arguments)
    (path,) = (tmp_path / "out").glob("image-transfer-*.json")
    first = json.loads(path.read_text())["tables"]
    figures, scores, grid, runs = first
    assert (
        [row["method"] for row in scores["rows"]]
        == [row["method"] for row in grid["rows"]]
        == list(image_transfer.METHODS)
    )
    assert len(figures["rows"]) == 3
    assert len(runs["rows"]) == 4 * 2
    counts = {row["method"]: (row["active"], row["touched"]) for row in scores["rows"]}
    assert counts[image_transfer.HEAD] == (0, 0)
    assert counts[image_transfer.LORA] == (8 * (4 * (16 + 16) + 2 * (16 + 24)),) * 2
    assert counts[image_transfer.SLICES][0] == 5 * (4 * 16 + 16 + 24)
    assert counts[image_transfer.SLICES][0] < counts[image_transfer.SLICES][1] < counts[image_transfer.FULL][1]

    monkeypatch.setattr(image_transfer, "tune", lambda *_: pytest.fail("a finished run is made again"))
    image_transfer.main(arguments)
    assert json.loads(path.read_text())["tables"] == first


@pytest.mark.parametrize("method", ["LoRA r8", "full", "head only"])
def test_the_head_is_trained_in_full(method):
    import image_transfer

    config = image_transfer.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = image_transfer.OTHERS[method](image_transfer.ViTForImageClassification(config))
    head = [p.shape for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    assert sorted(head) == [(2,), (2, 16)]


def test_images_are_the_digits_and_in_one_split_each(tmp_path):
    import image_transfer
    from PIL import Image
    from sklearn.datasets import load_digits

    sizes = image_transfer.write_images(tmp_path, image_transfer.NEW, seed=0)
    files = {split: list((tmp_path / split).rglob("*.png")) for split in image_transfer.SPLITS}
    assert {split: len(found) for split, found in files.items()} == sizes
    digits = load_digits()
    names = [file.stem for found in files.values() for file in found]
    assert sorted(map(int, names)) == np.flatnonzero(digits.target >= 5).tolist()
    file = files["test"][0]
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (8, 8)
    assert np.allclose(pixels / 255 * 16, digits.images[int(file.stem)], atol=0.07)
    assert digits.target[int(file.stem)] == int(file.parent.name)
