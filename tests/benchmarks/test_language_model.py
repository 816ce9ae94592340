from __future__ import annotations

import json

import pytest

TINY = (
    "--processes 1 --seeds 2 --lr 1e-3 3e-3 --pretrain-steps 2 --steps 4 --slide-every 2 --batch 1 --tokens 16 --windows 4 --layers 1 "
    "--hidden 16 --intermediate 24 --heads 2 --vocab 300"
)


def read_little(options):
    import torch
    from language_model import Texts

    generator = torch.Generator().manual_seed(0)
    return Texts(*(torch.randint(300, (200,), generator=generator) for _ in range(4)))


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path, monkeypatch):
    import language_model

    monkeypatch.setattr(language_model, "read_texts", read_little)
    language_model.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("language-model-*.json")
    figures, held_out, grid, runs = json.loads(path.read_text())["tables"]
    assert [row["method"] for row in held_out["rows"]] == [
        language_model.NONE,
        *(row["method"] for row in grid["rows"]),
    ]
    counts = {row["method"]: row["trainable"] for row in held_out["rows"]}
    assert counts[language_model.EQUAL] == counts[language_model.LORA]
    assert len(runs["rows"]) == 14
    (ratio,) = figures["rows"]
    assert ratio["value"] > 0


def test_docstrings_and_comments_are_no_code(tmp_path):
    import language_model

    path = tmp_path / "some.py"
    path.write_text(
        '"""About."""\n\ndef f(x):\n    """What it does."""\n    return x  # back\n\n\ndef g():\n    """Nothing."""\n'
    )
    docstrings, code = language_model.texts_of(path)
    assert docstrings == "About.\n\nWhat it does.\n\nNothing."
    assert code == "def f(x):\n    return x\n\ndef g():\n    pass"
