from __future__ import annotations

from pathlib import Path

import pytest
import reported

from slicefine.reporting import charts, model_map
from slicefine.reporting.run import write


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a page of an example of it, drawn in full; to be read only."""
    folder = tmp_path_factory.mktemp("pages")
    return {kind: write([make(folder / kind)], folder / f"{kind}.html") for kind, make in reported.MAKE.items()}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without drawings, which are made in no time."""
    monkeypatch.setattr(charts, "drawing", lambda key, *_, **__: f'<svg id="{key}"></svg>')
    monkeypatch.setattr(model_map, "text_of", lambda _: "<svg></svg>")
