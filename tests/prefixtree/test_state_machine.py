"""A cache driven by random calls, next to a model and a stand-in for the KV tensors.

The stand-in is a dictionary from slots to paths: when a sequence gets slots, the path that ends at
each token is written there at once, as a hasty engine would. Whatever any sequence or any later
match reads must then be its own path. Pools are tiny, blocks small, and there are few different
tokens, so that sharing, splits inside a block, duplicates and evictions happen all the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import prefixtree as pt
from allocator import OutOfBlocks
from prefixtree.errors import (
    InvalidBatch,
    InvalidLength,
    InvalidTokens,
    NotCommitted,
    PrefixTreeError,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)

from .model import ModelCache, ModelSequence, Path, prefixes
from .observe import Journal, View, check_forest, look

BAD_TOKENS: list[Any] = [
    [-1],
    [0, 1, -5],
    [2**31],
    [0, 2**40],
    [0.5],
    [float("nan")],
    ["a"],
    [None],
    [[0, 1]],
    0,
    "01",
    np.array([0.0, 1.0]),
    np.array([[0, 1]]),
    np.array([True]),
    np.array([-1]),
    np.array([2**31], dtype=np.uint32),
    np.array([2**63], dtype=np.uint64),
]

# They differ in different bytes, for a cache that compares memory.
TOKENS = [0, 1 << 24, 1, 2**31 - 1]

one_token = st.sampled_from(TOKENS)
tokens = st.lists(one_token, min_size=1, max_size=14)
few_tokens = st.lists(one_token, min_size=0, max_size=5)

# Requests that come in together: which earlier one each shares its beginning with, how much of it,
# how it goes on, and how much of it is computed.
arrivals = st.tuples(st.integers(0, 5), st.integers(0, 14), tokens, st.integers(0, 20))


@dataclass(eq=False)
class Handle:
    """An open sequence of the cache and the model's."""

    real: pt.Sequence
    model: ModelSequence
    index: int
    """Which of all sequences ever made it is."""

    def __repr__(self) -> str:
        return f"<{self.model.tokens} committed {self.model.committed}>"


@dataclass(eq=False)
class BatchHandle:
    """A cache's batch and its members."""

    real: pt.Batch
    members: list[Handle]


def fingerprint(cache: pt.PrefixCache, sequences: list[pt.Sequence]) -> tuple[Any, ...]:
    """All that can be seen of a cache, but for what only an eviction brings to light."""
    return (
        cache.stats(),
        str(cache.tree()),
        [
            (
                len(sequence),
                sequence.committed,
                sequence.cached_len,
                sequence.is_open,
                sequence.tokens().tolist(),
                sequence.slots(0, len(sequence)).tolist(),
            )
            for sequence in sequences
        ],
    )


