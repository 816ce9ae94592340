from __future__ import annotations

import pytest

from slicefine import SliceFineError
from slicefine.training import extras


def test_nothing_is_missing_here() -> None:
    extras.require_train()


def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.TRAIN, "absent_module", "absent-package")
    with pytest.raises(SliceFineError, match=r"^Training needs absent-package: pip install 'slicefine\[train\]'$"):
        extras.require_train()
