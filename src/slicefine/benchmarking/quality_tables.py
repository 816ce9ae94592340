"""The tables of `slicefine bench quality`, from what was found so far. Scores are in points, hundredths, as in the poster's table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slicefine.benchmarking.cells import Outcome
from slicefine.benchmarking.methods import REFERENCE
from slicefine.benchmarking.models import CAUSAL_LM
from slicefine.benchmarking.quality import Comparison
from slicefine.benchmarking.quality_intervals import RESAMPLES, Interval, over_seeds, resampled
from slicefine.benchmarking.results import Row, Table
from slicefine.benchmarking.suite import QualityTask
from slicefine.benchmarking.timing import TOGETHER
from slicefine.training.metrics import METRICS
from slicefine.training.named import NAMED

LOSS = "loss"
LOWER = (LOSS, "mse", "perplexity")
"""Scores of which less is better; they are no shares, and stay as they are."""


@dataclass(frozen=True)
class Tasks:
    """What is asked again and again of a comparison."""

    found: Comparison

    @property
    def names(self) -> list[str]:
        """Methods, in the order asked for."""
        return [one.name for one in self.found.variants[self.found.tasks[0].name]]

    def metric(self, task: QualityTask) -> str:
        """The first score of a task; the loss of a language model, and of what has no scores."""
        if task.recipe.task == CAUSAL_LM:
            return LOSS
        outcomes = [
            o for cell, o in (self.found.grid | self.found.final).items() if cell.task == task.name and o.scores
        ]
        return next(iter(outcomes[0].scores)) if outcomes else LOSS

    def scores(self, task: QualityTask, name: str) -> dict[int, float]:
        """Seed -> main score of the final run of a method, in points where it is a share; a run that diverged has none."""
        metric, runs = self.metric(task), self.found.by_seed(task.name, name)
        return {seed: score for seed, outcome in runs.items() if (score := main(outcome, metric)) is not None}

    def paces(self, task: QualityTask, name: str) -> list[float]:
        """Seconds of a step over those of the reference on the same batch; of a depth window on the batches of a whole cycle."""
        timed = self.found.timed.get(task.name)
        return timed.ratios(name, REFERENCE, self._turns(task, name)) if timed else []

    def seconds(self, task: QualityTask, name: str) -> float | None:
        """Mean seconds of a step.

        Of what was timed beside the reference: the mean of the reference, by the median of `paces`. The means of few rounds of each would
        hang on what happens once, as the first move to the other axis does.
        """
        timed, paces = self.found.timed.get(task.name), self.paces(task, name)
        if timed and paces:
            return statistics.median(paces) * statistics.fmean(timed.seconds[REFERENCE])
        own = timed.cycles(name, self._turns(task, name)) if timed else []
        return statistics.fmean(own) if own else None

    def _turns(self, task: QualityTask, name: str) -> int:
        return next(one.method.turns for one in self.found.variants[task.name] if one.name == name)

    def curve(self, task: QualityTask, name: str) -> list[tuple[int, float]]:
        """Step -> main score on the examples that choose, the mean of the runs that got there."""
        metric, at = self.metric(task), dict[int, list[float]]()
        for outcome in self.found.of(task.name, name):
            for point in outcome.curve:
                at.setdefault(int(point["step"]), []).append(points(metric, point[metric]))
        return [(step, statistics.fmean(values)) for step, values in sorted(at.items())]


def main(outcome: Outcome, metric: str) -> float | None:
    """The score `metric` of a run; None if it diverged."""
    value = outcome.loss if metric == LOSS else outcome.scores.get(metric)
    return None if value is None else points(metric, value)


def points(metric: str, value: float) -> float:
    """In hundredths, where it is a share or a correlation."""
    return value if metric in LOWER else 100 * value


def tables(found: Comparison) -> list[Table]:
    """All tables that there is something to fill with."""
    tasks = Tasks(found)
    if not found.grid and not found.final and not found.failed:
        return []
    made = [_poster(tasks)]
    if REFERENCE in tasks.names and found.final:
        made += [_against(tasks), *_time_to_score(tasks)]
    made += [_of_task(tasks, task) for task in found.tasks]
    made += [_sets(found), _grid(tasks)]
    if found.final:
        made.append(_every(tasks))
    return [table for table in made if table.rows]


# ---------------------------------------------------------------- the poster's table


def _poster(tasks: Tasks) -> Table:
    found, rows = tasks.found, []
    for name in tasks.names:
        row: Row = {
            "method": name,
            "#TTPs (active)": _over_tasks(tasks, name, lambda outcome: outcome.active),
            "touched": _over_tasks(tasks, name, lambda outcome: outcome.touched),
            "added": _over_tasks(tasks, name, lambda outcome: outcome.added),
        }
        for task in found.tasks:
            reason = found.failed.get((task.name, name))
            scores = spread(list(tasks.scores(task, name).values()))
            row[f"{task.name}, {tasks.metric(task)}"] = scores or ("x" if reason else None)
        row["Avg."] = spread(list(averages(tasks, name).values()))
        reasons = [why for (_, of), why in found.failed.items() if of == name]
        row["not measured"] = "; ".join(dict.fromkeys(reasons + _lacking(tasks, name)))
        rows.append(row)
    seeds = found.settings.seeds
    note = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."
    return Table(
        title="Scores",
        rows=rows,
        note=f"{note} Of the examples that judge, after the last step. Avg.: the mean over the tasks, of the seeds that every task has.",
    )


def _over_tasks(tasks: Tasks, name: str, count: Callable[[Outcome], int]) -> int | str | None:
    """A number of parameters; from the least to the greatest where the models of tasks differ."""
    counts = sorted({count(outcome) for task in tasks.found.tasks for outcome in tasks.found.of(task.name, name)})
    return f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else next(iter(counts), None)


def _lacking(tasks: Tasks, name: str) -> list[str]:
    """Which tasks have the method's score of some seeds alone, in words."""
    said, seeds = [], tasks.found.settings.seeds
    for task in tasks.found.tasks:
        runs, scores = tasks.found.of(task.name, name), tasks.scores(task, name)
        if runs and len(scores) < seeds:
            diverged = len(runs) - len(scores)
            said.append(f"{task.name}: {len(scores)} of {seeds} seeds" + (f", {diverged} diverged" if diverged else ""))
    return said


