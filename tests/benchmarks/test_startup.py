from __future__ import annotations

import json


def test_it_runs_and_writes_its_figures(tmp_path):
    import startup

    startup.main(["--repeats", "1", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("startup-*.json")
    figures = {row["figure"]: row for row in json.loads(path.read_text())["tables"][0]["rows"]}
    assert figures[startup.HELP]["target"] == "at most 0.5"
    assert 0 < figures[startup.IMPORT]["value"] <= figures[startup.FIRST_USE]["value"]
