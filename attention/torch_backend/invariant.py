"""Work whose results for a sequence have the same bits whatever else is planned.

A path is cut at fixed positions, whichever node they fall into; a query attends to one such chunk
at a time, in a call of its own shape: its query heads on CHUNK tokens, masked. Queries with a chunk
in common share its KV, which is read once, but no matrix. Where nodes have temperatures or weights,
and in sets of nodes, each node is cut for itself: results are then those of the same nodes.
"""

import numpy as np
import torch

from attention.algebra import Partial
from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import Segments
from attention.torch_backend.batches import GATHER_BYTES
from attention.torch_backend.execute import Layer, attend
from attention.torch_backend.groups import Gathered, Group, additive
from attention.torch_backend.items import WorkItems
from attention.torch_backend.places import slots_of

# Tokens of a chunk: padding of short paths against partials of long ones.
CHUNK = 256


def invariant_groups(problem: Problem, segments: Segments, query: Int64Array) -> list[Group]:
    """Calls for one chunk with all its queries each, or for chunks of one query each.

    Args:
        query: int64 [R], the number by which a row's query goes in the groups.
    """
    weighed = segments.temperature is not None or segments.log_weight is not None
    parent = np.full(len(segments.start), -1) if weighed else segments.parent
    chunks = _chunks(segments, parent)
    return _groups(problem, segments, query, chunks, _chunk_slots(segments, parent, chunks))


def add_up(problem: Problem, groups: list[Group], layer: Layer) -> Partial:
    """Partials of all queries, [N, Hkv, group, d] in the problem's precision.

    What a query's chunks give is added up in their order, each element by itself.
    """
    shape = layer.q.shape[:3]
    top = layer.q.new_full(shape, -torch.inf, dtype=problem.precision)
    weight = torch.zeros_like(top)
    o = top.new_zeros((*shape, problem.value_head_dim))
    for group in groups:
        part = attend(group, layer)
        index = group.query_index
        assert index is not None
        # Rows of a group see something, so `after` is not -inf.
        before = top.index_select(0, index)
        after = torch.maximum(before, part.lse)
        old, new = torch.exp(before - after), torch.exp(part.lse - after)
        top.index_copy_(0, index, after)
        weight.index_copy_(0, index, weight.index_select(0, index) * old + new)
        grown = o.index_select(0, index) * old.unsqueeze(3)
        o.index_copy_(0, index, grown.add_(part.o * new.unsqueeze(3)))
    seen = weight > 0
    o = o / torch.where(seen, weight, 1.0).unsqueeze(3)
    return Partial(o, torch.where(seen, top + torch.log(weight), -torch.inf))


