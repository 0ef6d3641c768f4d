"""What the kernels read: units of work as integer arrays.

A *unit* is a tile of up to `rows_per_tile` consecutive rows and a list of *entries*, runs of
consecutive slots that hold the KV of segments under those rows. One program of the segment kernel
takes one unit and one KV head: it walks the entries once for all its rows, with each row's query
heads of that KV head as rows of one matrix. Which row sees which token is an interval test: a row
sees an entry if it lies in the entry's range of rows, the rows of the segment. So a tile may walk
the union of its rows' paths, whatever their shape: chains and small siblings need no partial
results of their own, and a shared node is read once for all rows of the tile.

A unit gives one partial (o, lse) for each of its rows. Rows with a single partial are written to
the result directly, the others to slots of a buffer, in which the partials of a row stand side by
side in the order in which they are merged.

Everything is int32 on the plan's device, of fixed capacity, so that captured graphs stay valid:
what lies behind the sizes is not read.
"""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """R rows, as `attention.segments.Segments` orders them.

    Attributes:
        query: int32 [R], packed place of the row's query.
        position: int32 [R], its position.
        partial: int32 [R], slot of the row's first partial, or -1 if it has only one, which is
            then written to the result.
    """

    query: torch.Tensor
    position: torch.Tensor
    partial: torch.Tensor


class Entries(NamedTuple):
    """E runs of consecutive slots.

    Attributes:
        slot: int32 [E], the first slot.
        length: int32 [E], slots, 0 to the width of the units that read the entry.
        position: int32 [E], position of the first slot's token.
        row_begin, row_end: int32 [E], rows that attend to it.
        scale, bias: float32 [E], or None for 1 and 0: factor (1 / temperature) and log-weight of
            the logits.
    """

    slot: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    row_begin: torch.Tensor
    row_end: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None


class Units(NamedTuple):
    """U units that are run with the same tile, longest first.

    Lane i of a unit is token i % width of entry entry_begin + i // width.

    Attributes:
        size: int32 [1], units; those behind are capacity.
        row_begin, row_end: int32 [U], the unit's rows, at most rows_per_tile.
        entry_begin, entry_mid, entry_end: int32 [U], its entries. Up to entry_mid, every row of
            the unit sees all tokens of the entries; behind it a row sees token t of an
            entry if it lies in the entry's range of rows, t's position is at most its own, and t
            is inside the window or one of the first sink_tokens.
        log2_width: int32 [U], width of the unit's entries in lanes.
        ordinal: int32 [U], which of its rows' partials it gives: slot Rows.partial + ordinal.
        rows_per_tile: most rows that a unit has.
    """

    size: torch.Tensor
    row_begin: torch.Tensor
    row_end: torch.Tensor
    entry_begin: torch.Tensor
    entry_mid: torch.Tensor
    entry_end: torch.Tensor
    log2_width: torch.Tensor
    ordinal: torch.Tensor
    rows_per_tile: int


class Merges(NamedTuple):
    """Q results that are merged of several partials (or of rows of several segments).

    Attributes:
        size: int32 [1], results; those behind are capacity.
        query: int32 [Q], packed place of the query.
        begin, end: int32 [Q], its partials: slots of the partial buffer.
    """

    size: torch.Tensor
    query: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor


class Schedule(NamedTuple):
    """All work of one plan.

    Attributes:
        rows, entries: as above.
        units: one for each tile shape in use: lean (few rows), fat (many).
        merges: what is merged once all units are done.
        num_partials: slots that the partial buffer needs.
    """

    rows: Rows
    entries: Entries
    units: tuple[Units, ...]
    merges: Merges
    num_partials: int
