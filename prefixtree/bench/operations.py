"""What the cache's operations cost as the tree, the prompts and the batch grow."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefixtree.batch import Batch
from prefixtree.bench.measure import Rounds, Row, Timings, in_turn
from prefixtree.bench.peers import Ours, Peer
from prefixtree.cache import PrefixCache
from prefixtree.columns import Int32s

NODE_TOKENS = 64
LEAVES_OF_A_HEAD = 99
CHUNK = 2_048
SHARED_TOKENS = 1_024
SEQUENCES_OF_A_PROMPT = 8
LONG_PROMPT = 2**16


class Nodes(NamedTuple):
    """What was measured on trees of one size."""

    rows: list[Row]
    memory: dict[str, float]
    """By cache: bytes a node of 64 tokens; empty where memory cannot be read."""


def by_nodes(
    makers: Sequence[type[Peer]], sizes: Sequence[int], block_size: int, rounds: Rounds
) -> Iterator[Nodes]:
    """Measures trees of each of `sizes` nodes of 64 tokens, 99 leaves behind each inner node.

    A round matches a leaf's prompt, opens, commits and closes one that adds a leaf to the newest
    inner node or starts the next, and evicts 64 tokens. Memory is what the process's resident
    memory has grown by while a cache grew, so that it is exact only for large trees.
    """
    room = (max(sizes) + rounds.most + LEAVES_OF_A_HEAD) * NODE_TOKENS
    peers = [make(room + 2 * block_size, block_size) for make in makers]
    weight = dict.fromkeys((peer.name for peer in peers), 0)
    leaves = 0
    for size in sizes:
        wanted = size - -(-size // (LEAVES_OF_A_HEAD + 1))
        for peer in peers:
            before = resident_bytes()
            for leaf in range(leaves, wanted):
                cache_prompt(peer, leaf_prompt(leaf))
            weight[peer.name] += resident_bytes() - before
        leaves = max(leaves, wanted)
        timings = Timings(rounds.clock)
        for number in rounds:
            there = leaves - 1 - number * 7 % max(1, leaves // 2)
            for peer in in_turn(peers, number):
                known = peer.prepare(leaf_prompt(there))
                timed(timings, peer, "match", peer.match, known)
                request = _open_and_commit(timings, peer, leaf_prompt(leaves))
                timed(timings, peer, "close", peer.close, request)
                timed(timings, peer, "evict", peer.evict, NODE_TOKENS)
            leaves += 1
        steps = {step: step for step in ("match", "open", "commit", "open + commit", "close")}
        steps["evict"] = f"evict {NODE_TOKENS} tokens"
        yield Nodes(
            [timings.row(step, name, size, "nodes") for step, name in steps.items()],
            {name: grown / size for name, grown in weight.items() if resident_bytes()},
        )


def by_tokens(
    makers: Sequence[type[Peer]], sizes: Sequence[int], block_size: int, rounds: Rounds
) -> Iterator[list[Row]]:
    """Rows for prompts of each of `sizes` tokens, alone in the cache.

    A round opens, commits and closes a new prompt and matches it. Chunked prefill, of another one,
    is the open and then a commit after each 2,048 tokens, all in one timing.
    """
    peers = [make(max(sizes) + 2 * block_size, block_size) for make in makers]
    rng = np.random.default_rng(0)
    for size in sizes:
        timings = Timings(rounds.clock)
        for number in rounds:
            whole, chunked = rng.integers(0, 2**17, (2, size), np.int32)
            for peer in in_turn(peers, number):
                request = _open_and_commit(timings, peer, whole)
                timed(timings, peer, "close", peer.close, request)
                timed(timings, peer, "match", peer.match, peer.prepare(whole))
                peer.evict(size)
                prompt = peer.prepare(chunked)
                peer.close(timings.time("chunked", peer.name, _prefill, peer, prompt))
                peer.evict(size)
        steps = {step: f"{step} a prompt" for step in ("match", "open", "commit", "open + commit")}
        steps |= {"close": "close a prompt", "chunked": "chunked prefill"}
        yield [timings.row(step, name, size, "tokens") for step, name in steps.items()]


def by_sequences(sizes: Sequence[int], block_size: int, rounds: Rounds) -> Iterator[list[Row]]:
    """Rows for decode steps of each of `sizes` running sequences, ours only.

    Eight at a time share a prompt of 1,024 tokens. A step is `append` of a token each and `commit`
    of the batch; what attention plans from, `forest`, is a row of its own.
    """
    rng = np.random.default_rng(0)
    for size in sizes:
        prompts = -(-size // SEQUENCES_OF_A_PROMPT)
        own = rounds.most + 2 * block_size
        cache = PrefixCache(
            prompts * -(-SHARED_TOKENS // block_size) + size * -(-own // block_size + 1), block_size
        )
        sequences = []
        for number in range(size):
            first = number // SEQUENCES_OF_A_PROMPT
            prompt = np.full(SHARED_TOKENS + 1, first, np.int32)
            prompt[-1] = size + number
            sequences.append(cache.open(prompt))
            sequences[-1].commit(len(prompt))
        batch = cache.batch(sequences)
        timings = Timings(rounds.clock)

        def step(tokens: Int32s, cache: PrefixCache = cache, batch: Batch = batch) -> None:
            cache.append(batch, tokens)
            cache.commit(batch)

        for _ in rounds:
            timings.time("step", Ours.name, step, rng.integers(0, 2**17, size, np.int32))
            timings.time("forest", Ours.name, cache.forest, batch)
        names = {"step": "append + commit", "forest": "forest"}
        yield [timings.row(step, name, size, "sequences") for step, name in names.items()]


def bytes_a_token(peer: Peer, tokens: int) -> float | None:
    """What a token weighs in an empty cache that has room for `tokens`, kept in prompts of 65,536.

    By the growth of the process's resident memory; None where that cannot be read.
    """
    rng = np.random.default_rng(0)
    before = resident_bytes()
    for _ in range(tokens // LONG_PROMPT):
        cache_prompt(peer, rng.integers(0, 2**17, LONG_PROMPT, np.int32))
    after = resident_bytes()
    return (after - before) / tokens if after else None


def leaf_prompt(leaf: int) -> Int32s:
    """The tokens of a leaf and of the inner node that it is behind, 64 each."""
    return np.repeat(np.array([leaf // LEAVES_OF_A_HEAD, leaf], np.int32), NODE_TOKENS)


def timed(
    timings: Timings, peer: Peer, step: str, call: Callable[..., object], *args: object
) -> object:
    """Times a step, for a peer that does it apart from others."""
    if step in peer.steps:
        return timings.time(step, peer.name, call, *args)
    return call(*args)


def _open_and_commit(timings: Timings, peer: Peer, tokens: Int32s) -> object:
    request = timed(timings, peer, "open", peer.open, peer.prepare(tokens))
    timed(timings, peer, "commit", peer.commit, request)
    both = [timings.last(step, peer.name) for step in ("open", "commit") if step in peer.steps]
    timings.note("open + commit", peer.name, sum(both))
    return request


def _prefill(peer: Peer, prompt: object) -> object:
    request = peer.open(prompt)
    peer.prefill(request, CHUNK)
    return request


def cache_prompt(peer: Peer, tokens: Int32s) -> None:
    request = peer.open(peer.prepare(tokens))
    peer.commit(request)
    peer.close(request)


def resident_bytes() -> int:
    """Memory that the process has now, from /proc; 0 where there is none."""
    gc.collect()
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
