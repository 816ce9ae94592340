"""From keyword-only dataclasses to typed settings: YAML keys, `--dotted.flags` with help, and messages in plain words.

Nothing here knows what the settings mean. A setting is a field of a section (itself a dataclass), or a field of the whole;
the string under a field is its help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from argparse import SUPPRESS, ArgumentError
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from slicefine.errors import SliceFineError, did_you_mean

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Setting:
    """One setting."""

    key: str
    """Dotted: `slice.r`."""
    kind: Any
    """Its annotated type."""
    default: Any
    """`REQUIRED` if there is none."""
    help: str


@cache
def sections(whole: type) -> dict[str, type]:
    """Field name -> class of the fields that are sections."""
    return {
        name: kind
        for name, kind in get_type_hints(whole).items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }


@cache
def settings(whole: type) -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the fields, those without a section first."""
    found = [setting for setting in _settings_of(whole, "") if setting.key not in sections(whole)]
    for section, kind in sections(whole).items():
        found += _settings_of(kind, f"{section}.")
    return {setting.key: setting for setting in found}


def add_arguments(parser: ArgumentParser, whole: type, keys: Collection[str] | None = None) -> None:
    """Add `--<dotted key>` for every setting, or for `keys`, in one group a section."""
    groups = {
        section: parser.add_argument_group(f"{section}: {str(inspect.getdoc(kind)).rstrip('.')}")
        for section, kind in sections(whole).items()
        if keys is None or any(key.startswith(f"{section}.") for key in keys)
    }
    if keys is None:
        groups[""] = parser.add_argument_group("run")
    for setting in settings(whole).values():
        if keys is not None and setting.key not in keys:
            continue
        # What is required may stand in the file, so the command line never demands it.
        default = SUPPRESS if setting.default is REQUIRED else setting.default
        group = groups[setting.key.rpartition(".")[0]]
        group.add_argument(f"--{setting.key}", type=setting.kind, help=setting.help, default=default)


def typed(whole: type, key: str, value: Any) -> Any:
    """`value` as the type of `key`; `SliceFineError` if it is not."""
    setting = settings(whole)[key]
    if value is None and NoneType not in get_args(setting.kind):  # jsonargparse takes null for anything
        raise SliceFineError(_wrong_type(setting, "null"))
    try:
        return _parser(whole).parse_object({key: value}, defaults=False)[key]
    except ArgumentError as error:
        raise SliceFineError(_wrong_type(setting, repr(value))) from error


def explain(whole: type, error: ArgumentError) -> str | None:
    """What jsonargparse says of one value, in our words; None if the error is about something else."""
    key = re.search(r'Parser key "([\w.]+)"', str(error))
    value = re.search(r"(?:Got|Given) value: (.*)\Z", str(error), re.DOTALL)
    setting = settings(whole).get(key[1]) if key else None
    return _wrong_type(setting, value[1]) if setting and value else None


def unknown(whole: type, word: str) -> str:
    """Say that there is no key `word`, and which is near. A bare `r` is near to `slice.r`."""
    near = did_you_mean(word, settings(whole))
    if "." not in word:
        by_name = {key.rpartition(".")[2]: key for key in settings(whole)}
        name = re.search(r"'(.*)'", did_you_mean(word, by_name))
        near = f" Did you mean {by_name[name[1]]!r}?" if name else ""
    return f"there is no setting {word!r}.{near}"


def flatten(whole: type, content: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Known dotted keys and their values, and what is wrong with the rest."""
    flat: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        if key not in sections(whole):
            flat[str(key)] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif value is not None:  # None: a section whose lines are all commented out
            problems.append(f"`{key}` is a mapping of settings; got {_shape_of(value)}.")
    problems += [unknown(whole, key) for key in flat if key not in settings(whole)]
    return {key: value for key, value in flat.items() if key in settings(whole)}, problems


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises `SliceFineError`, with the line, if there is none."""
    if not path.is_file():
        near = [str(file) for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise SliceFineError(f"A recipe is a YAML file; there is none at {path}.{did_you_mean(str(path), near)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats)
    except UnicodeDecodeError as error:
        raise SliceFineError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SliceFineError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise SliceFineError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise SliceFineError(f"A recipe is a YAML mapping (`key: value` lines); {path} holds {_shape_of(content)}.")
    return content


class _NoRepeats(yaml.SafeLoader):
    """YAML lets a later key win in silence; here a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and seen.setdefault(key, line) != line:
                problem = f"{key!r} stands in line {seen[key]} already"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


@cache
def _parser(whole: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser, whole)
    return parser


def _settings_of(kind: type, prefix: str) -> Iterator[Setting]:
    hints, docs = get_type_hints(kind), _field_docs(kind)
    for field in dataclasses.fields(kind):
        yield Setting(prefix + field.name, hints[field.name], field.default, docs.get(field.name, ""))


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass. Python keeps it in the source alone."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        line.target.id: str(doc.value.value)
        for line, doc in pairwise(tree.body)
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }


def _wrong_type(setting: Setting, shown: str) -> str:
    word = shown.strip("'")
    near = did_you_mean(word, get_args(setting.kind) if get_origin(setting.kind) is Literal else ())
    if word == "None" and NoneType in get_args(setting.kind):
        near = " Write null."
    return f"`{setting.key}` is {_in_words(setting.kind)}; got {shown}.{near}"


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        NoneType: "null",
        list[str]: "a list of strings",
        list[int]: "a list of whole numbers",
    }
    return words[kind]


def _shape_of(value: Any) -> str:
    return {NoneType: "nothing", list: "a list", str: "a string"}.get(type(value), repr(value))