def _chunks(segments: Segments, parent: Int64Array) -> WorkItems:
    """The chunks that end in each segment, under all of its rows; and the last one of each path.

    kv_begin is negative where a chunk begins in a segment above.
    """
    stop = segments.start + segments.length
    # Chunks of a root begin where it does.
    root = np.arange(len(parent))
    while (parent[root] >= 0).any():
        root = np.where(parent[root] >= 0, parent[root], root)
    base = segments.start[root]
    first, last = (segments.start - base) // CHUNK, (stop - base) // CHUNK
    whole, ordinal = expand(last - first)
    chunk = first[whole] + ordinal

    # Rows without a segment below see the rest; they stand before those of the segments below.
    own_end = segments.row_end.copy()
    below = np.flatnonzero(parent >= 0)
    np.minimum.at(own_end, parent[below], segments.row_begin[below])
    rest = np.flatnonzero((own_end > segments.row_begin) & ((stop - base) % CHUNK > 0))
    of = np.concatenate((whole, rest))
    begin = base[of] + np.concatenate((chunk, last[rest])) * CHUNK
    end = np.minimum(begin + CHUNK, stop[of])
    row_end = np.concatenate((segments.row_end[whole], own_end[rest]))
    return WorkItems(
        segment=of,
        kv_begin=begin - segments.start[of],
        kv_len=end - begin,
        row_begin=segments.row_begin[of],
        row_end=row_end,
        masked=np.ones(len(of), np.bool_),
        # A query's chunks are added up in the order of its segments, then of their positions.
        round=segments.round[of] * (int(stop.max()) // CHUNK + 1) + begin // CHUNK,
    )


def _chunk_slots(segments: Segments, parent: Int64Array, chunks: WorkItems) -> Int64Array:
    """Slots of the chunks' tokens, padded with the last one's, int64 [chunks, CHUNK]."""
    slots = np.zeros((len(chunks.segment), CHUNK), np.int64)
    item = np.arange(len(chunks.segment))
    segment, begin = chunks.segment, segments.start[chunks.segment] + chunks.kv_begin
    first, end = begin, begin + chunks.kv_len
    while len(item):
        own = np.maximum(begin, segments.start[segment])
        run = WorkItems(
            segment=segment,
            kv_begin=own - segments.start[segment],
            kv_len=end - own,
            row_begin=own,
            row_end=own,
            masked=np.zeros(len(own), np.bool_),
            round=own,
        )
        of, ordinal = expand(run.kv_len)
        slots[item[of], (own - first[item])[of] + ordinal] = slots_of(segments, run, run.kv_len)
        above = np.flatnonzero(begin < own)
        item, begin, end, segment = item[above], begin[above], own[above], parent[segment[above]]
    token = np.minimum(np.arange(CHUNK), chunks.kv_len[:, None] - 1)
    return np.take_along_axis(slots, token, axis=1)


def _groups(
    problem: Problem,
    segments: Segments,
    query: Int64Array,
    chunks: WorkItems,
    slots: Int64Array,
) -> list[Group]:
    """Calls in the order of the rounds: chunks under several rows alone, the others together."""
    # Within what is gathered at once, and without cutting a query's heads.
    most = max(1, GATHER_BYTES // (CHUNK * problem.token_bytes))
    most = max(1, min(most, (1 << 20) // (problem.num_q_heads * CHUNK)))
    shared = chunks.num_rows > 1
    order = np.lexsort((chunks.row_begin, shared, chunks.round))
    key = np.stack((chunks.round, shared, np.where(shared, chunks.segment, -1)))
    if segments.temperature is not None:
        key = np.concatenate((key, segments.temperature[chunks.segment][None]))
    key = key[:, order]
    new = np.append(True, (key[:, 1:] != key[:, :-1]).any(axis=0))
    groups = []
    for of in np.split(order, np.flatnonzero(new)[1:]):
        item, ordinal = expand(chunks.num_rows[of])
        row, item = chunks.row_begin[of][item] + ordinal, of[item]
        for begin in range(0, len(row), most):
            some = slice(begin, begin + most)
            group = _group(problem, segments, query, chunks, slots, row[some], item[some])
            if group is not None:
                groups.append(group)
    return groups


def _group(
    problem: Problem,
    segments: Segments,
    query: Int64Array,
    chunks: WorkItems,
    slots: Int64Array,
    row: Int64Array,
    item: Int64Array,
) -> Group | None:
    """Rows with a chunk each; None where no row sees a token."""

    def tensor(values: Int64Array) -> torch.Tensor:
        return torch.from_numpy(values).to(problem.device)

    segment = chunks.segment[item]
    first = segments.start[segment] + chunks.kv_begin[item]
    token = np.arange(CHUNK)
    behind = segments.position[row] - first
    seen = token < np.minimum(behind + 1, chunks.kv_len[item])[:, None]
    if problem.window is not None:
        in_window = token > (behind - problem.window)[:, None]
        seen &= in_window | (token < (problem.sink_tokens - first)[:, None])
    kept = np.flatnonzero(seen.any(axis=1))
    if not len(kept):
        return None
    row, item, first, seen = row[kept], item[kept], first[kept], seen[kept]
    ids = slots[item[:1]] if (item == item[0]).all() else slots[item]
    weight = segments.log_weight
    return Group(
        size=len(row),
        queries=1,
        tokens=CHUNK,
        kv=Gathered(tensor(ids), 1, None, {}),
        positions=tensor(first),
        item=0,
        temperature=1.0
        if segments.temperature is None
        else float(segments.temperature[segment[0]]),
        log_weight=None
        if weight is None
        else torch.from_numpy(weight[segment[kept]]).to(problem.device, problem.precision),
        query_index=tensor(query[row]),
        mask=additive(problem, seen[:, None]),
    )
