"""The same random operations on SGLang's radix cache and on ours, compared at every step.

Runs only where sglang can be imported. Its `RadixCache` with pages of one token and our cache with
blocks of one token are both exact to the token, so match lengths and the evictable and protected
tokens have to be equal whatever is done to both.

In three points they differ on purpose, and the tests are made around them:

- SGLang evicts whole leaves, ours only the tail of the last one where that is enough. So ours is
  asked for as much as SGLang gave.
- SGLang notes the time of every match and insertion, ours when the last sequence on a node ends. So
  a lock is taken off behind another match, as an engine's last insertion would be.
- A match that ends inside a node renews all of it in SGLang, in ours only the matched part. So
  which leaves an eviction chose is compared where no two prompts have a token in common; elsewhere
  only how much it left, and then everything that is not in use goes.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixtree import PrefixCache, Sequence

radix_cache = pytest.importorskip("sglang.srt.mem_cache.radix_cache", exc_type=ImportError)
torch = pytest.importorskip("torch")

from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)

CAPACITY = 10_000
Prompt = tuple[int, ...]


class Slots:
    """All that SGLang's cache asks of an allocator: to take slots back."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.freed = 0

    def free_segment(self, slots: Any, *, start_pos: int) -> None:
        self.freed += len(slots)


class Both:
    """One cache of each kind; every method does the same to both."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.theirs = radix_cache.RadixCache.create_simulated(mock_allocator=self.slots)
        self.ours = PrefixCache(CAPACITY, 1)
        self.locked: list[tuple[Prompt, Any, Sequence]] = []

    def match(self, prompt: Prompt) -> int:
        theirs = self._matched(prompt).device_prefix_len
        assert self.ours.match(prompt).cached == theirs
        return int(theirs)

    def insert(self, prompt: Prompt) -> None:
        value = torch.arange(len(prompt))
        theirs = self.theirs.insert(InsertParams(key=self._key(prompt), value=value))
        sequence = self.ours.open(prompt)
        assert sequence.cached_len == theirs.prefix_len
        sequence.commit(len(prompt))
        sequence.close()

    def lock(self, prompt: Prompt) -> None:
        """Keeps what is cached of a prompt."""
        found = self._matched(prompt)
        if found.device_prefix_len:
            kept = prompt[: found.device_prefix_len]
            receipt = self.theirs.lock(found.last_device_node)
            self.locked.append((kept, receipt, self.ours.open(kept)))

    def unlock(self, which: int) -> None:
        if self.locked:
            kept, receipt, sequence = self.locked.pop(which % len(self.locked))
            self._matched(kept)
            self.theirs.unlock(receipt)
            sequence.close()

    def evict(self, num_tokens: int) -> int:
        theirs = self.theirs.evict(EvictParams(num_tokens=num_tokens)).num_tokens_evicted
        assert self.ours.evict(theirs).tokens == theirs
        return int(theirs)

    def agree(self) -> None:
        stats = self.ours.stats()
        assert stats.evictable_tokens == self.theirs.evictable_size()
        assert stats.pinned_tokens == self.theirs.protected_size()
        assert stats.cached_tokens == self.theirs.total_size()
        assert stats.evicted_tokens == self.slots.freed
        self.ours.check()

    def _matched(self, prompt: Prompt) -> Any:
        return self.theirs.match_prefix(MatchPrefixParams(key=self._key(prompt)))

    def _key(self, prompt: Prompt) -> Any:
        return radix_cache.RadixKey(array("q", prompt))


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), prompts),
        st.tuples(st.just("match"), prompts),
        st.tuples(st.just("lock"), prompts),
        st.tuples(st.just("unlock"), st.integers(0, 9)),
        st.tuples(st.just("evict"), st.integers(0, 40)),
    ),
    max_size=60,
)


@given(steps)
def test_prompts_that_share_prefixes(steps: list[tuple[str, Any]]) -> None:
    both = Both()
    seen: set[Prompt] = set()
    for operation, argument in steps:
        getattr(both, operation)(argument)
        both.agree()
        if operation == "evict":
            both.evict(CAPACITY)
            both.agree()
            assert both.ours.stats().evictable_tokens == 0
        if operation == "insert":
            seen.add(argument)
        for prompt in seen:
            both.match(prompt)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "insert", "lock", "unlock", "evict"]), st.integers(0, 9)
        ),
        max_size=80,
    )
)
def test_whole_leaves_go_in_the_same_order(steps: list[tuple[str, int]]) -> None:
    """Ten prompts that begin differently, of 1 to 10 tokens."""
    both = Both()
    every = [tuple(range(100 * which, 100 * which + which + 1)) for which in range(10)]
    for operation, which in steps:
        if operation in ("insert", "lock"):
            getattr(both, operation)(every[which])
        elif operation == "unlock":
            both.unlock(which)
        else:
            both.evict(which)
        both.agree()
        here = [node.key.token_ids[0] // 100 for node in both.theirs.root_node.children.values()]
        assert sorted(here) == [
            n for n, prompt in enumerate(every) if both.ours.match(prompt).cached
        ]
