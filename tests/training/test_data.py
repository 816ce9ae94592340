from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from slicefine import SliceFineError
from slicefine.training.data import SHOWN_PROBLEMS, names_a_split, read_table, read_tables
from slicefine.training.recipe import DataSettings

COLUMNS = ["text", "label"]


def refusal(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SliceFineError) as error:
        read_table(str(path), COLUMNS)
    return str(error.value)


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": 'None, "quoted"\nand two lines', "label": "1"}, {"text": "é", "label": "b"}]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\r\n\n" for row in rows))
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbflabel,other,text\r\n1,x,"None, ""quoted""\nand two lines"\r\n\r\nb,y,\xc3\xa9\r\n'
    )
    datasets.Dataset.from_list([{"other": 0, **row} for row in rows]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    kinds = ("jsonl", "json", "csv", "parquet")
    jsonl, as_list, csv, parquet = (read_table(str(tmp_path / f"a.{kind}"), COLUMNS) for kind in kinds)
    assert jsonl.rows == as_list.rows == csv.rows == parquet.rows == rows
    assert as_list.places == [f"{tmp_path / 'a.json'}:2 (row 1)", f"{tmp_path / 'a.json'}:6 (row 2)"]
    assert jsonl.places == [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'a.jsonl'}:3"]
    assert csv.places == [f"{tmp_path / 'a.csv'}:3", f"{tmp_path / 'a.csv'}:5"]  # the line a row ends in
    assert parquet.places == [f"{tmp_path / 'a.parquet'}, row 1", f"{tmp_path / 'a.parquet'}, row 2"]
    assert jsonl.typed
    assert not csv.typed


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,b\n")
    first = read_table(str(path), COLUMNS).fingerprint
    assert first == read_table(str(path), COLUMNS).fingerprint
    path.write_text("text,label\na,c\n")
    assert read_table(str(path), COLUMNS).fingerprint != first


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(SliceFineError, match=r"trian\.jsonl does not exist\. Did you mean 'train\.jsonl'\?"):
        read_table(str(tmp_path / "trian.jsonl"), COLUMNS)
    with pytest.raises(
        SliceFineError, match=r"is a folder; a task of texts reads files .* use a recipe of image-class"
    ):
        read_table(str(tmp_path), COLUMNS)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").touch()
    with pytest.raises(SliceFineError, match=r"A data file is \.jsonl, \.json, \.csv, \.parquet; got .*a\.tsv"):
        read_table(str(tmp_path / "a.tsv"), COLUMNS)


def test_broken_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "label": 1}', '{"text": "a", }', "[1]", '{"text": "b"}', '{"text": "\\ud800", "label": 1}']
    message = refusal(path, "\n".join(lines))
    assert f"{path}:2: not valid JSON at character 15" in message
    assert f"{path}:3: each line is a JSON object; got '[1]'" in message
    assert f"{path}:4: no column 'label'; there are 'text'." in message
    assert f"{path}:5: '\\ud800' is half of a surrogate pair" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_wrong_column_is_said_once_with_its_flag(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows: list[dict[str, Any]] = [{"txt": "a", "label": 1}] * 30
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(SliceFineError) as error:
        read_tables(DataSettings(train=str(path)), COLUMNS)
    assert str(error.value) == (
        f"{path}: in all 30 rows, no column 'text'; there are 'txt', 'label'. Did you mean 'txt'? "
        "Name the right one with --data.text."
    )
    rows[4:7] = [{"text": "a", "label": 1}] * 3
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(SliceFineError) as error:
        read_tables(DataSettings(train=str(path), label="y"), ["txt", "y"])
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{path}:1")
    assert first.endswith(
        "no column 'y'; there are 'txt', 'label'. Name the right one with --data.label. So in 26 more rows."
    )
    assert "no column 'txt', 'y'; there are 'text', 'label'. Did you mean 'text'? So in 2 more rows." in second


def test_all_columns(tmp_path: Path) -> None:
    rows = [{"b": "1", "a": "2"}, {"b": "3", "a": "4"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("b,a\n1,2\n3,4\n")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert [read_table(str(tmp_path / f"a.{kind}"), None).rows for kind in ("jsonl", "json", "csv", "parquet")] == [
        rows
    ] * 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n {"text": "a",\n  "label": }\n]', ":3: not valid JSON at character 12"),
        ('[\n {"text": "a", "label": 1},\n]', ":3: not valid JSON"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1}', "It looks like one object a line: name it .jsonl."),
        ('{"text": "a"}', "a .json file is a list of objects; got"),
        (
            '[{"text": "a", "label": 1},\n\n [1], "x"]',
            ":3 (row 2): each element of the list is a JSON object; got '[1]'",
        ),
        ('[{"text": [["a"], []], "label": 1},\n {"text": "b"}]', ":2 (row 2): no column 'label'; there are 'text'."),
        ('[{"text": "\\ud800", "label": 1}]', ":1 (row 1): '\\ud800' is half of a surrogate pair"),
    ],
)
def test_broken_json(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(tmp_path / "a.json", content)


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert f"{path}:1: no column 'text'; there are 'txt', 'label'. Did you mean 'txt'?" in refusal(
        path, "txt,label\na,b\n"
    )
    assert (
        f"{path}:3: 3 fields where the header has 2. A text with a comma in it goes between double quotes"
        in refusal(path, "text,label\na,b\na, b,c\n")
    )
    assert f"{path}:2: not valid CSV" in refusal(path, 'text,label\n"a"x,b\n')
    assert f"{path}:1: the header has 'label' more than once" in refusal(path, "text,label,label\na,b,c\n")


def test_texts_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'a' * 200_000},b\n")
    (row,) = read_table(str(path), COLUMNS).rows
    assert len(row["text"]) == 200_000


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_that_python_does_not_read(tmp_path: Path, value: str) -> None:
    line = f'{{"text": "a", "label": {value}}}'
    assert "a.jsonl:1: JSON that cannot be read" in refusal(tmp_path / "a.jsonl", line + "\n")
    assert "a.json: JSON that cannot be read" in refusal(tmp_path / "a.json", f"[{line}]")


