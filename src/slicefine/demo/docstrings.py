"""A data set of real text that is on any machine with the `demo` extra: which package does a docstring come from?

The examples are first sentences of the docstrings in the installed packages' source files, read without importing them. The
names of all the packages are masked, so that a model has to learn what they are about and how they are written.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from slicefine.errors import SliceFineError

PACKAGES = ("numpy", "scipy", "sklearn", "torch", "transformers", "pandas")
NAMES = re.compile(
    r"\b(numpy|np|scipy|scikit[- ]?learn|sklearn|py ?torch|torch|transformers?|hugging ?face|pandas|pd)\b",
    re.IGNORECASE,
)
MASK = "[MASK]"
MARKUP = re.compile(r":\w+:|[`*~|]+|<[^>]*>")
PER_PACKAGE = 500
CANDIDATES = 900
VALIDATION_SHARE = 0.2
SKIPPED = {"tests", "test", "testing", "_vendor", "externals"}
SHORTEST, LONGEST = 25, 240


@dataclass(frozen=True)
class DocstringData:
    """The files of the data set and its sizes."""

    train: Path
    validation: Path
    sizes: dict[str, int]
    """Package -> examples, both files together."""


def write_docstrings(folder: Path) -> DocstringData:
    """Write `train.jsonl` and `validation.jsonl` (fields `text`, `label`) into `folder`, the same for the same packages.

    Raises `SliceFineError` if a package is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise SliceFineError(
            f"The demo's examples are docstrings of installed packages; missing: {', '.join(missing)}. "
            "Install them with: pip install 'slicefine[demo]'"
        )
    found = {package: _sentences(_root(package)) for package in PACKAGES}
    owners: dict[str, list[str]] = {}
    for package, sentences in found.items():
        for sentence in sentences:
            owners.setdefault(sentence, []).append(package)
    examples = []
    for package, sentences in found.items():
        own = sorted((s for s in sentences if owners[s] == [package]), key=_digest)[:PER_PACKAGE]
        examples += [(sentence, package) for sentence in own]
    examples.sort(key=lambda example: _digest(example[0]))
    cut = int(len(examples) * VALIDATION_SHARE)
    folder.mkdir(parents=True, exist_ok=True)
    data = DocstringData(
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        sizes={package: sum(label == package for _, label in examples) for package in PACKAGES},
    )
    for file, part in ((data.validation, examples[:cut]), (data.train, examples[cut:])):
        lines = [json.dumps({"text": text, "label": label}) for text, label in part]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _sentences(root: Path) -> set[str]:
    """At least `CANDIDATES` distinct sentences of a package, if it has them; files come in a fixed, mixed order."""
    files = {file.relative_to(root): file for file in root.rglob("*.py")}
    found: set[str] = set()
    for name in sorted(files, key=lambda name: _digest(name.as_posix())):
        if SKIPPED & set(name.parts):
            continue
        try:
            tree = ast.parse(files[name].read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, and files meant for other Python versions
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
        found.update(sentence for sentence in map(_first_sentence, docstrings) if sentence)
        if len(found) >= CANDIDATES:
            break
    return found


def _first_sentence(docstring: str) -> str | None:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)])\.(?:\s|$)", paragraph)[0]
    sentence = NAMES.sub(MASK, " ".join(MARKUP.sub("", sentence).split()))
    return sentence if SHORTEST <= len(sentence) <= LONGEST else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
