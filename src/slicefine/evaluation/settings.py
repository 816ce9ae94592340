"""What `slicefine evaluate` is asked for. Nothing heavy is imported here, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.evaluation.suites import LABELLED, NAMES, Suite, Task, chosen, get_suite, select

ENGINES = ("generate", "lm-eval")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One evaluation."""

    model: str
    """Run folder, adapter folder, model folder, or hub name of a model."""
    suite: str | None = None
    """One of `NAMES`; None = the labelled examples of `data`."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; none = all of the suite, or for a classification run the one that it was trained for."""
    data: str | None = None
    """Folder with a folder for each task; without a suite, a labelled file or folder; None = the data sets of the hub."""
    limit: int | None = None
    """First questions of each task, or examples evenly spaced; None = all."""
    output: str | None = None
    """Folder of answers and results; None = inside the run folder."""
    batch_size: int = 32
    """Questions or examples per forward pass."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; None = as published for the suite."""
    num_beams: int = 1
    """Beams of the search; 1 = greedy."""
    train_data: tuple[str, ...] = ()
    """Files, or hub names, of the training examples; none = those of the run."""
    allow_contamination: bool = False
    """Go on if training examples are in the test sets."""
    overwrite: bool = False
    """Drop the answers in `output`."""
    engine: str = "generate"
    """One of `ENGINES`."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each; empty if nothing is."""
        found = []
        if self.engine not in ENGINES:
            found.append(
                f"`--engine` is one of {', '.join(ENGINES)}; got {self.engine!r}.{did_you_mean(self.engine, ENGINES)}"
            )
        found += self._suite_problems()
        for flag, value in (
            ("limit", self.limit),
            ("batch_size", self.batch_size),
            ("max_new_tokens", self.max_new_tokens),
            ("num_beams", self.num_beams),
        ):
            if value is not None and value < 1:
                found.append(f"`--{flag}` is at least 1; got {value}.")
        if self.classifies:
            found += self._unused_problems()
        elif self.engine == "lm-eval":
            found += self._harness_problems()
        return found

    def _suite_problems(self) -> list[str]:
        if self.suite is None:
            found = []
            if self.data is None:
                found.append(
                    f"`--suite` says what to score: {', '.join(NAMES)}; for a classification run, `--data` alone can name labelled "
                    "examples. Give one of them."
                )
            if self.tasks:
                found.append("`--tasks` names tasks of a suite. Add --suite, or leave it out.")
            return found
        try:
            if self.suite in LABELLED:
                chosen(self.suite, LABELLED[self.suite], self.tasks)
            else:
                select(get_suite(self.suite), self.tasks)
        except SliceFineError as error:
            return [str(error)]
        return []

    def _unused_problems(self) -> list[str]:
        given = {
            "max_new_tokens": self.max_new_tokens is not None,
            "num_beams": self.num_beams != 1,
            "engine": self.engine == "lm-eval",
        }
        return [
            f"`--{flag}` says how answers are generated; classes are not. Leave it out."
            for flag in given
            if given[flag]
        ]

    def _harness_problems(self) -> list[str]:
        found = []
        unused = {
            "data": self.data,
            "num_beams": self.num_beams != 1,
            "max_new_tokens": self.max_new_tokens,
            "train_data": self.train_data,
            "allow_contamination": self.allow_contamination,
        }
        for flag in (flag for flag, given in unused.items() if given):
            found.append(
                f"`--{flag}` says how answers are generated from our test sets; lm-evaluation-harness has its own. Leave it out."
            )
        if find_spec("lm_eval") is None:
            found.append("`--engine lm-eval` needs lm-evaluation-harness: pip install 'slicefine[eval]'")
        return found

    @property
    def classifies(self) -> bool:
        """Whether labelled examples are scored, and no generated answers. An unknown suite is neither."""
        return self.suite is None or self.suite in LABELLED

    @property
    def chosen_sets(self) -> tuple[str, ...]:
        """The labelled sets of the suite that are named; none if none is."""
        if self.suite is None or not self.tasks:
            return ()
        return chosen(self.suite, LABELLED[self.suite], self.tasks)

    @property
    def chosen_suite(self) -> Suite:
        assert self.suite is not None
        return get_suite(self.suite)

    @property
    def chosen_tasks(self) -> tuple[Task, ...]:
        return select(self.chosen_suite, self.tasks)

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return self.max_new_tokens or self.chosen_suite.max_new_tokens
