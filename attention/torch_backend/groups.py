"""Batches of work items as index tensors, ready to be run.

The items of a group are padded to its largest. Padding repeats an item's last token or block and
its last query, so that it reads only what the item reads anyway; a mask hides the tokens, and the
rows are dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import FloatArray, Segments
from attention.torch_backend.batches import Batches, Gathers, Views
from attention.torch_backend.items import BoolArray, WorkItems
from attention.torch_backend.places import blocks_of, slots_of


class InPlace(NamedTuple):
    """KV of equally spaced runs of consecutive blocks.

    Attributes:
        block, offset: where the first item's first token lies.
        step: blocks from each item to the next.
    """

    block: int
    offset: int
    step: int


class Rows(NamedTuple):
    """Rows of a cache that hold the tokens of a call.

    Attributes:
        chosen: int64, those that are to be gathered.
        blank: int64, where in what was gathered `Gathered.blank` lies, or None.
        num_rows, width, step: of all of the cache: elements of one, and from each to the next.
        heads_together: a row has all heads of its tokens; else an item's heads follow each other.
    """

    chosen: torch.Tensor
    blank: torch.Tensor | None
    num_rows: int
    width: int
    step: int
    heads_together: bool


class Gathered(NamedTuple):
    """KV at slots, or in whole blocks.

    Attributes:
        ids: int64 [size, tokens], slots, or [size, tokens / unit], blocks that the tokens fill, of
            any strides; one row where all items read the same.
        unit: tokens at each: 1 or the block size.
        blank: int64, tokens [size * tokens] that lie behind the end of their item in its last
            blocks, where anything may be written; None where there is none.
        known: for caches of some shape and strides the rows, as far as they have been asked for.
    """

    ids: torch.Tensor
    unit: int
    blank: torch.Tensor | None
    known: dict[tuple[int, ...], Rows]


class Group(NamedTuple):
    """One batched call: `size` items of up to `queries` queries and `tokens` tokens each.

    Attributes:
        size, queries, tokens: the padded shape.
        kv: where the tokens lie.
        positions: int64, position of each item's first token, this and other groups'.
        item: where the group's items begin in `positions`.
        temperature: what logits are divided by.
        log_weight: [size], added to the logits of each item; None for 0.
        first_query: first query, if the group's are consecutive and unpadded.
        query_index: int64 [size * queries], the queries otherwise.
        rows, targets: int64, the group's rows that are kept and their queries; None where all are
            kept.
        mask: [size, 1 or queries, tokens], 0 where seen and -inf where not; None where all is seen.
    """

    size: int
    queries: int
    tokens: int
    kv: InPlace | Gathered
    positions: torch.Tensor
    item: int
    temperature: float
    log_weight: torch.Tensor | None
    first_query: int | None = None
    query_index: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def make_groups(
    problem: Problem,
    segments: Segments,
    query: Int64Array,
    views: Views | None,
    gathers: Gathers | None,
) -> list[Group]:
    """Make the index tensors of all batches on the problem's device.

    Args:
        query: int64 [R], the number by which a row's query goes in the groups; ascending in the
            rows of a segment.
    """
    groups = []
    if views is not None:
        groups = _groups(problem, segments, query, views.batches, _in_place(views))
    if gathers is not None:
        kv = _gathered(problem, segments, gathers)
        groups += _groups(problem, segments, query, gathers.batches, kv)
    return groups


def _in_place(views: Views) -> list[InPlace]:
    columns = (views.block, views.offset, views.step)
    return [InPlace(*where) for where in zip(*(c.tolist() for c in columns), strict=True)]


def _gathered(problem: Problem, segments: Segments, gathers: Gathers) -> list[Gathered]:
    batches, whole_blocks = gathers
    of_item, padded = whole_blocks.repeat(batches.size), batches.tokens.repeat(batches.size)
    ids: dict[bool, torch.Tensor] = {}
    for whole in (False, True):
        (some,) = (of_item == whole).nonzero()
        if len(some):
            units, items = padded.take(some), batches.items.take(some)
            if whole:
                where = blocks_of(segments, items, units // segments.block_size)
            else:
                where = slots_of(segments, items, units)
            ids[whole] = torch.from_numpy(where).to(problem.device)
    gathered = []
    done = {False: 0, True: 0}
    for whole, begin, size, tokens in zip(
        whole_blocks.tolist(),
        batches.begin.tolist(),
        batches.size.tolist(),
        batches.tokens.tolist(),
        strict=True,
    ):
        unit = segments.block_size if whole else 1
        count = size * tokens // unit
        of = slice(done[whole], done[whole] + count)
        done[whole] += count
        blank = None
        if whole:
            kv_len = batches.items.kv_len[begin : begin + size]
            behind = np.flatnonzero(np.arange(tokens) >= kv_len[:, None])
            if len(behind):
                blank = torch.from_numpy(behind).to(problem.device)
        gathered.append(Gathered(ids[whole][of].view(size, -1), unit, blank, {}))
    return gathered


def _groups(
    problem: Problem,
    segments: Segments,
    query: Int64Array,
    batches: Batches,
    kv: list[InPlace] | list[Gathered],
) -> list[Group]:
    items, lead = batches.items, batches.begin
    first_row = query.take(items.row_begin)
    scattered = ~_consecutive(batches, first_row, query.take(items.row_end - 1) + 1)
    first_position = segments.start.take(items.segment) + items.kv_begin
    positions = torch.from_numpy(first_position).to(problem.device)
    temperature: FloatArray = np.ones(len(lead))
    log_weight = None
    if segments.temperature is not None:
        temperature = segments.temperature.take(items.segment.take(lead))
    if segments.log_weight is not None:
        each = torch.from_numpy(segments.log_weight.take(items.segment))
        log_weight = each.to(problem.device, problem.precision)

    columns = *batches[1:], first_row.take(lead), scattered, temperature
    indices = iter(_query_indices(problem, query, batches, scattered))
    groups = []
    for where, item, size, queries, tokens, first_query, apart, divisor in zip(
        kv, *(column.tolist() for column in columns), strict=True
    ):
        weight = None if log_weight is None else log_weight[item : item + size]
        # By their places, as by name it takes more than twice as long.
        in_range, index = (None, next(indices)) if apart else (first_query, None)
        groups.append(
            Group(size, queries, tokens, where, positions, item, divisor, weight, in_range, index)
        )

    masked = items.masked.take(lead)
    ragged = np.minimum.reduceat(items.kv_len, lead) < batches.tokens
    padded = np.minimum.reduceat(items.num_rows, lead) < batches.queries
    for batch in (masked | ragged | padded).nonzero()[0].tolist():
        group = groups[batch]
        some = items.take(np.arange(group.item, group.item + group.size))
        if ragged[batch] and not masked[batch]:
            seen = np.arange(group.tokens) < some.kv_len[:, None]
            group = group._replace(mask=additive(problem, seen[:, None]))
        if masked[batch] or padded[batch]:
            group = _with_rows(problem, segments, query, some, group)
        groups[batch] = group
    return groups


def _query_indices(
    problem: Problem, query: Int64Array, batches: Batches, chosen: BoolArray
) -> Sequence[torch.Tensor]:
    """The padded queries of each of the chosen batches."""
    if not np.count_nonzero(chosen):
        return ()
    of_items, items = chosen.repeat(batches.size), batches.items
    begin, end = items.row_begin[of_items], items.row_end[of_items]
    item, ordinal = expand(batches.queries.repeat(batches.size)[of_items])
    row = np.minimum(begin.take(item) + ordinal, end.take(item) - 1)
    indices: tuple[torch.Tensor, ...] = (
        torch.from_numpy(query.take(row))
        .to(problem.device)
        .split((batches.size * batches.queries)[chosen].tolist())
    )
    return indices


def _with_rows(
    problem: Problem, segments: Segments, query: Int64Array, items: WorkItems, group: Group
) -> Group:
    """The group with the rows that are kept of it and, where it needs one, its mask."""
    row = items.row_begin[:, None] + np.arange(group.queries)
    kept = row < items.row_end[:, None]
    row = np.minimum(row, items.row_end[:, None] - 1)
    if items.masked[0]:
        seen = _seen(problem, segments, items, row, group.tokens)
        group = group._replace(mask=additive(problem, seen))
        kept &= seen.any(axis=2)
    if not kept.all():
        group = group._replace(
            rows=torch.from_numpy(np.flatnonzero(kept)).to(problem.device),
            targets=torch.from_numpy(query[row[kept]]).to(problem.device),
        )
    return group


def _consecutive(batches: Batches, first: Int64Array, last: Int64Array) -> BoolArray:
    """For each batch, whether its queries are consecutive and none of them padding.

    first, last: int64 [I], first query of each item and the one behind its last.
    """
    follows = np.ones(len(first), np.bool_)
    np.equal(first[1:], last[:-1], out=follows[1:])
    follows[batches.begin] = True
    follows &= last - first == batches.queries.repeat(batches.size)
    consecutive: BoolArray = np.logical_and.reduceat(follows, batches.begin)
    return consecutive


def _seen(
    problem: Problem, segments: Segments, items: WorkItems, row: Int64Array, tokens: int
) -> BoolArray:
    """Which tokens of their item the rows `row` [size, queries] see, [size, queries, tokens]."""
    token = np.arange(tokens)
    first = segments.start[items.segment] + items.kv_begin
    behind = segments.position[row] - first[:, None]
    seen: BoolArray = token < np.minimum(behind + 1, items.kv_len[:, None])[:, :, None]
    if problem.window is not None:
        in_window = token > (behind - problem.window)[:, :, None]
        seen &= in_window | (token < problem.sink_tokens - first[:, None])[:, None]
    return seen


def additive(problem: Problem, seen: BoolArray) -> torch.Tensor:
    """A mask to add to logits: 0 where seen, -inf elsewhere."""
    mask = torch.zeros(seen.shape, dtype=problem.precision)
    return mask.masked_fill_(torch.from_numpy(~seen), -torch.inf).to(problem.device)
