"""The data sets of the paper by name: where each is, which columns it has, and by what it is scored.

A name alone reads the hub. With `data.train` set, to a file or folder, the name decides the kind of the labels and the
scores. The ids, splits and columns of GLUE, EuroSAT and Pets are in wide use; those of the other sets are the best known
and were not tried: where one is wrong, the error names what there is, and `data.train`, `data.image`, ... can be set by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slicefine.errors import listed


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """One data set."""

    name: str
    title: str
    suite: str
    task: str
    """A key of `TASKS`."""
    hub: str | None
    """Name on the hub; None if it is not there in a form that can be read."""
    subset: str | None = None
    train_split: str = "train"
    evaluation_splits: tuple[str, ...]
    """The first one is for validation."""
    columns: dict[str, str]
    """Our setting (`text`, `text_pair`, `label`, `image`, `video`) -> the column on the hub."""
    label_kind: Literal["class", "number"] = "class"
    metrics: tuple[str, ...]
    """Keys of `METRICS`."""
    classes: int | None = None
    """How many there are; None for numbers, and where sources differ."""
    positive: str | None = None
    """Name of the class whose F1 is counted; None, or where there is no such class: the second one."""

    @property
    def settings(self) -> dict[str, str | None]:
        """What the name stands for, by the names of the settings in `data`; `text_pair` is None for single texts."""
        pair = {"text_pair": None} if "text" in self.columns else {}
        validation = self.evaluation_splits[0]
        source = {"train": self.hub, "subset": self.subset, "train_split": self.train_split, "validation": validation}
        return {**source, **pair, **self.columns}


def other_classes(name: str | None, classes: list[str]) -> str | None:
    """That the examples of the data set `name` have another number of classes than it; None if they have as many."""
    known = NAMED[name].classes if name else None
    if known is None or known == len(classes):
        return None
    return f"`data.name` {name} has {known} classes; the examples have {len(classes)}: {listed(classes, 8)}."


def _glue(
    name: str, title: str, text: str, text_pair: str | None, metrics: tuple[str, ...], positive: str | None = None
) -> NamedSet:
    return NamedSet(
        name=name,
        title=title,
        suite="glue",
        task="text-classification",
        hub="nyu-mll/glue",
        subset=name,
        # The labels of the test splits are not public.
        evaluation_splits=("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",),
        columns={"text": text, "label": "label"} | ({"text_pair": text_pair} if text_pair else {}),
        label_kind="number" if name == "stsb" else "class",
        metrics=metrics,
        classes=None if name == "stsb" else 3 if name == "mnli" else 2,
        positive=positive,
    )


# Caltech101 has 102 with its background, which not every copy has.
_CLASSES = {
    "caltech101": None, "flowers102": 102, "pets": 37, "camelyon": 2, "eurosat": 10, "retinopathy": 5, "kitti": 4,
    "ucf101": 101, "kinetics": 400, "hmdb51": 51,
}  # fmt: skip


def _media(
    suite: str, name: str, title: str, hub: str | None, *evaluation_splits: str, label: str = "label", column: str = ""
) -> NamedSet:
    kind = "video" if suite == "video" else "image"
    return NamedSet(
        name=name,
        title=title,
        suite=suite,
        task=f"{kind}-classification",
        hub=hub,
        evaluation_splits=evaluation_splits,
        columns={kind: column or kind, "label": label},
        metrics=("accuracy",),
        classes=_CLASSES[name],
    )


_ALL = (
    _glue("cola", "CoLA: is the sentence grammatical?", "sentence", None, ("matthews_correlation",)),
    _glue("sst2", "SST-2: is the review positive?", "sentence", None, ("accuracy",)),
    _glue("mrpc", "MRPC: same meaning?", "sentence1", "sentence2", ("accuracy", "f1"), "equivalent"),
    _glue("stsb", "STS-B: how similar, 0 to 5", "sentence1", "sentence2", ("pearson", "spearman")),
    _glue("qqp", "QQP: the same question?", "question1", "question2", ("accuracy", "f1"), "duplicate"),
    _glue("mnli", "MNLI: entailment, neutral or contradiction", "premise", "hypothesis", ("accuracy",)),
    _glue("qnli", "QNLI: does the sentence answer the question?", "question", "sentence", ("accuracy",)),
    _glue("rte", "RTE: entailment?", "sentence1", "sentence2", ("accuracy",)),
    _glue("wnli", "WNLI: what a pronoun stands for", "sentence1", "sentence2", ("accuracy",)),
    _media("vtab-image", "caltech101", "Caltech101: objects", "dpdl-benchmark/caltech101", "test"),
    _media("vtab-image", "flowers102", "Oxford Flowers 102", "dpdl-benchmark/oxford_flowers102", "validation", "test"),
    _media("vtab-image", "pets", "Oxford-IIIT Pets: 37 breeds", "timm/oxford-iiit-pet", "test"),
    _media("vtab-image", "camelyon", "Patch Camelyon", "dpdl-benchmark/patch_camelyon", "validation", "test"),
    _media("vtab-image", "eurosat", "EuroSAT: land use", "timm/eurosat-rgb", "validation", "test"),
    # WebDataset archives: their columns are the endings of the files in them.
    _media(
        "vtab-image",
        "retinopathy",
        "Diabetic retinopathy detection: five grades",
        "clip-benchmark/wds_vtab-diabetic_retinopathy",
        "test",
        label="cls",
        column="webp",
    ),
    _media(
        "vtab-image",
        "kitti",
        "KITTI as in VTAB: distance of the closest vehicle, four classes",
        "clip-benchmark/wds_vtab-kitti_closest_vehicle_distance",
        "test",
        label="cls",
        column="webp",
    ),
    # The copies of UCF101 on the hub are single frames, an archive, or the 51 classes with sound.
    _media("video", "ucf101", "UCF101: 101 actions", None, "test"),
    _media("video", "kinetics", "Kinetics-400: 400 actions", "mteb/kinetics-400", "test"),
    _media("video", "hmdb51", "HMDB51: 51 actions, first split", "mteb/HMDB51", "test"),
)

NAMED = {named.name: named for named in _ALL}
SUITES = {
    suite: tuple(named.name for named in _ALL if named.suite == suite) for suite in ("glue", "vtab-image", "video")
}
