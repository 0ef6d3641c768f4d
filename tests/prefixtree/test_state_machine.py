"""A cache driven by random calls: those of a sequence's life, of batches and of memory.

Added to the rules of `keeping`; what every call is held against is in `machine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis.stateful import consumes, multiple, precondition, rule

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

from .keeping import Keeping
from .machine import (
    TOKENS,
    BatchHandle,
    Handle,
    batches,
    closed,
    few_tokens,
    one_token,
    sequences,
    spaces,
    tokens,
)
from .model import Path, prefixes
from .observe import check_forest

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


# Hypothesis gives an example up when it cannot fill a list.
when_any_is_open = precondition(lambda self: self.handles)


class Caching(Keeping):
    # Opening

    @rule(target=sequences, space=spaces, drawn=tokens)
    def open_fresh(self, space: int, drawn: list[int]) -> Any:
        return multiple(*self.open(self.path(space, drawn)))

    @precondition(lambda self: self.knows_paths)
    @rule(target=sequences, data=st.data(), more=tokens)
    def open_extension(self, data: st.DataObject, more: list[int]) -> Any:
        namespace, tokens = self.some_path(data)
        return multiple(*self.open(Path(namespace, (*tokens, *self.fit(more)))))

    @precondition(lambda self: self.knows_paths)
    @rule(target=sequences, data=st.data())
    def open_prefix(self, data: st.DataObject) -> Any:
        namespace, tokens = self.some_path(data)
        length = data.draw(st.integers(1, len(tokens)), label="length")
        return multiple(*self.open(Path(namespace, tokens[:length])))

    @precondition(lambda self: self.knows_paths)
    @rule(target=sequences, data=st.data(), other=st.integers(1, 3), more=few_tokens)
    def open_divergence(self, data: st.DataObject, other: int, more: list[int]) -> Any:
        namespace, tokens = self.some_path(data)
        at = data.draw(st.integers(0, len(tokens) - 1), label="at")
        token = TOKENS[(TOKENS.index(tokens[at]) + other) % self.alphabet]
        return multiple(*self.open(Path(namespace, (*tokens[:at], token, *self.fit(more)))))

    @rule(target=sequences, twin=sequences)
    def open_identical(self, twin: Handle) -> Any:
        return multiple(*self.open(twin.model.path))

    # Appending and committing

    @rule(handle=sequences, token=one_token)
    def append_one(self, handle: Handle, token: int) -> None:
        self.append([handle.real], [handle], [[token]])

    @when_any_is_open
    @rule(members=st.lists(sequences, min_size=1, max_size=4, unique=True), data=st.data())
    def append_batch(self, members: list[Handle], data: st.DataObject) -> None:
        drawn = data.draw(st.lists(one_token, min_size=len(members), max_size=len(members)))
        self.append([member.real for member in members], members, [[token] for token in drawn])

    @when_any_is_open
    @rule(members=st.lists(sequences, min_size=1, max_size=4, unique=True), data=st.data())
    def append_ragged(self, members: list[Handle], data: st.DataObject) -> None:
        drawn = data.draw(st.lists(few_tokens, min_size=len(members), max_size=len(members)))
        self.append([member.real for member in members], members, drawn)

    @rule(handle=sequences, data=st.data())
    def append_what_is_there(self, handle: Handle, data: st.DataObject) -> None:
        """Appends tokens with which another sequence, or a committed path, goes on."""
        own = handle.model.path
        paths = {*self.model.leaves(), *(other.model.path for other in self.handles)}
        further = sorted(
            path.tokens[len(own.tokens) :]
            for path in paths
            if path != own and path.starts_with(own)
        )
        if further:
            more = data.draw(st.sampled_from(further), label="more")
            self.append([handle.real], [handle], [list(more)])

    @when_any_is_open
    @rule(target=batches, members=st.lists(sequences, min_size=1, max_size=4, unique=True))
    def make_batch(self, members: list[Handle]) -> Any:
        return BatchHandle(self.cache.batch([member.real for member in members]), members)

    @rule(batch=batches, data=st.data())
    def append_to_batch_handle(self, batch: BatchHandle, data: st.DataObject) -> None:
        count = len(batch.members)
        drawn = data.draw(st.lists(few_tokens, min_size=count, max_size=count))
        if batch.is_usable:
            self.append(batch.real, batch.members, drawn)
        else:
            packed = [token for part in drawn for token in self.fit(part)]
            with self.refusal(SequenceClosed):
                self.cache.append(batch.real, packed, [len(part) for part in drawn])

    @rule(batch=batches)
    def commit_batch_handle(self, batch: BatchHandle) -> None:
        if batch.is_usable:
            self.commit(batch.real, batch.members)
        else:
            with self.refusal(SequenceClosed):
                self.cache.commit(batch.real)

    @when_any_is_open
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
    def fork_one(self, handle: Handle, count: int) -> Any:
        if handle.model.uncommitted:
            with self.refusal(NotCommitted):
                handle.real.fork(count)
            return multiple()
        forks = self.fork(handle, count)
        if not forks:
            return multiple()
        below_one = [InvalidLength] if len(handle.model) == 1 else []
        for side in (handle, *forks):
            with self.refusal(RollbackPastFork, *below_one):
                side.real.rollback(1)
        return multiple(*forks)

    @rule(handle=sequences, token=one_token)
    def fork_uncommitted(self, handle: Handle, token: int) -> None:
        self.append([handle.real], [handle], [[token]])
        if handle.model.uncommitted:
            with self.refusal(NotCommitted):
                handle.real.fork(2)

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
            ["commit", "fork", "rollback", "slots", "append", "commit_batch", "forest", "preempt"]
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
            "preempt": lambda: handle.real.preempt(),
        }
        with self.refusal(SequenceClosed):
            calls[use]()

    # Looking

    @precondition(lambda self: self.knows_paths)
    @rule(data=st.data(), more=few_tokens)
    def match_extension(self, data: st.DataObject, more: list[int]) -> None:
        namespace, tokens = self.some_path(data)
        cut = data.draw(st.integers(0, len(tokens) - 1), label="cut")
        with self.no_change():
            self.check_match(Path(namespace, tokens[: len(tokens) - cut] + tuple(self.fit(more))))

    @rule(space=spaces, drawn=tokens)
    def match_anything(self, space: int, drawn: list[int]) -> None:
        with self.no_change():
            self.check_match(self.path(space, drawn))

    @rule(handle=sequences, data=st.data())
    def slots_of_a_range(self, handle: Handle, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(handle.model)), label="start")
        stop = data.draw(st.integers(start, len(handle.model)), label="stop")
        slots = handle.real.slots(start, stop)
        assert slots.dtype == np.int64
        assert [self.kv[slot] for slot in slots.tolist()] == prefixes(*handle.model.path)[
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

    @when_any_is_open
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
        with self.no_change():
            check_forest(self.cache.forest(batch, kv_lens, query_lens), batch, kv_lens, query_lens)
        read = [
            slot
            for sequence, kv_len in zip(batch, kv_lens, strict=True)
            for slot in sequence.slots(0, kv_len).tolist()
        ]
        stats = self.cache.stats()
        assert (stats.attended_tokens, stats.attended_logical_tokens) == (len(set(read)), len(read))

    @rule(batch=batches)
    def forest_of_a_batch_handle(self, batch: BatchHandle) -> None:
        query_lens = [max(1, member.model.uncommitted) for member in batch.members]
        if batch.is_usable:
            forest = self.cache.forest(batch.real, query_lens=query_lens)
            real = [member.real for member in batch.members]
            check_forest(forest, real, query_lens=query_lens)
        else:
            with self.refusal(SequenceClosed):
                self.cache.forest(batch.real, query_lens=query_lens)

    @when_any_is_open
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
        freed = self.cache.evict(num_blocks).blocks
        self.journal.calls.append(lambda twin: twin.cache.evict(num_blocks))
        evicted = self.learn()
        assert freed == self.cache.stats().free_blocks - free
        assert freed == min(num_blocks, evictable)
        if num_blocks == 0:
            assert not evicted

    @precondition(lambda self: set(self.model.paths) != self.model.pinned())
    @rule()
    def clear(self) -> None:
        free = self.cache.stats().free_blocks
        evictable = self.cache.stats().evictable_blocks
        freed = self.cache.clear().blocks
        self.journal.calls.append(lambda twin: twin.cache.clear())
        self.learn()
        assert freed == evictable == self.cache.stats().free_blocks - free
        assert set(self.model.paths) == self.model.pinned()

    @rule(space=spaces, drawn=tokens)
    def exhaust_by_opening(self, space: int, drawn: list[int]) -> None:
        size = self.cache.stats().num_blocks * self.block_size
        assert not self.open(self.path(space, drawn + [0] * size * 2))

    @when_any_is_open
    @rule(members=st.lists(sequences, min_size=1, max_size=3, unique=True))
    def exhaust_by_appending(self, members: list[Handle]) -> None:
        lengths = [len(member.model) for member in members]
        size = self.cache.stats().num_blocks * self.block_size
        self.append([member.real for member in members], members, [[0] * (size + 1)] * len(members))
        assert [len(member.real) for member in members] == lengths

    @rule(
        bad=st.sampled_from(BAD_TOKENS),
        how=st.sampled_from(["open", "match", "can_open", "pin", "forget"]),
    )
    def bad_tokens(self, bad: Any, how: str) -> None:
        with self.refusal(InvalidTokens):
            getattr(self.cache, how)(bad)

    @when_any_is_open
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

    @when_any_is_open
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


TestCaching = Caching.TestCase