def test_what_is_a_split_and_what_a_path(tmp_path: Path) -> None:
    (tmp_path / "photos" / "val").mkdir(parents=True)
    local, hub = str(tmp_path / "photos"), "nobody/photos"
    assert [names_a_split(name, local) for name in ("validation", "test", "photos/val", "rows.csv")] == [
        True, False, False, False,
    ]  # fmt: skip
    assert [names_a_split(name, hub) for name in ("validation", "test", "photos/val", "rows.csv")] == [
        True, True, False, False,
    ]  # fmt: skip
    (tmp_path / "train.jsonl").touch()
    assert not names_a_split("test", str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(("mark", "shown"), [(";", "';'"), ("\t", r"'\t'"), ("|", "'|'")])
def test_csv_without_commas(tmp_path: Path, mark: str, shown: str) -> None:
    path = tmp_path / "a.csv"
    message = refusal(path, f"text{mark}label\na, b{mark}c\n")
    assert f"{path}:1: the columns of a CSV file are separated by commas, these by {shown}." in message
    assert "no column" not in message


@pytest.mark.parametrize(("kind", "first"), [("csv", b"text,label\n"), ("jsonl", b'{"text": "a", "label": 1}\n')])
def test_not_utf8(tmp_path: Path, kind: str, first: bytes) -> None:
    path = tmp_path / f"a.{kind}"
    assert f"{path}:2: byte 4 of the line, 0xe9, is not UTF-8." in refusal(path, first + b"caf\xe9,b\n")


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert f"{path}: not a complete Parquet file" in refusal(path, b"PAR1 and no more")
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(path)
    with pytest.raises(SliceFineError, match="no column 'text', 'label'; there are 'a'"):
        read_table(str(path), COLUMNS)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.jsonl", "x\n" * (SHOWN_PROBLEMS + 5))
    assert message.count("not valid JSON") == SHOWN_PROBLEMS
    assert "and 5 more like these." in message


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]), idx=datasets.Value("int32")
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "idx": [0, 1]}, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_table("nyu-mll/glue", COLUMNS, subset="sst2", split="validation")
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "validation"})]
    assert table.rows == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert table.class_names == {"label": ["no", "yes"]}
    assert table.places[1] == "nyu-mll/glue, split validation, row 2"
    with pytest.raises(SliceFineError, match="no column 'sentence'; there are 'text', 'label', 'idx'"):
        read_table("nyu-mll/glue", ["sentence"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nwith details"), "Couldn't reach"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found nothing.py"),
            "Dataset scripts are no longer",
        ),
        (datasets.exceptions.DatasetGenerationError(), "DatasetGenerationError"),
    ],
    ids=["unreachable", "script", "without words"],
)
def test_a_hub_that_gives_nothing_is_one_sentence(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SliceFineError, match=rf"'nobody/nothing' is no file here .*{says}[^\n]*$"):
        read_table("nobody/nothing", COLUMNS)
