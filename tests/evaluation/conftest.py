from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from parrot import (
    TEXTS,
    TRUE,
    boolq_rows,
    make_tokenizer,
    parrot,
    piqa_rows,
    random_llama,
    save,
    write_rows,
)
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEXTS)


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """Saves a model folder; returns it. Without a chain, the answers are random."""

    def make(chain: Sequence[str] | None = TRUE, name: str = "model", **settings: Any) -> str:
        model = random_llama(tokenizer, **settings) if chain is None else parrot(tokenizer, chain, **settings)
        return str(save(tmp_path / name, model, tokenizer))

    return make


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The test sets of boolq (3 questions) and piqa (2)."""
    write_rows(tmp_path / "data" / "boolq" / "test.jsonl", boolq_rows())
    write_rows(tmp_path / "data" / "piqa" / "test.jsonl", piqa_rows())
    return str(tmp_path / "data")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder fails at once, as it does offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
