"""A small cache at work, to look at: requests that share headers come, branch and go."""

from __future__ import annotations

from random import Random

from allocator import OutOfBlocks
from prefixtree.cache import PrefixCache
from prefixtree.sequence import Sequence

HEADERS = (
    "You are a careful assistant. Answer in one paragraph.\n",
    "Solve the problem in Python. Read from standard input.\n",
)
TASKS = ("Add two numbers.", "Sort a list.", "Find the median.", "Count words.", "Reverse a tree.")
WORDS = ("first ", "then ", "we ", "read ", "sort ", "add ", "the ", "list ", "and ", "print.\n")
TENANTS = "", "tenant b"
MOST_RUNNING = 12


def decode(tokens: list[int]) -> str:
    """The demonstration's tokens are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


class Demo:
    """The same for the same seed, step by step."""

    def __init__(self, seed: int = 0) -> None:
        self.cache = PrefixCache(512, 4)
        self._random = Random(seed)
        self._running: list[Sequence] = []
        for _ in range(20):
            self.step()

    def step(self) -> None:
        """A request comes and branches, all running ones get a word, and one or two end."""
        chance, cache = self._random, self.cache
        text = f"{chance.choice(HEADERS)}{chance.choice(TASKS)} Case {chance.randrange(9)}.\n"
        tokens, namespace = list(text.encode()), chance.choice(TENANTS)
        # Each of those running needs at most two blocks a word.
        if cache.can_open(tokens, namespace=namespace, watermark=2 * MOST_RUNNING):
            first = cache.open(tokens, namespace=namespace)
            first.commit(len(tokens))
            self._running += [first, *first.fork(chance.randrange(1, 4))]
        while len(self._running) > MOST_RUNNING or (self._running and chance.random() < 0.3):
            self._running.pop(chance.randrange(len(self._running))).close()
        words = [chance.choice(WORDS).encode() for _ in self._running]
        try:
            cache.append(self._running, list(b"".join(words)), list(map(len, words)))
        except OutOfBlocks:
            self._running.pop(0).close()
        # The last one's word is left to be computed: pending in the picture.
        cache.commit(self._running[:-1])
