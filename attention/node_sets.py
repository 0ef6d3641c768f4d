"""Sequences as sets of nodes with positions, for what is no tree: reused chunks, selected pages."""

from dataclasses import dataclass

import numpy as np

from attention.errors import InvalidForest
from attention.forest import Int32Array, Int64Array, check_nodes, check_shape, check_values


@dataclass(frozen=True)
class NodeSets:
    """N nodes and S sequences, each of which attends to a set of them.

    A query at position p sees the tokens at positions <= p of every node of its sequence, wherever
    another sequence has the same node. Queries are packed in the order of the sequences, positions
    ascending. Parallel contexts (several nodes at the same positions), reused chunks and selected
    pages are such sets; where the sets are the paths of trees, `Forest` says the same for less.

    Attributes:
        block_size: tokens a block holds, >= 1.
        length: int64 [N], tokens of the node, >= 1.
        offset: int32 [N], offset of the node's first token in its first block, < block_size.
        block_ptr: int64 [N + 1], node i lies in blocks[block_ptr[i]:block_ptr[i + 1]].
        blocks: int32 [block_ptr[-1]], block ids.
        member_ptr: int64 [S + 1], sequence s has the members member_ptr[s]:member_ptr[s + 1], at
            least one.
        member: int32 [member_ptr[-1]], nodes; none twice at one start in a sequence.
        member_start: int64 [member_ptr[-1]], position that the node's first token has for the
            sequence, >= 0.
        query_start: int64 [S], position of the sequence's first query, >= 0.
        query_len: int64 [S], queries of each sequence, >= 1.
    """

    block_size: int
    length: Int64Array
    offset: Int32Array
    block_ptr: Int64Array
    blocks: Int32Array
    member_ptr: Int64Array
    member: Int32Array
    member_start: Int64Array
    query_start: Int64Array
    query_len: Int64Array

    @property
    def num_queries(self) -> int:
        """Queries of all sequences together."""
        return int(self.query_len.sum())

    def validate(self, num_blocks: int | None = None) -> None:
        """Raise InvalidForest for the first contradiction in the arrays; O(M log M + blocks)."""
        num_nodes, num_sequences = len(self.length), len(self.query_len)
        check_nodes(self, num_nodes, num_blocks)
        if num_sequences == 0:
            raise InvalidForest("query_len is empty, expected at least one sequence")
        check_shape("query_len", self.query_len, num_sequences)
        check_shape("query_start", self.query_start, num_sequences)
        check_shape("member_ptr", self.member_ptr, num_sequences + 1)
        if self.member_ptr[0] != 0:
            raise InvalidForest(f"member_ptr[0] is {self.member_ptr[0]}, expected 0")
        members = np.diff(self.member_ptr)
        if (members < 1).any():
            first = int(np.argmax(members < 1))
            raise InvalidForest(f"sequence {first} has {members[first]} members, expected some")
        check_shape("member", self.member, int(self.member_ptr[-1]))
        check_shape("member_start", self.member_start, int(self.member_ptr[-1]))
        known = (self.member >= 0) & (self.member < num_nodes)
        check_values("member", self.member, known, f"a node, 0 to below {num_nodes}")
        check_values("member_start", self.member_start, self.member_start >= 0, "at least 0")
        check_values("query_start", self.query_start, self.query_start >= 0, "at least 0")
        check_values("query_len", self.query_len, self.query_len >= 1, "at least 1")
        sequence = np.repeat(np.arange(num_sequences), members)
        place = self.member_start.astype(np.int64) * num_nodes + self.member
        # Stable: of one node at one position, those of a sequence stand side by side.
        order = np.argsort(place, kind="stable")
        place, sequence = place[order], sequence[order]
        twice = (place[1:] == place[:-1]) & (sequence[1:] == sequence[:-1])
        if twice.any():
            index = int(np.argmax(twice))
            first = order[index]
            raise InvalidForest(
                f"sequence {sequence[index]} has node {self.member[first]} at "
                f"position {self.member_start[first]} twice"
            )
