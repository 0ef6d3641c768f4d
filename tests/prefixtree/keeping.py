"""The rules of who keeps what: namespaces, admission, pins, forgetting, preemption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import consumes, multiple, precondition, rule

import prefixtree as pt
from allocator import OutOfBlocks
from prefixtree.errors import (
    InvalidLength,
    InvalidNamespace,
    NotPinned,
    NotPreempted,
    SequenceClosed,
)

from .machine import (
    Handle,
    Machine,
    PinHandle,
    closed,
    few_tokens,
    sequences,
    spaces,
    tokens,
    unpinned,
)
from .model import Path

BAD_NAMESPACES: list[Any] = [None, 0, 1.5, b"a", ["a"], {"a"}, ("a", 1.5), ("a", ("b",)), object()]

PREEMPTED_REFUSE = [
    *["len", "committed", "tokens", "slots", "commit", "fork", "rollback", "preempt"],
    *["batch", "append", "commit_batch", "forest"],
]


class Keeping(Machine):
    def some_prefix(self, data: st.DataObject) -> Path:
        """A known path, or its beginning, that nobody need have committed."""
        path = self.some_path(data)
        length = data.draw(st.integers(1, len(path.tokens)), label="length")
        return path._replace(tokens=path.tokens[:length])

    # Namespaces

    @precondition(lambda self: self.knows_paths)
    @rule(target=sequences, data=st.data(), space=spaces, more=few_tokens)
    def open_what_others_have(self, data: st.DataObject, space: int, more: list[int]) -> Any:
        return multiple(*self.open(self.path(space, [*self.some_path(data).tokens, *more])))

    @precondition(lambda self: self.knows_paths)
    @rule(data=st.data())
    def look_in_a_namespace_of_nobody(self, data: st.DataObject) -> None:
        tokens = self.some_path(data).tokens
        with self.no_change():
            assert self.cache.match(tokens, namespace="nobody") == (0, 0)
            assert self.cache.forget(tokens, namespace="nobody") == (0, 0, 0)
            assert self.cache.forget(namespace="nobody") == (0, 0, 0)
            self.room(Path("nobody", tokens))

    @rule(
        bad=st.sampled_from(BAD_NAMESPACES),
        how=st.sampled_from(["open", "match", "can_open", "pin", "forget"]),
        drawn=tokens,
    )
    def bad_namespace(self, bad: Any, how: str, drawn: list[int]) -> None:
        with self.refusal(InvalidNamespace) as caught:
            getattr(self.cache, how)(drawn, namespace=bad)
        assert repr(bad) in str(caught.value)

    # Admission

    @precondition(lambda self: self.knows_paths)
    @rule(data=st.data(), more=tokens, repeated=st.integers(1, 12), watermark=st.integers(0, 45))
    def can_open(self, data: st.DataObject, more: list[int], repeated: int, watermark: int) -> None:
        """What it says comes true on a twin, whose blocks are then counted."""
        namespace, tokens = self.some_prefix(data)
        path = Path(namespace, (*tokens, *self.fit(more) * repeated))
        twin = self.journal.replay()
        try:
            twin.open(path)
        except OutOfBlocks:
            expected = False
        else:
            stats = twin.cache.stats()
            expected = stats.free_blocks + stats.evictable_blocks >= watermark
        with self.no_change():
            answer = self.cache.can_open(path.tokens, namespace=namespace, watermark=watermark)
        assert answer is expected

    @rule(space=spaces, drawn=tokens, watermark=st.integers(-5, -1))
    def can_open_below_nothing(self, space: int, drawn: list[int], watermark: int) -> None:
        namespace, tokens = self.path(space, drawn)
        with self.refusal(InvalidLength) as caught:
            self.cache.can_open(tokens, namespace=namespace, watermark=watermark)
        assert str(watermark) in str(caught.value)

    # Pins

    @precondition(lambda self: self.knows_paths)
    @rule(data=st.data(), more=few_tokens)
    def pin_prefix(self, data: st.DataObject, more: list[int]) -> None:
        namespace, tokens = self.some_prefix(data)
        self.pin(Path(namespace, (*tokens, *self.fit(more))))

    @rule(space=spaces, drawn=tokens)
    def pin_anything(self, space: int, drawn: list[int]) -> None:
        self.pin(self.path(space, drawn))

    @precondition(lambda self: self.pins)
    @rule(target=unpinned, data=st.data())
    def unpin_one(self, data: st.DataObject) -> PinHandle:
        pin = data.draw(st.sampled_from(self.pins), label="pin")
        self.unpin(pin)
        return pin

    @rule(pin=unpinned)
    def unpin_twice(self, pin: PinHandle) -> None:
        with self.refusal(NotPinned):
            pin.real.unpin()

    # Priorities

    @precondition(lambda self: self.knows_paths)
    @rule(
        data=st.data(),
        more=few_tokens,
        priority=st.sampled_from([0, 35, 60, 100]),
        duration=st.sampled_from([None, 1, 3]),
    )
    def retain_range(
        self, data: st.DataObject, more: list[int], priority: int, duration: float | None
    ) -> None:
        """Of a known path, or beyond its end."""
        namespace, tokens = self.some_path(data)
        path = Path(namespace, (*tokens, *self.fit(more)))
        ends = st.tuples(*[st.integers(0, len(path.tokens))] * 2).map(sorted)
        start, stop = data.draw(ends, label="range")
        self.retain(path, start, stop, priority, duration)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.wait(seconds)

    # Forgetting

    def forget(self, top: Path) -> None:
        """Forgets what is behind a path, all of the namespace for the empty one."""
        namespace, tokens = top
        wanted = tokens or None
        free = self.cache.stats().free_blocks
        slots = self.view.committed
        forgotten = self.cache.forget(wanted, namespace=namespace)
        self.journal.calls.append(lambda twin: twin.cache.forget(wanted, namespace=namespace))
        gone, kept = self.model.forget(top)
        freed = self.cache.stats().free_blocks - free
        assert forgotten == pt.Forgotten(
            blocks=freed, tokens=self.align * len(gone), kept_tokens=self.align * len(kept)
        )
        if self.looks_closely:
            staying = [slots[path] for path in self.model.paths] + list(self.view.reserved.values())
            assert freed == self.blocks_taken([slots[path] for path in gone], staying)
        self.counted["evicted_tokens"] += self.align * len(gone)

    @precondition(lambda self: self.model.paths)
    @rule(data=st.data())
    def forget_behind(self, data: st.DataObject) -> None:
        namespace, tokens = data.draw(st.sampled_from(self.model.leaves()), label="leaf")
        length = data.draw(st.integers(1, max(1, len(tokens) - 1)), label="length")
        self.forget(Path(namespace, tokens[:length]))

    @precondition(lambda self: self.knows_paths)
    @rule(data=st.data(), more=few_tokens)
    def forget_beyond(self, data: st.DataObject, more: list[int]) -> None:
        """Behind the end of a path, or behind what nobody has committed."""
        namespace, tokens = self.some_path(data)
        self.forget(Path(namespace, (*tokens, *self.fit(more))))

    @rule(target=closed, handle=consumes(sequences), data=st.data())
    def forget_a_closed_one(self, handle: Handle, data: st.DataObject) -> Handle:
        namespace, tokens = handle.model.path
        self.commit_one(handle, len(tokens))
        self.shut(handle)
        self.check_all()
        self.forget(Path(namespace, tokens[: data.draw(st.integers(0, len(tokens) - 1))]))
        return handle

    @rule(space=spaces)
    def forget_namespace(self, space: int) -> None:
        self.forget(self.path(space, []))

    # Preemption

    @rule(handle=consumes(sequences))
    def preempt_one(self, handle: Handle) -> None:
        self.preempt(handle)

    @rule(handle=consumes(sequences), more=tokens)
    def preempt_in_the_middle(self, handle: Handle, more: list[int]) -> None:
        """With tokens whose KV was never written."""
        self.append([handle.real], [handle], [more])
        self.preempt(handle)

    @precondition(lambda self: self.preempted)
    @rule(target=sequences, data=st.data())
    def resume_one(self, data: st.DataObject) -> Any:
        handle = data.draw(st.sampled_from(self.preempted), label="preempted")
        return multiple(*self.resume(handle))

    @precondition(lambda self: self.preempted)
    @rule(target=sequences, data=st.data(), spare=st.sampled_from([0, 0, 1, 2]))
    def resume_in_a_crowd(self, data: st.DataObject, spare: int) -> Any:
        """Another sequence takes all blocks there are, or nearly all, and goes again."""
        handle = data.draw(st.sampled_from(self.preempted), label="preempted")
        stats = self.cache.stats()
        blocks = stats.free_blocks + stats.evictable_blocks - spare
        everything = Path("crowd", (0,) * (blocks * self.block_size))
        crowd = self.open(everything) if blocks > 0 else []
        self.check_all()
        resumed = self.resume(handle)
        for other in crowd:
            self.shut(other)
        return multiple(*(resumed or self.resume(handle)))

    @rule(target=sequences, handle=consumes(sequences), more=few_tokens)
    def preempt_a_fork(self, handle: Handle, more: list[int]) -> Any:
        """The fork comes back to what it shares with the sequence it was forked from."""
        self.commit_one(handle, len(handle.model))
        forks = self.fork(handle, 1)
        if not forks:
            return handle
        (fork,) = forks
        self.append([fork.real], [fork], [more])
        self.preempt(fork)
        self.check_all()
        return multiple(handle, *self.resume(fork))

    @rule(
        target=sequences,
        handle=consumes(sequences),
        others=st.lists(sequences, max_size=2, unique=True),
    )
    def preempt_a_member_of_a_batch(self, handle: Handle, others: list[Handle]) -> Any:
        """What a batch knows about a sequence ends with its preemption."""
        members = [*others, handle]
        batch = self.cache.batch([member.real for member in members])
        self.preempt(handle)
        resumed = self.resume(handle)
        with self.refusal(SequenceClosed):
            self.cache.append(batch, [0] * len(members))
        with self.refusal(SequenceClosed):
            self.cache.commit(batch)
        with self.refusal(SequenceClosed):
            self.cache.forest(batch)
        return multiple(*resumed)

    @precondition(lambda self: self.preempted)
    @rule(target=closed, data=st.data())
    def close_preempted(self, data: st.DataObject) -> Handle:
        handle = data.draw(st.sampled_from(self.preempted), label="preempted")
        self.shut(handle)
        return handle

    @precondition(lambda self: self.preempted)
    @rule(
        data=st.data(),
        use=st.sampled_from(PREEMPTED_REFUSE),
        others=st.lists(sequences, max_size=2, unique=True),
    )
    def use_while_preempted(self, data: st.DataObject, use: str, others: list[Handle]) -> None:
        handle = data.draw(st.sampled_from(self.preempted), label="preempted")
        real = handle.real
        batch = [*(other.real for other in others), real]
        calls: dict[str, Callable[[], Any]] = {
            "len": lambda: len(real),
            "committed": lambda: real.committed,
            "tokens": real.tokens,
            "slots": lambda: real.slots(0, 1),
            "commit": lambda: real.commit(len(handle.model)),
            "fork": lambda: real.fork(1),
            "rollback": lambda: real.rollback(0),
            "preempt": real.preempt,
            "batch": lambda: self.cache.batch(batch),
            "append": lambda: self.cache.append(batch, [0] * len(batch)),
            "commit_batch": lambda: self.cache.commit(batch),
            "forest": lambda: self.cache.forest(batch),
        }
        with self.refusal(SequenceClosed):
            calls[use]()

    @rule(handle=sequences)
    def resume_what_runs(self, handle: Handle) -> None:
        with self.refusal(NotPreempted):
            handle.real.resume()

    @rule(handle=closed)
    def resume_what_is_closed(self, handle: Handle) -> None:
        with self.refusal(NotPreempted):
            handle.real.resume()
