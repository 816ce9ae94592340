"""Classifiers of texts, scored on labelled files and named sets."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from classifiers import review, reviews, text_model, trained, write_table
from parrot import make_tokenizer, save
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from slicefine import SliceFineError, SliceFineWarning
from slicefine.cli.evaluate import summary
from slicefine.evaluation import classification
from slicefine.evaluation import run as module
from slicefine.evaluation.run import evaluate
from slicefine.evaluation.scoring import wilson
from slicefine.evaluation.settings import Settings

TRAINED, HELD = range(24), range(100, 110)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a file, for the data set sst2."""
    root = tmp_path_factory.mktemp("text")
    data = write_table(root / "train.jsonl", reviews(TRAINED))
    settings = {"data.name": "sst2"}
    return trained("text-classification", base, data, root / "run", **settings)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run: results of one test are not those of another."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return write_table(tmp_path / "held.jsonl", reviews(HELD))


@pytest.fixture
def classifier(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a plain classifier with random weights and these classes; returns its folder."""

    def make(*classes: str, name: str = "plain", **settings: Any) -> Path:
        torch.manual_seed(1)
        names = dict(enumerate(classes))
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=len(classes) or 1, **({"id2label": names} if classes else {}), **settings
        )
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts rows into a data set of the hub, which is out of reach here."""
    there: dict[tuple[str, str | None, str], datasets.Dataset] = {}

    def load(name: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        if (name, subset, split) not in there:
            raise ValueError(f"no {name} {subset} {split}")
        return there[name, subset, split]

    def put(name: str, subset: str | None, split: str, rows: list[dict[str, Any]], classes: list[str]) -> None:
        made = datasets.Dataset.from_list(rows)
        there[name, subset, split] = made.cast_column("label", datasets.ClassLabel(names=classes)) if classes else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    return put


def score(model: Path | str, **values: Any) -> Any:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return evaluate(Settings(model=str(model), **given))


def refused(model: Path | str, **values: Any) -> str:
    with pytest.raises(SliceFineError) as caught:
        score(model, **values)
    return str(caught.value)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def by_row(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(line["task"], line["row"]): line for line in lines(folder)}


# ---------------------------------------------------------------- predictions and scores


def test_predictions_are_those_of_the_adapter_on_its_base(run: Path, base: Path, held: Path) -> None:
    result = score(run, data=held)
    rows, folder = reviews(HELD), run / "evaluation" / "held"
    found = by_row(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    tuned = PeftModel.from_pretrained(plain, str(run / "adapter")).eval()
    for number, row in enumerate(rows, 1):
        with torch.no_grad():
            chances = tuned(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        predicted = ["negative", "positive"][int(chances.argmax())]
        assert found["held", number] == {
            "task": "held",
            "row": number,
            "place": f"{held}:{number}",
            "label": row["label"],
            "predicted": predicted,
            "score": pytest.approx(float(chances.max()), abs=1e-5),
            "text": row["text"],
            "text_pair": None,
        }
    right = sum(line["label"] == line["predicted"] for line in found.values())
    assert right >= 18  # it has learned
    scores = saved(folder)["tasks"]["held"]
    assert scores == result.tasks["held"]
    assert (scores["examples"], scores["asked"], scores["right"]) == (20, 20, right)
    assert scores["metrics"] == {"accuracy": right / 20}
    assert scores["interval"] == pytest.approx(wilson(right, 20))
    assert sum(each["right"] for each in scores["classes"].values()) == right
    assert {name: each["examples"] for name, each in scores["classes"].items()} == {"negative": 10, "positive": 10}


def test_what_is_known_of_an_evaluation(run: Path, held: Path) -> None:
    score(run, data=held)
    known = saved(run / "evaluation" / "held")
    assert (known["status"], known["suite"], known["task"]) == ("finished", None, "text-classification")
    assert (known["classes"], known["dtype"]) == (["negative", "positive"], "float32")
    assert len(known["weights"]) == 32
    assert known["sets"]["held"]["source"] == str(held)
    assert known["sets"]["held"]["fingerprint"].startswith("sha256:")
    (session,) = known["sessions"]
    assert (session["examples"], session["batches"], session["batch_size"]) == (20, 1, 32)
    assert session["examples_per_second"] > 0
    assert session["versions"]["transformers"]
    assert known["contamination"]["rows"] == {}


def test_the_table_and_what_is_printed(run: Path, held: Path) -> None:
    result = score(run, data=held)
    printed = summary(result).splitlines()
    right = result.tasks["held"]["right"]
    low, high = wilson(right, 20)
    assert printed[0].split() == ["held"]
    assert printed[1].split() == ["accuracy,", "%", f"{5 * right}.0"]
    assert printed[2].split() == ["95", "%", "interval", f"{100 * low:.1f}-{100 * high:.1f}"]
    assert printed[3].split() == ["examples", "20"]
    classes = result.tasks["held"]["classes"]
    assert [line.split() for line in printed[4:9]] == [
        [],
        ["class", "right", "%"],
        *([name, f"{of['right']}/10", f"{10 * of['right']}.0"] for name, of in classes.items()),
        [],
    ]
    assert list(classes) == ["negative", "positive"]
    assert printed[9] == f"results: {run / 'evaluation' / 'held' / 'results.json'}"
    assert printed[10].startswith("20 examples in ")
    assert len(printed) == 11


def test_many_classes_are_not_printed(run: Path, held: Path) -> None:
    result = score(run, data=held)
    (of,) = {scores["examples"] for scores in result.tasks["held"]["classes"].values()}
    for count in (20, 21):
        result.tasks["held"]["classes"] = {
            f"class-{n}": {"examples": of, "right": 1, "accuracy": 1 / of} for n in range(count)
        }
        assert ("class-0" in summary(result)) == (count == 20)


def test_metrics_are_those_of_the_named_set(classifier: Callable[..., Path], tmp_path: Path) -> None:
    """F1 of MRPC counts the pairs that are equivalent, whatever the number of that class."""
    model = classifier("equivalent", "not_equivalent")
    labels = ("not_equivalent", "equivalent")
    rows = [
        {"sentence1": row["text"], "sentence2": row["text"] * (n % 3), "label": labels[n % 5 // 2 % 2], "idx": n}
        for n, row in enumerate(reviews(range(0, 250, 9)))
    ]
    write_table(tmp_path / "data" / "MRPC" / "validation.jsonl", rows)
    result = score(model, suite="glue", tasks=("mrpc",), data=tmp_path / "data", output=tmp_path / "out")
    found = by_row(tmp_path / "out").values()
    assert len({line["predicted"] for line in found}) == 2
    truth, predicted = [line["label"] for line in found], [line["predicted"] for line in found]
    counts = Counter(zip(truth, predicted, strict=True))
    assert counts["equivalent", "not_equivalent"] != counts["not_equivalent", "equivalent"]
    confusion = result.tasks["mrpc"]["confusion"]
    assert {(label, other): count for label, row in confusion.items() for other, count in row.items()} == counts
    classes = result.tasks["mrpc"]["classes"]
    assert classes["equivalent"]["right"] == counts["equivalent", "equivalent"]
    assert classes["equivalent"]["examples"] == truth.count("equivalent")
    metrics = result.tasks["mrpc"]["metrics"]
    assert metrics["f1"] == pytest.approx(f1_score(truth, predicted, pos_label="equivalent"))
    assert metrics["f1"] != pytest.approx(f1_score(truth, predicted, pos_label="not_equivalent"))
    table = result.table().splitlines()
    assert [line.split("  ")[0] for line in table] == ["", "accuracy, %", "F1, %", "95 % interval", "examples"]
    assert result.average == pytest.approx((metrics["accuracy"] + metrics["f1"]) / 2)


def test_numbers_have_correlations(classifier: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"text": review("positive", n), "text_pair": review("negative", n), "label": n % 11 / 2} for n in range(20)]
    write_table(tmp_path / "data" / "stsb" / "validation.csv", rows)
    model = classifier()
    result = score(model, suite="glue", tasks=("stsb",), data=tmp_path / "data", output=tmp_path / "out")
    found = by_row(tmp_path / "out")
    assert [found["stsb", n + 1]["label"] for n in range(20)] == [row["label"] for row in rows]
    assert {line["score"] for line in found.values()} == {None}
    assert [(line["text"], line["text_pair"]) for _, line in sorted(found.items())] == [
        (row["text"], row["text_pair"]) for row in rows
    ]
    assert set(result.tasks["stsb"]) == {"metrics", "examples", "asked"}
    assert list(result.tasks["stsb"]["metrics"]) == ["pearson", "spearman"]
    table = result.table().splitlines()
    assert [line.split("  ")[0] for line in table] == ["", "Pearson x 100", "Spearman x 100", "examples"]
    # Without a suite, a model of one output predicts numbers too.
    rows = [{"text": row["text"], "label": row["label"]} for row in rows]
    alone = score(model, data=write_table(tmp_path / "numbers.jsonl", rows), output=tmp_path / "alone")
    metrics = alone.tasks["numbers"]["metrics"]
    assert list(metrics) == ["pearson", "spearman", "mse"]
    assert alone.average == pytest.approx((metrics["pearson"] + metrics["spearman"]) / 2)
    same = [row | {"label": 2.5} for row in rows]
    level = score(model, data=write_table(tmp_path / "level.jsonl", same), output=tmp_path / "level")
    assert level.tasks["level"]["metrics"]["pearson"] == 0
    wrong = write_table(tmp_path / "wrong.jsonl", [*rows, {"text": "a", "label": "b"}])
    with pytest.raises(SliceFineError) as error:
        score(model, data=wrong, output=tmp_path / "wrong")
    assert str(error.value).count(f"{wrong}:21") == 1


def test_long_texts_are_cut_as_in_training(
    run: Path, base: Path, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    """A run at its `data.max_length`; a plain model at what it can read."""
    text = " ".join(review("positive", n) for n in range(20))
    data = write_table(tmp_path / "long.jsonl", [{"text": text, "label": "positive"}])
    plain = classifier("negative", "positive")
    tuned = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    models = {run: (PeftModel.from_pretrained(tuned, str(run / "adapter")).eval(), 16)}
    models[plain] = AutoModelForSequenceClassification.from_pretrained(plain).eval(), 32
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, (model, length) in models.items():
        score(name, data=data, output=tmp_path / name.stem / "out")
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, length)
        with torch.no_grad():
            chance = float(model(**inputs).logits.softmax(-1).max())
        assert by_row(tmp_path / name.stem / "out")["long", 1]["score"] == pytest.approx(chance, abs=1e-6)


def test_long_texts_are_kept_in_part(run: Path, tmp_path: Path) -> None:
    texts = ["a" * 2000, "b" * 2001]
    data = write_table(tmp_path / "long.jsonl", [{"text": text, "label": "positive"} for text in texts])
    score(run, data=data, output=tmp_path / "out")
    assert [line["text"] for _, line in sorted(by_row(tmp_path / "out").items())] == ["a" * 2000, "b" * 2000 + "\u2026"]


def test_decoders_without_a_pad_token(held: Path, tmp_path: Path) -> None:
    """They look for the last token before the padding, which the end token stands in for."""
    tokenizer = make_tokenizer([row["text"] for row in reviews(HELD)])
    tokenizer.pad_token = None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=2, id2label={0: "negative", 1: "positive"}, max_position_embeddings=64, pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    save(tmp_path / "llama", model, tokenizer)
    score(tmp_path / "llama", data=held, output=tmp_path / "out", batch_size=7)
    for number, row in enumerate(reviews(HELD), 1):
        with torch.no_grad():
            chance = float(model(tokenizer(row["text"], return_tensors="pt")["input_ids"]).logits.softmax(-1).max())
        assert by_row(tmp_path / "out")["held", number]["score"] == pytest.approx(chance, abs=1e-5)


def test_weights_keep_their_number_format(classifier: Callable[..., Path], held: Path, tmp_path: Path) -> None:
    model = classifier("negative", "positive", dtype=torch.bfloat16)
    assert score(model, data=held, output=tmp_path / "out").dtype == "bfloat16"


# ---------------------------------------------------------------- going on


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C after so many batches."""
    outputs = classification._outputs

    def after(batches: int) -> None:
        calls: list[int] = []

        def interrupted(*given: Any) -> Any:
            calls.append(1)
            if len(calls) > batches:
                monkeypatch.setattr(classification, "_outputs", outputs)
                raise KeyboardInterrupt
            return outputs(*given)

        monkeypatch.setattr(classification, "_outputs", interrupted)

    return after


def test_the_same_command_goes_on(run: Path, held: Path, tmp_path: Path, interrupt: Any) -> None:
    whole = score(run, data=held, output=tmp_path / "whole")
    interrupt(3)
    first = score(run, data=held, batch_size=4, output=tmp_path / "out")
    assert first.status == saved(tmp_path / "out")["status"] == "interrupted"
    assert (first.tasks["held"]["examples"], first.average) == (12, None)
    assert "12 of 20" in first.table()
    assert summary(first).splitlines()[-1].startswith("Interrupted;")
    kept = lines(tmp_path / "out")
    second = score(run, data=held, batch_size=3, output=tmp_path / "out")
    assert lines(tmp_path / "out")[:12] == kept
    assert second.tasks == whole.tasks
    assert second.average == whole.average is not None
    assert [session["examples"] for session in second.sessions] == [12, 8]
    assert {key: line["predicted"] for key, line in by_row(tmp_path / "out").items()} == {
        key: line["predicted"] for key, line in by_row(tmp_path / "whole").items()
    }
    assert score(run, data=held, output=tmp_path / "out").sessions[-1]["examples"] == 0


def test_a_torn_line_is_predicted_again(run: Path, held: Path) -> None:
    whole = score(run, data=held)
    path = run / "evaluation" / "held" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(SliceFineWarning, match=r"predictions\.jsonl was cut off .* its example is predicted again"):
        again = score(run, data=held)
    assert again.tasks == whole.tasks
    assert again.sessions[-1]["examples"] == 1


def test_predictions_from_before_texts_were_kept_are_gone_on_with(run: Path, held: Path) -> None:
    whole = score(run, data=held)
    folder = run / "evaluation" / "held"
    old = [{name: value for name, value in line.items() if not name.startswith("text")} for line in lines(folder)[:12]]
    write_table(folder / "predictions.jsonl", old)
    again = score(run, data=held)
    assert (again.tasks, again.sessions[-1]["examples"]) == (whole.tasks, 8)
    assert lines(folder)[:12] == old
    assert all(line["text"] for line in lines(folder)[12:])


@pytest.mark.parametrize("spoiled", [{"text": 3}, {"row": None}, {"other": ""}])
def test_lines_that_are_no_predictions_are_refused(run: Path, held: Path, spoiled: dict[str, Any]) -> None:
    score(run, data=held)
    folder = run / "evaluation" / "held"
    first, *others = lines(folder)
    write_table(folder / "predictions.jsonl", [first | spoiled, *others])
    assert "predictions.jsonl:1: not the fields of a prediction." in refused(run, data=held)
    del first["place"]
    write_table(folder / "predictions.jsonl", [first, *others])
    assert "predictions.jsonl:1: not the fields of a prediction." in refused(run, data=held)


def test_a_limit_takes_examples_from_everywhere(run: Path, held: Path) -> None:
    folder = run / "evaluation" / "held"
    few = score(run, data=held, limit=4)
    assert sorted(line["row"] for line in lines(folder)) == [1, 6, 11, 16]
    assert (few.tasks["held"]["examples"], few.tasks["held"]["asked"]) == (4, 4)
    more = score(run, data=held, limit=8)
    assert more.tasks["held"]["examples"] == 8
    assert more.sessions[-1]["examples"] == 8 - len({1, 6, 11, 16} & {1, 3, 6, 8, 11, 13, 16, 18})
    assert score(run, data=held).tasks["held"]["examples"] == 20


def test_predictions_of_another_evaluation_are_refused(
    run: Path, held: Path, tmp_path: Path, classifier: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    score(run, data=held, output=out)
    before = (out / "predictions.jsonl").read_bytes()
    other = classifier("negative", "positive")
    assert f"the weights are others: answered by {run}, asked of {other} now" in refused(other, data=held, output=out)
    swapped = classifier("positive", "negative", name="swapped")
    assert "`classes` was ['negative', 'positive'] and is ['positive', 'negative']" in refused(
        swapped, data=held, output=out
    )
    write_table(tmp_path / "glue" / "sst2" / "validation.jsonl", reviews(HELD))
    assert "`suite` was None and is glue now" in refused(run, suite="glue", data=tmp_path / "glue", output=out)
    write_table(held, reviews(range(50, 55)))
    assert "out has predictions for other examples; start anew with --overwrite" in refused(run, data=held, output=out)
    assert (out / "predictions.jsonl").read_bytes() == before
    result = score(run, data=held, output=out, overwrite=True)
    assert (len(lines(out)), len(result.sessions)) == (10, 1)


def test_a_failure_is_recorded(run: Path, held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = classification._outputs

    def broken(model: Any, batch: Any) -> Any:
        model.classifier.bias.data[0] = float("nan")
        return outputs(model, batch)

    monkeypatch.setattr(classification, "_outputs", broken)
    assert "puts out NaN or infinity (torch.float32)" in refused(run, data=held)
    assert saved(run / "evaluation" / "held")["status"] == "failed"
    assert not (run / "evaluation" / "held" / "predictions.jsonl").exists()


# ---------------------------------------------------------------- sets


def test_a_run_is_scored_on_the_set_it_was_trained_for(run: Path, tmp_path: Path, hub: Any) -> None:
    hub("nyu-mll/glue", "sst2", "validation", _on_hub(HELD), ["negative", "positive"])
    result = score(run, suite="glue")
    assert list(result.tasks) == ["sst2"]
    assert result.sets["sst2"] == {
        "title": "SST-2",
        "source": "nyu-mll/glue (sst2)",
        "split": "validation",
        "fingerprint": result.sets["sst2"]["fingerprint"],
        "examples": 20,
        "notes": [],
    }
    assert {line["label"] for line in lines(run / "evaluation" / "glue")} == {"negative", "positive"}
    write_table(tmp_path / "data" / "sst2" / "validation.jsonl", reviews(HELD))
    local = score(run, suite="glue", data=tmp_path / "data", output=tmp_path / "local")
    assert local.tasks == result.tasks


def _on_hub(numbers: Any) -> list[dict[str, Any]]:
    return [{"sentence": row["text"], "label": row["label"]} for row in reviews(numbers, (0, 1))]


def test_both_parts_of_mnli_are_scored(classifier: Callable[..., Path], tmp_path: Path) -> None:
    classes = ("entailment", "neutral", "contradiction")
    model = classifier(*classes)
    for split, count in (("validation_matched", 9), ("validation_mismatched", 6), ("test", 3)):
        rows = [
            {"premise": review("negative", n), "hypothesis": review("positive", n), "label": classes[n % 3]}
            for n in range(count)
        ]
        write_table(tmp_path / "data" / "mnli" / f"{split}.jsonl", rows)
    result = score(model, suite="glue", tasks=("mnli",), data=tmp_path / "data", output=tmp_path / "out")
    assert {name: scores["examples"] for name, scores in result.tasks.items()} == {
        "mnli-matched": 9,
        "mnli-mismatched": 6,
    }
    table = result.table().splitlines()
    assert re.split("  +", table[0])[1:] == ["MNLI matched", "MNLI mismatched", "average"]
    mean = sum(scores["accuracy"] for scores in result.tasks.values()) / 2
    assert result.average == pytest.approx(mean)
    assert table[1].split()[-1] == f"{100 * mean:.1f}"


@pytest.mark.parametrize("file", ["validation.csv", "dev.jsonl", "val.json", "test.jsonl", "test.parquet"])
def test_files_of_a_set(run: Path, tmp_path: Path, file: str) -> None:
    path, rows = tmp_path / "data" / "SST2" / file, reviews(HELD)
    if path.suffix == ".json":
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        write_table(path, rows)
    assert score(run, suite="glue", data=tmp_path / "data").tasks["sst2"]["examples"] == 20


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"suite": "glue", "data": "DATA"}, r"There is no folder .*sst2\. Did you mean 'sst22'\?"),
        ({"suite": "glue", "data": "DATA/held.jsonl"}, "is a folder with a folder for each task; .*held.jsonl is a file"),
        ({"suite": "glue", "tasks": ("rte",), "data": "DATA"}, r"validation\.jsonl or test\.jsonl \(or .json, .csv, .parquet\); .*rte has notes\.txt"),
        ({"data": "DATA/hold.jsonl"}, r"hold\.jsonl does not exist\. Did you mean 'held\.jsonl'\?"),
        ({"data": "DATA/empty.jsonl"}, "empty.jsonl has no examples"),
        ({"data": "DATA/other.jsonl"}, r"other\.jsonl has no column 'text', 'label'; there are 'a'"),
        ({"suite": "vtab-image"}, "is for text-classification; got --suite vtab-image. Give --suite glue, or --data"),
        ({"suite": "math"}, "is for text-classification; got --suite math. Give --suite glue, or --data"),
    ],
)  # fmt: skip
def test_sets_that_are_not_there(run: Path, tmp_path: Path, held: Path, values: dict[str, Any], says: str) -> None:
    write_table(tmp_path / "sst22" / "validation.jsonl", reviews(HELD))
    write_table(tmp_path / "other.jsonl", [{"a": 1}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "notes.txt").touch()
    if "data" in values:
        values = values | {"data": values["data"].replace("DATA", str(tmp_path))}
    with pytest.raises(SliceFineError, match=says):
        score(run, **values)
    assert not (run / "evaluation").exists()


def test_a_model_that_does_not_say_its_set_needs_tasks(classifier: Callable[..., Path], tmp_path: Path) -> None:
    model = classifier("negative", "positive")
    assert "does not say of which. Name it with --tasks: cola, sst2" in refused(
        model, suite="glue", output=tmp_path / "o"
    )


def test_another_set_needs_the_same_classes(
    run: Path, tmp_path: Path, hub: Any, classifier: Callable[..., Path]
) -> None:
    def put(name: str, classes: list[str]) -> None:
        rows = [{"sentence1": r["sentence"], "sentence2": "good", "label": r["label"]} for r in _on_hub(HELD)]
        rows = [r | {"question": r["sentence1"], "sentence": "good"} for r in rows]
        hub("nyu-mll/glue", name, "validation", rows, classes)

    put("rte", ["entailment", "not_entailment"])
    put("qnli", ["entailment", "not_entailment"])
    says = refused(run, suite="glue", tasks=("rte",))
    assert "nyu-mll/glue (rte) has 2 (entailment, not_entailment), the model 2 (negative, positive)" in says
    both = classifier("not_entailment", "entailment")
    result = score(both, suite="glue", tasks=("rte", "qnli"), output=tmp_path / "out")
    assert list(result.tasks) == ["qnli", "rte"]
    assert by_row(tmp_path / "out")["rte", 1]["label"] == "entailment"
    # Numbers in a file of another set may mean anything.
    rows = [{"text": r["text"], "text_pair": "good", "label": r["label"]} for r in reviews(HELD, (0, 1))]
    write_table(tmp_path / "data" / "rte" / "validation.jsonl", rows)
    says = refused(run, suite="glue", tasks=("rte",), data=tmp_path / "data")
    assert "label 0 is not among the 2 classes of the model." in says
    assert "for a model with the classes negative, positive" in says


def test_a_set_that_is_not_on_the_hub(run: Path, hub: Any) -> None:
    assert "did not load: no nyu-mll/glue sst2 validation" in refused(run, suite="glue")


# ---------------------------------------------------------------- labels


def test_labels_that_are_numbers_are_those_of_the_classes(run: Path, tmp_path: Path, held: Path) -> None:
    named = score(run, data=held)
    for suffix in ("jsonl", "csv"):
        path = write_table(tmp_path / f"numbers.{suffix}", reviews(HELD, (0, 1)))
        result = score(run, data=path, output=tmp_path / suffix)
        assert result.tasks["numbers"]["confusion"] == named.tasks["held"]["confusion"]
        note = f"The labels of {path} are taken as the numbers of the model's classes: 0 = negative, 1 = positive."
        assert note in summary(result)


def test_classes_without_names_are_numbered(classifier: Callable[..., Path], tmp_path: Path, hub: Any) -> None:
    hub("nyu-mll/glue", "sst2", "validation", _on_hub(HELD), ["negative", "positive"])
    for name, classes in (("stand-ins", ("LABEL_0", "LABEL_1")), ("digits", ("0", "1"))):
        out = tmp_path / f"out-{name}"
        score(classifier(*classes, name=name), suite="glue", tasks=("sst2",), output=out)
        assert [by_row(out)["sst2", row]["label"] for row in (1, 2)] == list(classes)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("neutral", "label 'neutral' is not among the 2 classes of the model."),
        (2, "label 2 is not among the 2 classes"),
        (None, "'label' is an integer or a string; got null"),
        (True, "'label' is an integer or a string; got True"),
        (-1, "1 of 20 labels are -1. -1 stands for a hidden label: those of GLUE's test sets are not public. Score the validation"),
    ],
)  # fmt: skip
def test_labels_that_the_model_does_not_know(run: Path, tmp_path: Path, label: Any, says: str) -> None:
    rows = reviews(HELD)
    rows[6]["label"] = label
    path = write_table(tmp_path / "held.jsonl", rows)
    assert f"{path}:7: {says}" in refused(run, data=path)
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize(("classes", "labels"), [(("1", "2"), (0, 1)), (("0", "5"), (0, 1))])
def test_labels_are_names_or_numbers_and_not_both(
    classes: tuple[str, str], labels: tuple[int, int], classifier: Callable[..., Path], tmp_path: Path
) -> None:
    """Where one of them is the name of a class, the others are no numbers of classes."""
    path = write_table(tmp_path / "held.jsonl", reviews(HELD, labels))
    with pytest.raises(SliceFineError, match="is not among the 2 classes of the model"):
        score(classifier(*classes), data=path, output=tmp_path / "out")


def test_all_unknown_labels_are_named_at_once(run: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "held.jsonl", reviews(HELD, ("bad", "good")))
    says = refused(run, data=path)
    assert says.startswith("Test sets, for a model with the classes negative, positive: 11 problems\n")
    assert f"{path}:10: label 'good'" in says
    assert "and 10 more like these" in says


def test_columns_that_the_recipe_does_not_name(run: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "kind": row["label"]} for row in reviews(HELD)]
    says = refused(run, data=write_table(tmp_path / "held.jsonl", rows))
    assert "held.jsonl has no column 'label'; there are 'text', 'kind'." in says
    assert (
        "as in the recipe that the model was trained with (text 'text', label 'label'): rename those of the file."
        in says
    )
    assert "--data." not in says


def test_bad_texts_are_named(run: Path, tmp_path: Path) -> None:
    rows = reviews(HELD)
    rows[2]["text"], rows[4]["text"] = None, "  "
    path = write_table(tmp_path / "held.jsonl", rows)
    says = refused(run, data=path)
    assert f"{path}:3: 'text' is a text; got null" in says
    assert f"{path}:5: 'text' is empty" in says


def test_hidden_labels_of_a_regression(classifier: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"sentence1": "good", "sentence2": "bad", "label": -1.0} for _ in range(3)]
    write_table(tmp_path / "data" / "stsb" / "test.jsonl", rows)
    says = refused(classifier(), suite="glue", tasks=("stsb",), data=tmp_path / "data", output=tmp_path / "out")
    assert "all 3 labels of" in says
    assert "Score the validation split" in says


# ---------------------------------------------------------------- models


def test_an_adapter_away_from_its_run_and_a_plain_model(
    run: Path, held: Path, tmp_path: Path, classifier: Callable[..., Path]
) -> None:
    of_run = score(run, data=held)
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert "is no run. Name a folder with --output" in refused(adapter, data=held)
    result = score(adapter, data=held, output=tmp_path / "out")
    assert result.tasks["held"]["confusion"] == of_run.tasks["held"]["confusion"]
    assert result.weights == of_run.weights
    assert "contamination: not checked for held" not in summary(of_run)
    assert "contamination: not checked (name the training examples with --train_data)" in summary(result)
    plain = score(classifier("negative", "positive"), data=held, output=tmp_path / "of plain")
    assert plain.tasks["held"]["examples"] == 20


def test_models_that_do_not_fit(classifier: Callable[..., Path], base: Path, held: Path, tmp_path: Path) -> None:
    out = {"output": tmp_path / "out"}
    three = classifier("a", "b", "c", name="three")
    says = refused(three, suite="glue", tasks=("stsb",), data=tmp_path, **out)
    assert "There is no folder" in says
    write_table(tmp_path / "stsb" / "validation.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1.5}])
    says = refused(three, suite="glue", tasks=("stsb",), data=tmp_path, **out)
    assert "stsb asks for a number; the model has 3 classes (a, b, c)" in says
    write_table(tmp_path / "sst2" / "validation.jsonl", reviews(HELD))
    says = refused(classifier(name="number"), suite="glue", tasks=("sst2",), data=tmp_path, **out)
    assert "sst2 asks for a class; the model predicts a number (num_labels is 1)" in says
    several = classifier("a", "b", name="several", problem_type="multi_label_classification")
    assert "gives an example several classes" in refused(several, data=held, **out)
    assert "has classes of the same name: a, a" in refused(classifier("a", "a", name="same"), data=held, **out)
    for asked in ({"suite": "glue", "tasks": ("sst2",), "data": tmp_path}, {"data": held}):
        says = refused(base, **asked, **out)
        assert (
            f"{base}, a BertModel, has no classification head. Train one (`slicefine train` with --model.name {base})"
            in says
        )
        assert "math" not in says
    assert not (tmp_path / "out").exists()


def test_a_head_without_values_is_refused(base: Path, held: Path, tmp_path: Path) -> None:
    """A model that says to have a head, whose files have none: its predictions would be random."""
    model = shutil.copytree(base, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "negative", "1": "positive"}}
    (model / "config.json").write_text(json.dumps(config | names))
    assert "has no values for classifier. Train it first" in refused(model, data=held, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    run: Path, held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module.models, "load_model", loaded)
    write_table(held, reviews(HELD, ("a", "b")))
    assert "not among the 2 classes" in refused(run, data=held)
    write_table(held, reviews(TRAINED))
    assert "was trained on examples that it is scored on" in refused(run, data=held)


# ---------------------------------------------------------------- training examples among those scored


def test_training_examples_are_refused(run: Path, finished: Path, tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "held.jsonl", [*reviews(HELD), {"text": review("positive", 3).upper() + " !", "label": "positive"}]
    )
    says = refused(run, data=path)
    train = finished.parent / "train.jsonl"
    assert f"1 training examples are test examples (held 1).\n  {train}:8 -> {path}:21\n" in says
    result = score(run, data=path, allow_contamination=True)
    assert saved(run / "evaluation" / "held")["contamination"]["questions"] == {"held": 1}
    assert "contaminated: examples that the model was trained on: held 1" in summary(result)
    # An example that is not scored is of no matter.
    assert score(run, data=path, limit=4, overwrite=True).contamination["rows"] == {}


def test_the_training_file_itself_is_refused(run: Path, finished: Path) -> None:
    assert "48 training examples are test examples (train 48)" in refused(run, data=finished.parent / "train.jsonl")


def test_training_examples_that_were_named(run: Path, held: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    train = write_table(tmp_path / "mine.jsonl", reviews(HELD)[:1])
    given = {"data": held, "output": tmp_path / "out", "train_data": (str(train),)}
    assert f"{train}:1 -> {held}:1" in refused(adapter, **given)
    assert score(adapter, **given, allow_contamination=True).contamination["rows"] == {"held": 1}


def test_pairs_are_the_same_if_both_texts_are(base: Path, tmp_path: Path) -> None:
    def pairs(*numbers: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {"text": review("negative", a), "text_pair": review("positive", b), "label": ("x", "y")[a % 2]}
            for a, b in numbers
        ]

    train = write_table(tmp_path / "train.jsonl", pairs(*((n, n) for n in range(16))))
    settings = {"data.text_pair": "text_pair", "training.max_steps": 8}
    run = trained("text-classification", base, train, tmp_path / "run", **settings)
    test = write_table(tmp_path / "test.jsonl", pairs((1, 2), (2, 1), (3, 3)))
    assert f"1 training examples are test examples (test 1).\n  {train}:4 -> {test}:3" in refused(run, data=test)


def test_training_examples_that_were_changed_or_are_gone(run: Path, base: Path, held: Path, tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.jsonl", reviews(TRAINED))
    own = trained("text-classification", base, train, tmp_path / "own", **{"training.max_steps": 8})
    write_table(train, reviews(range(1, 24)))
    assert f"{train}, were changed since the model was trained" in refused(own, data=held)
    train.unlink()
    with pytest.warns(SliceFineWarning, match=r"train\.jsonl, are not there any more: .* with --train_data"):
        result = score(own, data=held)
    assert result.contamination is None


def test_splits_that_are_published_together_are_counted_and_not_refused(base: Path, tmp_path: Path, hub: Any) -> None:
    """A sentence of SST-2 is in both of its splits, and everybody's figures are made with it."""
    classes = ["negative", "positive"]
    hub("nyu-mll/glue", "sst2", "train", _on_hub(TRAINED), classes)
    hub("nyu-mll/glue", "sst2", "validation", [*_on_hub(HELD), *_on_hub([5])], classes)
    run = tmp_path / "run"
    trained(
        "text-classification",
        base,
        None,
        run,
        **{"data.name": "sst2", "data.validation": None, "training.max_steps": 8},
    )
    result = score(run, suite="glue")
    assert result.contamination["questions"] == {"sst2": 2}
    assert "contaminated: examples that the model was trained on: sst2 2" in summary(result)
    path = write_table(tmp_path / "held.jsonl", reviews([5]))
    assert "2 training examples are test examples (held 2)" in refused(run, data=path)