def spread(values: Sequence[float]) -> str | None:
    """`85.3 ± 0.6`"""
    if not values:
        return None
    digits = 3 if max(map(abs, values)) < 10 else 1
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def averages(tasks: Tasks, name: str) -> dict[int, float]:
    """Seed -> mean over the tasks, of the seeds that every task has. Empty if scores are of kinds that cannot be averaged."""
    every = [tasks.scores(task, name) for task in tasks.found.tasks]
    kinds = {tasks.metric(task) in LOWER for task in tasks.found.tasks}
    return {} if len(kinds) > 1 else {seed: statistics.fmean(of[seed] for of in every) for seed in shared(every)}


def shared(every: Sequence[Mapping[int, float]]) -> list[int]:
    """The seeds that all have."""
    return sorted(set[int].intersection(*map(set, every)))


# ---------------------------------------------------------------- against the reference


def _against(tasks: Tasks) -> Table:
    rows = []
    theirs = averages(tasks, REFERENCE)
    for name in tasks.names:
        ours = averages(tasks, name)
        both = shared([ours, theirs])
        if name == REFERENCE or not both:
            continue
        differences = [ours[seed] - theirs[seed] for seed in both]
        of_examples, of_seeds = _interval(tasks, name, both), over_seeds(differences)
        row: Row = {
            "method": name,
            f"mean score - {REFERENCE}": statistics.fmean(differences),
            "seeds": len(both),
            "least, by seed": min(differences),
            "greatest, by seed": max(differences),
            "other seeds, low": of_seeds and of_seeds[0],
            "other seeds, high": of_seeds and of_seeds[1],
            "other examples, low": of_examples and of_examples[0],
            "other examples, high": of_examples and of_examples[1],
            "verdict": _verdict(tasks, of_seeds, of_examples),
        }
        rows.append(row)
    note = (
        "Difference of the mean over the tasks, the same seeds on both sides. Other seeds: 95 % interval of Student's t, of the differences by seed. Other examples: the "
        f"middle 95 % over {RESAMPLES} draws, with replacement, of the examples that judge, the same ones for both. Ahead or behind: both intervals exclude zero."
    )
    return Table(title=f"Against {REFERENCE}", rows=rows, note=note)


