"""The state of a cache under random calls, and what must hold after each of them.

The cache runs next to a model and a stand-in for the KV tensors. The stand-in is a dictionary from
slots to paths: when a sequence gets slots, the path that ends at each token is written there at
once, as a hasty engine would. Whatever any sequence or any later match reads must then be its own
path, in its own namespace. Pools are tiny, blocks small, and there are few different tokens, so
that sharing, splits inside a block, duplicates and evictions happen all the time.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
)

import prefixtree as pt
from allocator import OutOfBlocks
from prefixtree.errors import NotAligned, NotPinned, PriorityUnused

from .model import ModelCache, ModelSequence, Namespace, Path, in_order, prefixes
from .observe import Clock, Journal, Twin, View, look

# They differ in different bytes, for a cache that compares memory.
TOKENS = [0, 1 << 24, 1, 2**31 - 1]

NAMESPACES: list[Namespace] = ["", "a", ("a",), ("a", None)]

one_token = st.sampled_from(TOKENS)
tokens = st.lists(one_token, min_size=1, max_size=14)
few_tokens = st.lists(one_token, min_size=0, max_size=5)

# Which of the example's namespaces; most share the first.
spaces = st.sampled_from([0, 0, 0, 1, 1, 2])

# Requests that come in together: where, which earlier one each shares its beginning with, how much
# of it, how it goes on, how much of it is computed, and whether it is preempted then.
arrivals = st.tuples(
    spaces,
    st.integers(0, 5),
    st.integers(0, 14),
    tokens,
    st.integers(0, 20),
    st.sampled_from([False] * 5 + [True]),
)

# To look at everything (a twin that repeats all calls, the tree printed around every refusal, all
# matches, `check`) is most of the work. A soak of a million steps does it at some steps only; what
# a call returns, the counters and the sequences are held against the model at each step.
CLOSELY_EVERY = 16 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1

T = TypeVar("T")

sequences = Bundle("sequences")
closed = Bundle("closed")
batches = Bundle("batches")
unpinned = Bundle("unpinned")


# Who reserved a slot: a sequence, how often it had been opened by then and gone back into a block.
Holder = tuple[int, int, int]


@dataclass(eq=False)
class Handle:
    """A sequence of the cache and the model's."""

    real: pt.Sequence
    model: ModelSequence
    index: int
    """Which of all sequences ever made it is."""
    refills: int = 0
    """How often it went back into a block that others match, and so to a block of its own."""
    stale: set[int] = field(default_factory=set)
    """Slots that its last commit took from it: a kernel launched before may still read there."""

    @property
    def holder(self) -> Holder:
        return self.index, self.model.runs, self.refills

    def __repr__(self) -> str:
        return f"<{self.model.tokens} of {self.model.namespace!r} committed {self.model.committed}>"


@dataclass(eq=False)
class PinHandle:
    """A pin of the cache and the path that it keeps."""

    real: pt.Pin
    path: Path
    index: int
    """Which of all pins ever made it is."""


@dataclass(eq=False)
class BatchHandle:
    """A cache's batch and its members."""

    real: pt.Batch
    members: list[Handle]
    runs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = [member.model.runs for member in self.members]

    @property
    def is_usable(self) -> bool:
        """Whether its members have been open all the time."""
        return all(
            member.model.is_open and member.model.runs == runs
            for member, runs in zip(self.members, self.runs, strict=True)
        )


def numbers(cache: pt.PrefixCache) -> pt.Stats:
    """The statistics but for the last forest's: to ask for one changes nothing else."""
    return cache.stats()._replace(attended_tokens=0, attended_logical_tokens=0)


def fingerprint(
    cache: pt.PrefixCache, sequences: list[pt.Sequence], pins: list[pt.Pin]
) -> tuple[Any, ...]:
    """All that can be seen of a cache, but for what only an eviction brings to light."""
    return (
        numbers(cache),
        cache.tree().to_dicts(),
        [pin.tokens for pin in pins],
        [
            (
                repr(sequence),
                sequence.is_open,
                sequence.is_preempted,
                sequence.cached_len,
                sequence.fork_len,
            )
            for sequence in sequences
        ],
        [
            (
                len(sequence),
                sequence.committed,
                sequence.tokens().tolist(),
                sequence.slots(0, len(sequence)).tolist(),
            )
            for sequence in sequences
            if sequence.is_open
        ],
    )


