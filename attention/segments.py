"""Segments: runs of KV tokens, each with the one contiguous range of rows that attend to it.

What a forest and a set of nodes have in common, and all that a backend plans from. A row is a query
in a place: the queries of a forest are its rows, in depth-first order, so that the ranges of
ancestors enclose those of their descendants. In node sets a query has a row for each segment that
it attends to, next to the other rows of that segment.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attention.errors import InvalidForest
from attention.forest import ForestArrays, Int32Array, Int64Array, validate
from attention.node_sets import NodeSets
from attention.order import depth_first

FloatArray = npt.NDArray[np.floating]


class Segments(NamedTuple):
    """M segments of one or more tokens each, and R rows.

    Segments ascend by `row_begin`. Those of a forest stand in depth-first preorder, so that a
    subtree is consecutive and an ancestor before its descendants; those of node sets by position
    and node, each beginning where the one before it ends.

    Attributes:
        block_size: tokens a block holds.
        blocks: int32, block ids of all nodes.
        num_queries: queries of all sequences together.
        on_paths: each row's segments lie behind each other from position 0 on, as in forests;
            those of sets lie anywhere, and no two of them have a row in common.
        query: int64 [R], packed place of each row's query.
        position: int64 [R], position of each row's query.
        run_end: int64, ends of the runs of rows that are consecutive queries of one sequence.
        node: int64 [M], node of the forest or the sets.
        start: int64 [M], position of the segment's first token.
        length: int64 [M], tokens, >= 1.
        offset: int64 [M], offset of the first token in the segment's first block.
        first_block: int64 [M], where the segment's blocks begin in `blocks`.
        row_begin, row_end: int64 [M], rows that attend to the segment, at least one.
        round: int64 [M], segments of one round have no query in common; on a path, rounds ascend.
        parent: int64 [M], the segment that ends where this one begins on its path; -1 for roots and
            for those of sets.
        temperature, log_weight: float32 [M], or None for 1 and 0 everywhere: logits of the
            segment's tokens are divided by the one, and the other is added to them.
    """

    block_size: int
    blocks: Int32Array
    num_queries: int
    on_paths: bool
    query: Int64Array
    position: Int64Array
    run_end: Int64Array
    node: Int64Array
    start: Int64Array
    length: Int64Array
    offset: Int64Array
    first_block: Int64Array
    row_begin: Int64Array
    row_end: Int64Array
    round: Int64Array
    parent: Int64Array
    temperature: FloatArray | None
    log_weight: FloatArray | None


def segments_of(
    source: ForestArrays | NodeSets,
    temperature: FloatArray | None = None,
    log_weight: FloatArray | None = None,
) -> Segments:
    """The segments of a forest or of node sets, checked.

    Args:
        temperature, log_weight: floats [N], one for each node; see `attention.plan`.

    Raises:
        InvalidForest: an array contradicts another, a temperature is not positive and finite, or a
            log-weight not finite.
    """
    temperature = _per_node("temperature", temperature, len(source.length), positive=True)
    log_weight = _per_node("log_weight", log_weight, len(source.length), positive=False)
    if isinstance(source, NodeSets):
        source.validate()
        return _of_sets(source, temperature, log_weight)
    validate(source)
    return _of_forest(source, temperature, log_weight)


def _of_forest(
    forest: ForestArrays, temperature: FloatArray | None, log_weight: FloatArray | None
) -> Segments:
    order = depth_first(forest)
    node, begin, end, depth = order.node, order.begin, order.end, order.depth
    parent, used = order.parent, begin < end
    if np.count_nonzero(used) < len(used):
        node, begin, end, depth = node[used], begin[used], end[used], depth[used]
        # Who has no parent finds the entry behind the last one.
        parent = np.append(used.cumsum() - 1, -1).take(parent[used])
    return Segments(
        block_size=int(forest.block_size),
        blocks=forest.blocks,
        num_queries=len(order.packed),
        on_paths=True,
        query=order.packed,
        position=order.position,
        run_end=order.sequence_end,
        node=node,
        start=forest.start.take(node).astype(np.int64, copy=False),
        length=forest.length.take(node).astype(np.int64, copy=False),
        offset=forest.offset.take(node).astype(np.int64, copy=False),
        first_block=forest.block_ptr.take(node).astype(np.int64, copy=False),
        row_begin=begin,
        row_end=end,
        round=depth,
        parent=parent,
        temperature=None if temperature is None else temperature[node],
        log_weight=None if log_weight is None else log_weight[node],
    )


def _of_sets(
    sets: NodeSets, temperature: FloatArray | None, log_weight: FloatArray | None
) -> Segments:
    members = np.diff(sets.member_ptr)
    sequence = np.repeat(np.arange(len(members)), members)
    # One node at two positions is two segments.
    key = sets.member_start * len(sets.length) + sets.member
    distinct, segment = np.unique(key, return_inverse=True)
    start, node = distinct // len(sets.length), distinct % len(sets.length)

    by_segment = np.argsort(segment, kind="stable")
    of = sequence[by_segment]
    run_end = np.cumsum(sets.query_len[of])
    first_query = np.cumsum(sets.query_len) - sets.query_len
    rows = np.arange(run_end[-1])
    member_rows = sets.query_len[of]
    row_begin = run_end - member_rows
    segment_end = np.cumsum(np.bincount(segment))
    row_end = run_end[segment_end - 1]
    return Segments(
        block_size=int(sets.block_size),
        blocks=sets.blocks,
        num_queries=sets.num_queries,
        on_paths=False,
        query=rows + np.repeat(first_query[of] - row_begin, member_rows),
        position=rows + np.repeat(sets.query_start[of] - row_begin, member_rows),
        run_end=run_end,
        node=node,
        start=start,
        length=sets.length[node].astype(np.int64, copy=False),
        offset=sets.offset[node].astype(np.int64, copy=False),
        first_block=sets.block_ptr[node].astype(np.int64, copy=False),
        row_begin=np.append(0, row_end[:-1]),
        row_end=row_end,
        round=_rounds(of, segment_end, len(members)),
        parent=np.full(len(distinct), -1),
        temperature=None if temperature is None else temperature[node],
        log_weight=None if log_weight is None else log_weight[node],
    )


def _rounds(sequence: Int64Array, segment_end: Int64Array, num_sequences: int) -> Int64Array:
    """For each segment the first round in which none of its sequences has another one.

    Greedy colouring in the order of the segments; the rounds of a sequence are the bits of an
    integer, so that a step takes as many operations as the segment has sequences.

    Args:
        sequence: sequences of the first segment, of the second, and so on.
        segment_end: where those of each segment end.
    """
    sequences, taken, rounds = sequence.tolist(), [0] * num_sequences, []
    begin = 0
    for end in segment_end.tolist():
        of = sequences[begin:end]
        used = 0
        for one in of:
            used |= taken[one]
        lowest_free = ~used & (used + 1)
        for one in of:
            taken[one] |= lowest_free
        rounds.append(lowest_free.bit_length() - 1)
        begin = end
    return np.array(rounds)


def _per_node(
    name: str, values: FloatArray | None, num_nodes: int, *, positive: bool
) -> FloatArray | None:
    if values is None:
        return None
    values = np.asarray(values, np.float32)
    if values.shape != (num_nodes,):
        raise InvalidForest(f"{name} has shape {values.shape}, expected ({num_nodes},)")
    good = np.isfinite(values) & (values > 0 if positive else True)
    if not good.all():
        first = int(np.argmin(good))
        expected = "a positive number" if positive else "a finite number"
        raise InvalidForest(f"{name}[{first}] is {values[first]}, expected {expected}")
    return values
