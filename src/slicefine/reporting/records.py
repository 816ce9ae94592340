"""The records that pages are made of: which file of a folder tells what it is, and what is in it.

A run is named by its folder, or by the file that tells of it. What kind it is of is seen from what the file says, not from its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.errors import listed

TRAINING, EVALUATION, ANALYSIS, BENCHMARK, PLAN = "training run", "evaluation", "analysis", "benchmark", "plan"
VERSION = 1
"""Of every file that says its version."""
FILES = {"record.json": TRAINING, "results.json": EVALUATION, "analysis.json": ANALYSIS, "plan.json": PLAN}
"""Names under which commands write their records; those of benchmarks vary."""
REQUIRED: dict[str, dict[str, type]] = {
    TRAINING: {"status": str, "task": str, "model": str},
    EVALUATION: {"status": str, "model": str, "tasks": dict},
    ANALYSIS: {"status": str, "model": dict, "stages": dict, "verdicts": list},
    BENCHMARK: {"theme": str, "intro": str, "tables": list, "provenance": dict},
    PLAN: {"recipe": dict, "parameters": dict, "methods": list},
}
"""What no record of a kind is without. All else may be missing, and is then left out of the page."""
PARTS = {TRAINING: ("history.json", "slices.json", "memory.json"), EVALUATION: ()}
LINES = ("answers.jsonl", "predictions.jsonl")
RULE = "RUN is a folder that slicefine train, evaluate, analyze, bench or plan wrote, or its results JSON"
AGAIN = "Run the command again."
MODEL_FILES = ("config.json", "adapter_config.json")
RECIPE = "recipe.yaml"
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither HTML nor SVG may have."""
ESCAPED = re.compile(r"\\(?:[bf]|u00[01]|u007[fF]|u[dD][89a-fA-F]|u[fF]{3})")
"""How JSON may have written one of them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a command has written of one run."""

    kind: str
    file: Path
    """The file that tells of it."""
    content: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    """Other files of the run by name: JSON files as they are, lines of JSON as a list, texts as text."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.file.parent

    @property
    def name(self) -> str:
        """What the run is called: its folder, or a benchmark's file."""
        place = self.file.resolve()
        return place.parent.name or "run" if place.name in FILES else place.stem

    @property
    def made_from(self) -> list[str]:
        """Names of the files that were read."""
        return [self.file.name, *self.parts]


def read(paths: Sequence[Path], problems: list[str]) -> list[Record]:
    """The records of runs; what is wrong with any of them is added to `problems`."""
    found: list[Record] = []
    for path in paths:
        try:
            file = _file(path, problems)
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror}).")
            continue
        if file is None:
            continue
        if any(file.resolve() == record.file.resolve() for record in found):
            problems.append(f"{path} is named twice. Name each run once.")
            continue
        fix = AGAIN if file.name in FILES else f"{AGAIN[:-1]}; if no command wrote it: {RULE}."
        content = _json(file, problems, fix)
        record = None if content is None else _record(file, content, problems)
        if record:
            found.append(record)
    return found


# ---------------------------------------------------------------- which file


def _file(path: Path, problems: list[str]) -> Path | None:
    """The file that tells of the run `path`."""
    if path.is_file() and path.suffix.lower() == ".json":
        return path
    if path.is_file():
        problems.append(f"{RULE}; {path} is neither. {_instead(path)}")
        return None
    if not path.is_dir():
        problems.append(f"{RULE}; there is nothing at {path}. Name one that is there.")
        return None
    known = [path / name for name in FILES if (path / name).is_file()]
    found = known or [file for file in sorted(path.glob("*.json")) if _tells(file)]
    if len(found) > 1:
        names = listed((file.name for file in found), 5)
        problems.append(
            f"{path} holds several records: {names}. Name the file that the page is to be of: {found[0]}, say."
        )
        return None
    if found:
        return found[0]
    lacks = (
        f"has no record ({', '.join(FILES)}, or the JSON file of a benchmark)" if any(path.iterdir()) else "is empty"
    )
    problems.append(f"{RULE}; {path} {lacks}. {_instead(path)}")
    return None


def _instead(path: Path) -> str:
    """What to name instead of a file or folder that does not tell of a run."""
    path = path.resolve()  # of `.` too there are folders around
    inside = sorted(folder for folder in path.iterdir() if _is_run(folder)) if path.is_dir() else []
    if inside:
        return f"Runs are in it: name {inside[0]}{', say' if len(inside) > 1 else ''}."
    results = path.with_suffix(".json") if path.name else path
    if results != path and results.is_file() and _tells(results):  # the page of a benchmark
        return f"Name {results}."
    if around := next(filter(_is_run, path.parents[:2]), None):
        return f"It is in the folder of a run: name {around}."
    if any((path / name).is_file() for name in MODEL_FILES):
        return f"It is a model: name the folder that `slicefine analyze {path}` or another command with it wrote."
    return "Name the folder that the command wrote, its --output."


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _tells(file: Path) -> bool:
    """Whether a JSON file of a folder is a record."""
    try:
        return kind_of(json.loads(file.read_text(encoding="utf-8"))) is not None
    except (OSError, ValueError, RecursionError):
        return False


