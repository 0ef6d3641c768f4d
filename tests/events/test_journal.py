"""What a tree's journal makes of its notes, and hashes that others can compute."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree import journal, ragged
from prefixtree.errors import CacheBroken, EventsClosed
from prefixtree.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvents

from .mirror import Mirror, decoded, whole_blocks


def write(cache: pt.PrefixCache, tokens: list[int], namespace: pt.Namespace = "") -> None:
    sequence = cache.open(tokens, namespace=namespace)
    sequence.commit(len(tokens))
    sequence.close()


def test_a_block_used_again_in_between_is_removed_once() -> None:
    cache = pt.PrefixCache(2, 4)
    write(cache, [1, 2, 3, 4])
    events = KVEvents(cache)
    stored = events.take()[0]
    assert isinstance(stored, BlockStored)
    write(cache, [9, 9, 9, 9])
    for token in range(10, 20):  # each takes the blocks of those before it
        write(cache, [token] * 8)
    write(cache, [1, 2, 3, 4])
    gone, *came = events.take()
    assert gone == AllBlocksCleared()
    assert stored in came
    assert events.stored_blocks == sum(whole_blocks(cache).values())


def test_what_came_and_went_in_between_is_not_told() -> None:
    cache = pt.PrefixCache(20, 4)
    events = KVEvents(cache)
    write(cache, [1] * 12)
    cache.clear()
    assert events.take() == []
    write(cache, [1] * 3)  # no whole block
    assert events.take() == []


def test_a_duplicate_is_not_removed_while_another_copy_is_there() -> None:
    cache = pt.PrefixCache(20, 4)
    events = KVEvents(cache)
    first, second = cache.open([1] * 8), cache.open([1] * 8)
    first.commit(8)
    assert second.commit(8)  # found to be the same
    assert len(events.take()) == 1
    first.close()
    assert events.take() == []
    second.close()
    assert events.take() == []
    cache.clear()
    assert events.take() == [AllBlocksCleared()]


def test_notes_are_condensed_and_outlast_what_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "NOTES", 1)
    monkeypatch.setattr(ragged, "LEAST", 8)  # lists move all the time
    cache = pt.PrefixCache(30, 4)
    events = KVEvents(cache)
    mirror = Mirror(4)
    draw = random.Random(1)
    running: list[pt.Sequence] = []
    for _ in range(600):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
        if running and not cache.can_open(tokens, watermark=2):
            running.pop(0).close()
        elif len(running) < 3:
            running.append(cache.open(tokens))
            running[-1].commit(len(tokens))
        else:
            cache.append(running, [draw.randrange(2) for _ in running])
            cache.commit(running)
            running.pop(draw.randrange(len(running))).close()
        journal_ = cache._tree.journal
        assert journal_ is not None
        assert sum(map(len, journal_._cut)) <= 30
        assert len(journal_._grown) <= 32
        assert len(journal_._batches) <= 32
        if draw.random() < 0.05:
            for event in decoded(events.take()):
                mirror.apply(event)
            assert mirror.keys == whole_blocks(cache)
    assert cache.stats().evicted_nodes > 20


def test_what_is_cut_may_end_with_blocks_that_were_never_told() -> None:
    cache = pt.PrefixCache(8, 4)
    events, mirror = KVEvents(cache), Mirror(4)
    with cache.open([1] * 4) as sequence:
        sequence.commit(4)
        told = events.take()
        cache.append([sequence], [1] * 8, [8])
        sequence.commit(12)
    cache.clear()
    write(cache, [2] * 4)  # where the first block was
    for event in decoded([*told, *events.take()]):
        mirror.apply(event)
    assert mirror.keys == whole_blocks(cache)
    assert len(mirror.keys) == 1


def test_what_was_taken_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "LEAST", 8)
    cache = pt.PrefixCache(64, 4)
    KVEvents(cache)
    assert cache._tree.journal is not None
    sequence = cache.open([1, 2, 3, 4, 5, 6])
    sequence.commit(6)
    (fork,) = sequence.fork(1)
    cache.append([fork], [7, 8], [2])  # a block of both nodes' tokens
    fork.commit(8)
    tokens = cache._tree.journal.take().tokens
    before = [piece.tolist() for piece in tokens]
    assert np.concatenate(tokens).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    sequence.close()
    fork.close()
    cache.clear()
    for first in range(10, 90, 20):
        write(cache, [*range(first, first + 20)])
    assert [piece.tolist() for piece in tokens] == before


def test_a_restored_cache_is_told_whole(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache = pt.PrefixCache(60, 4)
    for start in range(6):
        write(cache, [*range(start), *range(100, 110)], "a" if start % 2 else "")
    path = tmp_path / "snapshot"
    cache.save(path)
    again = pt.PrefixCache.restore(path)
    mirror = Mirror(4)
    for event in decoded(KVEvents(again).take()):
        mirror.apply(event)
    assert mirror.keys == whole_blocks(again) == whole_blocks(cache)


@pytest.mark.parametrize("namespace", ["", "a", ("a",), ("a", 1, None)])
def test_hashes_can_be_computed_by_others(namespace: pt.Namespace) -> None:
    name = {"": '""', "a": '"a"', ("a",): '["a"]', ("a", 1, None): '["a",1,null]'}[namespace]
    blocks = [np.array(block, "<i4").tobytes() for block in ([1, 2], [3, 4], [5, 6])]

    def take(**options: object) -> list[object]:
        cache = pt.PrefixCache(8, 2)
        events = KVEvents(cache, **options)  # type: ignore[arg-type]
        write(cache, [1, 2, 3, 4, 5, 6, 7], namespace)
        (event,) = events.take()
        assert isinstance(event, BlockStored)
        return list(event.block_hashes)

    digest = xxhash.xxh3_128_digest((7).to_bytes(8, "little") + name.encode(), seed=7)
    digests = [digest := xxhash.xxh3_128_digest(digest + block, seed=7) for block in blocks]
    assert take(seed=7, block_hashes="bytes") == digests
    assert take(seed=7) == [int.from_bytes(each[-8:], "big") for each in digests]

    digest = hashlib.sha256(bytes(8) + name.encode()).digest()
    digests = [digest := hashlib.sha256(digest + block).digest() for block in blocks]
    assert take(hash="sha256", block_hashes="bytes") == digests


def test_what_consumers_are_told_of_namespaces() -> None:
    cache = pt.PrefixCache(8, 2)
    events = KVEvents(
        cache, medium="CPU", lora_name=lambda name: name[1] if isinstance(name, tuple) else None
    )
    write(cache, [1, 2, 3, 4], ("model", "adapter", None))
    (event,) = events.take()
    assert isinstance(event, BlockStored)
    assert event.lora_name == "adapter"
    assert event.extra_keys == [("model", "adapter", None)] * 2
    assert event.medium == "CPU"
    write(cache, [1, 2], "b")
    (event,) = events.take()
    assert isinstance(event, BlockStored)
    assert event.lora_name is None
    assert event.extra_keys == [("b",)]
    cache.forget(namespace="b")
    (gone,) = events.take()
    assert gone == BlockRemoved(event.block_hashes, "CPU")
    write(cache, [1, 2])  # in the block that was the other one's
    (event,) = events.take()
    assert isinstance(event, BlockStored)
    assert event.extra_keys is None


def test_what_is_refused() -> None:
    cache = pt.PrefixCache(8, 2)
    for options in ({"hash": "md5"}, {"seed": -1}, {"seed": 2**64}, {"block_hashes": "hex"}):
        with pytest.raises(InvalidArgument):
            KVEvents(cache, **options)  # type: ignore[arg-type]
    with KVEvents(cache) as events:
        with pytest.raises(InvalidArgument, match="has KV events already"):
            KVEvents(cache)
        write(cache, [1, 2])
        assert len(events.take()) == 1
    with pytest.raises(EventsClosed):
        events.take()
    with KVEvents(cache) as later:
        events.close()  # the other one's are not meant
        assert len(later.take()) == 1
        cache._broken = "a test"
        with pytest.raises(CacheBroken):
            later.take()
