"""Batches of work items as index tensors, ready to be run.

The items of a group are padded to its largest. Padding repeats an item's last token and its last
query, so that it reads only what the item reads anyway; a mask hides the tokens, and the rows are
dropped.
"""

from typing import NamedTuple

import numpy as np
import torch

from attention.forest import Int64Array
from attention.ranges import expand
from attention.segments import Segments
from attention.torch_backend.batches import Batches
from attention.torch_backend.items import BoolArray, WorkItems


class Group(NamedTuple):
    """One batched call: `size` items of up to `queries` queries and `tokens` tokens each.

    Attributes:
        size, queries, tokens: the padded shape.
        spans: first slot and number of tokens of each item, if they are read where they lie.
        slots: int64 [size * tokens], slot of each token otherwise.
        mask: [size, 1 or queries, tokens], 0 where seen and -inf where not; None where all is seen.
        first_query: first query in depth-first order, if the group's are consecutive and unpadded.
        query_index: int64 [size * queries], depth-first query of each row otherwise.
        rows, targets: int64, the rows that are kept and the depth-first queries they belong to;
            None where all rows are kept.
    """

    size: int
    queries: int
    tokens: int
    spans: list[tuple[int, int]] | None
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    first_query: int | None
    query_index: torch.Tensor | None
    rows: torch.Tensor | None
    targets: torch.Tensor | None


def make_groups(
    segments: Segments,
    batches: Batches,
    *,
    window: int | None,
    mask_dtype: torch.dtype,
    device: torch.device,
) -> list[Group]:
    """Make the index tensors of all batches on the device.

    Args:
        mask_dtype: float32 or float64, the precision of the logits.
    """
    items = batches.items
    kv = _gathered(segments, batches, mask_dtype, device)
    rows = _rows(batches, device)
    spans = _spans(segments, batches)
    first_query = items.row_begin[batches.begin].tolist()
    masked = items.masked[batches.begin].tolist()

    groups = []
    for index, (begin, size, queries, tokens) in enumerate(
        zip(*(column.tolist() for column in batches[2:]), strict=True)
    ):
        of_kv = slice(kv.end[index] - size * tokens, kv.end[index])
        of_rows = slice(rows.end[index] - size * queries, rows.end[index])
        group = Group(
            size=size,
            queries=queries,
            tokens=tokens,
            spans=spans[index],
            slots=kv.slots[of_kv] if spans[index] is None else None,
            mask=kv.mask[of_kv].view(size, 1, tokens) if kv.ragged[index] else None,
            first_query=first_query[index] if rows.consecutive[index] else None,
            query_index=None if rows.consecutive[index] else rows.query_index[of_rows],
            rows=None,
            targets=None,
        )
        if masked[index] or rows.ragged[index]:
            query = rows.query[of_rows]
            kept = rows.kept[of_rows]
            if masked[index]:
                of = items.take(slice(begin, begin + size))
                seen = _seen(segments, of, query.reshape(size, queries), tokens, window)
                group = group._replace(mask=_additive(seen, mask_dtype, device))
                kept = kept & seen.any(axis=2).ravel()
            if not kept.all():
                group = group._replace(
                    rows=torch.from_numpy(np.flatnonzero(kept)).to(device),
                    targets=torch.from_numpy(query[kept]).to(device),
                )
        groups.append(group)
    return groups


class _Gathered(NamedTuple):
    """Slots and padding mask of all gathered items, and for each batch where its own end."""

    slots: torch.Tensor
    mask: torch.Tensor
    end: list[int]
    ragged: list[bool]


def _gathered(
    segments: Segments, batches: Batches, mask_dtype: torch.dtype, device: torch.device
) -> _Gathered:
    in_place = batches.in_place[batches.begin]
    shortest = np.minimum.reduceat(batches.items.kv_len, batches.begin)
    slots, is_padding = _slots(segments, batches)
    return _Gathered(
        slots=torch.from_numpy(slots).to(device),
        mask=_additive(~is_padding, mask_dtype, device),
        end=np.cumsum(np.where(in_place, 0, batches.size * batches.tokens)).tolist(),
        ragged=(~in_place & (shortest < batches.tokens)).tolist(),
    )


