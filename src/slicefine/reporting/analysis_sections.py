"""What an analysis found, stage by stage: words, charts, and the tables in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting import balance_charts, energy_charts, winner_charts
from slicefine.reporting.page import FAIR, GOOD, MANY, Block, Listing, Prose, Section, table
from slicefine.reporting.text import brief, count, finite, interval, percent, plural

Found = Mapping[str, Any]
BALANCE_TITLE, ENERGY_TITLE, WINNERS_TITLE = "Spectral balance", "Task energy", "Local winners"
GLOBAL_TITLE, ADVICE_TITLE = "Global winner", "Rank advice"


def sections(content: Found) -> list[Section]:
    """A section for each stage that was run; one that has found nothing says why."""
    made = {
        "balance": (BALANCE_TITLE, _balance),
        "energy": (ENERGY_TITLE, _energy),
        "winners": (WINNERS_TITLE, _winners),
        "global": (GLOBAL_TITLE, _global),
        "advice": (ADVICE_TITLE, _advice),
    }
    stages, failed = content["stages"], content.get("failed") or {}
    found = list[Section]()
    for stage, (title, section) in made.items():
        if of := stages.get(stage):
            note = [Prose(text=str(of["note"]), tone=FAIR)] if of.get("note") else []
            whole = section(of)
            found.append(dataclasses.replace(whole, blocks=[*note, *whole.blocks]))
        elif stage in failed:
            found.append(Section(title=title, blocks=[Prose(text=f"It found nothing: {failed[stage]}")]))
    return found


def _balance(stage: Found) -> Section:
    weights = stage.get("weights") or []
    blocks: list[Block] = []
    if stage.get("definition"):
        blocks.append(Prose(text=str(stage["definition"])))
    if weights:
        blocks.append(balance_charts.dispersion(weights, finite(stage.get("poster"))))
        blocks += balance_charts.spectra(weights)
        rows = [
            {
                "weight": one["name"],
                "rows x columns": " x ".join(f"{size:,}" for size in one.get("shape") or []),
                "groups of": f"{one.get('axis')}s, {one.get('groups')}",
                "\u03c1": one.get("rho"),
                "\u03c1, shuffled": (one.get("null_shuffled") or {}).get("rho"),
                "\u03c1, permuted": (one.get("null_permuted") or {}).get("rho"),
                "energy spread": one.get("energy_spread"),
                "decay distance": one.get("decay_distance"),
                "stable rank": (one.get("stable_rank") or {}).get("mean"),
                "effective rank": (one.get("effective_rank") or {}).get("mean"),
                "note": one.get("note"),
            }
            for one in weights
        ]
        blocks.append(table(f"All {len(rows)} spectra", _brief(rows), folded=len(rows) > MANY))
    blocks += _skipped(stage)
    words = (
        "Cut a weight into groups of rows, or columns: the theory has their spectra nearly the same, so that no slice is weak. Two "
        "nulls beside it: rows permuted at random, and all entries shuffled."
    )
    return Section(title=BALANCE_TITLE, words=words, blocks=blocks)


def _brief(rows: Sequence[Found]) -> list[dict[str, Any]]:
    """Rows of a table, their fractions with the digits that tell."""
    return [{key: brief(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def _skipped(stage: Found) -> list[Block]:
    skipped = stage.get("skipped") or []
    if not skipped:
        return []
    return [Prose(text="Left out:"), Listing(items=[f"{one.get('name')}: {one.get('why')}" for one in skipped])]


def _energy(stage: Found) -> Section:
    layers, ntk = stage.get("layers") or [], stage.get("ntk") or {}
    blocks: list[Block] = []
    if layers:
        blocks.append(energy_charts.variance(layers, stage.get("untrained") or []))
        blocks.append(energy_charts.ranks_of_layers(layers, stage.get("untrained") or []))
        blocks.append(
            table(f"All {len(layers)} layers", _brief([_layer(one) for one in layers]), folded=len(layers) > MANY)
        )
        if cut := next((one for one in layers if one.get("truncated") or one.get("note")), None):
            text = cut.get("note") or "There are fewer tokens than dimensions: the spectrum is truncated."
            blocks.append(Prose(text=str(text), tone=FAIR))
    if ntk.get("eigenvalues"):
        blocks.append(energy_charts.kernel(ntk))
    if ntk.get("by_rank"):
        rows = [
            {
                "r": one.get("r"),
                "axis": one.get("axis"),
                "effective rank": one.get("effective_rank"),
                "alignment with all weights": one.get("alignment_with_full"),
                "alignment with the labels": one.get("alignment_with_labels"),
            }
            for one in ntk["by_rank"]
        ]
        blocks.append(table("The kernel by rank and axis", _brief(rows)))
    if ntk.get("why_no_full"):
        blocks.append(Prose(text=f"No comparison with the gradients of all weights: {ntk['why_no_full']}"))
    blocks += _skipped(stage)
    blocks += _definitions(stage)
    words = (
        f"How many directions hold what the model knows of the task: of the hidden states ({count(stage.get('tokens'))} tokens of "
        f"{count(stage.get('examples'))} examples), and of the gradients of slices (the lazy neural tangent kernel). Few directions: a small rank is enough."
    )
    return Section(title=ENERGY_TITLE, words=words, blocks=blocks or [Prose(text="The stage found nothing to show.")])


def _definitions(stage: Found) -> list[Block]:
    """What the words of a stage mean, where the record says so."""
    found = stage.get("definitions") or {}
    rows = [{"word": str(name).replace("_", " "), "meaning": str(text)} for name, text in found.items()]
    return [table("What the words mean", rows, folded=True)] if rows else []


def _layer(one: Found) -> dict[str, Any]:
    variance = one.get("variance") or {}
    kept, without = (((variance.get(name) or {}).get("k") or {}) for name in ("with", "without"))
    return {
        "layer": one.get("name"),
        "dimension": one.get("dimension"),
        "samples": one.get("samples"),
        **{f"k({tau})": without.get(tau) for tau in energy_charts.TAUS},
        "k(0.9) with outliers": kept.get("0.9"),
        "outliers": len(one.get("outliers") or []),
        "participation ratio": one.get("participation_ratio"),
        "truncated": "yes" if one.get("truncated") else "",
    }


def _winners(stage: Found) -> Section:
    rows, trials = stage.get("rows") or [], stage.get("trials") or []
    blocks: list[Block] = []
    if rows:
        blocks.append(winner_charts.winner_shares(rows))
    choices = (stage.get("summary") or {}).get("choice_matters") or {}
    if choices:
        blocks.append(winner_charts.choices(choices))
    if chart := winner_charts.gradients(trials):
        blocks.append(chart)
    if rows:
        shown = [
            {
                "model": one.get("model"),
                "choice": winner_charts.CHOICES.get(str(one.get("choice")), one.get("choice")),
                "axis": one.get("axis"),
                "r": one.get("r"),
                "winners": one.get("winners"),
                "of": one.get("trials"),
                "share": percent(one.get("share")),
                "95 % interval": interval(one.get("interval")),
                "median drop": percent(one.get("median_drop")),
            }
            for one in rows
        ]
        blocks.append(table("Every kind of slice", shown, folded=len(shown) > MANY))
    words = (
        f"Train one slice alone for {plural(stage.get('steps'), 'step')}: does the loss on held-out examples fall by more than "
        f"{brief(100 * (finite(stage.get('margin')) or 0.0))} % of it? Slices drawn at random, against masks of as many single entries, slices chosen by "
        "magnitude or gradient, and the same slices in a model with random weights."
    )
    return Section(title=WINNERS_TITLE, words=words, blocks=blocks or [Prose(text="The stage found nothing to show.")])


def _global(stage: Found) -> Section:
    runs = stage.get("runs") or []
    blocks: list[Block] = []
    if runs:
        blocks.append(winner_charts.together(runs))
    if chart := winner_charts.together_curves(stage):
        blocks.append(chart)
    if runs:
        rows = [
            {
                "layers": one.get("layers"),
                "r": one.get("r"),
                "axis": one.get("axis"),
                "moves": one.get("moves"),
                "trained at a step": one.get("active"),
                "loss after": one.get("loss_after"),
                "of the drop of full tuning": percent(one.get("share_of_full_drop")),
                "which layers": ", ".join(map(str, one.get("layer_indices") or [])),
            }
            for one in runs
        ]
        blocks.append(table("Every run", _brief(rows), folded=len(rows) > MANY))
    baseline = f" Drops count from {stage['baseline']}." if stage.get("baseline") else ""
    words = (
        f"A few slices across layers, tuned together for {plural(stage.get('steps'), 'step')}, against full tuning from the same start: "
        f"how much of its loss drop do they reach?{baseline}"
    )
    return Section(title=GLOBAL_TITLE, words=words, blocks=blocks or [Prose(text="The stage found nothing to show.")])


def _advice(stage: Found) -> Section:
    blocks: list[Block] = []
    if stage.get("words"):
        blocks.append(Prose(text=str(stage["words"]), tone=GOOD if stage.get("confirmed") else FAIR))
    if reasons := stage.get("reasons"):
        blocks.append(Listing(items=[str(one) for one in reasons]))
    if check := stage.get("check"):
        blocks.append(winner_charts.check(check, stage.get("r")))
        rows = [{"r": one.get("r"), "axis": one.get("axis"), "loss after": one.get("loss_after")} for one in check]
        blocks.append(table("The check in numbers", _brief(rows)))
    every = stage.get("slide_every")
    words = f"`--slice.r {stage.get('r')} --slice.axis {stage.get('axis')}`, {plural(stage.get('moves'), 'move')}" + (
        f", one every {every}." if every else "."
    )
    return Section(title=ADVICE_TITLE, words=words, blocks=blocks)
