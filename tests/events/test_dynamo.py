"""NVIDIA Dynamo's indexer consumes the events and answers as the cache does.

Where Dynamo is installed. With a Mooncake trace in PREFIXTREE_TRACE, the prompts are the trace's:

    PREFIXTREE_TRACE=mooncake_conversation.jsonl.gz python -m pytest -s tests/events/test_dynamo.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefixtree as pt
from prefixtree.events import KVEvents, ZmqPublisher
from prefixtree.replay.traces import load_traces

from .follow import two_endpoints

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("dynamo") is None, reason="needs Dynamo's indexer"
)

SECONDS = 60
BLOCK = 16
TRACE = os.environ.get("PREFIXTREE_TRACE")
REQUESTS = 1000


class Indexer:
    """Over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps({"model_name": "m", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read() or "null")

    def matched(self, worker: int, tokens: list[int]) -> int:
        instances = self.post("/query", token_ids=tokens)["instances"]
        return int(instances.get(str(worker), {"longest_matched": 0})["longest_matched"])

    def register(self, worker: int, endpoints: tuple[str, str]) -> None:
        endpoint, replay = endpoints
        self.post(
            "/register",
            instance_id=worker,
            endpoint=endpoint,
            replay_endpoint=replay,
            block_size=BLOCK,
        )


@contextmanager
def indexer() -> Iterator[Indexer]:
    port = int(two_endpoints()[0].rsplit(":", 1)[1])
    with subprocess.Popen([sys.executable, "-m", "dynamo.indexer", "--port", str(port)]) as process:
        try:
            client = Indexer(port)
            end = time.monotonic() + SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    assert time.monotonic() < end
                    time.sleep(0.1)
            yield client
        finally:
            process.kill()


def write(cache: pt.PrefixCache, tokens: list[int]) -> None:
    sequence = cache.open(tokens)
    sequence.commit(len(tokens))
    sequence.close()


def prompts() -> list[list[int]]:
    if TRACE:
        requests = load_traces([Path(TRACE)])[:REQUESTS]
        return [request.tokens()[: request.input_length].tolist() for request in requests]
    draw = np.random.default_rng(1)
    made: list[list[int]] = [[]]
    for _ in range(300):
        earlier = made[draw.integers(max(0, len(made) - 20), len(made))]
        rest = draw.integers(0, 1000, draw.integers(1, 100)).tolist()
        made.append(earlier[: draw.integers(0, 150)] + rest)
    return made[1:]


@pytest.mark.parametrize("positional", [False, True])
def test_the_indexer_answers_as_the_cache_does(positional: bool) -> None:
    cache = pt.PrefixCache(20_000 if TRACE else 200, BLOCK)
    endpoints = two_endpoints()
    draw = random.Random(1)
    asked = hits = 0
    with (
        indexer() as client,
        ZmqPublisher(
            KVEvents(cache), *endpoints, positional=positional, buffer_batches=50
        ) as publisher,
    ):
        seen: list[list[int]] = []
        for number, prompt in enumerate(prompts()):
            write(cache, prompt)
            publisher.flush()
            seen.append(prompt)
            if number == 200:  # more batches ago than are kept
                client.register(1, endpoints)
            if number >= 200 and number % 20 == 0:
                # Something new, to see that all before it was taken in.
                end = time.monotonic() + SECONDS
                marker = [number] * (BLOCK + 1)
                while client.matched(1, marker) != BLOCK:
                    assert time.monotonic() < end
                    cache.forget(marker[:1])
                    publisher.flush()
                    write(cache, marker)
                    publisher.flush()
                    time.sleep(0.05)
                for tokens in draw.sample(seen[-100:], 10):
                    expected = cache.match(tokens).cached // BLOCK * BLOCK
                    assert client.matched(1, tokens) == expected
                    asked, hits = asked + 1, hits + (expected > 0)
        assert cache.stats().evicted_nodes > 0
        stats = publisher.stats()
        assert stats.replays >= 1
        assert hits > asked // 4
        cache.clear()
        publisher.flush()
        while client.matched(1, marker):
            assert time.monotonic() < end + SECONDS
    print(f"{asked} questions, {hits} with a hit, {cache.stats().evicted_nodes} evictions, {stats}")
