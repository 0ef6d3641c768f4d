"""Integer tables that hold a million rows without a million Python objects.

Rows are plain ints and each field is one numpy array, so that a batch of rows is read or written by
one vector operation, and the garbage collector has nothing to walk. Single values go through a
memoryview of the same array, which reads in half of numpy's time.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

Column: TypeAlias = "memoryview[int]"
"""A field of a table: `column[row]` for one value, `np.asarray(column)` (no copy) for vectors.

A table that grows replaces its columns: hold on to the table, not to a column.
"""

FloatColumn: TypeAlias = "memoryview[float]"

Int32s: TypeAlias = npt.NDArray[np.int32]
Int64s: TypeAlias = npt.NDArray[np.int64]

NOTHING: Int32s = np.empty(0, np.int32)
"""No tokens, no blocks."""


class Columns:
    """Rows handed out by `new` and given back by `free`; subclasses name the fields.

    A row's fields hold what its last owner left there: whoever takes a row sets all of them.
    """

    FIELDS: ClassVar[dict[str, str]]
    """Field name to memoryview format: "b" int8, "i" int32, "q" int64, "d" float64."""

    used: Column

    def __init__(self) -> None:
        self._free: list[int] = []
        self._top = 0
        self._allocate(64, 0)

    def __len__(self) -> int:
        """Rows in use."""
        return self._top - len(self._free)

    @property
    def top(self) -> int:
        """All rows in use are below it."""
        return self._top

    def new(self) -> int:
        """A row, the last one given back first. Amortised O(1)."""
        if self._free:
            row = self._free.pop()
        else:
            if self._top == len(self.used):
                self._allocate(2 * self._top, self._top)
            row = self._top
            self._top += 1
        self.used[row] = 1
        return row

    def extend(self, count: int) -> int:
        """`count` rows that nobody had before, all fields 0; returns the first. O(capacity)."""
        first = self._top
        self._top += count
        if self._top > len(self.used):
            self._allocate(max(self._top, 2 * first), first)
        np.asarray(self.used)[first : self._top] = 1
        return first

    def free(self, row: int) -> None:
        self.used[row] = 0
        self._free.append(row)

    def rows(self) -> Int64s:
        """The rows in use, ascending. O(capacity)."""
        return np.flatnonzero(np.asarray(self.used)[: self._top])

    def _allocate(self, capacity: int, kept: int) -> None:
        for name, form in {"used": "b", **self.FIELDS}.items():
            column = np.zeros(capacity, np.dtype(form))
            if kept:
                column[:kept] = np.asarray(getattr(self, name))[:kept]
            setattr(self, name, column.data)