class _Rows(NamedTuple):
    """Query of each row of all batches, and for each batch where its own end.

    `query_index` is `query` on the device, `kept` False for padding.
    """

    query: Int64Array
    query_index: torch.Tensor
    kept: BoolArray
    end: list[int]
    ragged: list[bool]
    consecutive: list[bool]


def _rows(batches: Batches, device: torch.device) -> _Rows:
    items, begin = batches.items, batches.begin
    padded = np.repeat(batches.queries, batches.size)
    item, ordinal = expand(padded)
    kept = ordinal < items.num_rows[item]
    query = np.minimum(items.row_begin[item] + ordinal, items.row_end[item] - 1)
    unpadded = items.num_rows == padded
    follows = np.append(True, items.row_begin[1:] == items.row_end[:-1])
    follows[begin] = True
    return _Rows(
        query=query,
        query_index=torch.from_numpy(query).to(device),
        kept=kept,
        end=np.cumsum(batches.size * batches.queries).tolist(),
        ragged=(~np.logical_and.reduceat(unpadded, begin)).tolist(),
        consecutive=np.logical_and.reduceat(follows & unpadded, begin).tolist(),
    )


def _slots(segments: Segments, batches: Batches) -> tuple[Int64Array, BoolArray]:
    """Slots of the gathered items' tokens, padded within their batch; and which are padding."""
    block_size = segments.block_size
    gathered = np.flatnonzero(~batches.in_place)
    items = batches.items.take(gathered)
    padding = np.repeat(batches.tokens, batches.size)[gathered] - items.kv_len
    begin = segments.offset[items.segment] + items.kv_begin
    end = begin + items.kv_len
    first_block, last_block = begin // block_size, (end - 1) // block_size

    # One run of slots per block of an item.
    item, ordinal = expand(last_block - first_block + 1)
    block = first_block[item] + ordinal
    run_begin = np.maximum(block * block_size, begin[item])
    run_end = np.minimum((block + 1) * block_size, end[item])
    block_id = segments.blocks[segments.first_block[items.segment][item] + block].astype(np.int64)
    first_slot = block_id * block_size + run_begin % block_size
    run_len = run_end - run_begin
    # An item's last run goes on into its padding, which then takes the last token's slot instead.
    run_len[block == last_block[item]] += padding
    slots = np.arange(run_len.sum())
    slots += np.repeat(first_slot - (np.cumsum(run_len) - run_len), run_len)
    last_token = np.cumsum(items.kv_len + padding) - padding - 1
    of, ordinal = expand(padding)
    padded = last_token[of] + 1 + ordinal
    slots[padded] = slots[last_token[of]]
    is_padding = np.zeros(len(slots), np.bool_)
    is_padding[padded] = True
    return slots, is_padding


def _spans(segments: Segments, batches: Batches) -> list[list[tuple[int, int]] | None]:
    """First slot and number of tokens of the items of each batch that is read in place."""
    spans: list[list[tuple[int, int]] | None] = [None] * len(batches.begin)
    for batch in np.flatnonzero(batches.in_place[batches.begin]).tolist():
        begin = batches.begin[batch]
        items = batches.items.take(slice(begin, begin + batches.size[batch]))
        token = segments.offset[items.segment] + items.kv_begin
        block = segments.blocks[segments.first_block[items.segment] + token // segments.block_size]
        slot = block.astype(np.int64) * segments.block_size + token % segments.block_size
        spans[batch] = list(zip(slot.tolist(), items.kv_len.tolist(), strict=True))
    return spans


def _seen(
    segments: Segments,
    items: WorkItems,
    query: Int64Array,
    tokens: int,
    window: int | None,
) -> BoolArray:
    """Which tokens of their item the queries [size, queries] see, [size, queries, tokens]."""
    token = np.arange(tokens)
    behind = segments.position[query] - (segments.start[items.segment] + items.kv_begin)[:, None]
    seen: BoolArray = token < np.minimum(behind + 1, items.kv_len[:, None])[:, :, None]
    if window is not None:
        seen &= token > (behind - window)[:, :, None]
    return seen


def _additive(seen: BoolArray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A mask to add to logits: 0 where seen, -inf elsewhere."""
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~seen), -torch.inf).to(device)
