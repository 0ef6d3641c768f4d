"""Plays requests through a real cache, as an engine without a model would."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from allocator import BrokenInvariant, OutOfBlocks
from prefixtree.columns import Int32s
from prefixtree.replay.meter import Meter, MeteredCache
from prefixtree.replay.request import Request
from prefixtree.sequence import Sequence

EVENTS = "refused", "aborted", "preempted", "forgotten", "cut_short"


@dataclass(eq=False, slots=True)
class _Running:
    request: Request
    tokens: Int32s  # of prompt and output
    sequence: Sequence
    produced: int = 0  # tokens of the output

    @property
    def left(self) -> int:
        return self.request.output_length - self.produced


class Player:
    """Serves requests in order of arrival, at most `running` at a time.

    A request is opened, its prompt committed, and it holds its blocks until it is finished: its
    output is appended and committed, and it is closed. The oldest is finished whenever too many
    run, or the next one would leave the outputs of those running too little room; the turn before
    of its session always. A request that does not fit the empty cache is refused.

    At the rate `disturb`, a request is aborted in its prompt, one that runs is preempted in its
    output and resumed before the next arrival, and of an earlier prompt all is forgotten behind
    some place in what it did not find cached.
    """

    def __init__(self, cache: MeteredCache, running: int, disturb: float, seed: int) -> None:
        self._cache = cache
        self._meter: Meter = cache.meter
        self._limit = running
        self._disturb = disturb
        self._random = Random(seed)
        self._running: deque[_Running] = deque()
        self._preempted: list[_Running] = []
        self._served: list[tuple[Request, int]] = []  # each with how much was cached
        self.events: Counter[str] = Counter()

    def play(self, requests: Iterable[Request]) -> None:
        """Plays these to the end of the last one."""
        for request in requests:
            self._resume()
            self._arrive(request)
            if self._disturb:
                self._disturb_running()
        self._resume()
        while self._running:
            self._finish(self._running.popleft())

    def end(self) -> None:
        """Clears the cache; raises `BrokenInvariant` unless it is whole, and empty again."""
        cache = self._cache
        cache.clear()
        cache.check()
        stats = cache.stats()
        if stats.free_blocks != stats.num_blocks or stats.open_sequences:
            raise BrokenInvariant(
                f"{stats.free_blocks} of {stats.num_blocks} blocks are free and"
                f" {stats.open_sequences} sequences open after the last one ended"
            )

    def _arrive(self, request: Request) -> None:
        for other in [other for other in self._running if other.request.session == request.session]:
            self._running.remove(other)
            self._finish(other)
        if not fits(request, self._cache.num_blocks, self._cache.block_size):
            self.events["refused"] += 1
            return
        tokens = request.tokens()
        prompt = tokens[: request.input_length]
        self._meter.call("match", self._cache.match, prompt)
        self._make_room(prompt, request.output_length)
        sequence = self._meter.call("open", self._cache.open, prompt)
        self._served.append((request, sequence.cached_len))
        if self._happens():
            self.events["aborted"] += 1
            written = self._random.randint(sequence.cached_len, len(prompt))
            self._meter.call("commit", sequence.commit, written)
            self._meter.call("close", sequence.close)
            return
        self._meter.call("commit", sequence.commit, len(prompt))
        self._running.append(_Running(request, tokens, sequence))

    def _resume(self) -> None:
        """Takes up again what was preempted."""
        while self._preempted:
            item = self._preempted.pop()
            tokens = item.tokens[: item.request.input_length + item.produced]
            self._make_room(tokens, item.left)
            self._meter.call("open", item.sequence.resume)
            self._meter.call("commit", item.sequence.commit, len(tokens))
            self._running.append(item)

    def _make_room(self, tokens: Int32s, output_length: int) -> None:
        """Finishes the oldest until a sequence of these tokens can run beside the others."""
        while self._running:
            outputs = [item.left for item in self._running]
            room = sum(map(self._blocks, outputs)) + self._blocks(output_length)
            if len(self._running) < self._limit and self._cache.can_open(tokens, watermark=room):
                return
            self._finish(self._running.popleft())
        if not self._cache.can_open(tokens, watermark=self._blocks(output_length)):
            # It fits an empty cache, but its own cached prefix lies in many half-filled blocks.
            self._cache.clear()

    def _finish(self, item: _Running) -> None:
        self._generate(item, item.left)
        self._meter.call("close", item.sequence.close)

    def _generate(self, item: _Running, count: int) -> None:
        """Appends and commits the next `count` tokens of the output."""
        if not count:
            return
        at = item.request.input_length + item.produced
        added = item.tokens[at : at + count]
        item.produced += count
        try:
            self._meter.call("append", self._cache.append, [item.sequence], added, [count])
        except OutOfBlocks:
            # Another's copy of earlier output, joined at a commit, fills its blocks less well.
            item.produced = item.request.output_length
            self.events["cut_short"] += 1
            return
        self._meter.call("commit", item.sequence.commit, at + count)

    def _disturb_running(self) -> None:
        if self._running and self._happens():
            self.events["preempted"] += 1
            item = self._random.choice(self._running)
            self._running.remove(item)
            self._generate(item, self._random.randint(0, item.left))
            item.sequence.preempt()
            self._preempted.append(item)
        if self._served and self._happens():
            self.events["forgotten"] += 1
            request, cached_len = self._random.choice(self._served)
            # Not in front of that: a header that all requests share would soon be gone for all.
            length = self._random.randint(max(cached_len, 1), request.input_length)
            self._cache.forget(request.tokens()[:length])

    def _happens(self) -> bool:
        return self._random.random() < self._disturb

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._cache.block_size)


def fits(request: Request, num_blocks: int, block_size: int) -> bool:
    """Whether the request can be served by an empty cache of this size."""
    return request.blocks(block_size) <= num_blocks
