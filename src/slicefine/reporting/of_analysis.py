"""The page of an analysis: whether the winning-slice hypothesis is true for a model and a task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting import analysis_sections, provenance
from slicefine.reporting.page import (
    BAD,
    FAIR,
    GOOD,
    PLAIN,
    Block,
    Code,
    Figure,
    Listing,
    Notice,
    Page,
    Prose,
    Section,
    Verdict,
    Verdicts,
)
from slicefine.reporting.records import Record
from slicefine.reporting.text import (
    DASH,
    base_name,
    brief,
    count,
    decimal,
    duration,
    finite,
    interval,
    joined,
    percent,
    plural,
)

NOT_MEASURED = "not measured"
TONES = {"holds": GOOD, "holds partly": FAIR, "fails": BAD, NOT_MEASURED: PLAIN}
WORDS = {
    "holds": ("holds", "hold"),
    "holds partly": ("holds partly", "hold partly"),
    "fails": ("fails", "fail"),
    NOT_MEASURED: ("was not measured", "were not measured"),
}

ABOUT = (
    "What the theory says, what was found here, and from which figure on we say that it holds. Thresholds are ours: the poster has "
    "none."
)


def page(record: Record) -> Page:
    """The page of one analysis."""
    content = record.content
    return Page(
        kind="analysis",
        title=name_of(content),
        subtitle=" · ".join(
            part for part in (content["model"].get("class"), content.get("task"), _when(content)) if part
        ),
        notice=notice(content),
        verdict=verdict(content),
        figures=_figures(content),
        sections=[
            Section(
                title="Verdicts",
                words=ABOUT,
                blocks=verdicts(content) or [Prose(text="No property was judged yet.")],
            ),
            *analysis_sections.sections(content),
            _provenance(content),
        ],
        made_from=record.made_from,
    )


def name_of(content: Mapping[str, Any]) -> str:
    """What the model is called; a twin with random weights is said to be one."""
    return base_name(str(content["model"].get("name"))) + (", untrained twin" if content.get("untrained") else "")


def _when(content: Mapping[str, Any]) -> str:
    return str(content.get("ended") or content.get("started") or "")[:10]


def notice(content: Mapping[str, Any]) -> Notice | None:
    """What has to be said first of an analysis that is not whole, or not of a pretrained model."""
    done = ", ".join(content["stages"]) or "none"
    words = {
        "failed": (
            BAD,
            f"This analysis failed: {content.get('error') or 'the record does not say why'}. Finished stages: {done}.",
        ),
        "interrupted": (
            FAIR,
            f"This analysis was interrupted. Finished stages: {done}. The same command goes on with it.",
        ),
        "running": (PLAIN, f"This analysis is still going on, or was ended from outside. Finished stages: {done}."),
    }
    if content["status"] in words:
        tone, text = words[content["status"]]
        return Notice(tone=tone, text=text)
    if content.get("untrained"):
        return Notice(
            tone=PLAIN,
            text="The weights of this model are random: for it the hypothesis should fail. It is the control of the pretrained one.",
        )
    return None


# ---------------------------------------------------------------- the verdicts and the numbers


def tally(content: Mapping[str, Any]) -> str:
    """How many properties hold, hold partly, fail, and were not measured; empty if none was judged."""
    found = Counter(str(one.get("verdict")) for one in content["verdicts"])
    names = [*WORDS, *(name for name in found if name not in WORDS)]
    return joined([f"{found[name]} {WORDS.get(name, (name, name))[found[name] > 1]}" for name in names if found[name]])


def verdict(content: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    said, total = tally(content), len(content["verdicts"])
    if not said:
        return f"No property of the winning-slice hypothesis has been judged for {name_of(content)} yet."
    text = f"Of {'the one property' if total == 1 else f'{total} properties'} of the winning-slice hypothesis, {said} for {name_of(content)}"
    if content.get("task"):
        text += f" on {content['task']}"
    advice = content["stages"].get("advice") or {}
    if advice.get("r") is not None:
        text += f". Advice: r = {advice['r']}, axis {advice.get('axis')}, {plural(advice.get('moves'), 'move')} ({_checked(advice)})"
    return f"{text}."


def _checked(advice: Mapping[str, Any]) -> str:
    """What short runs say of the advised rank; where they do not bear it out, what they show instead."""
    if advice.get("confirmed"):
        return "confirmed by short runs"
    if advice.get("favoured") is not None:
        return f"not confirmed: short runs favour r = {advice['favoured']}"
    own = next((one for one in advice.get("check") or [] if one.get("r") == advice.get("r")), {})
    before, after = finite(own.get("loss_before")), finite(own.get("loss_after"))
    if before is None or after is None:
        return "not confirmed by short runs"
    return f"not confirmed: in short runs the loss goes from {decimal(before)} to {decimal(after)}"


def _title(text: str) -> str:
    return text if text[1:3] == " =" else text[:1].upper() + text[1:]  # r = 1 stays what it is


def verdicts(content: Mapping[str, Any]) -> list[Block]:
    """What was measured, one verdict a property; then what was not, by the reason; empty if no property was judged."""
    measured: list[Mapping[str, Any]] = []
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for one in content["verdicts"]:
        if one.get("verdict") == NOT_MEASURED:
            missing[str(one.get("words") or "")].append(str(one.get("property")))
        else:
            measured.append(one)
    found: list[Block] = [_verdicts(measured)] if measured else []
    if missing:
        items = [": ".join(filter(None, (_title(", ".join(names)), why))) for why, names in missing.items()]
        found += [Prose(text="Not measured:"), Listing(items=items)]
    return found


def _verdicts(judged: Sequence[Mapping[str, Any]]) -> Verdicts:
    return Verdicts(
        verdicts=[
            Verdict(
                property=_title(str(one.get("property"))),
                verdict=str(one.get("verdict")),
                tone=TONES.get(str(one.get("verdict")), PLAIN),
                figure=brief(one.get("figure")),
                threshold=str(one.get("threshold") or DASH),
                words=str(one.get("words") or ""),
                claim=str(one.get("poster") or DASH),
            )
            for one in judged
        ]
    )


def _figures(content: Mapping[str, Any]) -> list[Figure]:
    stages = content["stages"]
    found = []
    if rows := ((stages.get("balance") or {}).get("summary") or {}).get("row"):
        words = (
            f"Median dispersion between groups of rows; the poster has about {brief(stages['balance'].get('poster', 0.001))}. "
            f"Entries shuffled: {brief(rows.get('rho_shuffled_median'))}; rows permuted: {brief(rows.get('rho_permuted_median'))}."
        )
        found.append(Figure(name="Dispersion \u03c1", value=brief(rows.get("rho_median")), words=words))
    if energy := (stages.get("energy") or {}).get("summary"):
        words = (
            f"Directions with 90 % of the variance of the hidden states, of {count(energy.get('dimension'))}, outliers left out: {percent(energy.get('share'))}. "
            f"Untrained: {percent(energy.get('untrained_share'))}."
        )
        found.append(Figure(name="k(0.9), median layer", value=count(energy.get("k90_median")), words=words))
        if energy.get("ntk_effective_rank") is not None:
            words = "Of the kernel of the active slices' gradients: how many directions training has at hand."
            found.append(Figure(name="NTK effective rank", value=brief(energy["ntk_effective_rank"]), words=words))
    if winners := (stages.get("winners") or {}).get("summary"):
        shares, twin = winners.get("share_by_rank") or {}, winners.get("share_untrained") or {}
        ranks = sorted(filter(str.isdecimal, shares), key=int)
        for rank in dict.fromkeys(ranks[:1] + ranks[-1:]):  # the smallest and the greatest, which may be one
            words = f"{interval(shares[rank][1:])} (95 % interval) of random slices of rank {rank} win alone."
            if rank in twin:
                words += f" Untrained: {percent(twin[rank][0])} ({interval(twin[rank][1:])})."
            found.append(Figure(name=f"Winners, r = {rank}", value=percent(shares[rank][0]), words=words))
    if together := (stages.get("global") or {}).get("summary"):
        words = f"Of the loss drop of full tuning, by the best few slices; r = 1 in all layers: {percent(together.get('r1_all_layers_share'))}."
        found.append(Figure(name="Global winner", value=percent(together.get("best_share")), words=words))
    if advice := stages.get("advice"):
        words = f"Axis {advice.get('axis')}, {plural(advice.get('moves'), 'move')}; {_checked(advice)}."
        found.append(Figure(name="Advised rank", value=f"r = {advice.get('r')}", words=words))
    return found


def _provenance(content: Mapping[str, Any]) -> Section:
    model = content["model"]
    seconds = content.get("seconds") or {}
    settings = content.get("settings") or {}
    rows: Sequence[tuple[str, Any]] = [
        ("command", content.get("command")),
        ("model", model.get("name")),
        ("class", model.get("class")),
        ("parameters", count(model["parameters"]) if model.get("parameters") else None),
        ("fingerprint of the weights", model.get("fingerprint")),
        ("weights", "drawn at random" if content.get("untrained") else "pretrained"),
        ("data", content.get("data")),
        ("seed", settings.get("seed")),
        ("time by stage", ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())),
        *provenance.made_with(content),
    ]
    notes: list[Block] = []
    if content.get("notes"):
        notes = [Prose(text=provenance.DECIDED), Listing(items=[str(one) for one in content["notes"]])]
    text = "\n".join(
        f"{key}: {provenance.flat(value) if value is not None else 'null'}" for key, value in settings.items()
    )
    return provenance.section(rows, *notes, *([Code(title="All settings", text=text)] if text else []))
