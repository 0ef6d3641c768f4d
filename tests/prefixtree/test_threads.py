"""Many threads on one cache."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from typing import Literal

import pytest

import prefixtree as pt


def work(cache: pt.PrefixCache, seed: int, steps: int) -> None:
    """Random calls on sequences of this thread's own; prompts and the pool are everybody's."""
    chance = random.Random(seed)
    mine: list[pt.Sequence] = []
    pins: list[pt.Pin] = []
    for _ in range(steps):
        prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 40))]
        call = chance.randrange(12)
        # What a thread reads may be old when it acts on it: refusals are part of the game.
        with suppress(
            pt.OutOfBlocks,
            pt.NotCommitted,
            pt.InvalidLength,
            pt.RollbackPastFork,
            pt.SequenceClosed,
        ):
            if call <= 2 or not mine:
                mine.append(cache.open(prompt))
            elif call == 3:
                cache.append(mine[:3], [1] * len(mine[:3]))
            elif call <= 5:
                cache.commit(mine)
            elif call == 6:
                mine += chance.choice(mine).fork(2)
            elif call == 7:
                chance.choice(mine).rollback(chance.randrange(3))
            elif call == 8:
                one = chance.choice(mine)
                one.preempt()
                with suppress(pt.OutOfBlocks):
                    one.resume()
                if one.is_preempted:
                    mine.remove(one)
                    one.close()
            elif call == 9:
                cache.evict(2)
                cache.match(prompt)
                cache.explain(prompt)
                if mine:
                    cache.forest(mine[:2], query_lens=[len(s) for s in mine[:2]])
            elif call == 10:
                pins.append(cache.pin(prompt))
                cache.forget(prompt[:2])
            else:
                mine.pop(chance.randrange(len(mine))).close()
    for sequence in mine:
        sequence.close()
    for pin in pins:
        pin.unpin()


@pytest.mark.parametrize("align", ["token", "block"])
def test_eight_threads_leave_every_invariant_whole(align: Literal["token", "block"]) -> None:
    cache = pt.PrefixCache(400, 4, thread_safe=True, align=align)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            work(cache, seed, 300)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.check()
    assert cache.stats().open_sequences == 0
    cache.clear()
    cache.check()
    assert cache.stats().free_blocks == 400
