"""What `slicefine bench quality` says while it runs: a line for each run with the time left, and on a terminal a bar below."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

TITLE = "quality"


class Progress:
    """Counts optimizer steps, by which the time left is estimated; those of earlier calls, which took no time, are left out."""

    def __init__(self, steps: int) -> None:
        """`steps`: of all runs, as far as is known."""
        self._planned, self._made = steps, 0
        self._began = time.monotonic()
        # None = no bar unless stderr is a terminal: in a file each of its states would be a line.
        self._bar = tqdm(total=steps, desc=TITLE, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None)

    def leave_out(self, steps: int) -> None:
        """Steps that need not be made, or cannot."""
        self.add(-steps)

    def add(self, steps: int) -> None:
        """Steps that were not known of."""
        self._planned += steps
        self._bar.total = self._planned
        self._bar.refresh()

    def made(self, steps: int, words: str) -> None:
        """Say what came of a run of `steps`."""
        self._made += steps
        self._bar.update(steps)
        seconds = (time.monotonic() - self._began) * (self._planned - self._made) / self._made
        left = f"{tqdm.format_interval(max(0.0, seconds))} left"
        self.say(f"[{self._made:,}/{self._planned:,} steps, {left}] {words}")

    def say(self, words: str) -> None:
        """A line, above the bar if there is one."""
        self._bar.write(words, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
