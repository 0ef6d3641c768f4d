"""The nodes under a batch of sequences, as plain arrays: everything attention knows of a tree."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from attention.errors import InvalidForest

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class NodeArrays(Protocol):
    """Nodes as runs of tokens in blocks, whoever attends to them."""

    @property
    def block_size(self) -> int: ...
    @property
    def length(self) -> Int64Array: ...
    @property
    def offset(self) -> Int32Array: ...
    @property
    def block_ptr(self) -> Int64Array: ...
    @property
    def blocks(self) -> Int32Array: ...


class ForestArrays(NodeArrays, Protocol):
    """What `attention.plan` and `attention.attend` read; `Forest` documents each field."""

    @property
    def parent(self) -> Int32Array: ...
    @property
    def start(self) -> Int64Array: ...
    @property
    def leaf(self) -> Int32Array: ...
    @property
    def query_len(self) -> Int64Array: ...


@dataclass(frozen=True)
class Forest:
    """N nodes and S sequences on them.

    A sequence's KV are all tokens of its leaf and of the leaf's ancestors; its queries are its last
    `query_len` positions and may reach back over several nodes. A query at position p sees the
    positions <= p of its own path. Queries are packed everywhere in the order of the sequences,
    positions ascending.

    Attributes:
        block_size: tokens a block holds, >= 1.
        parent: int32 [N], index of each node's parent, -1 for a root; a parent stands before its
            children.
        start: int64 [N], position of the node's first token in its path.
        length: int64 [N], tokens of the node, >= 1.
        offset: int32 [N], offset of the node's first token in its first block, < block_size.
        block_ptr: int64 [N + 1], node i lies in blocks[block_ptr[i]:block_ptr[i + 1]], of which
            there are exactly ceil((offset + length) / block_size).
        blocks: int32 [block_ptr[-1]], block ids. Two nodes may share a block (a split inside it).
        leaf: int32 [S], deepest node of each sequence; need not be a leaf of the forest.
        query_len: int64 [S], >= 1 and at most the length of the sequence's path.
    """

    block_size: int
    parent: Int32Array
    start: Int64Array
    length: Int64Array
    offset: Int32Array
    block_ptr: Int64Array
    blocks: Int32Array
    leaf: Int32Array
    query_len: Int64Array

    @property
    def num_queries(self) -> int:
        """Queries of all sequences together."""
        return int(self.query_len.sum())

    def validate(self, num_blocks: int | None = None) -> None:
        """Raise InvalidForest for the first contradiction found; see `validate`."""
        validate(self, num_blocks)


def validate(forest: ForestArrays, num_blocks: int | None = None) -> None:
    """Raise InvalidForest for the first contradiction in the forest's arrays; O(nodes + blocks).

    Block ids are checked against `num_blocks` where it is given, and are never negative.
    """
    num_nodes, num_sequences = len(forest.parent), len(forest.leaf)
    check_nodes(forest, num_nodes, num_blocks)
    check_shape("start", forest.start, num_nodes)
    check_shape("parent", forest.parent, num_nodes)
    check_shape("leaf", forest.leaf, num_sequences)
    check_shape("query_len", forest.query_len, num_sequences)
    if num_sequences == 0:
        raise InvalidForest("leaf is empty, expected at least one sequence")

    if _is_forest(forest):
        return

    # Something is wrong; these find out what.
    parent, start = forest.parent, forest.start
    nodes = np.arange(num_nodes)
    check_values("parent", parent, (parent >= -1) & (parent < nodes), "-1 or an earlier node")
    end = start + forest.length
    expected_start = np.where(parent >= 0, end[parent], 0)
    check_values("start", start, start == expected_start, "the end of the parent, 0 for a root")

    leaf, query_len = forest.leaf, forest.query_len
    check_values("leaf", leaf, (leaf >= 0) & (leaf < num_nodes), f"a node, 0 to below {num_nodes}")
    check_values(
        "query_len",
        query_len,
        (query_len >= 1) & (query_len <= end[leaf]),
        "from 1 to the length of the sequence's path",
    )


def _is_forest(forest: ForestArrays) -> bool:
    """Whether `validate` has no more to say, in few passes: it is run at every step."""
    num_nodes = len(forest.parent)
    if num_nodes == 0:
        return False
    parent, leaf, query_len = forest.parent, forest.leaf, forest.query_len
    if parent.min() < -1 or np.count_nonzero(parent >= np.arange(num_nodes)):
        return False
    if not _is_below(num_nodes, leaf) or query_len.min() < 1:
        return False
    # Index -1, the parent of roots, reads the entry behind the last node.
    end = np.zeros(num_nodes + 1, np.int64)
    np.add(forest.start, forest.length, out=end[:-1])
    return not (
        np.count_nonzero(end.take(parent) != forest.start)
        or np.count_nonzero(end.take(leaf) < query_len)
    )


def check_nodes(nodes: NodeArrays, num_nodes: int, num_blocks: int | None) -> None:
    """Raise InvalidForest where lengths, offsets and blocks of nodes contradict each other."""
    if not isinstance(nodes.block_size, Integral) or nodes.block_size < 1:
        raise InvalidForest(f"block_size is {nodes.block_size!r}, expected an integer, at least 1")
    check_shape("length", nodes.length, num_nodes)
    check_shape("offset", nodes.offset, num_nodes)
    check_shape("block_ptr", nodes.block_ptr, num_nodes + 1)
    length, offset = nodes.length, nodes.offset
    if _are_nodes(nodes, num_blocks):
        return

    # Something is wrong; these find out what.
    check_values("length", length, length >= 1, "at least 1")
    inside = (offset >= 0) & (offset < nodes.block_size)
    check_values("offset", offset, inside, f"from 0 to below the block size {nodes.block_size}")

    if nodes.block_ptr[0] != 0:
        raise InvalidForest(f"block_ptr[0] is {nodes.block_ptr[0]}, expected 0")
    counts = np.diff(nodes.block_ptr)
    expected_counts = -(-(offset + length) // nodes.block_size)
    if (counts != expected_counts).any():
        first = int(np.argmax(counts != expected_counts))
        raise InvalidForest(
            f"node {first} has {counts[first]} blocks, expected {expected_counts[first]} "
            f"for {length[first]} tokens from offset {offset[first]}"
        )
    check_shape("blocks", nodes.blocks, int(nodes.block_ptr[-1]))
    known = nodes.blocks >= 0
    if num_blocks is not None:
        known &= nodes.blocks < num_blocks
    limit = "any id" if num_blocks is None else str(num_blocks)
    check_values("blocks", nodes.blocks, known, f"from 0 to below {limit}")


def _are_nodes(nodes: NodeArrays, num_blocks: int | None) -> bool:
    """Whether `check_nodes` has no more to say, in few passes: it is run at every step."""
    if not len(nodes.length) or nodes.block_ptr[0] != 0:
        return False
    if nodes.blocks.shape != (nodes.block_ptr[-1],) or nodes.blocks.dtype.kind != "i":
        return False
    offset, block_size = nodes.offset, nodes.block_size
    left = (nodes.block_ptr[1:] - nodes.block_ptr[:-1]) * np.int64(block_size)
    left -= offset
    left -= nodes.length
    if not _is_below(block_size, left) or not _is_below(block_size, offset):
        return False
    limit = 1 << 63 if num_blocks is None else num_blocks
    return bool(nodes.length.min() >= 1) and _is_below(limit, nodes.blocks)


def _is_below(bound: int, values: npt.NDArray[np.signedinteger]) -> bool:
    """Whether all of (one or more) values are from 0 to below a bound; in one pass.

    False also for values in another byte order than the machine's.
    """
    unsigned = _UNSIGNED.get(values.dtype)
    if unsigned is None:
        return False
    # Without their sign, negative values are more than any of the others.
    bound = min(bound, 1 << 8 * values.itemsize - 1)
    return bool(np.maximum.reduce(values.view(unsigned)) < bound)


_UNSIGNED = {np.dtype(f"i{size}"): np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def check_shape(name: str, array: npt.NDArray[Any], size: int) -> None:
    """Raise InvalidForest unless the array is of one dimension, this size and signed integers."""
    if array.shape != (size,):
        raise InvalidForest(f"{name} has shape {array.shape}, expected ({size},)")
    if array.dtype.kind != "i":
        raise InvalidForest(f"{name} has dtype {array.dtype}, expected a signed integer")


def check_values(
    name: str, values: npt.NDArray[Any], good: npt.NDArray[np.bool_], expected: str
) -> None:
    """Raise InvalidForest for the first value that is not good."""
    if not good.all():
        first = int(np.argmin(good))
        raise InvalidForest(f"{name}[{first}] is {values[first]}, expected {expected}")
