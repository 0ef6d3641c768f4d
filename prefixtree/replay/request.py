"""A recorded request: when it came, how long it was, and its tokens on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefixtree.columns import Int32s, Int64s

MAX_TOKENS = 2**31
"""Distinct tokens that all traces of one replay may have together: token ids are int32."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request. Its tokens, prompt and output, are kept as runs of consecutive ids.

    A trace says only which blocks of tokens are equal. Every distinct block therefore gets a range
    of token ids of its own and is that range: equal blocks have equal tokens, different ones have
    no token in common, and the start of a block is the start of its range.
    """

    time_s: float
    """When it arrived, in seconds since the start of the trace."""
    session: int
    """Requests of one session are its turns: each starts when the one before has ended."""
    input_length: int
    output_length: int
    firsts: Int64s
    """First token id of each run, int64 [runs]."""
    lengths: Int64s
    """Tokens of each run, int64 [runs]; their sum is input_length + output_length."""

    def tokens(self) -> Int32s:
        """Prompt and output, int32 [input_length + output_length]. O(length), vectorised."""
        ends = np.cumsum(self.lengths)
        ids = np.repeat(self.firsts - (ends - self.lengths), self.lengths)
        ids += np.arange(len(ids))
        return ids.astype(np.int32)

    def blocks(self, block_size: int) -> int:
        """Blocks that it needs where nothing is cached."""
        return -(-self.input_length // block_size) - (-self.output_length // block_size)