def kind_of(content: Any) -> str | None:
    """What a file tells of; None if it is nothing that is known here."""
    if not isinstance(content, dict):
        return None
    if content.get("kind") == ANALYSIS:
        return ANALYSIS
    if "theme" in content and "tables" in content:
        return BENCHMARK
    if "planned_steps" in content and "status" in content:
        return TRAINING
    if "tasks" in content and "weights" in content:
        return EVALUATION
    if "methods" in content and "recipe" in content:
        return PLAN
    return None


# ---------------------------------------------------------------- what is in it


def _record(file: Path, content: Any, problems: list[str]) -> Record | None:
    kind = kind_of(content)
    if kind is None:
        part = any(file.name in names for names in PARTS.values())
        fix = f"It is a part of a run; name the run's folder: {file.parent}." if part else _instead(file)
        if file.name in FILES:
            fix = f"Was it changed by hand? {AGAIN}"
        called = content.get("kind") if isinstance(content, dict) else None
        said = f"{file} is no record that is known here{f' (kind {called!r})' if called else ''}"
        problems.append(f"{RULE}; {said}. {fix}")
        return None
    version = content.get("version", content.get("format", VERSION))
    if version != VERSION:
        problems.append(_other_version(file, version))
        return None
    wrong = [name for name, of in REQUIRED[kind].items() if not isinstance(content.get(name), of)]
    if wrong:
        problems.append(
            f"{file} is not a whole record of {_a(kind)}: `{'`, `'.join(wrong)}` {'is' if len(wrong) == 1 else 'are'} missing or of "
            "another type. Was it changed by hand? Run the command again."
        )
        return None
    return Record(kind=kind, file=file, content=content, parts=_parts(kind, file.parent, problems))


def _parts(kind: str, folder: Path, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    readers: dict[str, Callable[[Path, list[str]], Any]] = {}
    if kind == TRAINING:
        readers = {**dict.fromkeys(PARTS[TRAINING], _part), RECIPE: _text}
    elif kind == EVALUATION:
        readers = dict.fromkeys(LINES, _lines)
    for name, reader in readers.items():
        if (folder / name).is_file():
            content = reader(folder / name, problems)
            if content is not None:
                found[name] = content
    return found


def _part(file: Path, problems: list[str]) -> dict[str, Any] | None:
    content = _json(file, problems)
    if content is None:
        return None
    if not isinstance(content, dict):
        problems.append(f"{file} holds an object, {{...}}; got {type(content).__name__}. Run the command again.")
        return None
    if content.get("version", VERSION) != VERSION:
        problems.append(_other_version(file, content["version"]))
        return None
    return content


def _other_version(file: Path, version: Any) -> str:
    return (
        f"{file} is a record of version {version}; this slicefine reads version {VERSION}. Use the slicefine that wrote it, or "
        "run the command again with this one."
    )


def _json(file: Path, problems: list[str], fix: str = AGAIN) -> Any:
    text = _text(file, problems, fix)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        problems.append(f"{file} is damaged: line {error.lineno}, column {error.colno}: {error.msg}. {fix}")
        return None
    except RecursionError:
        problems.append(f"{file} is damaged: it is nested too deeply to be read. {fix}")
        return None
    if content is None:
        problems.append(f"{file} is damaged: it holds nothing (null). {fix}")
    return cleaned(content) if ESCAPED.search(text) else content


def _text(file: Path, problems: list[str], fix: str = AGAIN) -> str | None:
    try:
        return NOT_TEXT.sub("\ufffd", file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        problems.append(f"{file} is damaged: byte {error.start} is not UTF-8. {fix}")
    except OSError as error:
        problems.append(f"{file} cannot be read ({error.strerror}).")
    return None


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]] | None:
    """One object a line. The last line may have been cut off when it was written, and is then left out."""
    text = _text(file, problems)
    if text is None:
        return None
    found, damaged = [], []
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            item = json.loads(line)
            if not isinstance(item, dict):
                raise ValueError("no object")
            found.append(cleaned(item))
        except (ValueError, RecursionError) as error:
            damaged.append(f"{file} is damaged: line {number}: {error}. Evaluate again with --overwrite.")
    problems += damaged[:3]
    return None if damaged else found


def cleaned(value: Any) -> Any:
    """`value` with a replacement sign for characters that no page may have."""
    if isinstance(value, str):
        return NOT_TEXT.sub("\ufffd", value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------- several


def names(records: Sequence[Record]) -> list[str]:
    """What to call each of several runs: as little of its path as tells it from the others."""
    paths = [list(record.file.resolve().parts) for record in records]
    ends = [path[:-1] if path[-1] in FILES else [*path[:-1], Path(path[-1]).stem] for path in paths]
    for length in range(1, max(map(len, ends), default=1) + 1):
        found = ["/".join(end[-length:]) for end in ends]
        if len(set(found)) == len(found):
            return found
    return [str(record.file) for record in records]


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Those of one kind."""
    return [record for record in records if record.kind == kind]


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"
