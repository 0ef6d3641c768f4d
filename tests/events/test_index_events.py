"""What the events of a `PrefixIndex` say is what it holds, whatever was done to it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree.events import BlockStored, KVEvents
from tests.prefixtree.test_index import IndexMachine

from .mirror import Key, Mirror, decoded, packed, parts_of


class Told(IndexMachine):
    """The index's state machine, with a consumer that is told now and then."""

    events: KVEvents | None = None

    @rule(begins=st.booleans())
    def tell(self, begins: bool) -> None:
        if self.events is None:
            if not begins:
                return  # some of it is there already when they begin
            self.events = KVEvents(self.index, block_hashes="bytes")
            self.mirror = Mirror(self.size)
        for event in decoded(self.events.take()):
            self.mirror.apply(event)
        assert self.mirror.keys == self.expected()
        assert self.events.stored_blocks == len(self.blocks)
        again = Mirror(self.size)
        for event in decoded(list(self.events.everything())):
            again.apply(event)
        assert again.paths == self.mirror.paths

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.tell(True)

    def expected(self) -> Counter[Key]:
        return Counter((parts_of(space), packed(tokens)) for space, *tokens in self.blocks)


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_node_that_grows_in_place_is_told_of() -> None:
    index = pt.PrefixIndex(16, 2)
    prefix = index.match([])
    index.hold(prefix)
    index.extend(prefix, [1, 2], [5])
    events = KVEvents(index)
    (first,) = events.take()
    assert isinstance(first, BlockStored)
    index.extend(prefix, [3, 4, 5, 6], [9, 2])
    assert index.stats().nodes == 1
    (more,) = events.take()
    assert isinstance(more, BlockStored)
    assert (more.token_ids, more.parent_block_hash) == ([3, 4, 5, 6], first.block_hashes[0])
    assert events.take() == []


def test_an_index_has_events_once() -> None:
    index = pt.PrefixIndex(16, 2)
    with KVEvents(index), pytest.raises(InvalidArgument, match="has KV events already"):
        KVEvents(index)
    KVEvents(index).close()
