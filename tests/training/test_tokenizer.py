from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertTokenizerFast, ViTConfig, ViTModel

from slicefine import SliceFineError
from slicefine.training.recipe import Recipe
from slicefine.training.run import train
from slicefine.training.smoke import smoke
from slicefine.training.tokenizer import load_tokenizer, refuse_unknown

TASKS = ("text-classification", "causal-lm")


def refused(settings: dict[str, Any], tmp_path: Path, **changed: Any) -> set[str]:
    """What run and smoke test say; the run leaves nothing behind."""
    recipe = Recipe.from_flat(settings | {key.replace("__", "."): value for key, value in changed.items()})
    said = set()
    with pytest.raises(SliceFineError) as error:
        train(recipe)
    said.add(str(error.value))
    assert not Path(recipe.output).exists()
    (tmp_path / "smoke").mkdir()
    with pytest.raises(SliceFineError) as error:
        smoke(recipe, tmp_path / "smoke")
    return said | {str(error.value)}


@pytest.fixture(params=TASKS)
def of_task(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue("lm_settings" if request.param == "causal-lm" else "settings")


def test_a_folder_without_a_tokenizer_is_refused(of_task: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(of_task["model.name"]) / name, folder)
    (message,) = refused(of_task, tmp_path, model__name=str(folder))
    assert f"{folder} has no file of a tokenizer in it. Copy the tokenizer's files" in message


def test_a_tokenizer_of_special_tokens_alone_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "halved"
    shutil.copytree(settings["model.name"], folder)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    (message,) = refused(settings, tmp_path, model__name=str(folder))
    assert f"the tokenizer of {folder} knows special tokens alone ([" in message


def test_texts_that_the_tokenizer_does_not_know(settings: dict[str, Any], tmp_path: Path) -> None:
    data = Path(settings["data.train"])
    data.write_text("".join(f'{{"text": "word{n} other{n}", "label": {n % 2}}}\n' for n in range(40)))
    (message,) = refused(settings, tmp_path)
    name = settings["model.name"]
    assert (
        f"the tokenizer of {name} does not know the training texts: 100% of their tokens are [UNK] (the first"
        in message
    )


def test_a_model_of_images_does_not_read_text(of_task: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)
    (message,) = refused(of_task, tmp_path, model__name=str(folder))
    assert message == (
        f"`model.name`: {folder} is a vit, which does not read text. Name a model of texts, or use a recipe for images or clips."
    )


def test_a_few_unknown_words_are_no_mistake(model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    assert isinstance(tokenizer, BertTokenizerFast)
    refuse_unknown(tokenizer, ["a b c d e f g h ball goal", "", "  "], "m")
    with pytest.raises(SliceFineError, match="90% of their tokens are"):
        refuse_unknown(tokenizer, ["a b c d e f g h i ball", "", "  "], "m")
    refuse_unknown(tokenizer, ["", " "], "m")  # said where examples are read


def test_a_vocabulary_of_bytes_knows_all_texts(lm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    assert tokenizer.unk_token_id is None
    refuse_unknown(tokenizer, ["\u4f60\u597d", "\x00"], "m")
