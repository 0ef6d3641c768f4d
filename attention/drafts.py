"""Draft trees of speculative decoding as a forest: a draft token sees its ancestors only."""

import numpy as np
import numpy.typing as npt

from attention.errors import InvalidForest
from attention.forest import (
    Forest,
    ForestArrays,
    Int32Array,
    Int64Array,
    check_shape,
    check_values,
    validate,
)
from attention.ranges import expand


def draft_trees(forest: ForestArrays, draft_ptr: Int64Array, draft_parent: Int32Array) -> Forest:
    """The forest in which the last tokens of sequences are trees of draft tokens.

    In `forest` the drafts of a sequence are the last tokens of its leaf and among its queries, as
    if they followed one another: their KV have slots in this order. In the result each of them
    stands behind its parent, at the position that it has in its own branch, and its query sees
    the committed tokens, its ancestors and itself. Branches without forks remain one node where
    their tokens lie side by side. The packed order of queries is unchanged, but a draft sequence
    is several entries of `leaf` and `query_len` there, so that many more than in `forest`.

    Args:
        draft_ptr: int64 [S + 1], sequence s has the drafts draft_ptr[s]:draft_ptr[s + 1], none or
            at most as many as it has queries and its leaf tokens. A leaf with drafts is the leaf
            of one sequence and has no children.
        draft_parent: int32 [draft_ptr[-1]], parent of each draft among those of its sequence,
            counted from 0, before the draft itself; -1 where it follows the committed tokens.

    Raises:
        InvalidForest: an array contradicts another or what is said above.

    O(nodes + blocks + drafts log depth), vectorised.
    """
    validate(forest)
    drafts = _checked(forest, draft_ptr, draft_parent)
    num_nodes, num_sequences, num_drafts = len(forest.parent), len(drafts), len(draft_parent)
    sequence, ordinal = expand(drafts)
    leaf, query_len = forest.leaf.astype(np.int64), forest.query_len.astype(np.int64)
    committed = forest.length[leaf] - drafts
    # Place of the parent among all drafts, or the one behind the last for committed tokens.
    is_root = draft_parent < 0
    parent = np.where(is_root, num_drafts, draft_parent + draft_ptr[sequence])

    # Drafts that go on a branch without forks stay in one node, the first ones in the leaf.
    goes_on = _goes_on(parent, ordinal)
    num_roots = np.bincount(sequence[is_root], minlength=num_sequences)
    goes_on |= (ordinal == 0) & ((committed == 0) | (num_roots == 1))[sequence]
    head = np.flatnonzero(~goes_on)
    owner, end = sequence[head], np.append(head, num_drafts)[1:]
    end = np.minimum(end, draft_ptr[owner + 1])
    branches = np.bincount(owner, minlength=num_sequences)
    branch_end = np.cumsum(branches)
    branch = np.cumsum(~goes_on) - 1
    in_leaf = branch < (branch_end - branches)[sequence]
    node = np.where(in_leaf, leaf[sequence], num_nodes + branch)
    cut_off = drafts - np.bincount(sequence[in_leaf], minlength=num_sequences)

    # The nodes of `forest`, leaves without what is cut off, and behind them the branches.
    length = np.append(forest.length, end - head)
    length[leaf] -= cut_off
    source = np.append(np.arange(num_nodes), leaf[owner])
    first_slot = forest.offset[source].astype(np.int64)
    first_slot[num_nodes:] += committed[owner] + ordinal[head]
    offset = first_slot % forest.block_size
    counts = -(-(offset + length) // forest.block_size)
    of, block = expand(counts)
    block += (forest.block_ptr[source] + first_slot // forest.block_size)[of]
    above = np.where(committed > 0, leaf, forest.parent[leaf])[owner]
    prefix = forest.start[leaf] + committed

    # The queries left in the leaf, and then those of each branch: the packed order.
    entry_leaf = np.insert(num_nodes + np.arange(len(head)), branch_end - branches, leaf)
    entry_len = np.insert(end - head, branch_end - branches, query_len - cut_off)
    entries = np.flatnonzero(entry_len)
    return Forest(
        block_size=forest.block_size,
        parent=np.append(
            forest.parent, np.where(is_root[head], above, np.append(node, -1)[parent[head]])
        ).astype(np.int32),
        start=np.append(forest.start, prefix[owner] + _depth(parent)[head]),
        length=length,
        offset=offset.astype(np.int32),
        block_ptr=np.append(0, np.cumsum(counts)),
        blocks=forest.blocks[block],
        leaf=entry_leaf[entries].astype(np.int32),
        query_len=entry_len[entries],
    )


def _checked(forest: ForestArrays, draft_ptr: Int64Array, draft_parent: Int32Array) -> Int64Array:
    """Number of drafts of each sequence, once all that `draft_trees` asks for is given."""
    num_sequences = len(forest.leaf)
    check_shape("draft_ptr", draft_ptr, num_sequences + 1)
    if draft_ptr[0] != 0:
        raise InvalidForest(f"draft_ptr[0] is {draft_ptr[0]}, expected 0")
    drafts = np.diff(draft_ptr).astype(np.int64)
    check_values("draft_ptr", draft_ptr[1:], drafts >= 0, "no less than the entry before")
    check_shape("draft_parent", draft_parent, int(draft_ptr[-1]))
    _, ordinal = expand(drafts)
    earlier = (draft_parent >= -1) & (draft_parent < ordinal)
    check_values("draft_parent", draft_parent, earlier, "-1 or an earlier draft of the sequence")

    length = forest.length[forest.leaf]
    most = np.minimum(length, forest.query_len)
    if (drafts > most).any():
        first = int(np.argmax(drafts > most))
        raise InvalidForest(
            f"sequence {first} has {drafts[first]} drafts, expected no more than its leaf has "
            f"tokens, {length[first]}, and than it has queries, {forest.query_len[first]}"
        )
    num_nodes = len(forest.parent)
    uses = np.bincount(forest.leaf, minlength=num_nodes)
    uses += np.bincount(forest.parent[forest.parent >= 0], minlength=num_nodes)
    shared = (drafts > 0) & (uses[forest.leaf] > 1)
    if shared.any():
        first = int(np.argmax(shared))
        raise InvalidForest(
            f"sequence {first} has drafts in node {forest.leaf[first]}, which has children or is "
            "the leaf of another sequence, expected a leaf of its own"
        )
    return drafts


def _goes_on(parent: Int64Array, ordinal: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each draft is the only child of the one before it in the slots."""
    children = np.bincount(parent, minlength=len(parent) + 1)
    previous = np.arange(-1, len(parent) - 1)
    goes_on: npt.NDArray[np.bool_] = (
        (ordinal > 0) & (parent == previous) & (children[previous] == 1)
    )
    return goes_on


def _depth(parent: Int64Array) -> Int64Array:
    """Number of drafts above each draft, by pointer doubling (Hillis and Steele 1986).

    Args:
        parent: places of parents, len(parent) for none.
    """
    none = len(parent)
    ancestor = np.append(parent, none)
    depth = (ancestor < none).astype(np.int64)
    while ancestor.min() < none:
        depth += depth[ancestor]
        ancestor = ancestor[ancestor]
    return depth[:-1]
