"""Where a result comes from: what every page ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting.page import Block, Cell, Section, Table
from slicefine.reporting.records import Record

TITLE = "Where it comes from"
EMPTY: tuple[Any, ...] = (None, "", [], {})
DECIDED = "Decided for you, for want of a setting, and said so:"
ABOUT = "What has to be the same for the same result, and what it was made with."


def section(rows: Sequence[tuple[str, Any]], *more: Block) -> Section:
    """The last section: what has no value is left out."""
    shown = [(name, flat(value)) for name, value in rows if value not in EMPTY]
    table = Table(title="", columns=["", ""], rows=[[Cell(text=name), Cell(text=text)] for name, text in shown])
    return Section(title=TITLE, words=ABOUT, blocks=[table, *more])


def columns(keys: Sequence[str], of: Mapping[str, Mapping[str, Any]], *, title: str = TITLE) -> Section:
    """The last section of a page of several runs: one column a run; what none of them has is left out."""
    rows = [
        [Cell(text=key), *(Cell(text="" if one.get(key) in EMPTY else flat(one[key])) for one in of.values())]
        for key in keys
        if any(one.get(key) not in EMPTY for one in of.values())
    ]
    return Section(title=title, blocks=[Table(title="", columns=["", *of], rows=rows)])


def made_with(of: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Times, commit, hardware and versions, as records have them."""
    return [
        ("started", of.get("started")),
        ("ended", of.get("ended")),
        ("commit", commit(of.get("commit"))),
        ("hardware", of.get("hardware")),
        ("versions", of.get("versions")),
    ]


def commit(found: Any) -> str | None:
    """The commit, and whether files differed from it."""
    if isinstance(found, Mapping):
        return f"{found.get('hash')}{', with changes that are not in it' if found.get('modified') else ''}"
    return found if isinstance(found, str) else None


def flat(value: Any) -> str:
    """A value of a record in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(inner)}" for key, inner in value.items() if inner not in (None, ""))
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def files(records: Sequence[Record]) -> list[str]:
    """Names of the files that a page of several runs is made from."""
    return list(dict.fromkeys(name for record in records for name in record.made_from))
