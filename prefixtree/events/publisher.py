"""Events sent over ZeroMQ, as vLLM sends them.

| socket | frames |
|---|---|
| PUB | topic, sequence number (8 bytes, big-endian, from 0 on), batch (msgpack) |
| ROUTER, asked | first sequence number wanted (8 bytes, big-endian), behind an empty frame |
| ROUTER, answers | empty, topic, sequence number, batch: one for each; last empty, -1 and empty |

Only the latest batches are kept for replay. Whoever asks for more than that is told everything
anew: the answer begins with a batch that starts with `AllBlocksCleared`, and all that follow it
rebuild what is cached. When no such batch is kept, one is made and sent to all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Self, SupportsIndex

import msgspec
import zmq

from allocator.errors import at_least
from prefixtree.errors import CannotPublish, EventsClosed
from prefixtree.events.messages import (
    AllBlocksCleared,
    Event,
    as_array,
    num_blocks,
)
from prefixtree.events.source import KVEvents
from prefixtree.journal import Changes

END = (-1).to_bytes(8, "big", signed=True)

BATCH_BLOCKS = 4096
"""Blocks that a batch tells of before the next one is begun."""

WAITING = 64
"""Calls of `publish` whose changes may wait to be sent; further changes stay in the cache."""

LINGER_MS = 1000
"""How long closing waits for consumers to be sent the rest."""


class PublisherStats(NamedTuple):
    """What a publisher did so far."""

    batches: int
    """Sent, and so the next sequence number."""
    blocks: int
    """That the events told of."""
    replays: int
    """Requests for replay that were answered."""
    resyncs: int
    """How often everything was told anew; the first time at the start."""
    postponed: int
    """Calls of `publish` that left the changes to a later one, since too much waited already."""


class Work(NamedTuple):
    """What the sending thread is to do."""

    ts: float
    changes: Changes | None
    """To be sent; None: everything is to be told anew."""


class ZmqPublisher:
    """Sends the events of a cache; a thread of its own does the hashing and the sending.

    A consumer that reads too slowly loses batches, sees it by the sequence numbers and asks for
    them. Nothing here ever waits for a consumer.
    """

    def __init__(
        self,
        events: KVEvents,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        positional: bool = False,
        data_parallel_rank: SupportsIndex = 0,
        buffer_batches: SupportsIndex = 1000,
        high_water_mark: SupportsIndex = 10_000,
    ) -> None:
        """Binds the endpoints, "tcp://127.0.0.1:5557", "tcp://*:5557" or "ipc:///run/kv-events".

        Events are maps, or, if `positional`, arrays as older consumers expect them.
        `buffer_batches` are kept for replay, some 5 bytes a token; `high_water_mark` is how many
        may wait for a slow consumer before it loses some. From now on `events` is the publisher's.

        Raises `CannotPublish` when an endpoint cannot be bound, a port in use for example, and
        `InvalidArgument` for a rank < 0, or a number of batches < 1.
        """
        self._events = events
        self._topic = topic.encode()
        self._positional = positional
        self._rank = at_least(0, "data_parallel_rank", data_parallel_rank)
        self._kept = at_least(1, "buffer_batches", buffer_batches)
        limit = at_least(1, "high_water_mark", high_water_mark)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer: deque[bytes] = deque(maxlen=self._kept)  # the latest batches
        self._fresh = 0  # the latest batch that begins with AllBlocksCleared
        self._batches = self._blocks = self._replays = self._resyncs = self._postponed = 0

        self._work: deque[Work | None] = deque()
        self._lock = threading.Lock()  # of those who call
        self._closed = False
        self._failure: Exception | None = None
        self._context = zmq.Context()
        self._context.linger = LINGER_MS
        try:
            self._pub = self._socket(zmq.PUB, limit, endpoint)
            # Twice the longest answer: ZeroMQ learns only by halves of it what was read.
            self._router = self._socket(zmq.ROUTER, 2 * self._kept + 4, replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._wake = self._context.socket(zmq.PAIR)
        self._woken = self._context.socket(zmq.PAIR)
        self._wake.sndhwm = self._woken.rcvhwm = 0
        self._wake.bind("inproc://work")
        self._woken.connect("inproc://work")
        self._thread = threading.Thread(target=self._run, daemon=True, name="kv-events")
        self._thread.start()

    def publish(self) -> None:
        """Hands what changed since the last call to the sending thread.

        To be called as the cache is: once a step, or by a timer. Costs nothing where nothing
        changed. When the thread is far behind, the changes stay in the cache until a later call:
        nothing is lost. Raises `EventsClosed`, `CannotPublish` when the thread has failed, and what
        a broken cache does.
        """
        with self._lock:
            self._require_running()
            if len(self._work) >= WAITING:
                self._postponed += 1
            elif (changes := self._events.collect()) is not None:
                self._give(Work(time.time(), changes))

    def resync(self) -> None:
        """Has everything told anew to all: `AllBlocksCleared`, and then what is stored.

        Does not touch the cache, so any thread may call it. Raises `EventsClosed`, `CannotPublish`.
        """
        with self._lock:
            self._require_running()
            self._give(Work(time.time(), None))

    def stats(self) -> PublisherStats:
        """The numbers of now. Any thread may call it, also after `close`."""
        return PublisherStats(
            self._batches, self._blocks, self._replays, self._resyncs, self._postponed
        )

    def close(self) -> None:
        """Sends what was handed over, then unbinds. The cache notes no changes any more.

        More than once does no harm.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._give(None)
        self._thread.join()
        self._wake.close()
        self._context.term()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _socket(self, kind: int, limit: int, endpoint: str | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.sndhwm = limit
        if endpoint is not None:
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise CannotPublish(f"cannot bind {endpoint!r}: {error}") from error
        return socket

    def _require_running(self) -> None:
        if self._closed:
            raise EventsClosed("the publisher is closed")
        if self._failure is not None:
            error = self._failure
            raise CannotPublish(f"sending failed: {type(error).__name__}: {error}") from error

    def _give(self, work: Work | None) -> None:
        self._work.append(work)
        with suppress(zmq.Again):  # the thread has failed
            self._wake.send(b"", zmq.NOBLOCK)

    # What the thread does.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        try:
            self._tell_everything(time.time())
            while True:
                ready = dict(poller.poll())
                if self._router in ready:
                    self._answer(self._router.recv_multipart())
                if self._woken in ready:
                    self._woken.recv()
                    work = self._work.popleft()
                    if work is None:
                        break
                    if work.changes is None:
                        self._tell_everything(work.ts)
                    else:
                        self._send(work.ts, self._events.apply(work.changes), BATCH_BLOCKS)
        except Exception as error:
            self._failure = error
        finally:
            for socket in (self._pub, self._router, self._woken):
                socket.close()

    def _tell_everything(self, ts: float) -> None:
        self._resyncs += 1
        # So few batches that all of them are kept.
        limit = max(BATCH_BLOCKS, 2 * self._events.stored_blocks // self._kept + 1)
        self._send(ts, self._events.everything(), limit)

    def _send(self, ts: float, events: Iterable[Event], limit: int) -> None:
        for batch in _batches(events, limit):
            told = [as_array(event) for event in batch] if self._positional else batch
            if isinstance(batch[0], AllBlocksCleared):
                self._fresh = self._batches
            payload = self._encoder.encode((ts, told, self._rank))
            number = self._batches.to_bytes(8, "big")
            self._pub.send_multipart((self._topic, number, payload))
            self._buffer.append(payload)
            self._batches += 1
            self._blocks += sum(map(num_blocks, batch))

    def _answer(self, request: list[bytes]) -> None:
        if len(request) != 3 or len(request[2]) != 8:
            return  # nobody who speaks this protocol
        client, _, wanted = request
        self._replays += 1
        first = int.from_bytes(wanted, "big")
        if first < self._oldest:
            if self._fresh < self._oldest:
                self._tell_everything(time.time())
            first = self._fresh
        for number, payload in enumerate(self._buffer, self._oldest):
            if number >= first:
                frames = (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                self._router.send_multipart(frames)
        self._router.send_multipart((client, b"", b"", END, b""))

    @property
    def _oldest(self) -> int:
        """Number of the first batch that is kept."""
        return self._batches - len(self._buffer)


def _batches(events: Iterable[Event], limit: int) -> Iterator[list[Event]]:
    """The events in lists, each of which ends when it tells of `limit` blocks or more."""
    batch: list[Event] = []
    blocks = 0
    for event in events:
        batch.append(event)
        blocks += num_blocks(event)
        if blocks >= limit:
            yield batch
            batch, blocks = [], 0
    if batch:
        yield batch
