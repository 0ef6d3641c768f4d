"""A recorded trace through a cache, and a consumer that rebuilds what is cached from its events.

    python -m tests.events.follow mooncake_conversation.jsonl.gz --blocks 20000

Over real sockets, and with buffers so small that batches are lost. Every so often what the consumer
knows is held against the tree: each block by its hash, its tokens and the block in front of it.
"""

from __future__ import annotations

import argparse
import random
import socket
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import xxhash

import prefixtree as pt
from prefixtree.events import KVEvents, ZmqPublisher
from prefixtree.replay.request import Request
from prefixtree.replay.traces import load_traces

from .consumer import Consumer, join


def two_endpoints() -> tuple[str, str]:
    """Of ports that are free now."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        first, second = (each.getsockname()[1] for each in (one, two))
    return f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{second}"


def recount(cache: pt.PrefixCache) -> dict[int, tuple[int | None, bytes]]:
    """Hash, hash in front and tokens of every whole block, from the tree and nothing else."""
    view = cache.tree()
    size = 4 * view.block_size
    begin = xxhash.xxh3_128_digest(bytes(8) + b'""')
    found: dict[int, tuple[int | None, bytes]] = {}
    ends: dict[Any, tuple[bytes, int | None, bytes]] = {}
    for node in view:
        digest, name, rest = ends.get(node.parent, (begin, None, b""))
        tokens = rest + np.array(node.tokens, "<i4").tobytes()
        whole = len(tokens) // size * size
        for at in range(0, whole, size):
            block = tokens[at : at + size]
            digest = xxhash.xxh3_128_digest(digest + block)
            parent, name = name, int.from_bytes(digest[-8:], "big")
            found[name] = parent, block
        ends[node] = digest, name, tokens[whole:]
    return found


def follow(requests: list[Request], num_blocks: int, checks: int, running: int = 8) -> str:
    """Plays the requests; raises AssertionError where the consumer knows something wrong."""
    cache = pt.PrefixCache(num_blocks, 16)
    draw = random.Random(1)
    endpoints = two_endpoints()
    open_: deque[pt.Sequence] = deque()
    compared = 0
    with (
        ZmqPublisher(
            KVEvents(cache), *endpoints, buffer_batches=100, high_water_mark=2
        ) as publisher,
        Consumer(*endpoints, block_size=16, limit=2) as consumer,
    ):
        join(publisher, consumer)
        consumer.mirror.longest = 16
        for number, request in enumerate(requests, 1):
            tokens = request.tokens()
            prompt = tokens[: request.input_length]
            while open_ and (
                len(open_) >= running
                or not cache.can_open(prompt, watermark=request.output_length // 16 + 2)
            ):
                open_.popleft().close()
            sequence = cache.open(prompt)
            sequence.commit(len(prompt))
            publisher.flush()
            if request.output_length:
                cache.append([sequence], tokens[len(prompt) :], [request.output_length])
                sequence.commit(len(tokens))
                publisher.flush()
            open_.append(sequence)
            if draw.random() < 0.001:
                while open_:
                    open_.pop().close()
                cache.clear()
            if draw.random() < 0.3:  # otherwise it reads nothing, and loses some
                consumer.read()
            if number % (len(requests) // checks) == 0:
                consumer.follow(publisher)
                expected = recount(cache)
                mirror = consumer.mirror
                known = {key: (mirror.parents[key], mirror.paths[key][1]) for key in mirror.paths}
                assert known == expected
                compared += len(expected)
        stats = publisher.stats()
    assert cache.stats().evicted_nodes > 0
    assert consumer.missed > 0
    return (
        f"{len(requests):,} requests, {stats.blocks:,} blocks told in {stats.batches:,} batches,"
        f" {cache.stats().evicted_nodes:,} nodes evicted; the consumer missed {consumer.missed:,}"
        f" batches, asked {len(consumer.asked):,} times, was told everything {stats.resyncs:,}"
        f" times, and agreed about all of {compared:,} blocks compared"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.events.follow")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--checks", type=int, default=10)
    parser.add_argument("--requests", type=int)
    options = parser.parse_args()
    began = perf_counter()
    requests = load_traces([options.trace])[: options.requests]
    print(follow(requests, options.blocks, options.checks), f"in {perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