def _verdict(tasks: Tasks, *intervals: Interval | None) -> str | None:
    """None if one of the intervals is not known: a single seed says nothing of others."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    more_is_better = tasks.metric(tasks.found.tasks[0]) not in LOWER
    if all(low > 0 for low, _ in known):
        return "ahead" if more_is_better else "behind"
    if all(high < 0 for _, high in known):
        return "behind" if more_is_better else "ahead"
    return "level"


def _interval(tasks: Tasks, name: str, seeds: Sequence[int]) -> Interval | None:
    """Ends of the bootstrap interval of the difference of means over `seeds`; None where a task keeps no predictions."""
    drawn = []
    for task in tasks.found.tasks:
        metric = tasks.metric(task)
        of_both = [tasks.found.by_seed(task.name, of) for of in (name, REFERENCE)]
        runs = [[of[seed] for seed in seeds] for of in of_both]
        if metric not in METRICS or any(not outcome.predicted for side in runs for outcome in side):
            return None
        ours, theirs = (resampled(side, metric, positive(tasks.found, task), task.name) for side in runs)
        drawn.append(points(metric, 1) * (ours - theirs))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(low), float(high)


def positive(found: Comparison, task: QualityTask) -> int:
    """Number of the class whose F1 counts, as `training/metrics.py` has it."""
    named = NAMED.get(task.recipe.data.name or "")
    classes = found.sources[task.name]["judge"].get("classes", [])
    return classes.index(named.positive) if named and named.positive in classes else 1


# ---------------------------------------------------------------- time to a score


def _time_to_score(tasks: Tasks) -> list[Table]:
    found, rows = tasks.found, []
    for name in tasks.names:
        row: Row = {"method": name}
        ratios: list[float | None] = []
        for task in found.tasks:
            goal = tasks.curve(task, REFERENCE)
            if not goal:
                continue
            own, theirs = (first_step(tasks, task, of, goal[-1][1]) for of in (name, REFERENCE))
            paces = tasks.paces(task, name)
            ratio = own / theirs * statistics.median(paces) if own and theirs and paces else None
            row[f"{task.name}: steps to {goal[-1][1]:.1f}"] = own if own or not tasks.curve(task, name) else "never"
            row[f"{task.name}: time / {REFERENCE}"] = ratio
            ratios.append(ratio)
        reached = [ratio for ratio in ratios if ratio is not None]
        row["mean of time"] = statistics.fmean(reached) if reached and len(reached) == len(ratios) else None
        rows.append(row)
    note = (
        f"First evaluation at which the mean of the seeds, on the examples that choose, is as good as that of {REFERENCE} after its last step; times "
        f"are steps by `a step / {REFERENCE}`."
    )
    return (
        [Table(title=f"Time to the final score of {REFERENCE}", rows=rows, note=note)]
        if rows and len(rows[0]) > 2
        else []
    )


def first_step(tasks: Tasks, task: QualityTask, name: str, goal: float) -> int | None:
    """The first evaluation at which a method is as good as `goal`; None if it never is."""
    sign = -1 if tasks.metric(task) in LOWER else 1
    return next((step for step, score in tasks.curve(task, name) if sign * score >= sign * goal), None)


# ---------------------------------------------------------------- task by task


def _of_task(tasks: Tasks, task: QualityTask) -> Table:
    found, metric, rows = tasks.found, tasks.metric(task), []
    every = [outcome.scores for cell, outcome in found.final.items() if cell.task == task.name]
    other = [name for name in dict.fromkeys(name for scores in every for name in scores) if name != metric]
    for name in tasks.names:
        outcomes, scores = found.of(task.name, name), list(tasks.scores(task, name).values())
        rate, paces, seconds = found.rates.get((task.name, name)), tasks.paces(task, name), tasks.seconds(task, name)
        row: Row = {
            "method": name,
            "active": outcomes[0].active if outcomes else None,
            "touched": outcomes[0].touched if outcomes else None,
            "learning rate": rate,
            "of the grid": edge(found, task.name, name),
            metric: statistics.fmean(scores) if scores else None,
            "std": statistics.stdev(scores) if len(scores) > 1 else None,
            "min": min(scores, default=None),
            "max": max(scores, default=None),
        }
        for of in other:
            values = [points(of, outcome.scores[of]) for outcome in outcomes if of in outcome.scores]
            row[of] = statistics.fmean(values) if values else None
        losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        row["test loss"] = statistics.fmean(losses) if losses else None
        timed = found.timed.get(task.name)
        row[f"a step / {REFERENCE}"] = statistics.median(paces) if paces else None
        beside = paces if timed and timed.arrangement == TOGETHER else []
        row |= {f"a step / {REFERENCE}, {end.__name__}": end(beside, default=None) for end in (min, max)}
        row["ms a step"] = 1000 * seconds if seconds else None
        row["minutes of training"] = seconds * found.settings.steps_of(task) / 60 if seconds else None
        peaks = [outcome.peak_bytes for outcome in outcomes if outcome.peak_bytes is not None]
        row["peak MiB"] = max(peaks) / 2**20 if peaks else None
        diverged = sum(outcome.diverged is not None for outcome in outcomes)
        why = [found.failed.get((task.name, name), f"{diverged} of {len(outcomes)} runs diverged" if diverged else "")]
        if (task.name, name) in found.ended:
            why.append(f"its grid ends before {found.ended[task.name, name]}")
        if timed and seconds is None and (task.name, name) not in found.failed:
            why.append(f"no times: {timed.reason(name)}")
        row["not measured"] = "; ".join(filter(None, why))
        rows.append(row)
    return Table(title=task.name, rows=rows, note=_of_times(tasks, task))


def _of_times(tasks: Tasks, task: QualityTask) -> str:
    """What the columns of times are; empty where there are none."""
    timed = tasks.found.timed.get(task.name)
    if timed is None:
        return ""
    if not timed.seconds.get(REFERENCE):
        return f"ms a step: the mean, timed {timed.arrangement}; minutes: as many steps as a final run has."
    ends = ", and the ends," if timed.arrangement == TOGETHER else ""
    return (
        f"a step / {REFERENCE}: the median{ends} of ratios on the same batch, timed {timed.arrangement}; ms a step: that median by the mean of "
        f"{REFERENCE}'s times; minutes: as many steps as a final run has."
    )


def edge(found: Comparison, task: str, name: str) -> str | None:
    """Where in its grid the learning rate that was chosen lies: there may be a better one beyond an end."""
    rate = found.rates.get((task, name))
    tried = [cell.learning_rate for cell in found.grid if (cell.task, cell.method) == (task, name)]
    if rate is None or len(tried) < 2:
        return None
    return "lowest" if rate == min(tried) else "highest" if rate == max(tried) else "within"


def _sets(found: Comparison) -> Table:
    rows: list[Row] = []
    for task in found.tasks:
        choose, judge = found.sources[task.name]["choose"], found.sources[task.name]["judge"]
        rows.append(
            {
                "task": task.name,
                "kind": task.recipe.task,
                "steps": found.settings.steps_of(task),
                "steps to choose a rate": found.settings.steps_of_grid(task),
                "rates of the grids, times": task.rate_scale,
                "trained on": _count(choose, "train"),
                "choose": _count(choose, "validation"),
                "judge": _count(judge, "validation"),
                "of these, trained on or choose": found.seen.get(task.name),
                "classes": len(choose["classes"]) if "classes" in choose else None,
            }
        )
    return Table(title="The examples", rows=rows)


def _count(summary: dict[str, Any], name: str) -> int | None:
    return summary.get(name, {}).get("examples")


def _grid(tasks: Tasks) -> Table:
    rows = [
        {
            "task": cell.task,
            "method": cell.method,
            "learning rate": cell.learning_rate,
            "loss": outcome.loss,
            "score": main(outcome, tasks.metric(task)),
            "chosen": "yes" if tasks.found.rates.get((cell.task, cell.method)) == cell.learning_rate else "",
            "diverged": outcome.diverged or "",
        }
        for task in tasks.found.tasks
        for cell, outcome in tasks.found.grid.items()
        if cell.task == task.name
    ]
    note = "One run each with the first seed, judged by the examples that choose; the lowest loss is chosen."
    return Table(title="The grid", rows=rows, note=note)


def _every(tasks: Tasks) -> Table:
    rows = [
        {
            "task": cell.task,
            "method": cell.method,
            "seed": cell.seed,
            "learning rate": cell.learning_rate,
            "score": main(outcome, tasks.metric(task)),
            "loss": outcome.loss,
            "minutes, other work beside it": outcome.seconds / 60,
            "diverged": outcome.diverged or "",
        }
        for task in tasks.found.tasks
        for cell, outcome in sorted(tasks.found.final.items(), key=lambda run: (run[0].method, run[0].seed))
        if cell.task == task.name
    ]
    return Table(title="Every final run", rows=rows)
