"""Many threads on one cache, and a cache that has found itself broken."""

import random
import threading

import numpy as np
import pytest

from prefixtree import BrokenInvariant, CacheBroken, OutOfBlocks, PrefixCache
from prefixtree.sequence import Sequence


def work(cache: PrefixCache, seed: int, errors: list[BaseException]) -> None:
    draw = random.Random(seed)
    held: list[Sequence] = []
    try:
        for _ in range(150):
            try:
                if draw.random() < 0.4 or not held:
                    tokens = [draw.randrange(3) for _ in range(draw.randint(1, 12))]
                    held.append(cache.open(tokens))
                elif draw.random() < 0.5:
                    sequence = draw.choice(held)
                    sequence.commit(len(sequence))
                    cache.append([sequence], [draw.randrange(3)])
                elif draw.random() < 0.3:
                    sequence = draw.choice(held)
                    sequence.commit(len(sequence))
                    held += sequence.fork(2)
                else:
                    held.pop(draw.randrange(len(held))).close()
            except OutOfBlocks:
                held.pop(draw.randrange(len(held))).close() if held else None
        for sequence in held:
            sequence.close()
    except BaseException as error:
        errors.append(error)


def test_eight_threads_leave_every_invariant_whole() -> None:
    cache = PrefixCache(64, 3, thread_safe=True)
    errors: list[BaseException] = []
    threads = [threading.Thread(target=work, args=(cache, n, errors)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    cache.check()
    cache.clear()
    assert cache.stats().free_blocks == 64


def test_a_broken_cache_refuses_further_work() -> None:
    cache = PrefixCache(8, 2)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    cache._pool.retain(np.array([sequence.slots(0, 1)[0] // 2]))
    with pytest.raises(BrokenInvariant, match="references"):
        cache.check()
    for call in (lambda: cache.match([1]), lambda: sequence.commit(3), sequence.close):
        with pytest.raises(CacheBroken, match="references"):
            call()
