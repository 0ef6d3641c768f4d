"""The samples that decode, side by side in arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixtree.cache import PrefixCache
from prefixtree.columns import Int64s
from prefixtree.engines.requests import ROW, Request
from prefixtree.sequence import Sequence


class Member(NamedTuple):
    """A sample that decodes. Its sequence holds all its tokens but the newest."""

    request: Request
    sample: int
    sequence: Sequence


class Running:
    """The samples that decode, in the order in which they were admitted.

    Made anew when a sample comes or goes; a step without such a change only replaces `rows`.

    Attributes: members; rows, one of ROW for each member; batch, their sequences; request_ids and
    samples, the columns of their events.
    """

    def __init__(self, cache: PrefixCache, members: list[Member], rows: NDArray[np.void]) -> None:
        self.members = members
        self.rows = rows
        self.batch = cache.batch(member.sequence for member in members)
        self.request_ids = [member.request.id for member in members]
        self.samples = [member.sample for member in members]
        stops = [member.request.params.stop_tokens for member in members]
        self._stop_rows = np.repeat(np.arange(len(stops)), [len(tokens) for tokens in stops])
        self._stop_tokens = np.array([token for tokens in stops for token in tokens], np.int64)

    @classmethod
    def none(cls, cache: PrefixCache) -> Running:
        return cls(cache, [], np.empty(0, ROW))

    def __len__(self) -> int:
        return len(self.members)

    def stopped(self, tokens: Int64s) -> Int64s:
        """The members that have a stop token at their place in `tokens` [>= len]."""
        hit: NDArray[np.bool_] = tokens[self._stop_rows] == self._stop_tokens
        return self._stop_rows[hit]
