from __future__ import annotations

import pytest

from slicefine import SliceFineError
from slicefine.training import extras
from slicefine.training.tasks import get_task


def test_nothing_is_missing_here() -> None:
    extras.require_train()


@pytest.mark.parametrize("task", ["image-classification", "video-classification", "causal-lm"])
def test_nothing_is_missing_for_any_task(task: str) -> None:
    extras.require_task(task)


def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS["train"], "absent_module", "absent-package")
    with pytest.raises(SliceFineError, match=r"^Training needs absent-package: pip install 'slicefine\[train\]'$"):
        extras.require_train()


@pytest.mark.parametrize(
    ("task", "extra", "missing"),
    [
        ("image-classification", "vision", "pillow"),
        ("video-classification", "video", "pillow, av"),
    ],
)
def test_a_task_names_the_packages_of_its_own(
    task: str, extra: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module in ("PIL", "av") else object())
    with pytest.raises(SliceFineError) as error:
        get_task(task)
    assert str(error.value) == f"{task.capitalize()} needs {missing}: pip install 'slicefine[{extra}]'"
    extras.require_train()
    get_task("text-classification")
