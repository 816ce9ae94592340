"""`slicefine bench speed` and `slicefine bench memory`: every model, every size of a sweep, one report."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slicefine.benchmarking import charts, memory, speed, targets
from slicefine.benchmarking.methods import FROZEN, Method, method, too_few
from slicefine.benchmarking.models import Architecture
from slicefine.benchmarking.results import Report, Row, Table
from slicefine.benchmarking.settings import RANK, REFERENCES, Settings
from slicefine.benchmarking.setups import ROOM, Setup, device_of
from slicefine.benchmarking.timing import Measured, free_bytes, keep_freed_memory
from slicefine.errors import SliceFineError, raise_all
from slicefine.training.folder import refuse_unwritable

SPEED, MEMORY = "speed", "memory"
MEASURED_IN = {SPEED: "median ms", MEMORY: "saved MiB"}
"""Benchmark -> column that a sweep draws."""
DRAWN_AS = {SPEED: f"training step / {FROZEN}", MEMORY: f"saved for backward / {FROZEN}"}
DRAWN_FROM = {SPEED: f"/ {FROZEN}", MEMORY: f"saved MiB / {FROZEN}"}


def run(what: str, settings: Settings, command: str) -> Report:
    """Measure and write; returns the report, whose status is `finished` or `interrupted`.

    Raises `SliceFineError` before anything is measured if a model has no such size, there is no such device, a depth window is to be timed
    in fewer rounds than it has turns, or results cannot be written.
    """
    if what == SPEED:
        raise_all(too_few(settings.rounds, map(method, settings.methods)), "slicefine bench")
    device = device_of(settings)
    _refuse_output(Path(settings.output))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    architectures = settings.architectures(gpu=device == "cuda")
    report = _report(what, settings, device, command)
    try:
        for of in architectures:
            setup = Setup.of_settings(settings, of)
            methods = settings.compared()
            if settings.equal_parameters is not None:
                methods = [*map(method, REFERENCES), *setup.sized(methods, method(settings.equal_parameters))]
            methods = list(dict.fromkeys(methods))
            finished = (_speed if what == SPEED else _memory)(report, setup, methods, settings)
            _draw(report, what, settings)
            if not finished:
                raise KeyboardInterrupt
            report.write()
        report.status = "finished"
    except KeyboardInterrupt:
        report.status = "interrupted"
    report.write()
    return report


def _refuse_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SliceFineError(f"`--output` is a folder; {folder} is a file. Name another.")
    refuse_unwritable(folder)


def _report(what: str, settings: Settings, device: str, command: str) -> Report:
    dtype = settings.dtype or ("bfloat16" if device == "cuda" else "float32")
    known = {
        "dtype": dtype,
        "device": "a GPU" if device == "cuda" else "a CPU",
        "threads": f" (threads: {torch.get_num_threads()})" if device == "cpu" else "",
        "checkpointing": ", activations checkpointed" if settings.checkpointing else "",
        "compile": ", compiled by torch.compile" if settings.compile else "",
        "warmup": settings.warmup,
        "rounds": settings.rounds,
        "how": memory.HOW[device],
    }
    intro = (speed.INTRO if what == SPEED else memory.INTRO).format(**known)
    if not charts.can_draw():
        print(charts.MISSING, file=sys.stderr)
    resolved = dataclasses.asdict(settings) | {"device": device, "dtype": dtype}
    if what == SPEED and device == "cpu":
        resolved["freed_memory_kept"] = keep_freed_memory()
    if hasattr(os, "getloadavg"):
        resolved["load_before"] = round(os.getloadavg()[0], 2)
    theme = f"{what}-sweep-{settings.sweep}" if settings.sweep else what
    return Report(theme=theme, intro=intro, folder=Path(settings.output), command=command, settings=resolved)


def _speed(report: Report, setup: Setup, methods: Sequence[Method], settings: Settings) -> bool:
    """Whether it was finished; Ctrl-C keeps what there is."""
    together = setup.bytes_of(methods) <= ROOM * free_bytes(setup.device)

    def keep(title: str, rows: list[Row], measured: Measured) -> bool:
        note = f"Measured {measured.arrangement}."
        if rows:
            _add(report, setup, settings, Table(title=title, rows=rows, note=note))
        report.raw.append({"title": title, **_described(setup, settings), **dataclasses.asdict(measured)})
        report.write()
        return not measured.interrupted

    rows, measured = speed.steps(setup, methods, settings, together=together)
    if not keep("training step", rows, measured):
        return False
    if settings.sweep is not None:
        return True
    methods = [one for one in methods if one.name in measured.seconds]
    moves, measured = speed.moves(setup, methods, settings, rows, together=together)
    if not keep("moving every slice once", moves, measured):
        return False
    lengths = [0, settings.generate] if settings.generate and speed.generates(setup) else [0]
    for generate in lengths:
        title = f"generating {generate} tokens" if generate else "forward pass without gradients"
        found = speed.inference(setup, methods, settings, generate=generate, together=together)
        if not keep(title, *found):
            return False
    _judge(report, setup, settings, targets.of_speed(**_place(setup), threads=torch.get_num_threads()), rows, moves)
    return True


def _memory(report: Report, setup: Setup, methods: Sequence[Method], settings: Settings) -> bool:
    rows, interrupted = memory.memory(setup, methods)
    if rows:
        _add(report, setup, settings, Table(title="memory", rows=rows))
    report.raw.append({"title": "memory", **_described(setup, settings), "rows": rows})
    if not interrupted:
        _judge(report, setup, settings, targets.of_memory(**_place(setup)), rows)
    return not interrupted


def _place(setup: Setup) -> dict[str, Any]:
    """What decides which targets there are."""
    dtype = str(setup.dtype).removeprefix("torch.")
    return {"model": setup.of.name, "gpu": setup.device == "cuda", "dtype": dtype}


def _judge(
    report: Report, setup: Setup, settings: Settings, wanted: Sequence[targets.Target], *tables: Sequence[Row]
) -> None:
    """Add the table of targets, if there are any for what was measured."""
    as_it_is = settings.sweep is None and not settings.checkpointing and not settings.compile
    rows = targets.judge(wanted, *tables) if as_it_is else []
    if rows:
        _add(report, setup, settings, Table(title="targets", rows=rows, note=targets.NOTE))


def _add(report: Report, setup: Setup, settings: Settings, table: Table) -> None:
    of = setup.of
    size = f", {settings.sweep} {of.dimension(settings.sweep)}" if settings.sweep not in (None, RANK) else ""
    inputs = f"{of.batch} x {of.length} tokens" if of.length else f"{of.batch} inputs"
    table.title = f"{of.name}{size}: {table.title}"
    table.note = f"Batches of {inputs}. {table.note}".strip()
    report.tables.append(table)


def _described(setup: Setup, settings: Settings) -> dict[str, Any]:
    of: Architecture = setup.of
    value = of.dimension(settings.sweep) if settings.sweep not in (None, RANK) else None
    return {"model": of.name, "sweep": settings.sweep, "value": value, "architecture": dataclasses.asdict(of)}


# ---------------------------------------------------------------- charts


def _draw(report: Report, what: str, settings: Settings) -> None:
    if not charts.can_draw():
        return
    shown = [(raw, table) for raw, table in _measured_rows(report, what)]
    if settings.sweep is None:
        groups = {raw["model"]: _bars(rows, DRAWN_FROM[what]) for raw, rows in shown}
        groups = {name: group for name, group in groups.items() if group}
        if groups:
            report.charts[""] = charts.bars(groups, DRAWN_AS[what])
        return
    for ending, column, label in (
        ("", MEASURED_IN[what], MEASURED_IN[what]),
        ("-ratio", DRAWN_FROM[what], DRAWN_AS[what]),
    ):
        groups = _lines(shown, column, settings)
        if groups:
            report.charts[ending] = charts.growth(groups, settings.sweep, label)


def _measured_rows(report: Report, what: str) -> list[tuple[dict[str, Any], list[Row]]]:
    """What was measured -> rows of its first table."""
    title = "training step" if what == SPEED else "memory"
    raws = [raw for raw in report.raw if raw["title"] == title]
    tables = [table for table in report.tables if table.title.endswith(f": {title}")]
    return [(raw, table.rows) for raw, table in zip(raws, tables, strict=False)]


def _bars(rows: Sequence[Row], column: str) -> list[charts.Bar]:
    return [
        (row["method"], row[column], row.get(f"{column}, min"), row.get(f"{column}, max"))
        for row in rows
        if row[column] is not None
    ]


def _lines(
    shown: Sequence[tuple[dict[str, Any], list[Row]]], column: str, settings: Settings
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Model -> method -> points. Over ranks a line joins those of a method; one that has no rank is flat."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for raw, rows in shown:
        lines = groups.setdefault(raw["model"], {})
        ranks = sorted({method(row["method"]).r or 0 for row in rows} - {0})
        for row in rows:
            if row[column] is None:
                continue
            one = method(row["method"])
            if settings.sweep != RANK:
                lines.setdefault(one.name, []).append((raw["value"], row[column]))
            elif one.r is not None:
                lines.setdefault(one.family, []).append((one.r, row[column]))
            else:
                lines[one.name] = [(ranks[0], row[column]), (ranks[-1], row[column])]
    return {model: lines for model, lines in groups.items() if lines}
