"""What the events say is what the cache holds, whatever was done to it."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis.stateful import invariant

from prefixtree.events import KVEvents
from tests.prefixtree.test_state_machine import Caching

from .mirror import Key, Mirror, decoded, packed, parts_of


class Told(Caching):
    """The cache's state machine, with a consumer that is told every few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.events: KVEvents | None = None

    @property
    def looks_closely(self) -> bool:
        return False  # the machine itself is tested elsewhere

    @invariant()
    def check_events(self) -> None:
        stats = self.cache.stats()
        if self.events is None:
            self.events = KVEvents(self.cache, block_hashes="bytes")
            self.mirror = Mirror(self.block_size)
        elif self.steps % (1 + stats.num_blocks % 4):
            return  # several steps are told at once
        for event in decoded(self.events.take()):
            self.mirror.apply(event)
        assert self.mirror.keys == self.expected()
        assert self.events.stored_blocks == len(self.mirror.paths)
        again = Mirror(self.block_size)
        for event in decoded(list(self.events.everything())):
            again.apply(event)
        assert again.paths == self.mirror.paths

    def expected(self) -> Counter[Key]:
        return Counter(
            (parts_of(namespace), packed(tokens))
            for namespace, tokens in self.model.paths
            if len(tokens) % self.block_size == 0
        )


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=settings.default.max_examples)
