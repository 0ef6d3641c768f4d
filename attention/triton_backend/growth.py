"""How a schedule grows by a token a row: which of its numbers change to what."""

import numpy as np
import numpy.typing as npt

from attention.errors import PlanMismatch
from attention.forest import Int32Array, Int64Array
from attention.triton_backend.buffers import Change
from attention.triton_backend.planner import UnitPlan
from attention.triton_backend.tails import place_tails

AnyArray = npt.NDArray[np.generic]


class Growth:
    """The tails of R rows, each a query of its own, on their way.

    Attributes:
        left: how many tokens a row may still grow by.
    """

    def __init__(self, plan: UnitPlan, units: str, reserve: int) -> None:
        """Begin with the tails as they are planned; there must be some.

        Args:
            units: name of the columns of the units that read the tails.
        """
        assert plan.tails is not None
        segments, tail = plan.segments, plan.tails.segment
        self.left = reserve
        self._units = units
        self._block_size = segments.block_size
        self._query = segments.query
        places = place_tails(segments, plan.pieces, plan.tails)
        # What goes into the columns at every step is counted in 32 bits, as they do.
        self._next_slot, self._entry, self._length, self._room, *rest = places
        self._width, self._tile, self._free, self._unit = rest
        self._position = segments.position.astype(np.int32)
        self._scale = self._bias = None
        if segments.temperature is not None:
            self._scale = 1 / segments.temperature[tail]
        if segments.log_weight is not None:
            self._bias = segments.log_weight[tail]

    def advance(self, slots: AnyArray) -> list[Change]:
        """Append the token at slots[query] to each row's tail; the changes of the columns.

        Where a tail's last entry is full, or the slot does not follow it in its block, the row
        takes the next entry that is free behind its tile's list. O(R).

        Raises PlanMismatch for slots that are not R integers of at least 0; nothing is changed.
        """
        if slots.shape != self._query.shape or slots.dtype.kind not in "iu":
            raise PlanMismatch(
                f"slots has shape {slots.shape} and dtype {slots.dtype}, "
                f"expected {self._query.shape} integers"
            )
        if len(slots) and slots.min() < 0:
            raise PlanMismatch(f"slots has {slots.min()}, expected at least 0")
        slot = slots.astype(np.int32).take(self._query)
        self.left -= 1
        self._position += 1
        fresh = slot != self._next_slot
        fresh |= self._room == 0
        changes: list[Change] = []
        (row,) = fresh.nonzero()
        if len(row):
            changes = self._open(row, slot)
        self._length += 1
        self._room -= 1
        self._next_slot = np.add(slot, 1, out=slot)
        return [
            *changes,
            ("entries.length", self._entry, self._length),
            ("rows.position", None, self._position),
        ]

    def _open(self, row: Int64Array, slot: Int32Array) -> list[Change]:
        """Give rows new entries, which begin at their slots."""
        tile = self._tile[row]
        # Rows of a tile are neighbours and take its free entries in their order.
        new = np.ones(len(row), np.bool_)
        np.not_equal(tile[1:], tile[:-1], out=new[1:])
        first = np.flatnonzero(new)
        count = np.diff(first, append=len(row))
        entry = self._free[tile] + np.arange(len(row)) - np.repeat(first, count)
        tile = tile[first]
        self._free[tile] += count
        self._entry[row] = entry
        self._length[row] = 0
        self._room[row] = np.minimum(
            self._width[row], self._block_size - slot[row] % self._block_size
        )
        changes: list[Change] = [
            ("entries.slot", entry, slot[row]),
            ("entries.position", entry, self._position[row]),
            ("entries.row_begin", entry, row),
            ("entries.row_end", entry, row + 1),
            (f"{self._units}.entry_end", self._unit[tile], self._free[tile]),
        ]
        if self._scale is not None:
            changes.append(("entries.scale", entry, self._scale[row]))
        if self._bias is not None:
            changes.append(("entries.bias", entry, self._bias[row]))
        return changes
