from __future__ import annotations

import json

import pytest

TINY = "--layers 2 --batch 2 --tokens 16 --hidden 64 --intermediate 96 --heads 4 --kv-heads 2 --head 16 --vocab 50"


@pytest.mark.usefixtures("imported")
def test_it_runs_and_columns_keep_their_features_only(tmp_path, monkeypatch):
    import saved_activations

    # The others take time and add nothing: every method is measured by the same lines.
    some = ("frozen limit", "SliceFine columns r5", "SliceFine rows r5", "LoRA r8 all-linear")
    monkeypatch.setattr(saved_activations, "METHODS", {name: saved_activations.METHODS[name] for name in some})
    saved_activations.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("saved-activations-meta-device-*.json")
    figures, *tables = json.loads(path.read_text())["tables"]
    assert {row["verdict"] for row in figures["rows"]} <= {"met", "**missed**", ""}
    assert len(tables) == 2
    for table in tables:
        kept = {row["method"]: row["MiB a layer"] for row in table["rows"]}
        # bf16: 7 linear layers keep 5 features of each of 2 x 16 tokens.
        features = 7 * 5 * 2 * 16 * 2 / 2**20
        assert kept["SliceFine columns r5"] - kept["frozen limit"] == pytest.approx(features)
        assert kept["SliceFine columns r5"] < kept["SliceFine rows r5"] < kept["LoRA r8 all-linear"]
        assert all(row["stashed MiB, model"] == 0 for row in table["rows"] if row["method"].startswith("SliceFine"))


def test_a_difference_needs_two_models(capsys):
    import saved_activations

    with pytest.raises(SystemExit):
        saved_activations.main(["--layers", "1"])
    assert "at least 2" in capsys.readouterr().err
