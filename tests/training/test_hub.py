from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest

from slicefine import SliceFineError
from slicefine.training import hub
from slicefine.training.data import read_table


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some folders."""
    here = tmp_path / "here"
    (here / "photos" / "train").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    return here


def no_network(*args: object, **kwargs: object) -> bool:
    raise OSError("Name or service not known")


def must_not_be_asked(*args: object, **kwargs: object) -> bool:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("./fotos", "photos"),
        ("../fotos", ""),
        ("photos/trian", "photos/train"),
        ("photos/train/cats", ""),
        ("PLACE/fotos", "PLACE/photos"),
    ],
)
def test_a_path_is_never_a_name_on_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    monkeypatch.setattr(huggingface_hub, "repo_exists", must_not_be_asked)
    monkeypatch.setattr(huggingface_hub, "file_exists", must_not_be_asked)
    name, near = name.replace("PLACE", str(place)), near.replace("PLACE", str(place))
    meant = f" Did you mean {near!r}?" if near else ""
    assert hub.dataset_problem(name) == f"There is no file or folder {name}.{meant}"
    if name != "photos/trian":  # a folder may be called as an owner of models is
        assert str(hub.model_problem(name)).endswith(f"; there is no folder {name}.{meant}")


def test_without_a_network_one_question_is_enough(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "repo_exists", no_network)
    monkeypatch.setattr("datasets.load_dataset", must_not_be_asked)
    with pytest.raises(SliceFineError) as error:
        read_table("nophotos", None)
    message = str(error.value)
    assert message.startswith(
        "There is no file or folder nophotos here. Did you mean 'photos'? For a data set of that name"
    )
    assert message.endswith(
        "cannot be reached: Name or service not known. Check the network, or give a file or folder."
    )
    assert "None" not in message


def test_what_the_hub_has_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda name, repo_type: name == "owner/set")
    assert hub.dataset_problem("owner/set") is None
    assert hub.dataset_problem("nophotos") == (
        "'nophotos' is no file or folder here, and no data set of the hub. Did you mean 'photos'?"
    )


def test_what_was_downloaded_before_needs_no_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(place / "cache" / "owner___some_set")
    monkeypatch.setattr(huggingface_hub, "repo_exists", no_network)
    assert hub.dataset_problem("owner/SomeSet") is None
    assert hub.dataset_problem("owner/Other") is not None
