"""What goes over the sockets: frames, replay, losses, and what is refused."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree.errors import CannotPublish, EventsClosed
from prefixtree.events import EventBatch, KVEvents, ZmqPublisher
from prefixtree.events import publisher as publisher_module

from .consumer import Consumer, contents, join, numbers, settle
from .follow import two_endpoints
from .mirror import whole_blocks


@pytest.fixture
def endpoints() -> tuple[str, str]:
    return two_endpoints()


def write(cache: pt.PrefixCache, tokens: list[int], **options: str) -> None:
    sequence = cache.open(tokens, **options)
    sequence.commit(len(tokens))
    sequence.close()


def churn(cache: pt.PrefixCache, publisher: ZmqPublisher, steps: int, seed: int) -> None:
    """Prompts that share beginnings, in a cache too small for all."""
    draw = random.Random(seed)
    for _ in range(steps):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
        write(cache, tokens, namespace=draw.choice(["", "a"]))
        if draw.random() < 0.02:
            cache.clear()
        publisher.flush()


def test_a_consumer_follows(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(60, 4)
    write(cache, list(range(10)))  # before anybody listens
    with (
        ZmqPublisher(KVEvents(cache), *endpoints) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        join(publisher, consumer)
        for seed in range(10):
            churn(cache, publisher, 30, seed)
            consumer.follow(publisher)
            assert consumer.mirror.keys == whole_blocks(cache)
        assert cache.stats().evicted_nodes > 0
    write(cache, [1, 2, 3])  # nobody notes it any more
    cache.check()


def test_the_frames(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(8, 2)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints, topic="kv", data_parallel_rank=0) as publisher,
        Consumer(*endpoints, block_size=2) as consumer,
    ):
        write(cache, [1, 2, 3, 4, 5])
        publisher.flush()
        publisher.flush()  # nothing new: no batch
        settle(publisher, consumer)
        answers = consumer.ask(0)
        assert [answer[0] for answer in answers] == [b"kv", b"kv"]
        assert numbers(answers) == [0, 1]
        (_, cleared, _), (ts, stored, rank) = contents(answers)
        assert cleared == [{"type": "AllBlocksCleared"}]
        assert ts > 1.6e9
        assert rank == 0
        hashes = stored[0]["block_hashes"]
        assert all(0 <= name < 2**64 for name in hashes)
        assert stored == [
            {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": None,
                "token_ids": [1, 2, 3, 4],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            }
        ]
        decoder = msgspec.msgpack.Decoder(EventBatch)
        assert decoder.decode(answers[1][2]).events[0].token_ids == [1, 2, 3, 4]

        write(cache, [1, 2, 9, 9, 9, 9], namespace="tenant")
        write(cache, [1, 2, 3, 7])
        publisher.flush()
        cache.forget([1, 2, 3, 4])
        cache.forget([1, 2])
        publisher.flush()
        cache.clear()
        publisher.flush()
        settle(publisher, consumer)
        told, gone, nothing = [events for _, events, _ in contents(consumer.ask(2))]
        assert [(event["token_ids"], event["parent_block_hash"]) for event in told] == [
            ([1, 2, 9, 9, 9, 9], None),
            ([3, 7], hashes[0]),
        ]
        assert told[0]["extra_keys"] == [["tenant"]] * 3
        assert gone[0]["type"] == "BlockRemoved"
        assert set(gone[0]["block_hashes"]) == {hashes[1], told[1]["block_hashes"][0]}
        assert nothing == [{"type": "AllBlocksCleared"}]


def test_positional_events(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints, positional=True) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        write(cache, [1, 2, 3, 4])
        publisher.flush()
        settle(publisher, consumer)
        event = contents(consumer.ask(1))[0][1][0]
        assert event == ["BlockStored", event[1], None, [1, 2, 3, 4], 4, None, "GPU", None]
        join(publisher, consumer)
        churn(cache, publisher, 100, seed=1)
        consumer.follow(publisher)
        assert consumer.mirror.keys == whole_blocks(cache)


def test_who_joins_late_is_told_everything(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(60, 4)
    with ZmqPublisher(KVEvents(cache), *endpoints, buffer_batches=10) as publisher:
        churn(cache, publisher, 200, seed=1)
        assert publisher.stats().postponed < 200
        with Consumer(*endpoints, block_size=4) as consumer:
            settle(publisher, consumer)  # else the last changes may wait in the cache
            publisher.flush()
            settle(publisher, consumer)
            resyncs = publisher.stats().resyncs
            consumer.catch_up(0)
            assert consumer.mirror.keys == whole_blocks(cache)
            assert len(consumer.mirror.keys) > 10
        with Consumer(*endpoints, block_size=4) as another:
            another.catch_up(0)
            assert another.mirror.keys == whole_blocks(cache)
        # The second one needed none of its own.
        assert publisher.stats().resyncs <= resyncs + 1
        assert publisher.stats().replays >= 3


@pytest.mark.parametrize("buffer", [1, 3, 1000])
def test_a_slow_consumer_loses_some_and_agrees_again(
    endpoints: tuple[str, str], buffer: int
) -> None:
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(
            KVEvents(cache), *endpoints, buffer_batches=buffer, high_water_mark=1
        ) as publisher,
        Consumer(*endpoints, block_size=4, limit=1) as consumer,
    ):
        join(publisher, consumer)
        consumer.follow(publisher)
        consumer.asked.clear()
        for seed in range(3):
            for part in range(20):  # without reading
                churn(cache, publisher, 20, seed=1000 * seed + part)
            consumer.follow(publisher)
            assert consumer.mirror.keys == whole_blocks(cache)
        assert consumer.asked, "nothing was lost"
        assert publisher.stats().replays > len(consumer.asked)


def test_one_that_never_reads_does_not_matter(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints, high_water_mark=1) as publisher,
        Consumer(*endpoints, block_size=4, limit=1) as stuck,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        join(publisher, stuck)
        join(publisher, consumer)
        stuck.dealer.send_multipart([b"", bytes(8)])
        churn(cache, publisher, 1000, seed=3)
        consumer.follow(publisher)
        assert consumer.mirror.keys == whole_blocks(cache)


def test_a_resync_on_request(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        churn(cache, publisher, 100, seed=1)
        settle(publisher, consumer)  # else the last changes may wait in the cache
        publisher.flush()
        settle(publisher, consumer)
        before = publisher.stats().batches
        publisher.resync()
        settle(publisher, consumer)
        consumer.expected = before  # as if it had lost count
        consumer.catch_up(before)
        assert consumer.mirror.keys == whole_blocks(cache)
        assert publisher.stats().resyncs == 2


def test_a_resync_is_kept_whole(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "BATCH_BLOCKS", 1)
    cache = pt.PrefixCache(200, 1)
    for start in range(20):
        write(cache, [start, *range(100, 105)])
    with (
        ZmqPublisher(KVEvents(cache), *endpoints, buffer_batches=5) as publisher,
        Consumer(*endpoints, block_size=1) as consumer,
    ):
        publisher.flush()
        settle(publisher, consumer)
        assert publisher.stats().batches > 5
        assert publisher.stats().blocks == 120
        consumer.catch_up(0)
        assert consumer.mirror.keys == whole_blocks(cache)


def test_requests_that_nobody_understands_are_not_answered(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(8, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        for request in ([b""], [b"", b"1"], [bytes(8)], [b"", bytes(9)], [b"", bytes(8), b""]):
            consumer.dealer.send_multipart(request)
        assert numbers(consumer.ask(0)) == [0]
        assert publisher.stats().replays == 1


def test_more_changes_than_the_process_can_send_wait_in_the_cache(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        monkeypatch.setattr(publisher_module, "WAITING", 0)
        churn(cache, publisher, 300, seed=5)
        assert publisher.stats().postponed == 300
        assert publisher.stats().batches <= 1
        monkeypatch.undo()
        publisher.flush()
        settle(publisher, consumer)
        consumer.catch_up(0)
        assert consumer.mirror.keys == whole_blocks(cache)


def test_an_address_that_cannot_be_had(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(8, 4)
    events = KVEvents(cache)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for wrong in ([used], [endpoints[0], used], ["nowhere"], ["tcp://256.0.0.1:5"]):
            with pytest.raises(CannotPublish, match="cannot bind"):
                ZmqPublisher(events, *wrong)
    for options in (
        {"buffer_batches": 0},
        {"high_water_mark": 0},
        {"interval": -1},
        {"data_parallel_rank": -1},
    ):
        with pytest.raises(InvalidArgument):
            ZmqPublisher(events, *endpoints, **options)
    write(cache, [1, 2, 3, 4])
    with ZmqPublisher(events, *endpoints) as publisher, Consumer(*endpoints, 4) as consumer:
        publisher.flush()
        settle(publisher, consumer)
        consumer.catch_up(0)
        assert consumer.mirror.keys == whole_blocks(cache)


def test_changes_wait_for_the_interval_and_no_longer(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(publisher_module.time, "monotonic", lambda: now)
    cache = pt.PrefixCache(60, 4)
    with ZmqPublisher(KVEvents(cache), *endpoints, interval=0.5) as publisher:
        assert told_by(publisher) == 0
        for moment, told in ((100.0, 1), (100.4, 1), (100.5, 3), (100.9, 3), (101.0, 5)):
            now = moment
            write(cache, [int(10 * moment)] * 4)
            publisher.publish()
            assert told_by(publisher) == told
        write(cache, [1, 2, 3, 4])
        publisher.publish()
        assert told_by(publisher) == 5
        publisher.flush()
        assert told_by(publisher) == 6


def told_by(publisher: ZmqPublisher) -> int:
    """Blocks that were told when all that was handed over has been sent."""
    while publisher.stats().waiting:
        time.sleep(0.001)
    return publisher.stats().blocks


def test_a_process_that_fails_says_so(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = pt.PrefixCache(8, 4)
    events = KVEvents(cache)
    with ZmqPublisher(events, *endpoints) as publisher:
        write(cache, [1, 2, 3, 4])
        told = events.collect()
        assert told is not None
        broken = told._replace(changes=told.changes._replace(tokens=[told.changes.tokens[0][:3]]))
        monkeypatch.setattr(events, "collect", lambda: broken)
        publisher.flush()
        publisher._process.wait()
        for call in (publisher.flush, publisher.publish, publisher.resync):
            with pytest.raises(CannotPublish, match="sending failed: ValueError: cannot reshape"):
                call()
    cache.check()


def test_a_process_that_is_killed_is_missed(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(8, 4)
    with ZmqPublisher(KVEvents(cache), *endpoints) as publisher:
        publisher._process.kill()
        publisher._process.wait()
        for call in (publisher.flush, publisher.publish, publisher.resync):
            with pytest.raises(CannotPublish, match="has ended, exit code -9"):
                call()
        write(cache, [1, 2, 3, 4])
    cache.check()
    with ZmqPublisher(KVEvents(cache), *endpoints) as again:  # both can be had again
        again.flush()
        assert told_by(again) == 1


def test_a_process_that_hangs_is_killed_by_close(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "CLOSE_SECONDS", 0.1)
    publisher = ZmqPublisher(KVEvents(pt.PrefixCache(8, 4)), *endpoints)
    publisher._process.send_signal(signal.SIGSTOP)
    publisher.close()
    assert publisher._process.returncode == -signal.SIGKILL


LEFT = """
import os, signal, sys
import prefixtree as pt
from prefixtree.events import KVEvents, ZmqPublisher
publisher = ZmqPublisher(KVEvents(pt.PrefixCache(8, 4)), sys.argv[1])
print(publisher._process.pid, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", ""])
def test_the_process_ends_when_its_parent_does(endpoints: tuple[str, str], end: str) -> None:
    # Returns when nobody has its output open any more: not before the child has ended.
    parent = subprocess.run(
        [sys.executable, "-c", LEFT.format(end=end), endpoints[0]],
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert int(parent.stdout) > 0


def test_a_process_that_cannot_be_started(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = KVEvents(pt.PrefixCache(8, 4))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(CannotPublish, match=r"cannot start the sending process.*/no/such"):
            ZmqPublisher(events, *endpoints)
    with monkeypatch.context() as patch:
        patch.setattr(publisher_module, "_SENDER", "import sys; sys.exit(3)")
        with pytest.raises(CannotPublish, match="has ended, exit code 3"):
            ZmqPublisher(events, *endpoints)


def test_closing(endpoints: tuple[str, str]) -> None:
    cache = pt.PrefixCache(8, 4)
    publisher = ZmqPublisher(KVEvents(cache), *endpoints)
    write(cache, [1, 2, 3, 4])
    publisher.flush()
    publisher.close()
    publisher.close()
    assert publisher.stats().batches == 2
    for call in (publisher.publish, publisher.flush, publisher.resync):
        with pytest.raises(EventsClosed):
            call()
    with ZmqPublisher(KVEvents(cache), *endpoints):  # both can be had again
        pass


def test_vllm_reads_the_bytes_and_would_have_written_them(endpoints: tuple[str, str]) -> None:
    theirs = pytest.importorskip("vllm.distributed.kv_events")
    cache = pt.PrefixCache(60, 4)
    with (
        ZmqPublisher(KVEvents(cache), *endpoints) as publisher,
        Consumer(*endpoints, block_size=4) as consumer,
    ):
        churn(cache, publisher, 300, seed=7)
        publisher.flush()
        settle(publisher, consumer)
        payloads = [answer[2] for answer in consumer.ask(0)]
    decoder = msgspec.msgpack.Decoder(theirs.KVEventBatch)
    kinds = set()
    for payload in payloads:
        batch = decoder.decode(payload)
        kinds |= {type(event).__name__ for event in batch.events}
        assert msgspec.msgpack.encode(batch) == payload
    assert kinds == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