class Caching(RuleBasedStateMachine):
    sequences = Bundle("sequences")
    closed = Bundle("closed")
    batches = Bundle("batches")

    @initialize(
        target=sequences,
        num_blocks=st.integers(6, 40),
        block_size=st.integers(1, 5),
        alphabet=st.integers(2, 4),
        past=st.lists(tokens, max_size=6),
        present=st.lists(arrivals, max_size=6),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        alphabet: int,
        past: list[list[int]],
        present: list[tuple[int, int, list[int], int]],
    ) -> Any:
        """A cache that was in use before: hypothesis leaves many rules out of an example, and an
        example without any that opens would see an empty cache only."""
        self.cache = pt.PrefixCache(num_blocks, block_size)
        self.journal = Journal(num_blocks, block_size)
        self.made = 0
        self.model = ModelCache()
        self.block_size = block_size
        self.alphabet = alphabet
        self.handles: list[Handle] = []
        self.kv: dict[int, Path] = {}
        self.view = View({}, {}, set(), 0)
        self.holders: list[Handle] = []
        self.counted = dict.fromkeys(
            ["query_tokens", "hit_tokens", "evicted_tokens", "opens", "rollbacks"], 0
        )
        self.forked = 0
        for drawn in past:
            for handle in self.open(drawn):
                self.commit_one(handle, len(handle.model))
                self.shut(handle)
        prompts: list[list[int]] = [[]]
        for which, cut, drawn, _ in present:
            prompts.append(prompts[which % len(prompts)][:cut] + drawn)
        handles = [handle for prompt in prompts[1:] for handle in self.open(prompt)]
        for handle, (*_, length) in zip(handles, present, strict=False):
            sequence = handle.model
            self.commit_one(handle, max(sequence.committed, min(length, len(sequence))))
        return multiple(*handles)

    # What every rule needs

    def fit(self, drawn: Sequence[int]) -> list[int]:
        """These tokens, with only as many different ones as this example uses."""
        return [TOKENS[TOKENS.index(token) % self.alphabet] for token in drawn]

    def some_path(self, data: st.DataObject) -> list[int]:
        """A path that is committed, or that an open sequence is about to commit."""
        known = {*self.model.leaves(), *(tuple(handle.model.tokens) for handle in self.handles)}
        return list(data.draw(st.sampled_from(sorted(known)), label="path"))

    def handle(self, real: pt.Sequence, model: ModelSequence) -> Handle:
        handle = Handle(real, model, self.made)
        self.handles.append(handle)
        self.made += 1
        return handle

    def real(self) -> list[pt.Sequence]:
        return [handle.real for handle in self.handles]

    def fingerprint(self) -> tuple[Any, ...]:
        return fingerprint(self.cache, self.real())

    @contextmanager
    def refusal(self, *errors: type[Exception]) -> Iterator[Any]:
        """The call inside fails with one of these errors, and the cache is as before it."""
        before = self.fingerprint()
        with pytest.raises(errors) as caught:
            yield caught
        assert str(caught.value)
        assert self.fingerprint() == before

    def twin(self) -> tuple[pt.PrefixCache, list[pt.Sequence]]:
        """The cache and its open sequences, made once more by the same calls."""
        twin, made = self.journal.replay()
        return twin, [made[handle.index] for handle in self.handles]

    def write(self, slots: Sequence[int], sequence: ModelSequence, start: int) -> None:
        for slot, path in zip(slots, prefixes(sequence.tokens)[start:], strict=True):
            self.kv[slot] = path

    def learn(self, keep: Sequence[int] = ()) -> set[Path]:
        """Finds out what an eviction that had to keep this path took, and returns it."""
        leaves = self.model.leaves()
        kept = [self.cache.match(leaf).cached for leaf in leaves]
        remaining = {
            path
            for leaf, length in zip(leaves, kept, strict=True)
            for path in prefixes(leaf[:length])
        }
        evicted = self.model.forget(remaining, keep)
        assert kept == [self.model.cached(leaf) for leaf in leaves]
        self.counted["evicted_tokens"] += len(evicted)
        return evicted

    def blocks_taken(self, slots: Sequence[int], held: Sequence[int]) -> int:
        """Blocks that hold these new slots and none of the slots held before."""
        before = {slot // self.block_size for slot in held}
        return len({slot // self.block_size for slot in slots} - before)

    def least_blocks(self, count: int) -> int:
        """Blocks for `count` more tokens when all but one slot of a block on the path are used."""
        return self.blocks_for(max(0, count - (self.block_size - 1)))

    def blocks_for(self, count: int) -> int:
        return -(-count // self.block_size)

    def reserve(
        self,
        call: Callable[[pt.PrefixCache], Any],
        keep: Sequence[int],
        least: int,
        most: int,
        taken: Callable[[Any], int],
    ) -> Any:
        """Makes a call that takes blocks, and judges what it evicted or why it refused.

        `keep` is a path that the call itself holds and must not evict. It needs between `least`
        and `most` blocks; `taken` counts them from its result. Returns None when it was refused.
        """
        before = self.fingerprint()
        free = self.cache.stats().free_blocks
        known = self.model.leaves()
        twin, _ = self.twin()
        if keep:
            twin.open(keep)
        try:
            result = call(self.cache)
        except OutOfBlocks as error:
            refused = error
        else:
            needed = taken(result)
            assert least <= needed <= most
            evicted = self.learn(keep)
            if needed <= free:
                assert not evicted, "evicted without need"
                assert self.cache.stats().free_blocks == free - needed
            else:
                freed = twin.evict(needed - free)
                assert self.cache.stats().free_blocks == free + freed - needed
                assert [twin.match(leaf).cached for leaf in known] == [
                    self.model.cached(leaf) for leaf in known
                ]
            return result
        assert self.fingerprint() == before
        assert least <= refused.needed <= most
        assert refused.free == free
        assert refused.evictable == twin.clear()
        assert refused.needed > refused.free + refused.evictable
        for number in (refused.needed, refused.free, refused.evictable):
            assert str(number) in str(refused)
        return None

    def open(self, drawn: Sequence[int]) -> list[Handle]:
        """The new sequence, or none when it was refused."""
        prompt = self.fit(drawn)
        cached = self.model.cached(prompt)
        rest = len(prompt) - cached

        def taken(sequence: pt.Sequence) -> int:
            slots = sequence.slots(0, len(prompt)).tolist()
            return self.blocks_taken(slots[cached:], slots[:cached])

        real = self.reserve(
            lambda cache: cache.open(prompt),
            keep=prompt[:cached],
            least=self.least_blocks(rest) if cached else self.blocks_for(rest),
            most=self.blocks_for(rest),
            taken=taken,
        )
        if real is None:
            return []
        assert self.model.cached(prompt) == cached, "evicted what the new sequence matched"
        handle = self.handle(real, self.model.open(prompt))
        self.journal.calls.append(lambda cache, made: made.append(cache.open(prompt)))
        assert real.cached_len == real.committed == cached
        self.write(real.slots(cached, len(prompt)).tolist(), handle.model, cached)
        self.counted["opens"] += 1
        self.counted["query_tokens"] += len(prompt)
        self.counted["hit_tokens"] += cached
        return [handle]

    def shut(self, handle: Handle) -> None:
        handle.real.close()
        self.journal.calls.append(lambda cache, made: made[handle.index].close())
        self.model.close(handle.model)
        self.handles.remove(handle)
        assert not handle.real.is_open

    def append(self, batch: Any, members: list[Handle], drawn: list[list[int]]) -> None:
        new = [self.fit(part) for part in drawn]
        packed = [token for part in new for token in part]
        counts = [len(part) for part in new]
        plain = all(count == 1 for count in counts)
        held = [member.real.slots(0, len(member.real)).tolist() for member in members]

        def taken(slots: np.ndarray) -> int:
            parts = np.split(slots, np.cumsum(counts)[:-1])
            return sum(
                self.blocks_taken(part.tolist(), before)
                for part, before in zip(parts, held, strict=True)
            )

        slots = self.reserve(
            lambda cache: (
                cache.append(batch, packed) if plain else cache.append(batch, packed, counts)
            ),
            keep=[],
            least=sum(map(self.least_blocks, counts)),
            most=sum(map(self.blocks_for, counts)),
            taken=taken,
        )
        if slots is None:
            return
        chosen = [member.index for member in members]
        self.journal.calls.append(
            lambda cache, made: cache.append([made[index] for index in chosen], packed, counts)
        )
        assert slots.dtype == np.int64
        assert slots.shape == (len(packed),)
        parts = np.split(slots, np.cumsum(counts)[:-1])
        for member, part, slots_of_member in zip(members, new, parts, strict=True):
            before = len(member.model)
            self.model.append(member.model, part)
            assert (
                slots_of_member.tolist() == member.real.slots(before, before + len(part)).tolist()
            )
            self.write(slots_of_member.tolist(), member.model, before)

    # Opening

    @rule(target=sequences, drawn=tokens)
    def open_fresh(self, drawn: list[int]) -> Any:
        return multiple(*self.open(drawn))

    @precondition(lambda self: self.model.paths or self.handles)
    @rule(target=sequences, data=st.data(), more=tokens)
    def open_extension(self, data: st.DataObject, more: list[int]) -> Any:
        return multiple(*self.open(self.some_path(data) + more))

    @precondition(lambda self: self.model.paths or self.handles)
    @rule(target=sequences, data=st.data())
    def open_prefix(self, data: st.DataObject) -> Any:
        path = self.some_path(data)
        return multiple(*self.open(path[: data.draw(st.integers(1, len(path)), label="length")]))

    @precondition(lambda self: self.model.paths or self.handles)
    @rule(target=sequences, data=st.data(), other=st.integers(1, 3), more=few_tokens)
    def open_divergence(self, data: st.DataObject, other: int, more: list[int]) -> Any:
        path = self.some_path(data)
        at = data.draw(st.integers(0, len(path) - 1), label="at")
        token = TOKENS[(TOKENS.index(path[at]) + other) % self.alphabet]
        return multiple(*self.open([*path[:at], token, *more]))

    @rule(target=sequences, twin=sequences)
    def open_identical(self, twin: Handle) -> Any:
        return multiple(*self.open(twin.model.tokens))

    # Appending and committing

    @rule(handle=sequences, token=one_token)
    def append_one(self, handle: Handle, token: int) -> None:
        self.append([handle.real], [handle], [[token]])

    @rule(members=st.lists(sequences, min_size=1, max_size=4, unique=True), data=st.data())
    def append_batch(self, members: list[Handle], data: st.DataObject) -> None:
        drawn = data.draw(st.lists(one_token, min_size=len(members), max_size=len(members)))
        self.append([member.real for member in members], members, [[token] for token in drawn])

    @rule(members=st.lists(sequences, min_size=1, max_size=4, unique=True), data=st.data())
    def append_ragged(self, members: list[Handle], data: st.DataObject) -> None:
        drawn = data.draw(st.lists(few_tokens, min_size=len(members), max_size=len(members)))
        self.append([member.real for member in members], members, drawn)

    @rule(handle=sequences, data=st.data())
    def append_what_is_there(self, handle: Handle, data: st.DataObject) -> None:
        """Appends tokens with which another sequence, or a committed path, goes on."""
        own = handle.model.tokens
        paths = {*self.model.leaves(), *(tuple(other.model.tokens) for other in self.handles)}
        further = sorted(
            path[len(own) :]
            for path in paths
            if len(path) > len(own) and path[: len(own)] == tuple(own)
        )
        if further:
            more = data.draw(st.sampled_from(further), label="more")
            self.append([handle.real], [handle], [list(more)])

    @rule(target=batches, members=st.lists(sequences, min_size=1, max_size=4, unique=True))
    def make_batch(self, members: list[Handle]) -> Any:
        return BatchHandle(self.cache.batch([member.real for member in members]), members)

    @rule(batch=batches, data=st.data())
    def append_to_batch_handle(self, batch: BatchHandle, data: st.DataObject) -> None:
        count = len(batch.members)
        drawn = data.draw(st.lists(few_tokens, min_size=count, max_size=count))
        if all(member.model.is_open for member in batch.members):
            self.append(batch.real, batch.members, drawn)
        else:
            packed = [token for part in drawn for token in self.fit(part)]
            with self.refusal(SequenceClosed):
                self.cache.append(batch.real, packed, [len(part) for part in drawn])

    def commit(self, batch: Any, members: list[Handle]) -> None:
        self.cache.commit(batch)
        chosen = [member.index for member in members]
        self.journal.calls.append(
            lambda cache, made: cache.commit([made[index] for index in chosen])
        )
        for member in members:
            self.model.commit(member.model, len(member.model))

    def commit_one(self, handle: Handle, length: int) -> None:
        handle.real.commit(length)
        self.journal.calls.append(lambda cache, made: made[handle.index].commit(length))
        self.model.commit(handle.model, length)

    @rule(batch=batches)
    def commit_batch_handle(self, batch: BatchHandle) -> None:
        if all(member.model.is_open for member in batch.members):
            self.commit(batch.real, batch.members)
        else:
            with self.refusal(SequenceClosed):
                self.cache.commit(batch.real)

    @rule(members=st.lists(sequences, min_size=1, max_size=4, unique=True))
    def commit_batch(self, members: list[Handle]) -> None:
        self.commit([member.real for member in members], members)

    @rule(handle=sequences)
    def commit_all(self, handle: Handle) -> None:
        self.commit_one(handle, len(handle.model))

    @rule(handle=sequences, data=st.data())
    def commit_part(self, handle: Handle, data: st.DataObject) -> None:
        sequence = handle.model
        length = data.draw(st.integers(sequence.committed, len(sequence)), label="length")
        self.commit_one(handle, length)

    @rule(handle=sequences, by=st.integers(1, 5), backwards=st.booleans())
    def commit_backwards_or_beyond_the_end(self, handle: Handle, by: int, backwards: bool) -> None:
        length = handle.model.committed - by if backwards else len(handle.model) + by
        with self.refusal(InvalidLength) as caught:
            handle.real.commit(length)
        assert str(length) in str(caught.value)

    # Forking and rolling back

    @rule(target=sequences, handle=sequences, count=st.integers(1, 4))
    def fork(self, handle: Handle, count: int) -> Any:
        if handle.model.uncommitted:
            with self.refusal(NotCommitted):
                handle.real.fork(count)
            return multiple()
        free = self.cache.stats().free_blocks
        real = handle.real.fork(count)
        self.journal.calls.append(lambda cache, made: made.extend(made[handle.index].fork(count)))
        models = self.model.fork(handle.model, count)
        self.forked += count
        assert self.cache.stats().free_blocks == free
        below_one = [InvalidLength] if len(handle.model) == 1 else []
        for side in (handle.real, *real):
            with self.refusal(RollbackPastFork, *below_one):
                side.rollback(1)
        return multiple(*map(self.handle, real, models))

    @rule(handle=sequences, token=one_token)
    def fork_uncommitted(self, handle: Handle, token: int) -> None:
        self.append([handle.real], [handle], [[token]])
        if handle.model.uncommitted:
            with self.refusal(NotCommitted):
                handle.real.fork(2)

    def roll_back(self, handle: Handle, count: int) -> None:
        handle.real.rollback(count)
        self.journal.calls.append(lambda cache, made: made[handle.index].rollback(count))
        self.model.rollback(handle.model, count)
        self.counted["rollbacks"] += 1

    @rule(handle=sequences, data=st.data())
    def rollback_uncommitted(self, handle: Handle, data: st.DataObject) -> None:
        sequence = handle.model
        most = min(sequence.uncommitted, len(sequence) - sequence.fork_len)
        self.roll_back(handle, data.draw(st.integers(0, most), label="count"))

    @rule(handle=sequences, data=st.data())
    def rollback_anywhere(self, handle: Handle, data: st.DataObject) -> None:
        most = len(handle.model) - handle.model.fork_len
        self.roll_back(handle, data.draw(st.integers(0, most), label="count"))

    @rule(handle=sequences, data=st.data(), drawn=few_tokens)
    def rollback_committed_and_go_on(
        self, handle: Handle, data: st.DataObject, drawn: list[int]
    ) -> None:
        self.commit_one(handle, len(handle.model))
        most = len(handle.model) - handle.model.fork_len
        self.roll_back(handle, data.draw(st.integers(0, most), label="count"))
        self.check_all()
        self.append([handle.real], [handle], [drawn])

    @rule(handle=sequences, beyond=st.integers(1, 5))
    def rollback_too_far(self, handle: Handle, beyond: int) -> None:
        sequence = handle.model
        count = len(sequence) - sequence.fork_len + beyond
        errors = [RollbackPastFork] if count < len(sequence) else [RollbackPastFork, InvalidLength]
        with self.refusal(*errors) as caught:
            handle.real.rollback(count)
        assert str(count) in str(caught.value)

    @rule(handle=sequences, count=st.integers(-5, -1))
    def rollback_forward(self, handle: Handle, count: int) -> None:
        with self.refusal(InvalidLength) as caught:
            handle.real.rollback(count)
        assert str(count) in str(caught.value)

    # Closing

    @rule(target=closed, handle=consumes(sequences))
    def close(self, handle: Handle) -> Handle:
        self.shut(handle)
        return handle

    @rule(handle=closed)
    def close_twice(self, handle: Handle) -> None:
        with self.refusal(SequenceClosed):
            handle.real.close()

    @rule(
        handle=closed,
        use=st.sampled_from(
            ["commit", "fork", "rollback", "slots", "append", "commit_batch", "forest"]
        ),
        others=st.lists(sequences, max_size=2, unique=True),
    )
    def use_after_close(self, handle: Handle, use: str, others: list[Handle]) -> None:
        batch = [*(other.real for other in others), handle.real]
        calls: dict[str, Callable[[], Any]] = {
            "commit": lambda: handle.real.commit(len(handle.model)),
            "fork": lambda: handle.real.fork(1),
            "rollback": lambda: handle.real.rollback(0),
            "slots": lambda: handle.real.slots(0, 1),
            "append": lambda: self.cache.append(batch, [0] * len(batch)),
            "commit_batch": lambda: self.cache.commit(batch),
            "forest": lambda: self.cache.forest(batch),
        }
        with self.refusal(SequenceClosed):
            calls[use]()

    # Looking

    @precondition(lambda self: self.model.paths or self.handles)
    @rule(data=st.data(), more=few_tokens)
    def match_extension(self, data: st.DataObject, more: list[int]) -> None:
        path = self.some_path(data)
        cut = data.draw(st.integers(0, len(path) - 1), label="cut")
        self.check_match(path[: len(path) - cut] + self.fit(more))

    @rule(drawn=tokens)
    def match_anything(self, drawn: list[int]) -> None:
        self.check_match(self.fit(drawn))

    def check_match(self, path: Sequence[int]) -> None:
        before = self.fingerprint()
        self.check_one_match(path)
        assert self.fingerprint() == before

    @rule(handle=sequences, data=st.data())
    def slots_of_a_range(self, handle: Handle, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(handle.model)), label="start")
        stop = data.draw(st.integers(start, len(handle.model)), label="stop")
        slots = handle.real.slots(start, stop)
        assert slots.dtype == np.int64
        assert [self.kv[slot] for slot in slots.tolist()] == prefixes(handle.model.tokens)[
            start:stop
        ]

    @rule(
        handle=sequences, beyond=st.integers(1, 5), kind=st.sampled_from(["stop", "start", "order"])
    )
    def slots_of_no_range(self, handle: Handle, beyond: int, kind: str) -> None:
        length = len(handle.model)
        start, stop = {
            "stop": (0, length + beyond),
            "start": (-beyond, length),
            "order": (length, length - min(beyond, length)),
        }[kind]
        with self.refusal(SlotRange) as caught:
            handle.real.slots(start, stop)
        assert str(start) in str(caught.value)
        assert str(stop) in str(caught.value)

    @rule(members=st.lists(sequences, min_size=1, max_size=6, unique=True), data=st.data())
    def forest_of_a_batch(self, members: list[Handle], data: st.DataObject) -> None:
        kv_lens, query_lens = [], []
        for member in members:
            committed = member.model.committed
            kv_len = data.draw(st.integers(max(1, committed), len(member.model)), label="kv_len")
            least = max(1, kv_len - committed)
            query_lens.append(data.draw(st.integers(least, kv_len), label="query_len"))
            kv_lens.append(kv_len)
        batch = [member.real for member in members]
        before = self.fingerprint()
        check_forest(self.cache.forest(batch, kv_lens, query_lens), batch, kv_lens, query_lens)
        assert self.fingerprint() == before

    @rule(batch=batches)
    def forest_of_a_batch_handle(self, batch: BatchHandle) -> None:
        query_lens = [max(1, member.model.uncommitted) for member in batch.members]
        if all(member.model.is_open for member in batch.members):
            forest = self.cache.forest(batch.real, query_lens=query_lens)
            real = [member.real for member in batch.members]
            check_forest(forest, real, query_lens=query_lens)
        else:
            with self.refusal(SequenceClosed):
                self.cache.forest(batch.real, query_lens=query_lens)

    @rule(
        members=st.lists(sequences, min_size=1, max_size=3, unique=True),
        wrong=st.sampled_from(["kv beyond", "kv short", "no query", "long query", "unknown kv"]),
    )
    def forest_of_bad_lengths(self, members: list[Handle], wrong: str) -> None:
        last = members[-1].model
        kv_lens = [len(member.model) for member in members]
        query_lens = [max(1, member.model.uncommitted) for member in members]
        if wrong == "kv beyond":
            kv_lens[-1] += 1
            query_lens[-1] += 1
        elif wrong == "kv short":
            kv_lens[-1] = last.committed - 1
            query_lens[-1] = 1
        elif wrong == "no query":
            query_lens[-1] = 0
        elif wrong == "long query":
            query_lens[-1] = len(last) + 1
        elif last.uncommitted > 1:
            query_lens[-1] = last.uncommitted - 1
        else:
            return
        with self.refusal(InvalidLength):
            self.cache.forest([member.real for member in members], kv_lens, query_lens)

    # Memory

    @rule(num_blocks=st.integers(0, 8))
    def evict(self, num_blocks: int) -> None:
        free = self.cache.stats().free_blocks
        evictable = self.cache.stats().evictable_blocks
        freed = self.cache.evict(num_blocks)
        self.journal.calls.append(lambda cache, made: cache.evict(num_blocks))
        evicted = self.learn()
        assert freed == self.cache.stats().free_blocks - free
        assert freed >= min(num_blocks, evictable)
        assert freed <= evictable
        if num_blocks == 0:
            assert not evicted

    @precondition(lambda self: set(self.model.paths) != self.model.pinned())
    @rule()
    def clear(self) -> None:
        free = self.cache.stats().free_blocks
        evictable = self.cache.stats().evictable_blocks
        freed = self.cache.clear()
        self.journal.calls.append(lambda cache, made: cache.clear())
        self.learn()
        assert freed == evictable == self.cache.stats().free_blocks - free
        assert set(self.model.paths) == self.model.pinned()

    @rule(drawn=tokens)
    def exhaust_by_opening(self, drawn: list[int]) -> None:
        size = self.cache.stats().num_blocks * self.block_size
        prompt = self.fit(drawn) + [0] * size * 2
        assert not self.open(prompt)

    @rule(members=st.lists(sequences, min_size=1, max_size=3, unique=True))
    def exhaust_by_appending(self, members: list[Handle]) -> None:
        lengths = [len(member.model) for member in members]
        size = self.cache.stats().num_blocks * self.block_size
        self.append([member.real for member in members], members, [[0] * (size + 1)] * len(members))
        assert [len(member.real) for member in members] == lengths

    @rule(bad=st.sampled_from(BAD_TOKENS), how=st.sampled_from(["open", "match"]))
    def bad_tokens(self, bad: Any, how: str) -> None:
        with self.refusal(InvalidTokens):
            self.cache.open(bad) if how == "open" else self.cache.match(bad)

    @rule(
        bad=st.sampled_from(BAD_TOKENS),
        members=st.lists(sequences, min_size=1, max_size=3, unique=True),
    )
    def append_bad_tokens(self, bad: Any, members: list[Handle]) -> None:
        size = len(bad) if hasattr(bad, "__len__") else 1
        counts = [0] * len(members)
        counts[-1] = size
        with self.refusal(InvalidTokens):
            self.cache.append([member.real for member in members], bad, counts)

    @rule(members=st.lists(sequences, min_size=1, max_size=3, unique=True), more=st.booleans())
    def append_miscounted(self, members: list[Handle], more: bool) -> None:
        count = len(members) + (1 if more else -1)
        with self.refusal(PrefixTreeError):
            self.cache.append([member.real for member in members], [0] * count)
        with self.refusal(PrefixTreeError):
            self.cache.append(
                [member.real for member in members], [0] * 3, [1] * (len(members) + 3)
            )
        with self.refusal(PrefixTreeError):
            self.cache.append(
                [member.real for member in members], [], [-1] + [1] * (len(members) - 1)
            )

    @rule(handle=sequences, others=st.lists(sequences, max_size=2, unique=True))
    def name_a_sequence_twice(self, handle: Handle, others: list[Handle]) -> None:
        batch = [handle.real, *(other.real for other in others if other is not handle), handle.real]
        with self.refusal(InvalidBatch):
            self.cache.batch(batch)
        with self.refusal(InvalidBatch):
            self.cache.append(batch, [0] * len(batch))

    # What must hold after every rule, by the numbers of the design's list of invariants

    @invariant()
    def check_all(self) -> None:
        self.check_sequences()
        twin, batch = self.twin()
        assert fingerprint(twin, batch) == self.fingerprint()  # 9
        earlier, earlier_holders = self.view, self.holders
        self.view = look(twin, batch, self.model.leaves())
        self.holders = list(self.handles)
        self.check_blocks()  # 1, 2
        self.check_kv()  # 3, 7
        self.check_nothing_moved(earlier, earlier_holders)
        self.check_counters()  # 4, 6
        self.check_pins(twin)  # 5
        self.check_matches()  # 8
        self.cache.check()

    def check_sequences(self) -> None:
        for handle in self.handles:
            real, model = handle.real, handle.model
            assert real.is_open
            assert (len(real), real.committed) == (len(model), model.committed)
            assert real.tokens().dtype == np.int32
            assert real.tokens().tolist() == model.tokens

    def check_blocks(self) -> None:
        """A block is in use exactly while a committed or a reserved token lies on it."""
        stats = self.cache.stats()
        assert stats.free_blocks + len(self.view.blocks) == stats.num_blocks
        assert all(0 <= block < stats.num_blocks for block in self.view.blocks)

    def check_kv(self) -> None:
        """Everybody reads the KV of their own path, the committed tokens and the others."""
        assert self.view.committed.keys() == set(self.model.paths)
        for path, slot in self.view.committed.items():
            assert self.kv[slot] == path
        for (index, position), slot in self.view.reserved.items():
            assert self.kv[slot] == tuple(self.handles[index].model.tokens[: position + 1])

    def check_nothing_moved(self, earlier: View, holders: list[Handle]) -> None:
        """A token's slot changes at most once: when its commit finds it in the tree already."""
        for path, slot in earlier.committed.items():
            assert self.view.committed.get(path, slot) == slot
        now = {
            (handle, position): self.view.reserved[index, position]
            for index, handle in enumerate(self.handles)
            for position in range(handle.model.committed, len(handle.model))
        }
        for (index, position), slot in earlier.reserved.items():
            assert now.get((holders[index], position), slot) == slot

    def check_counters(self) -> None:
        stats = self.cache.stats()
        pinned = len(self.model.pinned())
        assert stats.cached_tokens == len(self.model.paths)
        assert stats.pinned_tokens == pinned
        assert stats.evictable_tokens == len(self.model.paths) - pinned
        assert stats.nodes == self.view.nodes
        assert stats.open_sequences == len(self.handles)
        assert stats.logical_tokens == sum(len(handle.model) for handle in self.handles)
        assert stats.forks == self.forked
        for name, count in self.counted.items():
            assert getattr(stats, name) == count, name

    def check_pins(self, twin: pt.PrefixCache) -> None:
        """Clearing the twin leaves exactly the tokens that open sequences hold."""
        free = twin.stats().free_blocks
        freed = twin.clear()
        assert freed == self.cache.stats().evictable_blocks == twin.stats().free_blocks - free
        pinned = self.model.pinned()
        assert twin.stats().cached_tokens == twin.stats().pinned_tokens == len(pinned)
        for handle in self.handles:
            path = handle.model.tokens
            held = sum(prefix in pinned for prefix in prefixes(path))
            assert twin.match(path).cached == held

    def check_matches(self) -> None:
        for leaf in self.model.leaves():
            self.check_one_match(leaf)
            for token in TOKENS[: self.alphabet]:
                self.check_one_match((*leaf, token))
        for handle in self.handles:
            self.check_one_match((*handle.model.tokens, 0))

    def check_one_match(self, path: Sequence[int]) -> None:
        expected = pt.Match(self.model.cached(path), self.model.pending(path))
        assert self.cache.match(path) == expected

    def teardown(self) -> None:
        """When all is closed and cleared, every block is free."""
        if sys.exception() is not None:
            return  # that failure is the one to report
        for handle in list(self.handles):
            self.shut(handle)
            self.check_all()
        self.cache.clear()
        self.cache.check()
        stats = self.cache.stats()
        assert stats.free_blocks == stats.num_blocks
        assert stats.nodes == stats.cached_tokens == stats.open_sequences == 0


TestCaching = Caching.TestCase
# A step is cheap, and the corners are where several rare things come together.
TestCaching.settings = settings(max_examples=2 * settings.default.max_examples)
