"""The forest under block tables: sequences that begin with the same blocks share them."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from attention.errors import InvalidForest
from attention.forest import Forest, Int64Array, check_shape, check_values

# Ids that are compared at a time: temporary arrays that stay in the cache.
_WINDOW = 1 << 16
# Columns that are compared first, then twice as many, and so on. To come to a row anew takes longer
# than to read so many.
_FIRST_COLUMNS = 256
_MAX_ID = np.iinfo(np.int32).max

Integers = npt.NDArray[Any] | torch.Tensor


def forest_from_block_tables(
    block_tables: Integers, seq_lens: Integers, query_start_loc: Integers, block_size: int
) -> Forest:
    """The forest of sequences of which an engine knows the blocks only.

    A block is shared by the sequences that have it, and all blocks before it, at the same place
    of their tables, and have filled it. A sequence's last block is its own until it is full: to
    share a part of it would save less than a block and cut a node inside a block. What is shared
    are slots, so that the result is exact whatever the engine put there.

    Args:
        block_tables: int [S, max_blocks], ids of each sequence's blocks in order; what is behind
            its length is not read.
        seq_lens: int [S], tokens of each sequence, its queries among them.
        query_start_loc: int [S + 1], sequence s has the packed queries query_start_loc[s] to
            query_start_loc[s + 1], its last tokens; from 0.
        block_size: tokens a block holds.
        All three as NumPy arrays or torch tensors; those of a device are copied, once each.

    Raises:
        InvalidForest: shapes or dtypes differ from these, a block id is negative, a sequence is
            empty or longer than its table, or it has no query or more than tokens.

    Ids are compared, never hashes of them: O(S max_blocks) at most, each id that is shared once
    for each sequence and those behind where two part a few hundred, or as many as are shared. The
    Python loops are over rounds, about log S of them, in each of which all groups of sequences
    part from their longest one, and over what is compared at a time.
    """
    tables, seq_len, query_start = map(_on_host, (block_tables, seq_lens, query_start_loc))
    _check(tables, seq_len, query_start, block_size)
    tables = np.ascontiguousarray(tables)
    seq_len = seq_len.astype(np.int64)
    trie = _shared(tables, seq_len // block_size)

    num_blocks = -(-seq_len // block_size)
    num_shared, own = len(trie.row), np.flatnonzero(seq_len > trie.depth * block_size)
    row = np.append(trie.row, own)
    begin = np.append(trie.begin, trie.depth[own])
    end = np.append(trie.end, num_blocks[own])
    length = np.append(
        (trie.end - trie.begin) * block_size, (seq_len - trie.depth * block_size)[own]
    )
    leaf = trie.node.copy()
    leaf[own] = num_shared + np.arange(len(own))
    blocks = _pieces(tables, row, begin, end)
    block_ptr = np.append(0, np.cumsum(end - begin))
    beyond = np.iinfo(blocks.dtype).max > _MAX_ID and blocks.max() > _MAX_ID
    if beyond or blocks.min() < 0:
        good = (blocks >= 0) & (blocks <= _MAX_ID)
        first = int(np.argmin(good))
        node = int(np.searchsorted(block_ptr, first, side="right")) - 1
        place = int(begin[node] + first - block_ptr[node])
        raise InvalidForest(
            f"block_tables[{row[node]}, {place}] is {blocks[first]}, expected a block id from 0 "
            "to below 2^31"
        )
    return Forest(
        block_size=block_size,
        parent=np.append(trie.parent, trie.node[own]).astype(np.int32),
        start=begin * block_size,
        length=length,
        offset=np.zeros(len(row), np.int32),
        block_ptr=block_ptr,
        blocks=blocks.astype(np.int32, copy=False),
        leaf=leaf.astype(np.int32),
        query_len=np.diff(query_start).astype(np.int64),
    )


def _pieces(
    tables: npt.NDArray[Any], row: Int64Array, begin: Int64Array, end: Int64Array
) -> npt.NDArray[Any]:
    """The columns begin[i]:end[i] of rows row[i], one behind the other."""
    # Bytes are joined several times as fast as arrays are, which are faster than single ids.
    ids = tables.reshape(-1).data.cast("B")
    first = row * tables.shape[1]
    bounds = zip(
        ((first + begin) * tables.itemsize).tolist(),
        ((first + end) * tables.itemsize).tolist(),
        strict=True,
    )
    return np.frombuffer(bytearray().join([ids[b:e] for b, e in bounds]), tables.dtype)


def _on_host(values: Integers) -> npt.NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def _check(
    tables: npt.NDArray[Any],
    seq_len: npt.NDArray[Any],
    query_start: npt.NDArray[Any],
    block_size: int,
) -> None:
    if block_size < 1:
        raise InvalidForest(f"block_size is {block_size}, expected at least 1")
    if tables.ndim != 2 or tables.dtype.kind != "i":
        raise InvalidForest(
            f"block_tables has shape {tables.shape} and dtype {tables.dtype}, expected two "
            "dimensions and a signed integer"
        )
    num_sequences, max_blocks = tables.shape
    if num_sequences == 0:
        raise InvalidForest("block_tables is empty, expected at least one sequence")
    check_shape("seq_lens", seq_len, num_sequences)
    check_shape("query_start_loc", query_start, num_sequences + 1)
    check_values(
        "seq_lens",
        seq_len,
        (seq_len >= 1) & (seq_len <= max_blocks * block_size),
        f"from 1 to what {max_blocks} blocks of {block_size} tokens hold",
    )
    if query_start[0] != 0:
        raise InvalidForest(f"query_start_loc[0] is {query_start[0]}, expected 0")
    query_len = np.diff(query_start)
    good = (query_len >= 1) & (query_len <= seq_len)
    if not good.all():
        first = int(np.argmin(good))
        raise InvalidForest(
            f"sequence {first} has {query_len[first]} queries by query_start_loc, expected from 1 "
            f"to its length {seq_len[first]}"
        )


class _Trie(NamedTuple):
    """Shared runs of blocks as nodes, a parent before its children, and where sequences leave them.

    Attributes:
        row, begin, end: int64 [N], node i is the blocks begin[i]:end[i] of the table's row row[i].
        parent: int64 [N], -1 for roots.
        node: int64 [S], the last node that each sequence shares, -1 if none.
        depth: int64 [S], how many blocks it shares.
    """

    row: Int64Array
    begin: Int64Array
    end: Int64Array
    parent: Int64Array
    node: Int64Array
    depth: Int64Array


def _shared(tables: npt.NDArray[Any], full: Int64Array) -> _Trie:
    """The compressed trie of the full blocks that two or more sequences share.

    A group of sequences that agree so far is led by its longest one. Where others part from it,
    its path is cut; those that part at one place and go on with one block are a group of the next
    round.
    """
    num_sequences, max_blocks = tables.shape
    node, depth = np.full(num_sequences, -1), np.zeros(num_sequences, np.int64)
    columns: list[tuple[Int64Array, ...]] = []
    num_nodes = 0
    # All sorting is stable, so that the longest sequence of a group always is its first.
    rows = np.argsort(-full, kind="stable")
    while True:
        rows = rows[depth[rows] < full[rows]]
        rows, first = _groups(rows, node[rows], tables[rows, depth[rows]])
        if len(first) == 0:
            break
        lead = rows[first]
        follows = np.ones(len(rows), np.bool_)
        follows[first] = False
        group = (~follows).cumsum() - 1
        rows, group = rows[follows], group[follows]
        common = _common(tables, rows, lead[group], depth[rows], full[rows])

        # Each place where some part from the lead ends a node of its path.
        cuts, cut = np.unique(group * (max_blocks + 1) + common, return_inverse=True)
        of, end = cuts // (max_blocks + 1), cuts % (max_blocks + 1)
        nodes = num_nodes + np.arange(len(cuts))
        row = lead[of]
        opens, closes = _bounds(of[1:] != of[:-1])
        begin, parent = np.empty_like(end), nodes - 1
        begin[1:] = end[:-1]
        begin[opens], parent[opens] = depth[lead], node[lead]
        columns.append((row, begin, end, parent))
        num_nodes += len(cuts)
        last = np.flatnonzero(closes)
        node[lead], depth[lead] = nodes[last], end[last]
        node[rows], depth[rows] = nodes[cut], common
    if not columns:
        empty = np.empty(0, np.int64)
        return _Trie(empty, empty, empty, empty, node, depth)
    row, begin, end, parent = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Trie(row, begin, end, parent, node, depth)


def _groups(
    rows: Int64Array, node: Int64Array, block: npt.NDArray[Any]
) -> tuple[Int64Array, Int64Array]:
    """Rows of one node that go on with one block side by side, lone ones left out.

    Returns the rows and where each group begins.
    """
    order = np.lexsort((block, node))
    node, block = node[order], block[order]
    opens, closes = _bounds((node[1:] != node[:-1]) | (block[1:] != block[:-1]))
    shared = ~(opens & closes)[: len(rows)]
    return rows[order[shared]], np.flatnonzero(opens[: len(rows)][shared])


def _bounds(differs: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which values are the first and which the last of a run, by where neighbours differ."""
    bounds = np.ones(len(differs) + 2, np.bool_)
    bounds[1:-1] = differs
    return bounds[:-1], bounds[1:]


def _common(
    tables: npt.NDArray[Any],
    rows: Int64Array,
    leads: Int64Array,
    begin: Int64Array,
    end: Int64Array,
) -> Int64Array:
    """First column from `begin` to below `end` in which each row differs from its lead, or `end`.

    Up to `begin` they are known to agree, and the table has `end` columns or more.
    """
    common = end.copy()
    left, column, width = np.arange(len(rows)), int(begin.min()), _FIRST_COLUMNS
    while len(left):
        window = tables[:, column : column + width]
        for at in _chunks(left[begin[left] < column + width], max(_WINDOW // width, 1)):
            differs = window[rows[at]] != window[leads[at]]
            where = differs.argmax(axis=1)
            found = differs[np.arange(len(at)), where]
            at, where = at[found], where[found]
            # What differs behind the end does not count.
            common[at] = np.minimum(end[at], column + where)
        column, width = column + width, 2 * width
        left = left[common[left] > column]
    return common


def _chunks(values: Int64Array, size: int) -> list[Int64Array]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]
