"""What is computed in the next step, and what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.errors import OutOfBlocks
from prefixtree.cache import PrefixCache
from prefixtree.columns import Int64s
from prefixtree.engines.requests import Continuation, Prefill, Request
from prefixtree.engines.running import Member, Running
from prefixtree.sequence import Sequence


class Chunk(NamedTuple):
    """Positions start..stop-1 of a prefill, to be computed in one step."""

    prefill: Prefill
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.prefill.work.tokens)


class Scheduler:
    """A sample waits, its prefill is being computed, or it decodes.

    Running samples come first: each takes a token of every step, and prefills share the rest of
    the budget in the order of their admission. So all prefills were admitted after all running
    samples, and the most recently admitted is the last prefill, or else the last running sample.

    Attributes: running; prefilling; waiting, preempted ones first; preemptions, their number.
    """

    def __init__(self, cache: PrefixCache, max_batch_tokens: int, max_running: int) -> None:
        self.running = Running.none(cache)
        self.prefilling: list[Prefill] = []
        self.waiting: deque[Continuation] = deque()
        self.preemptions = 0
        self._cache = cache
        self._capacity = cache.num_blocks * cache.block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running

    def append(self) -> tuple[Int64s, list[Continuation]]:
        """Appends the newest token of every running sample to its sequence.

        While they do not fit, the most recently admitted is preempted: it gives its blocks back and
        waits, before all new requests, to be opened again with all it has generated; its KV stays
        cached as long as nobody needs the room. Returns the slots of the appended tokens and what
        can never go on, since it does not fit into the cache even alone.
        """
        lost: list[Continuation] = []
        while self.running:
            try:
                return self._cache.append(self.running.batch, self.running.rows["token"]), lost
            except OutOfBlocks:
                work = self._take_last_admitted()
            if len(work.tokens) > self._capacity:
                lost.append(work)
            else:
                self.waiting.appendleft(work)
                self.preemptions += 1
        return np.empty(0, np.int64), lost

    def undo_append(self) -> None:
        """Takes the newest tokens back from their sequences: the step did not happen."""
        for member in self.running.members:
            member.sequence.rollback(1)

    def admit(self) -> None:
        """Opens what waits, in its order, while budget, places and blocks last.

        One whose next tokens another prefill is about to compute is passed over until they are
        there: in the next step, when budget for it is left now.
        """
        budget = self._prefill_budget() - sum(prefill.todo for prefill in self.prefilling)
        places = self._max_running - len(self.running)
        places -= sum(len(prefill.work.samples) for prefill in self.prefilling)
        passed_over: list[Continuation] = []
        while self.waiting and budget > 0 and len(passed_over) < self._max_running:
            work = self.waiting[0]
            if len(work.samples) > places:
                break
            if self.prefilling and self._cache.match(work.tokens).pending:
                passed_over.append(self.waiting.popleft())
                continue
            sequence = self._open(work)
            if sequence is None:
                break
            prefill = Prefill(self.waiting.popleft(), sequence)
            self.prefilling.append(prefill)
            places -= len(work.samples)
            budget -= prefill.todo
        self.waiting.extendleft(reversed(passed_over))

    def chunks(self) -> list[Chunk]:
        """What is computed of the prefills in this step."""
        budget = self._prefill_budget()
        chunks = []
        for prefill in self.prefilling:
            if budget == 0:
                break
            start = prefill.start
            stop = min(len(prefill.work.tokens), start + budget)
            chunks.append(Chunk(prefill, start, stop))
            budget -= stop - start
        return chunks

    def settle(self, rows: NDArray[np.void], ended: Container[int], chunks: list[Chunk]) -> None:
        """Takes over a step that happened.

        `rows`: of the running samples, then of the samples behind every chunk that is the last of
        its prefill. `ended`: which of these rows have had their last token.
        """
        done = [chunk.prefill for chunk in chunks if chunk.is_last]
        if not done and not ended:
            self.running.rows = rows
            return
        members = []
        for row, member in enumerate(self.running.members):
            if row in ended:
                member.sequence.close()
            else:
                members.append(member)
        row = len(self.running)
        for work, sequence in done:
            alive = [s for i, s in enumerate(work.samples) if row + i not in ended]
            row += len(work.samples)
            members += _branch(work.request, alive, sequence)
        del self.prefilling[: len(done)]
        alive_rows = np.array([i not in ended for i in range(row)], bool)
        self.running = Running(self._cache, members, rows[alive_rows])

    def remove(self, request: Request) -> None:
        """Forgets a request wherever it is."""
        self.waiting = deque(work for work in self.waiting if work.request is not request)
        members = self.running.members
        kept = np.array([member.request is not request for member in members], bool)
        sequences = [m.sequence for m in members if m.request is request]
        sequences += [p.sequence for p in self.prefilling if p.work.request is request]
        self.prefilling = [p for p in self.prefilling if p.work.request is not request]
        if not kept.all():
            remaining = [member for member in members if member.request is not request]
            self.running = Running(self._cache, remaining, self.running.rows[kept])
        for sequence in sequences:
            sequence.close()

    def _take_last_admitted(self) -> Continuation:
        if self.prefilling:
            work, sequence = self.prefilling.pop()
            sequence.close()
            return work
        *members, (request, sample, sequence) = self.running.members
        *_, token = self.running.rows["token"]
        text = np.append(sequence.tokens(), np.int32(token))
        sequence.close()
        self.running = Running(self._cache, members, self.running.rows[:-1])
        return Continuation(request, text, [sample])

    def _open(self, work: Continuation) -> Sequence | None:
        """None when there are not enough blocks until others have finished."""
        try:
            return self._cache.open(work.tokens)
        except OutOfBlocks:
            if self.running or self.prefilling:
                return None
        # Alone it fits, but not beside the part of it that is cached in many half-filled blocks.
        self._cache.clear()
        return self._cache.open(work.tokens)

    def _prefill_budget(self) -> int:
        return self._max_batch_tokens - len(self.running)


def _branch(request: Request, samples: list[int], sequence: Sequence) -> list[Member]:
    """The samples behind a computed sequence, which the first of them goes on with."""
    if not samples:
        sequence.close()
        return []
    forks = sequence.fork(len(samples) - 1) if len(samples) > 1 else []
    return [
        Member(request, sample, own)
        for sample, own in zip(samples, [sequence, *forks], strict=True)
    ]
