"""What `slicefine evaluate` is asked for. Nothing heavy is imported here, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.evaluation.suites import Suite, Task, get_suite, select

ENGINES = ("generate", "lm-eval")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One evaluation."""

    model: str
    """Run folder, adapter folder, model folder, or hub name of a model."""
    suite: str
    """A key of `SUITES`."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; none = all of the suite."""
    data: str | None = None
    """Folder with `<task>/test.jsonl` or `<task>/test.json`; None = the data sets of the hub."""
    limit: int | None = None
    """First questions of each task; None = all."""
    output: str | None = None
    """Folder of answers and results; None = inside the run folder."""
    batch_size: int = 32
    """Questions per forward pass."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; None = as published for the suite."""
    num_beams: int = 1
    """Beams of the search; 1 = greedy."""
    train_data: tuple[str, ...] = ()
    """Files, or hub names, of the training examples; none = those of the run."""
    allow_contamination: bool = False
    """Go on if training examples are test questions."""
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
        try:
            select(get_suite(self.suite), self.tasks)
        except SliceFineError as error:
            found.append(str(error))
        for flag, value in (
            ("limit", self.limit),
            ("batch_size", self.batch_size),
            ("max_new_tokens", self.max_new_tokens),
            ("num_beams", self.num_beams),
        ):
            if value is not None and value < 1:
                found.append(f"`--{flag}` is at least 1; got {value}.")
        if self.engine == "lm-eval":
            found += self._harness_problems()
        return found

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
    def chosen_suite(self) -> Suite:
        return get_suite(self.suite)

    @property
    def chosen_tasks(self) -> tuple[Task, ...]:
        return select(self.chosen_suite, self.tasks)

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return self.max_new_tokens or self.chosen_suite.max_new_tokens
