from __future__ import annotations

import json

import pytest


def test_a_figure_says_whether_its_target_is_met():
    from _common import Figure

    verdicts = [
        Figure(name="low is good", value=1.06, at_most=1.05).row()["verdict"],
        Figure(name="low is good", value=1.05, at_most=1.05).row()["verdict"],
        Figure(name="high is good", value=1.29, at_least=1.30).row()["verdict"],
        Figure(name="high is good", value=1.30, at_least=1.30).row()["verdict"],
        Figure(name="no target", value=9.0).row()["verdict"],
    ]
    assert verdicts == ["**missed**", "met", "**missed**", "met", ""]


def test_a_result_is_two_files_with_provenance_and_every_row(tmp_path, capsys):
    from _common import Figure, Table, provenance, write

    made_by = provenance(["benchmarks/x.py", "--rounds", "1"], threads=2, seed=7)
    page = write(
        tmp_path,
        theme="theme",
        hardware="Some(R) CPU 2 threads",
        intro="What was measured.",
        figures=[Figure(name="won", value=1.0, at_most=1.05), Figure(name="lost", value=2.0, low=1.5, at_most=1.05)],
        tables=[Table(title="Rows", rows=[{"variant": "a", "ms": 1.0, "empty": None}])],
        made_by=made_by,
    )
    assert page.name == f"theme-some-cpu-2-threads-{made_by['date'][:10]}.md"
    text = page.read_text()
    assert "| won | 1.000 |  | at most 1.05 | met |" in text
    assert "| lost | 2.000 | 1.500 | at most 1.05 | **missed** |" in text
    assert "empty" not in text  # a column that no row fills
    assert text in capsys.readouterr().out

    record = json.loads(page.with_suffix(".json").read_text())
    assert record["provenance"]["command"] == "python benchmarks/x.py --rounds 1"
    assert record["provenance"]["seed"] == 7
    assert {"commit", "dirty", "cpu", "cores", "threads", "torch", "peft", "date"} <= record["provenance"].keys()
    assert [row["figure"] for row in record["tables"][0]["rows"]] == ["won", "lost"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


@pytest.mark.parametrize("text", ["0", "-1"])
def test_counts_are_at_least_one(text, capsys):
    from _common import parser, positive

    made = parser("A benchmark.")
    made.add_argument("--rounds", type=positive, default=9)
    with pytest.raises(SystemExit):
        made.parse_args(["--rounds", text])
    assert "at least 1" in capsys.readouterr().err