class Machine(RuleBasedStateMachine):
    """What all rules need: a used cache to start with, calls that are judged, and invariants."""

    @initialize(
        target=sequences,
        num_blocks=st.integers(6, 40),
        block_size=st.integers(1, 5),
        alphabet=st.integers(2, 4),
        by_block=st.booleans(),
        reserve_block_0=st.booleans(),
        thread_safe=st.booleans(),
        eviction=st.sampled_from(["lru", "priority"]),
        namespaces=st.lists(st.sampled_from(NAMESPACES), min_size=2, max_size=3, unique=True),
        past=st.lists(st.tuples(spaces, tokens), max_size=6),
        kept=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 14)), max_size=1),
        present=st.lists(arrivals, max_size=6),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        alphabet: int,
        by_block: bool,
        reserve_block_0: bool,
        thread_safe: bool,
        eviction: str,
        namespaces: list[Namespace],
        past: list[tuple[int, list[int]]],
        kept: list[tuple[int, int]],
        present: list[tuple[int, int, int, list[int], int, bool]],
    ) -> Any:
        """A cache that was in use before: hypothesis leaves many rules out of an example, and an
        example without any that opens would see an empty cache only."""
        self.clock = Clock()
        self.eviction = eviction

        def make(thread_safe: bool, clock: Clock) -> pt.PrefixCache:
            return pt.PrefixCache(
                num_blocks,
                block_size,
                eviction=eviction,
                align="block" if by_block else "token",
                reserve_block_0=reserve_block_0,
                thread_safe=thread_safe,
                clock=clock,
            )

        self.cache = make(thread_safe, self.clock)
        # In one thread the lock makes no difference: the twin does without, or the other way round.
        self.journal = Journal(lambda clock: make(not thread_safe, clock))
        self.align = block_size if by_block else 1
        self.model = ModelCache(self.align)
        self.num_reserved = int(reserve_block_0)
        self.block_size = block_size
        self.alphabet = alphabet
        self.namespaces = namespaces
        self.handles: list[Handle] = []
        self.preempted: list[Handle] = []
        self.pins: list[PinHandle] = []
        self.sequences_made = self.pins_made = 0
        self.kv: dict[int, Path] = {}
        self.steps = 0
        self.view = View({}, {}, {}, set(), 0)
        self.holders: list[Holder] = []
        self.counted = dict.fromkeys(
            [
                "query_tokens",
                "hit_tokens",
                "evicted_tokens",
                "opens",
                "forks",
                "rollbacks",
                "closes",
                "preemptions",
            ],
            0,
        )
        for space, drawn in past:
            for handle in self.open(self.path(space, drawn)):
                self.commit_one(handle, len(handle.model))
                self.shut(handle)
        for which, length in kept[: len(past)]:
            space, drawn = past[which % len(past)]
            self.pin(self.path(space, drawn[:length]))
        prompts: list[list[int]] = [[]]
        handles = []
        for space, which, cut, drawn, *_ in present:
            prompts.append(prompts[which % len(prompts)][:cut] + drawn)
            handles += self.open(self.path(space, prompts[-1]))
        for handle, (*_, length, gives_way) in zip(handles, present, strict=False):
            sequence = handle.model
            self.commit_one(handle, max(sequence.committed, min(length, len(sequence))))
            if gives_way:
                self.preempt(handle)
        return multiple(*self.handles)

    # Paths

    def fit(self, drawn: Sequence[int]) -> list[int]:
        """These tokens, with only as many different ones as this example uses."""
        return [TOKENS[TOKENS.index(token) % self.alphabet] for token in drawn]

    def path(self, space: int, drawn: Sequence[int]) -> Path:
        """These tokens in one of the example's namespaces."""
        return Path(self.namespaces[space % len(self.namespaces)], tuple(self.fit(drawn)))

    @property
    def knows_paths(self) -> bool:
        return bool(self.model.paths or self.handles or self.preempted)

    def some_path(self, data: st.DataObject) -> Path:
        """A path that is committed, or that a sequence is about to commit."""
        known = {
            *self.model.leaves(),
            *(handle.model.path for handle in self.handles + self.preempted),
        }
        return data.draw(st.sampled_from(in_order(known)), label="path")

    # Watching the cache

    def handle(self, real: pt.Sequence, model: ModelSequence) -> Handle:
        handle = Handle(real, model, self.sequences_made)
        self.handles.append(handle)
        self.sequences_made += 1
        return handle

    @property
    def looks_closely(self) -> bool:
        """Whether everything is looked at in this step."""
        return self.steps % CLOSELY_EVERY == 0

    def some_of(self, things: list[T]) -> list[T]:
        """All of them when looking closely, else at each step another one."""
        if self.looks_closely or not things:
            return things
        return [things[self.steps % len(things)]]

    def trace(self) -> tuple[Any, ...]:
        """In what a call shows that should have changed nothing."""
        return self.fingerprint() if self.looks_closely else (numbers(self.cache),)

    def fingerprint(self) -> tuple[Any, ...]:
        handles = self.handles + self.preempted
        return fingerprint(
            self.cache, [handle.real for handle in handles], [pin.real for pin in self.pins]
        )

    def fingerprint_of(self, twin: Twin) -> tuple[Any, ...]:
        handles = self.handles + self.preempted
        return fingerprint(
            twin.cache,
            [twin.sequences[handle.index] for handle in handles],
            [twin.pins[pin.index] for pin in self.pins],
        )

    @contextmanager
    def refusal(self, *errors: type[Exception]) -> Iterator[Any]:
        """The call inside fails with one of these errors, and the cache is as before it."""
        before = self.trace()
        with pytest.raises(errors) as caught:
            yield caught
        assert str(caught.value)
        assert self.trace() == before

    @contextmanager
    def no_change(self) -> Iterator[None]:
        """The cache is as before the calls inside."""
        before = self.trace()
        yield
        assert self.trace() == before

    def write(self, slots: Sequence[int], path: Path, start: int) -> None:
        for handle in self.handles:
            assert not handle.stale & set(slots), f"{handle} may still be read there"
        for slot, written in zip(slots, prefixes(*path)[start:], strict=True):
            self.kv[slot] = written

    def cached(self, path: Path) -> int:
        return self.cache.match(path.tokens, namespace=path.namespace).cached

    def learn(self, keep: Iterable[Path] = ()) -> set[Path]:
        """Finds out what an eviction that had to keep these paths took, and returns it."""
        leaves = self.model.leaves()
        lengths = [self.cached(leaf) for leaf in leaves]
        remaining = {
            path
            for leaf, length in zip(leaves, lengths, strict=True)
            for path in self.model.prefixes(leaf.namespace, leaf.tokens[:length])
        }
        evicted = self.model.lose(remaining, keep)
        assert lengths == [self.model.cached(*leaf) for leaf in leaves]
        self.counted["evicted_tokens"] += self.align * len(evicted)
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
        call: Callable[[], Any],
        keep: Path | None,
        least: int,
        most: int,
        taken: Callable[[Any], int],
    ) -> Any:
        """Makes a call that takes blocks, and judges what it evicted or why it refused.

        `keep` is a path that the call itself holds and must not evict. It needs between `least`
        and `most` blocks; `taken` counts them from its result. Returns None when it was refused.
        """
        before = self.trace()
        free, retired = self.cache.stats().free_blocks, self.cache.stats().retired_blocks
        known = self.model.leaves()
        twin = self.journal.replay() if self.looks_closely else None
        if twin and keep:
            twin.open(keep)
        try:
            result = call()
        except OutOfBlocks as error:
            refused = error
        else:
            needed = taken(result)
            assert least <= needed <= most
            evicted = self.learn(self.model.prefixes(*keep) if keep else [])
            settled = retired - self.cache.stats().retired_blocks
            assert settled >= 0
            free += settled
            if needed <= free:
                assert not evicted, "evicted without need"
                assert self.cache.stats().free_blocks == free - needed
            elif twin:
                freed = twin.cache.evict(needed - free).blocks
                assert self.cache.stats().free_blocks == free + freed - needed
                assert [twin.cached(leaf) for leaf in known] == [
                    self.model.cached(*leaf) for leaf in known
                ]
            return result
        assert self.trace() == before
        assert least <= refused.needed <= most
        assert free <= refused.free <= free + retired
        assert twin is None or refused.evictable == twin.cache.clear().blocks
        assert refused.needed > refused.free + refused.evictable
        for number in (refused.needed, refused.free, refused.evictable):
            assert str(number) in str(refused)
        return None

    def room(self, path: Path) -> int:
        """How many watermarks, from 0 on, `can_open` finds room for."""
        watermarks = range(self.cache.num_blocks + 1)
        return bisect_left(
            watermarks,
            True,
            key=lambda watermark: (
                not self.cache.can_open(path.tokens, namespace=path.namespace, watermark=watermark)
            ),
        )

    # Calls that change the cache: made, judged, and repeated on the model and on every twin

    def begin(self, path: Path, call: Callable[[], pt.Sequence]) -> bool:
        """Opens or resumes a sequence with the path's tokens; False when it was refused."""
        cached = self.model.cached(*path)
        rest = len(path.tokens) - cached
        room = self.room(path)

        def taken(sequence: pt.Sequence) -> int:
            slots = sequence.slots(0, len(path.tokens)).tolist()
            return self.blocks_taken(slots[cached:], slots[:cached])

        real = self.reserve(
            call,
            keep=Path(path.namespace, path.tokens[:cached]) if cached else None,
            least=self.least_blocks(rest) if cached else self.blocks_for(rest),
            most=self.blocks_for(rest),
            taken=taken,
        )
        if real is None:
            assert room == 0, "can_open promised what open refuses"
            return False
        stats = self.cache.stats()
        assert room == stats.free_blocks + stats.evictable_blocks + 1
        assert self.model.cached(*path) == cached, "evicted what the new sequence matched"
        assert real.cached_len == real.committed == cached
        self.write(real.slots(cached, len(path.tokens)).tolist(), path, cached)
        return True

    def open(self, path: Path) -> list[Handle]:
        """The new sequence, or none when it was refused."""
        made: list[pt.Sequence] = []

        def call() -> pt.Sequence:
            made.append(self.cache.open(path.tokens, namespace=path.namespace))
            return made[0]

        if not self.begin(path, call):
            return []
        handle = self.handle(made[0], self.model.open(*path))
        self.journal.calls.append(lambda twin: twin.sequences.append(twin.open(path)))
        self.counted["opens"] += 1
        self.counted["query_tokens"] += len(path.tokens)
        self.counted["hit_tokens"] += handle.model.cached_len
        return [handle]

    def shut(self, handle: Handle) -> None:
        """Closes a sequence that is open or preempted."""
        handle.real.close()
        self.journal.calls.append(lambda twin: twin.sequences[handle.index].close())
        if handle in self.preempted:
            self.preempted.remove(handle)
        else:
            self.model.close(handle.model)
            self.handles.remove(handle)
        self.counted["closes"] += 1
        assert not handle.real.is_open
        assert not handle.real.is_preempted

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
            lambda: (
                self.cache.append(batch, packed)
                if plain
                else self.cache.append(batch, packed, counts)
            ),
            keep=None,
            least=sum(map(self.least_blocks, counts)),
            most=sum(map(self.blocks_for, counts)),
            taken=taken,
        )
        if slots is None:
            return
        chosen = [member.index for member in members]
        self.journal.calls.append(
            lambda twin: twin.cache.append(
                [twin.sequences[index] for index in chosen], packed, counts
            )
        )
        assert slots.dtype == np.int64
        assert slots.shape == (len(packed),)
        parts = np.split(slots, np.cumsum(counts)[:-1])
        for member in members:
            member.stale.clear()
        for member, part, slots_of_member in zip(members, new, parts, strict=True):
            before = len(member.model)
            self.model.append(member.model, part)
            assert (
                slots_of_member.tolist() == member.real.slots(before, before + len(part)).tolist()
            )
            self.write(slots_of_member.tolist(), member.model.path, before)

    def commit(self, batch: Any, members: list[Handle]) -> None:
        before = [member.real.slots(0, len(member.real)).tolist() for member in members]
        moved = self.cache.commit(batch)
        self.settle(members, before, moved.tolist())
        chosen = [member.index for member in members]
        self.journal.calls.append(
            lambda twin: twin.cache.commit([twin.sequences[index] for index in chosen])
        )
        for member in members:
            self.model.commit(member.model, len(member.model))

    def commit_one(self, handle: Handle, length: int) -> None:
        before = handle.real.slots(0, len(handle.real)).tolist()
        moved = handle.real.commit(length)
        self.settle([handle], [before], [0] if moved else [])
        self.journal.calls.append(lambda twin: twin.sequences[handle.index].commit(length))
        self.model.commit(handle.model, length)

    def settle(self, members: list[Handle], before: list[list[int]], moved: list[int]) -> None:
        """After a commit of these: who moved was told so, and may be read at its old slots."""
        changed = []
        for index, (member, old) in enumerate(zip(members, before, strict=True)):
            now = member.real.slots(0, len(old)).tolist()
            member.stale = set(old) - set(now)
            if now != old:
                changed.append(index)
        assert moved == changed

    def roll_back(self, handle: Handle, count: int) -> None:
        length = len(handle.model) - count
        again = self.align > 1 and length < handle.model.found and length % self.align > 0
        before = self.trace()
        stats = self.cache.stats()
        if again and stats.free_blocks + stats.evictable_blocks == 0:
            with pytest.raises(OutOfBlocks) as refused:
                handle.real.rollback(count)
            numbers = refused.value.needed, refused.value.free, refused.value.evictable
            assert numbers == (1, 0, 0)
            assert self.trace() == before
            return
        handle.real.rollback(count)
        handle.stale.clear()
        if again:
            handle.refills += 1
            self.learn()
            start = self.model.aligned(length)
            path = handle.model.path._replace(tokens=handle.model.path.tokens[:length])
            self.write(handle.real.slots(start, length).tolist(), path, start)
        self.journal.calls.append(lambda twin: twin.sequences[handle.index].rollback(count))
        self.model.rollback(handle.model, count)
        self.counted["rollbacks"] += 1

    def fork(self, handle: Handle, count: int) -> list[Handle]:
        length = len(handle.model)
        shared = self.model.aligned(length)
        needed = count if shared < length else 0
        real = self.reserve(
            lambda: handle.real.fork(count), None, needed, needed, taken=lambda _: needed
        )
        if real is None:
            return []
        for fork in real:
            self.write(fork.slots(shared, length).tolist(), handle.model.path, shared)
        self.journal.calls.append(
            lambda twin: twin.sequences.extend(twin.sequences[handle.index].fork(count))
        )
        models = self.model.fork(handle.model, count)
        self.counted["forks"] += count
        return list(map(self.handle, real, models))

    def preempt(self, handle: Handle) -> None:
        handle.real.preempt()
        handle.stale.clear()
        self.journal.calls.append(lambda twin: twin.sequences[handle.index].preempt())
        self.model.preempt(handle.model)
        self.handles.remove(handle)
        self.preempted.append(handle)
        self.counted["preemptions"] += 1

    def resume(self, handle: Handle) -> list[Handle]:
        """The sequence, or none when it was refused."""

        def call() -> pt.Sequence:
            handle.real.resume()
            return handle.real

        if not self.begin(handle.model.path, call):
            return []
        self.journal.calls.append(lambda twin: twin.sequences[handle.index].resume())
        self.model.resume(handle.model)
        self.preempted.remove(handle)
        self.handles.append(handle)
        return [handle]

    def pin(self, path: Path) -> PinHandle:
        free = self.cache.stats().free_blocks
        real = self.cache.pin(path.tokens, namespace=path.namespace)
        self.journal.calls.append(
            lambda twin: twin.pins.append(twin.cache.pin(path.tokens, namespace=path.namespace))
        )
        pin = PinHandle(real, self.model.pin(path), self.pins_made)
        self.pins_made += 1
        self.pins.append(pin)
        assert real.tokens == len(pin.path.tokens)
        assert self.cache.stats().free_blocks == free
        return pin

    def unpin(self, pin: PinHandle) -> None:
        free = self.cache.stats().free_blocks
        pin.real.unpin()
        self.journal.calls.append(lambda twin: twin.pins[pin.index].unpin())
        self.model.unpin(pin.path)
        self.pins.remove(pin)
        assert self.cache.stats().free_blocks == free
        with self.refusal(NotPinned):
            pin.real.unpin()

    def retain(
        self, path: Path, start: int, stop: int, priority: int, duration: float | None
    ) -> None:
        free = self.cache.stats().free_blocks

        def call(cache: pt.PrefixCache) -> int:
            return cache.retain(
                path.tokens,
                priority=priority,
                duration=duration,
                start=start,
                stop=stop,
                namespace=path.namespace,
            )

        if self.eviction != "priority":
            with self.refusal(PriorityUnused):
                call(self.cache)
            return
        covered = call(self.cache)
        self.journal.calls.append(lambda twin: call(twin.cache))
        assert covered == self.model.retain(path, start, stop, priority, duration)
        assert self.cache.stats().free_blocks == free

    def wait(self, seconds: float) -> None:
        self.clock.turn(seconds)
        self.journal.calls.append(lambda twin: twin.clock.turn(seconds))
        self.model.now += seconds

    # What must hold after every rule, by the numbers of the design's list of invariants

    @invariant()
    def check_all(self) -> None:
        self.steps += 1
        self.check_sequences()
        self.check_counters()  # 4, 6
        self.check_matches()  # 8
        if self.looks_closely:
            self.check_namespaces()
            self.cache.check()
            self.check_on_twin()

    def check_on_twin(self) -> None:
        twin = self.journal.replay()
        assert self.fingerprint_of(twin) == self.fingerprint()  # 9
        earlier, earlier_holders = self.view, self.holders
        self.view = look(
            twin,
            [twin.sequences[handle.index] for handle in self.handles],
            [handle.model.namespace for handle in self.handles],
            self.model.leaves(),
            self.align,
        )
        self.holders = [handle.holder for handle in self.handles]
        self.check_blocks()  # 1, 2
        self.check_kv()  # 3, 7
        if CLOSELY_EVERY == 1:
            self.check_nothing_moved(earlier, earlier_holders)
        assert self.cache.stats().nodes == self.view.nodes
        self.check_pins(twin)  # 5

    def check_sequences(self) -> None:
        for handle in self.handles:
            real, model = handle.real, handle.model
            assert real.is_open
            assert not real.is_preempted
            assert (len(real), real.committed) == (len(model), model.committed)
            assert real.cached_len == model.cached_len
        for handle in self.some_of(self.handles):
            real, model = handle.real, handle.model
            assert real.tokens().dtype == np.int32
            assert real.tokens().tolist() == model.tokens
            if self.align == self.block_size:
                slots = real.slots(0, len(real))
                table = real.block_table()
                assert len(table) == -(-len(real) // self.block_size)
                assert (
                    table.repeat(self.block_size)[: len(real)] == slots // self.block_size
                ).all()
                assert (slots % self.block_size == np.arange(len(real)) % self.block_size).all()
            else:
                with pytest.raises(NotAligned):
                    real.block_table()
        for handle in self.preempted:
            assert handle.real.is_preempted
            assert not handle.real.is_open

    def check_blocks(self) -> None:
        """A block is in use exactly while a committed or a reserved token lies on it."""
        stats = self.cache.stats()
        aside = stats.retired_blocks + self.num_reserved
        assert stats.free_blocks + len(self.view.blocks) + aside == stats.num_blocks
        stale = {slot // self.block_size for handle in self.handles for slot in handle.stale}
        assert stats.retired_blocks == len(stale - self.view.blocks)
        assert all(self.num_reserved <= block < stats.num_blocks for block in self.view.blocks)

    def check_kv(self) -> None:
        """Everybody reads the KV of their own path, the committed tokens and the others."""
        assert self.view.committed.keys() == set(self.model.paths)
        for slot, path in self.view.written.items():
            assert self.kv[slot] == path
        for (index, position), slot in self.view.reserved.items():
            namespace, tokens = self.handles[index].model.path
            assert self.kv[slot] == Path(namespace, tokens[: position + 1])

    def check_nothing_moved(self, earlier: View, holders: list[Holder]) -> None:
        """A token's slot changes at most once while its sequence is open: when its commit finds it
        in the tree already."""
        for path, slot in earlier.committed.items():
            assert self.view.committed.get(path, slot) == slot
        now = {
            (handle.holder, position): self.view.reserved[index, position]
            for index, handle in enumerate(self.handles)
            for position in range(handle.model.committed, len(handle.model))
        }
        for (index, position), slot in earlier.reserved.items():
            assert now.get((holders[index], position), slot) == slot

    def check_counters(self) -> None:
        stats = self.cache.stats()
        pinned, cached = len(self.model.pinned()), len(self.model.paths)
        assert stats.cached_tokens == self.align * cached
        assert stats.pinned_tokens == self.align * pinned
        assert stats.evictable_tokens == self.align * (cached - pinned)
        assert stats.open_sequences == len(self.handles)
        assert stats.logical_tokens == sum(len(handle.model) for handle in self.handles)
        for name, count in self.counted.items():
            assert getattr(stats, name) == count, name

    def check_pins(self, twin: Twin) -> None:
        """Clearing the twin leaves exactly the tokens that open sequences and pins hold."""
        free = twin.cache.stats().free_blocks
        freed = twin.cache.clear().blocks
        stats = twin.cache.stats()
        assert freed == self.cache.stats().evictable_blocks == stats.free_blocks - free
        pinned = self.model.pinned()
        assert stats.cached_tokens == stats.pinned_tokens == self.align * len(pinned)
        for path in [handle.model.path for handle in self.handles + self.preempted]:
            held = sum(prefix in pinned for prefix in self.model.prefixes(*path))
            assert twin.cached(path) == self.align * held
        for path in [pin.path for pin in self.pins if pin.path.tokens]:
            assert twin.cached(path) == len(path.tokens)

    def check_matches(self) -> None:
        for leaf in self.some_of(self.model.leaves()):
            for namespace in self.namespaces:
                self.check_match(leaf._replace(namespace=namespace))
            for token in TOKENS[: self.alphabet]:
                self.check_match(leaf._replace(tokens=(*leaf.tokens, token)))
        for handle in self.some_of(self.handles + self.preempted):
            namespace, tokens = handle.model.path
            self.check_match(Path(namespace, (*tokens, 0)))

    def check_match(self, path: Path) -> None:
        expected = pt.Match(self.model.cached(*path), self.model.pending(*path))
        assert self.cache.match(path.tokens, namespace=path.namespace) == expected

    def check_namespaces(self) -> None:
        """The tree knows the namespaces that hold anything, and no others."""
        roots = self.cache.tree().roots
        holding = {path.namespace for path in self.model.paths}
        holding |= {handle.model.namespace for handle in self.handles}
        assert {""} | holding <= roots.keys()
        assert roots.keys() <= {""} | holding | {pin.path.namespace for pin in self.pins}

    def teardown(self) -> None:
        """When all is closed, unpinned and cleared, every block is free."""
        if sys.exception() is not None:
            return  # that failure is the one to report
        for handle in self.handles + self.preempted:
            self.shut(handle)
            self.check_all()
        self.check_on_twin()
        for pin in list(self.pins):
            self.unpin(pin)
            self.check_all()
        self.cache.clear()
        self.cache.check()
        stats = self.cache.stats()
        assert stats.free_blocks == stats.num_blocks - self.num_reserved
        assert stats.nodes == stats.cached_tokens == stats.open_sequences == 0
        assert self.cache.tree().roots.keys() == {""}
