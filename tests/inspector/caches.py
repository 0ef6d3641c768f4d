"""Caches to look at."""

from __future__ import annotations

import base64
import json
import re
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np

import prefixtree as pt
from allocator import OutOfBlocks
from prefixtree.columns import Int32s
from prefixtree.tree import Namespace

AWKWARD = "</script><script>document.title='run'</script><!--<b>&amp;\"'\u202eltr\x07\n🎉 שלום"
"""Text that a careless page would take for something else."""


def from_utf8(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def small() -> tuple[pt.PrefixCache, list[pt.Sequence]]:
    """A fork, a pending tail, a tenant, an evictable branch and a retired duplicate."""
    cache = pt.PrefixCache(64, 4, reserve_block_0=True)
    with cache.open(list(AWKWARD.encode())) as whole:
        whole.commit(len(whole))
    first = cache.open(list(b"shared prefix, then one"))
    first.commit(len(first))
    samples = first.fork(2)
    cache.append(samples, list(b"ab"))
    cache.commit(samples)
    cache.append(samples, list(b"cdef"), [2, 2])
    tenant = cache.open(list(b"shared prefix of a tenant"), namespace=("tenant", 1))
    tenant.commit(10)
    with cache.open(list(b"shared prefix, then two")) as other:
        other.commit(len(other))
    return cache, [first, *samples, tenant]


NAMESPACES: list[Namespace] = ["", "", "b", "ü\ud800", ("a", 1, None)]


class Grown:
    """A cache after so many random steps: deep and branched, with all kinds of nodes in it."""

    def __init__(self, seed: int, steps: int, block_size: int) -> None:
        self.chance = Random(seed)
        self.cache = pt.PrefixCache(48, block_size, reserve_block_0=seed % 2 == 0)
        self.running: list[pt.Sequence] = []
        self.pins: list[pt.Pin] = []
        for _ in range(steps):
            with suppress(OutOfBlocks):
                self.step()

    def step(self) -> None:
        chance, what = self.chance, self.chance.random()
        if what < 0.4 or not self.running:
            prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 12))]
            sequence = self.cache.open(prompt, namespace=chance.choice(NAMESPACES))
            sequence.commit(chance.randint(sequence.cached_len, len(prompt)))
            self.running.append(sequence)
            return
        sequence = chance.choice(self.running)
        if what < 0.55:
            self.cache.append([sequence], [0, 1], [2])
            sequence.commit(len(sequence) - chance.randrange(2))
        elif what < 0.62:
            sequence.commit(len(sequence))
            self.running += sequence.fork(2)
        elif what < 0.66:
            prefix = sequence.tokens()[:5]
            self.pins.append(self.cache.pin(prefix, namespace=sequence._namespace))
        else:
            self.running.remove(sequence)
            sequence.close()


def large(nodes: int, seed: int = 0) -> pt.PrefixCache:
    """Random branches off each other, some of them in use by nobody."""
    chance = Random(seed)
    cache = pt.PrefixCache(4 * nodes + 64, 8)
    paths = [list(b"the beginning ")]
    while cache.stats().nodes < nodes:
        base = chance.choice(paths)
        cut = chance.randrange(len(base)) + 1
        path = base[:cut][:200] + [
            chance.randrange(97, 123) for _ in range(chance.randrange(4, 20))
        ]
        with cache.open(path, namespace=chance.choice(["", "", "b"])) as sequence:
            sequence.commit(len(path))
        paths.append(path)
    return cache


def data_of(page: str) -> Any:
    """What a page has to show, as a browser finds it."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def unpacked(frame: Any) -> dict[str, Int32s]:
    return {
        name: np.frombuffer(base64.b64decode(text), "<i4") for name, text in frame["arrays"].items()
    }
