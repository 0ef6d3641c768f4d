"""The index for engines that hand out blocks themselves, held against a model of plain dicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as _Bundle
from hypothesis.stateful import (
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import prefixtree as pt
from allocator import BlockTaken, InvalidArgument

NUM_BLOCKS = 40
EVICTIONS = ("lru", "lfu", "fifo", "cost", "priority")
NAMESPACES = ("", "", ("b", 1))
TOKENS = st.lists(st.integers(0, 1), max_size=9)


@dataclass
class Held:
    """A prefix of the index, and what the model says of it."""

    prefix: pt.Prefix
    namespace: Any
    tokens: list[int]
    births: list[int] = field(default_factory=list)
    moment: int = 0  # drops before it was matched


class IndexMachine(RuleBasedStateMachine):
    """Paths of whole blocks in a dict: (namespace, *tokens) to (block, birth, holds)."""

    prefixes = _Bundle("prefixes")

    @initialize(size=st.sampled_from([1, 2, 4]), eviction=st.sampled_from(EVICTIONS))
    def start(self, size: int, eviction: str) -> None:
        self.size = size
        self.index = pt.PrefixIndex(NUM_BLOCKS, size, eviction=eviction)
        self.blocks: dict[tuple[Any, ...], int] = {}
        self.birth: dict[tuple[Any, ...], int] = {}
        self.free = list(range(NUM_BLOCKS))
        self.held: list[Held] = []
        self.born = self.drops = 0

    def paths(self, namespace: Any, tokens: list[int]) -> list[tuple[Any, ...]]:
        whole = len(tokens) // self.size * self.size
        return [(namespace, *tokens[:end]) for end in range(self.size, whole + 1, self.size)]

    def matched(self, namespace: Any, tokens: list[int]) -> int:
        count = 0
        for path in self.paths(namespace, tokens):
            if path not in self.blocks:
                break
            count += self.size
        return count

    def make(self, prefix: pt.Prefix, namespace: Any, tokens: list[int]) -> Held:
        tokens = tokens[: prefix.length]
        births = [self.birth[path] for path in self.paths(namespace, tokens)]
        return Held(prefix, namespace, tokens, births, self.drops)

    def put(self, namespace: Any, tokens: list[int], blocks: list[int]) -> None:
        for path, block in zip(self.paths(namespace, tokens), blocks, strict=True):
            if path not in self.blocks:
                self.blocks[path] = block
                self.birth[path] = self.born = self.born + 1
                self.free.remove(block)

    def pick(self, count: int, shift: int) -> list[int]:
        """So many free blocks, in no order to rely on."""
        return (self.free[shift:] + self.free[:shift])[:count][::-1]

    def kept(self) -> set[tuple[Any, ...]]:
        return {path for one in self.held for path in self.paths(one.namespace, one.tokens)}

    def drop(self, blocks: np.ndarray[Any, Any]) -> None:
        """Takes out what came back; nothing held, and nothing that has something behind it."""
        self.drops += 1
        gone = set(blocks.tolist())
        assert len(gone) == len(blocks)
        paths = {path for path, block in self.blocks.items() if block in gone}
        assert len(paths) == len(gone)
        assert not paths & self.kept()
        for path in paths:
            del self.blocks[path], self.birth[path]
        for path in self.blocks:
            above = path[: -self.size]
            assert len(above) == 1 or above in self.blocks
        self.free += blocks.tolist()

    @rule(
        target=prefixes,
        namespace=st.sampled_from(NAMESPACES),
        tokens=TOKENS,
    )
    def match(self, namespace: Any, tokens: list[int]) -> Any:
        found = self.index.match(tokens, namespace=namespace)
        assert found.length == self.matched(namespace, tokens)
        assert not found.holds
        expected = [self.blocks[path] for path in self.paths(namespace, tokens[: found.length])]
        assert self.index.blocks(found).tolist() == expected
        return self.make(found, namespace, tokens)

    @rule(
        target=prefixes,
        namespace=st.sampled_from(NAMESPACES),
        tokens=TOKENS,
        shift=st.integers(0, 7),
    )
    def insert(self, namespace: Any, tokens: list[int], shift: int) -> Any:
        count = len(tokens) // self.size
        known = self.matched(namespace, tokens)
        if count - known // self.size > len(self.free):
            return multiple()
        blocks = [0] * (known // self.size)  # not looked at
        blocks += self.pick(count - len(blocks), shift)
        got = self.index.insert(tokens, blocks, namespace=namespace)
        assert got.known == known
        assert got.prefix.length == count * self.size
        self.put(namespace, tokens, blocks)
        return self.make(got.prefix, namespace, tokens)

    @rule(target=prefixes, one=prefixes, tokens=TOKENS)
    def match_behind(self, one: Held, tokens: list[int]) -> Any:
        return self.match(one.namespace, one.tokens + tokens)

    @rule(target=prefixes, one=prefixes, tokens=TOKENS, shift=st.integers(0, 7))
    def insert_behind(self, one: Held, tokens: list[int], shift: int) -> Any:
        return self.insert(one.namespace, one.tokens + tokens, shift)

    @rule(one=prefixes)
    def hold(self, one: Held) -> None:
        alive = [self.birth.get(path) for path in self.paths(one.namespace, one.tokens)]
        try:
            self.index.hold(one.prefix)
        except pt.PrefixGone:
            assert self.drops > one.moment
            assert not one.prefix.holds
        else:
            assert alive == one.births
            self.held.append(one)

    @rule(one=prefixes)
    def touch(self, one: Held) -> None:
        alive = [self.birth.get(path) for path in self.paths(one.namespace, one.tokens)]
        nodes = self.index.stats().nodes
        try:
            self.index.touch(one.prefix)
        except pt.PrefixGone:
            assert self.drops > one.moment
        else:
            assert alive == one.births
        assert self.index.stats().nodes == nodes

    @rule(one=prefixes)
    def release(self, one: Held) -> None:
        if one.prefix.holds:
            self.index.release(one.prefix)
            self.held.remove(one)
        else:
            with pytest.raises(pt.NotHeld):
                self.index.release(one.prefix)

    @rule(one=prefixes, tokens=TOKENS, shift=st.integers(0, 7))
    def extend(self, one: Held, tokens: list[int], shift: int) -> None:
        if one.prefix.holds != 1:
            with pytest.raises(pt.NotHeld):
                self.index.extend(one.prefix, tokens, [])
            return
        before = one.prefix.length
        whole = one.tokens + tokens[: len(tokens) // self.size * self.size]
        known = self.matched(one.namespace, whole) - before
        count = (len(whole) - before) // self.size
        if count - known // self.size > len(self.free):
            return
        blocks = [0] * (known // self.size)
        blocks += self.pick(count - len(blocks), shift)
        assert self.index.extend(one.prefix, tokens, blocks) == known
        assert one.prefix.length == len(whole)
        above = [self.blocks[path] for path in self.paths(one.namespace, one.tokens)]
        self.put(one.namespace, whole, above + blocks)
        one.tokens = whole
        one.births = [self.birth[path] for path in self.paths(one.namespace, whole)]

    @rule(one=prefixes, start=st.integers(0, 4), chosen=st.lists(st.booleans(), max_size=5))
    def replace(self, one: Held, start: int, chosen: list[bool]) -> None:
        """Some of the blocks from one on, others stay."""
        every = self.paths(one.namespace, one.tokens)
        paths = every[start : start + len(chosen)]
        chosen = chosen[: len(paths)]
        if [self.birth.get(path) for path in every] != one.births or sum(chosen) > len(self.free):
            return
        old = [self.blocks[path] for path in paths]
        fresh = iter(self.pick(sum(chosen), start))
        new = [next(fresh) if other else block for other, block in zip(chosen, old, strict=True)]
        try:
            got = self.index.replace(one.prefix, new, min(start, len(every)) * self.size)
        except pt.PrefixGone:
            assert self.drops > one.moment
            return
        assert got.tolist() == [block for block in old if block not in new]
        for path, block in zip(paths, new, strict=True):
            self.blocks[path] = block
        self.free = [block for block in self.free if block not in new] + got.tolist()

    @rule(count=st.integers(0, 12), last_first=st.booleans())
    def evict(self, count: int, last_first: bool) -> None:
        room = len(self.blocks) - len(self.kept())
        assert self.index.evictable_blocks == room
        order = self.index.eviction_order().tolist()
        assert len(order) == room
        blocks = self.index.evict(count, last_first=last_first)
        assert len(blocks) == min(count, room)
        if last_first:
            assert blocks.tolist() == order[:count]
        else:
            assert set(blocks.tolist()) == set(order[:count])
        self.drop(blocks)

    @rule(
        namespace=st.sampled_from(NAMESPACES),
        tokens=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=6),
    )
    def forget(self, namespace: Any, tokens: list[int] | None) -> None:
        top = (namespace, *(tokens or [])[: len(tokens or []) // self.size * self.size])
        below = [path for path in self.blocks if path[: len(top)] == top and len(path) > len(top)]
        kept = len(set(below) & self.kept())
        got = self.index.forget(tokens, namespace=namespace)
        assert len(got.blocks) * self.size == got.tokens == (len(below) - kept) * self.size
        assert got.kept_tokens == kept * self.size
        self.drop(got.blocks)

    @rule()
    def clear(self) -> None:
        got = self.index.clear()
        assert got.kept_tokens == len(self.kept()) * self.size
        assert len(got.blocks) * self.size == got.tokens
        self.drop(got.blocks)

    @rule(one=consumes(prefixes))
    def let_go(self, one: Held) -> None:
        while one.prefix.holds:
            self.release(one)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        stats = self.index.stats()
        assert stats.cached_tokens == len(self.blocks) * self.size
        assert self.index.cached_blocks == len(self.blocks)
        assert stats.free_blocks == len(self.free)
        assert stats.open_sequences == len(self.held)
        assert stats.logical_tokens == sum(len(one.tokens) for one in self.held)
        runs = np.flatnonzero(np.diff(np.sort(self.free)) != 1)
        assert stats.free_extents == (len(runs) + 1 if self.free else 0)
        for one in self.held:
            expected = [self.blocks[path] for path in self.paths(one.namespace, one.tokens)]
            assert self.index.blocks(one.prefix).tolist() == expected


IndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestIndexMachine = IndexMachine.TestCase


@pytest.fixture
def index() -> pt.PrefixIndex:
    index = pt.PrefixIndex(16, 2)
    index.insert([1, 2, 3, 4], [7, 8])
    return index


def test_a_decode_grows_one_node(index: pt.PrefixIndex) -> None:
    prefix = index.match([1, 2, 3, 4])
    index.hold(prefix)
    for block in range(5):
        assert index.extend(prefix, [10 + block, 0], [block]) == 0
    assert index.stats().nodes == 2
    assert index.blocks(prefix).tolist() == [7, 8, 0, 1, 2, 3, 4]
    assert index.blocks(prefix, 2, 8).tolist() == [8, 0, 1]


def test_growth_in_place_is_bounded() -> None:
    index = pt.PrefixIndex(20_000, 1)
    prefix = index.match([])
    index.hold(prefix)
    for at in range(100):
        index.extend(prefix, range(at * 100, at * 100 + 100), np.arange(at * 100, at * 100 + 100))
    assert index.stats().nodes == 3
    index.check()


@pytest.fixture
def grown(index: pt.PrefixIndex) -> pt.Prefix:
    """A prefix 1 2 3 4 5 6 on the blocks 7 8 9, held, that made its last node itself."""
    prefix = index.match([1, 2, 3, 4])
    index.hold(prefix)
    index.extend(prefix, [5, 6], [9])
    return prefix


def test_what_another_holds_does_not_grow(index: pt.PrefixIndex, grown: pt.Prefix) -> None:
    other = index.match([1, 2, 3, 4, 5, 6])
    index.hold(other)
    index.extend(grown, [7, 8], [10])
    index.release(grown)
    assert index.evictable_blocks == 1
    assert index.evict(9).tolist() == [10]
    assert index.blocks(other).tolist() == [7, 8, 9]
    index.check()


def test_what_has_something_behind_it_does_not_grow(
    index: pt.PrefixIndex, grown: pt.Prefix
) -> None:
    index.insert([1, 2, 3, 4, 5, 6, 0, 0], [7, 8, 9, 1])
    assert index.extend(grown, [7, 8], [10]) == 0
    assert index.extend(grown, [0, 0], [11]) == 0
    index.check()
    assert index.match([1, 2, 3, 4, 5, 6, 0, 0]).length == 8
    assert index.blocks(index.match([1, 2, 3, 4, 5, 6, 7, 8, 0, 0])).tolist() == [7, 8, 9, 10, 11]


def test_an_extension_that_is_known_moves_the_hold(index: pt.PrefixIndex, grown: pt.Prefix) -> None:
    index.insert([1, 2, 3, 4, 5, 6, 0, 0, 1, 1], [7, 8, 9, 1, 2])
    assert index.extend(grown, [0, 0], [10]) == 2
    assert index.blocks(grown).tolist() == [7, 8, 9, 1]
    assert index.extend(grown, [1, 1, 2, 2], [11, 12]) == 2
    assert index.blocks(grown, 6).tolist() == [1, 2, 12]
    assert index.evictable_blocks == 0
    index.release(grown)
    assert index.evictable_blocks == index.cached_blocks == 6
    index.check()


def test_an_older_prefix_never_takes_new_tokens_for_its_own(index: pt.PrefixIndex) -> None:
    older = index.match([1, 2, 3, 4])
    assert index.evict(1).tolist() == [8]
    index.insert([1, 2, 5, 6], [7, 9])
    for call in (index.hold, index.blocks):
        with pytest.raises(pt.PrefixGone, match="4 tokens"):
            call(older)
    assert index.match([1, 2, 3, 4]).length == 2


def test_a_node_that_may_have_been_cut_does_not_grow(index: pt.PrefixIndex) -> None:
    older = index.match([1, 2, 3, 4])
    assert index.evict(1).tolist() == [8]
    index.insert([1, 2, 3, 4, 5, 6], [7, 1, 2])
    assert index.evict(1).tolist() == [2]
    prefix = index.match([1, 2])
    index.hold(prefix)
    assert index.extend(prefix, [3, 4], [9]) == 2
    assert index.evict(9).tolist() == []
    newer = index.match([1, 2, 3, 4])
    index.extend(prefix, [7, 8], [10])
    assert index.blocks(newer).tolist() == [7, 1]
    with pytest.raises(pt.PrefixGone):
        index.hold(older)
    assert index.stats().nodes == 3


def test_priorities_decide_who_goes_first() -> None:
    index = pt.PrefixIndex(16, 2, eviction="priority")
    first = index.insert([1, 2, 3, 4], [0, 1]).prefix
    index.insert([5, 6], [2])
    index.retain(first, priority=90, start=2)
    assert index.evict(1).tolist() == [2]
    index.check()
    with pytest.raises(pt.PriorityUnused, match="'lru'"):
        pt.PrefixIndex(4).retain(pt.PrefixIndex(4).match([]), priority=1)


@pytest.mark.parametrize("eviction", ["lru", "mru", "fifo", "lfu", "slru", "cost"])
@pytest.mark.parametrize("aim", [[1, 2, 3], [1, 2, 4], [1, 2], [5], [9]])
def test_a_touch_is_a_hold_and_a_release(eviction: str, aim: list[int]) -> None:
    touched, held = (pt.PrefixIndex(8, 1, eviction=eviction) for _ in range(2))
    for index in (touched, held):
        index.insert([1, 2, 3], [0, 1, 2])
        index.insert([1, 2, 4], [0, 1, 3])
        index.insert([5], [4])
        index.insert([6], [5])
    for tokens in (aim, aim, [5], [1, 2, 4], [6], [1, 2, 3]):
        touched.touch(touched.match(tokens))
        prefix = held.match(tokens)
        held.hold(prefix)
        held.release(prefix)
    touched.check()
    for _ in range(6):
        assert touched.evict(1).tolist() == held.evict(1).tolist()


def test_a_touch_in_a_node_renews_all_of_it() -> None:
    index = pt.PrefixIndex(8, 1)
    index.insert([1, 2, 3], [0, 1, 2])
    index.insert([4], [3])
    index.touch(index.match([1]))
    assert index.stats().nodes == 2
    assert [index.evict(1).tolist() for _ in range(4)] == [[3], [2], [1], [0]]


def test_a_prefix_is_promoted_where_it_was_worth_less() -> None:
    index = pt.PrefixIndex(8, 1, eviction="priority")
    index.retain(index.insert([1, 2], [0, 1]).prefix, priority=80)
    longer = index.insert([1, 2, 3, 4], [0, 1, 2, 3]).prefix
    index.insert([5], [4])
    index.promote(longer, priority=60)
    index.promote(index.match([]), priority=99)
    index.promote(index.match([5]), priority=70)
    index.promote(index.match([5]), priority=10)
    index.check()
    assert [index.evict(1).tolist() for _ in range(5)] == [[3], [2], [4], [1], [0]]
    with pytest.raises(InvalidArgument, match="101"):
        index.promote(longer, priority=101)
    with pytest.raises(pt.PriorityUnused, match="'lru'"):
        pt.PrefixIndex(8, 1).promote(longer, priority=60)


def test_requests_are_counted_when_they_are_held(index: pt.PrefixIndex) -> None:
    prefix = index.match([1, 2, 9])
    index.hold(prefix, query_tokens=3)
    stats = index.stats()
    assert (stats.opens, stats.query_tokens, stats.hit_tokens) == (1, 3, 2)
    with pytest.raises(InvalidArgument, match="query_tokens is 1"):
        index.hold(prefix, query_tokens=1)
    assert "2 tokens" in str(index.tree())
    assert index.explain([1, 2, 9, 9]).cached == 2


@pytest.mark.parametrize(
    ("tokens", "blocks", "error", "named"),
    [
        ([1, 2], [], pt.InvalidLength, "0 blocks for 2 tokens, expected 1"),
        ([1, 2, 5, 6], [7, 16], InvalidArgument, "block 16"),
        ([1, 2, 5, 6], [7, -1], InvalidArgument, "block -1"),
        ([1, 2, 5, 6], [7, 2**32 + 3], InvalidArgument, "block 4294967299"),
        ([1, 2, 5, 6], [7, 8], BlockTaken, "8"),
        ([5, 6, 7, 8], [3, 3], BlockTaken, "3"),
        ([5, 6], [0.0], InvalidArgument, "float64"),
        ([5, 6], [[0]], InvalidArgument, "shape"),
        ([5, -6], [0], pt.InvalidTokens, "-6"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    index: pt.PrefixIndex, tokens: Any, blocks: Any, error: type[Exception], named: str
) -> None:
    held = index.match([1, 2, 3, 4])
    index.hold(held)
    before = str(index.tree()), index.stats()._replace(reuse_gaps=None)  # type: ignore[arg-type]
    with pytest.raises(error, match=named):
        index.insert(tokens, blocks)
    if tokens[0] == 5:
        with pytest.raises(error, match=named):
            index.extend(held, tokens, blocks)
    assert (str(index.tree()), index.stats()._replace(reuse_gaps=None)) == before  # type: ignore[arg-type]
    index.check()


def test_lengths_outside_are_refused(index: pt.PrefixIndex) -> None:
    prefix = index.match([1, 2, 3, 4])
    for start, stop in ((-2, 2), (0, 6), (1, 2), (4, 2)):
        with pytest.raises(pt.InvalidLength, match=r"expected whole blocks of 2 tokens"):
            index.blocks(prefix, start, stop)
    with pytest.raises(pt.InvalidLength, match="-1"):
        index.evict(-1)
    with pytest.raises(pt.InvalidNamespace):
        index.insert([1, 2], [0], namespace=3)  # type: ignore[arg-type]
    assert index.evict(100).tolist() == [7, 8]


def test_the_order_is_that_of_blocks_evicted_one_by_one(index: pt.PrefixIndex) -> None:
    held = index.insert([1, 2, 5, 6, 7, 8], [0, 3, 4]).prefix
    index.hold(held)
    index.insert([9, 9], [1], namespace="b")
    assert index.eviction_order().tolist() == [8, 1]
    index.release(held)
    above = index.match([1, 2])
    index.hold(above)
    assert index.eviction_order().tolist() == [8, 1, 4, 3]
    index.release(above)
    order = index.eviction_order().tolist()
    assert order == [8, 1, 4, 3, 7]
    assert [index.evict(1).tolist() for _ in order] == [[block] for block in order]
    assert index.eviction_order().tolist() == []


def test_the_order_knows_of_priorities_that_are_over() -> None:
    now = [0.0]
    index = pt.PrefixIndex(4, 1, eviction="priority", clock=lambda: now[0])
    for token in range(3):
        index.insert([token], [token])
    index.retain(index.match([0]), priority=90, duration=5)
    assert index.eviction_order().tolist() == [1, 2, 0]
    now[0] = 6
    assert index.eviction_order().tolist() == [0, 1, 2]


def test_threads_may_share_it() -> None:
    assert pt.PrefixIndex(4, thread_safe=True).thread_safe
    assert not pt.PrefixIndex(4).thread_safe
