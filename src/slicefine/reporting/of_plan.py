"""The page of a plan: what a run will cost, before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting import provenance
from slicefine.reporting.charts import stacked
from slicefine.reporting.page import BAD, GOOD, Block, Cell, Chart, Code, Figure, Listing, Page, Prose, Section, Table
from slicefine.reporting.records import Record
from slicefine.reporting.text import base_name, count, finite, joined, percent, plural, size

GIB, MIB = 2**30, 2**20
TITLES = {
    "activations": "activations",
    "logits": "logits",
    "gradients": "gradients",
    "temporary": "temporary",
}
ROWS = (
    ("parameters trained at a step", "active", count),
    ("parameters added to the model", "added", count),
    ("weights", "weights", size),
    ("masters, adapters (trained)", "masters", size),
    ("AdamW's moments", "moments", size),
    ("gradients", "gradients", size),
    ("saved for backward", "saved_for_backward", size),
    ("logits", "logits", size),
    ("all of a step, at its peak", "step", size),
    ("device, at its peak", "device", size),
    ("originals, on the CPU", "originals_on_cpu", size),
    ("artifact", "artifact", size),
)


def page(record: Record) -> Page:
    """The page of one plan."""
    content = record.content
    recipe = content["recipe"]
    return Page(
        kind="plan",
        title=f"What will {base_name(str(recipe.get('model.name')))} cost?",
        subtitle=f"{content.get('architecture') or ''} · {recipe.get('task')} · {str(content.get('device')).upper()}",
        verdict=verdict(content),
        figures=_figures(content),
        sections=[_memory(content), _fits(content), _recipe(content), _provenance(content)],
        made_from=record.made_from,
    )


def needed(method: Mapping[str, Any]) -> bool | None:
    """Whether a method fits into the memory that was given; None if none was."""
    fits = method.get("fits")
    return fits if isinstance(fits, bool) else None


def verdict(content: Mapping[str, Any]) -> str:
    """What the plan comes to, in a sentence."""
    methods = content["methods"]
    ours, others = methods[0], methods[1:]
    if ours["device"] is None:
        return f"{ours['method']} trains {count(ours['active'])} parameters at a step; its memory could not be counted."
    beside = joined([f"{one['method']} {size(one['device'])}" for one in others])
    text = f"{ours['method']} needs {size(ours['device'])} at its peak" + (f" ({beside})" if beside else "")
    memory = content.get("memory")
    if memory is None:
        return f"{text}; whether that fits is not known without the memory of a device."
    fitting = [one["method"] for one in methods if needed(one)]
    if needed(ours):
        return f"{text}, and fits into {size(memory)}" + (f", as {joined(fitting[1:])} would." if fitting[1:] else ".")
    changes = content.get("changes") or []
    if changes:
        return f"{text}, and does not fit into {size(memory)}; with `{_settings(changes[0])}` it needs {size(changes[0]['device'])} and does."
    return f"{text}, and does not fit into {size(memory)}, whatever the batch, the axis and the checkpointing."


def _figures(content: Mapping[str, Any]) -> list[Figure]:
    counts, total = content["parameters"], finite(content["parameters"].get("total"))
    active = finite(counts.get("active"))
    ours = content["methods"][0]
    steps = content.get("steps")
    found = [
        Figure(
            name="At its peak",
            value=size(ours["device"]),
            words="On the device at the highest moment of a step, without what is no tensor.",
        ),
        Figure(
            name="Trained at a step",
            value=percent(active / total) if active is not None and total else count(active),
            words=f"{count(active)} of {count(total)} parameters, in {plural(content.get('targets', 0), 'weight')}.",
        ),
        Figure(
            name="Run",
            value="not known" if steps is None else plural(steps, "step"),
            words="Give `--examples` or `--training.max_steps` to know."
            if steps is None
            else f"With {plural(content.get('moves') or 0, 'move')} of the slices.",
        ),
    ]
    if content.get("coverage") is not None:
        words = "Of the entries of these weights, trained by the end of the run."
        found.append(Figure(name="Coverage", value=percent(content["coverage"]), words=words))
    if counts.get("modules_to_save"):
        words = "Parameters of new modules, which every method trains in full."
        found.append(Figure(name="New head", value=count(counts["modules_to_save"]), words=words))
    found.append(
        Figure(name="Artifact", value=size(ours["artifact"]), words="What will be saved, beside the base model.")
    )
    if turns := content.get("turns"):
        each = ", ".join(f"{count(turn['active'])} from block {turn['lowest']} on" for turn in turns)
        words = f"Parameters trained at a step, by turn: {each}. Memory is that of the turn that needs most."
        found.append(Figure(name="Depth window", value=plural(len(turns), "turn"), words=words))
    if content.get("lora_rank") is not None:
        words = "Rank of the run exported as a LoRA adapter that is the slices exactly."
        found.append(Figure(name="As LoRA", value=f"rank {content['lora_rank']}", words=words))
    return found


def parts(method: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What a device holds at the highest moment of a step, by part, in bytes."""
    at_peak = method.get("step_at_its_peak") or {}
    own = [
        ("weights", method.get("weights")),
        ("masters, adapters", method.get("masters")),
        ("moments", method.get("moments")),
    ]
    step = [(TITLES.get(name, name), at_peak.get(name)) for name in dict.fromkeys([*TITLES, *at_peak])]
    return [(name, value) for name, part in [*own, *step] if (value := finite(part))]


