"""A file of finished items, one JSON line each, written batch by batch, so that nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.training.data import shorten

Item = TypeVar("Item")
Key = tuple[str, int]
"""Task and row."""


class Store(Generic[Item]):
    """The items in a folder. What a process wrote last, cut off in the middle of a line, is dropped with a warning."""

    FILE: ClassVar[str]
    ITEM: ClassVar[type]
    """A dataclass with `task` and `row`. Fields with a default came later: lines that were written before do without."""
    TYPES: ClassVar[dict[str, Any]]
    """Field of `ITEM` -> what its value is, for `isinstance`."""
    CALLED: ClassVar[str]
    AGAIN: ClassVar[str]
    """What is done about a line that was cut off."""

    def __init__(self, folder: Path) -> None:
        """Read the file in `folder`, if there is one. Raises `SliceFineError` for lines that are no items."""
        self.path = folder / self.FILE
        self._length = self._size = 0
        """Bytes of whole lines, and of all."""
        self.found: dict[Key, Item] = {}
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._length, self._size = content.rfind(b"\n") + 1, len(content)
        if self._length < self._size:
            warnings.warn(
                f"The last line of {self.path} was cut off when it was written; {self.AGAIN}.",
                SliceFineWarning,
                stacklevel=3,
            )
        needed = {field.name for field in dataclasses.fields(self.ITEM) if field.default is dataclasses.MISSING}
        problems = []
        for number, line in enumerate(content[: self._length].splitlines(), 1):
            try:
                values = json.loads(line)
                whole = needed <= values.keys() <= self.TYPES.keys()
                if not whole or not all(isinstance(value, self.TYPES[name]) for name, value in values.items()):
                    raise ValueError(f"not the fields of {self.CALLED}")
            except (ValueError, AttributeError) as error:
                problems.append(f"{self.path}:{number}: {error}.")
                continue
            self._add(self.ITEM(**values))
        if problems:
            raise SliceFineError(
                "\n".join([*shorten(problems), "Start anew with --overwrite, or name another --output."])
            )

    def _add(self, item: Any) -> None:
        self.found[item.task, item.row] = item

    def append(self, items: Sequence[Item]) -> None:
        """Write the items of a batch through to the disk.

        Raises `SliceFineError` if the file is not as this object has read or left it: another process writes into it.
        """
        lines = "".join(json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in items)  # pyright: ignore[reportArgumentType] -- a type variable cannot be bound to dataclasses
        with self.path.open("ab") as file:
            if file.tell() != self._size:
                raise SliceFineError(
                    f"Another process writes into {self.path}: wait for it, or choose another --output."
                )
            file.truncate(self._length)
            file.write(lines.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            self._length = self._size = file.seek(0, os.SEEK_END)
        for item in items:
            self._add(item)