def memory_chart(methods: Mapping[str, Mapping[str, Any]], memory: float | None, set_aside: float | None) -> Chart:
    """A bar a method, the device as a line."""
    room = None if memory is None else memory - (set_aside or 0)
    largest = max([*(one["device"] for one in methods.values()), room or 0])
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    bars = {title: [(part, value / unit) for part, value in parts(one)] for title, one in methods.items()}
    words = "At the highest moment of a step: " + "; ".join(
        f"{title} {size(one['device'])}" for title, one in methods.items()
    )
    if memory is not None:
        words += f". The device has {size(memory)}" + (
            f", of which {size(set_aside)} are set aside for what is no tensor" if set_aside else ""
        )
    line = (f"room on the device, {size(room)}", room / unit) if room and room > 0 else None
    return stacked(
        "memory",
        bars,
        title="Memory by part",
        words=f"{words}.",
        label=f"{name} on the device",
        line=line,
        totals=lambda value: size(value * unit),
    )


def _memory(content: Mapping[str, Any]) -> Section:
    methods = content["methods"]
    counted = {one["method"]: one for one in methods if one["device"] is not None}
    charts = [memory_chart(counted, content.get("memory"), content.get("set_aside"))] if counted else []
    rows = [[Cell(text=title), *(Cell(text=shown(one.get(key))) for one in methods)] for title, key, shown in ROWS]
    at_most = (
        " Originals and artifact are the most there can be, as the length of the run is not known."
        if content.get("steps") is None and content["recipe"].get("slice.slide_every") is not None
        else ""
    )
    note = f"Counted for the longest batch.{at_most} What is assumed, and what is not counted: docs/planning.md."
    table = Table(title="Part by part", columns=["", *(one["method"] for one in methods)], rows=rows, note=note)
    return Section(
        title="Memory",
        words="Where the memory of a step goes, beside LoRA and full tuning on the same weights.",
        blocks=[*charts, table],
    )


def _fits(content: Mapping[str, Any]) -> Section:
    memory, methods = content.get("memory"), [one for one in content["methods"] if one["device"] is not None]
    if not methods:
        return Section(
            title="Does it fit?", blocks=[Prose(text="Not known: the memory of a step could not be counted.")]
        )
    if memory is None:
        text = "No memory was given. `slicefine plan MODEL --memory 24GiB` says whether it fits, and what would make it fit."
        return Section(title="Does it fit?", blocks=[Prose(text=text)])
    room = memory - (content.get("set_aside") or 0)
    rows = [
        [
            Cell(text=one["method"]),
            Cell(text=size(one["device"])),
            Cell(text=size(room - one["device"]) if room >= one["device"] else f"-{size(one['device'] - room)}"),
            Cell(text="fits" if needed(one) else "does not fit", tone=GOOD if needed(one) else BAD),
        ]
        for one in methods
    ]
    blocks: list[Block] = [Table(title="", columns=["method", "needs", "room left", f"in {size(memory)}"], rows=rows)]
    if changes := content.get("changes"):
        rows = [[Cell(text=_settings(change), code=True), Cell(text=size(change["device"]))] for change in changes]
        blocks.append(Table(title=f"What makes {methods[0]['method']} fit", columns=["settings", "needs"], rows=rows))
    elif smallest := content.get("smallest"):
        text = (
            f"No batch, checkpointing or axis makes {methods[0]['method']} fit: with `{_settings(smallest)}` it still needs "
            f"{size(smallest['device'])}{' beside what is set aside' if content.get('set_aside') else ''}, {size(methods[0]['weights'])} of them weights."
        )
        blocks.append(Prose(text=text, tone="bad"))
    return Section(title="Does it fit?", blocks=blocks)


def _settings(change: Mapping[str, Any]) -> str:
    return " ".join(f"--{key} {str(value).lower()}" for key, value in change["settings"].items())


def _recipe(content: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    if notes := content.get("notes"):
        blocks.append(Listing(items=[str(note) for note in notes]))
    text = "\n".join(
        f"{key}: {provenance.flat(value) if value is not None else 'null'}" for key, value in content["recipe"].items()
    )
    blocks.append(Code(title="The recipe in full", text=text))
    return Section(title="Notes and recipe", blocks=blocks)


def _provenance(content: Mapping[str, Any]) -> Section:
    recipe = content["recipe"]
    rows: Sequence[tuple[str, Any]] = [
        ("model", recipe.get("model.name")),
        ("architecture", content.get("architecture")),
        ("counted for", content.get("device")),
        ("attention", content.get("attention")),
        ("texts of a batch are padded", content.get("padded")),
        ("seed", recipe.get("training.seed")),
        *provenance.made_with(content),
    ]
    return provenance.section(rows)
