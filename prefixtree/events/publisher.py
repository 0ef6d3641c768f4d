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

import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple, Self, SupportsFloat, SupportsIndex

import zmq

from allocator.errors import InvalidArgument, at_least
from prefixtree.errors import CannotPublish, EventsClosed
from prefixtree.events.lane import Lane
from prefixtree.events.progress import Progress, create
from prefixtree.events.sender import Setup, Work
from prefixtree.events.source import KVEvents

BATCH_BLOCKS = 4096
"""Blocks that a batch tells of before the next one is begun."""

WAITING = 64
"""Works that may wait to be sent; further changes stay in the cache."""

CLOSE_SECONDS = 60.0
"""How long closing waits for the sending process, before it is killed."""

_SENDER = "from prefixtree.events.sender import main; main()"


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
    """How often changes were left to a later call, since too much waited already."""
    waiting: int
    """Changes handed over, and resyncs asked for, that are not sent yet."""


class ZmqPublisher:
    """Sends the events of a cache; a process of its own does the hashing and the sending.

    So the cache's process spends on it little more than a copy of what changed, into memory that
    both have: 16 MiB, more while much at once is new. The other process keeps about 100 bytes for
    each cached block of 16 tokens; it ends with `close`, and when the process that started it ends,
    however that happens.

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
        interval: SupportsFloat = 0.05,
        positional: bool = False,
        data_parallel_rank: SupportsIndex = 0,
        buffer_batches: SupportsIndex = 1000,
        high_water_mark: SupportsIndex = 10_000,
    ) -> None:
        """Binds the endpoints, "tcp://127.0.0.1:5557", "tcp://*:5557" or "ipc:///run/kv-events".

        `publish` hands changes over at most once in `interval` seconds. Events are maps, or, if
        `positional`, arrays as older consumers expect them. `buffer_batches` are kept for replay,
        some 5 bytes a token; `high_water_mark` is how many may wait for a slow consumer before it
        loses some. From now on `events` is the publisher's.

        Raises `CannotPublish` when an endpoint cannot be bound, a port in use for example, or the
        process cannot be started, and `InvalidArgument` for an interval or a rank < 0, or a number
        of batches < 1.
        """
        self._interval = float(interval)
        if not self._interval >= 0:
            raise InvalidArgument(f"interval is {interval}, expected a number of seconds >= 0")
        setup = Setup(
            events.ledger,
            endpoint,
            replay_endpoint,
            topic=topic.encode(),
            positional=positional,
            rank=at_least(0, "data_parallel_rank", data_parallel_rank),
            kept=at_least(1, "buffer_batches", buffer_batches),
            high_water_mark=at_least(1, "high_water_mark", high_water_mark),
            batch_blocks=BATCH_BLOCKS,
        )
        self._events = events
        self._lock = threading.Lock()  # of those who call
        self._closed = False
        self._given = self._postponed = 0
        self._next = 0.0
        self._progress: Progress
        self._lane: Lane
        self._context = zmq.Context()
        self._work: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._work.sndhwm = 0  # `WAITING` is the limit
        self._work.reconnect_ivl = 5  # ms: tried until the process is there
        try:
            self._lane = Lane()
        except OSError as error:
            raise CannotPublish(f"cannot start the sending process: {error}") from error
        try:
            self._process = self._start(setup)
        except BaseException:
            self._lane.close()
            self._context.destroy(linger=0)
            raise

    def publish(self) -> None:
        """Hands what changed since the last time to the sending process, once in `interval`.

        To be called as the cache is: once a step, or by a timer. Costs next to nothing before the
        interval is over; what changed then is told by the next call after it, so before a pause in
        which nobody calls, `flush`. When the process is far behind, the changes stay in the cache
        until a later call: nothing is lost. Raises `EventsClosed`, `CannotPublish` when the process
        has failed or ended, what `lora_name` does and what a broken cache does.
        """
        now = time.monotonic()
        if now >= self._next:
            with self._lock:
                self._require_open()
                self._hand_over()
                self._next = now + self._interval

    def flush(self) -> None:
        """As `publish`, whenever the last time was. Does not wait until it is sent."""
        with self._lock:
            self._require_open()
            self._hand_over()

    def resync(self) -> None:
        """Has everything told anew to all: `AllBlocksCleared`, and then what is stored.

        Does not touch the cache, so any thread may call it. Raises `EventsClosed`, `CannotPublish`.
        """
        with self._lock:
            self._require_open()
            self._require_running()
            self._give(Work(time.time()))

    def stats(self) -> PublisherStats:
        """The numbers of now. Any thread may call it, also after `close`."""
        now = self._progress
        return PublisherStats(
            waiting=self._given - now.done,  # before the others, which then tell of what is done
            batches=now.batches,
            blocks=now.blocks,
            replays=now.replays,
            resyncs=now.resyncs,
            postponed=self._postponed,
        )

    def close(self) -> None:
        """Sends what was handed over, then unbinds. The cache notes no changes any more.

        More than once does no harm.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._next = 0.0  # so that `publish` looks
            self._work.send_pyobj(None)
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._end()
            self._lane.close()
            self._context.destroy(linger=0)
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, setup: Setup) -> subprocess.Popen[bytes]:
        """The process, with its sockets bound."""
        # Nobody else may read the directory. Once the process is ready it is needed no more, so
        # nothing stays behind, however this one ends.
        with tempfile.TemporaryDirectory(prefix="kv-events-") as private:
            address, progress = f"ipc://{private}/work", f"{private}/progress"
            try:
                self._progress = create(progress)
                self._work.connect(address)  # so that to send never waits, bound there or not
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _SENDER, address, progress, str(self._lane.file)],
                    pass_fds=[self._lane.file],
                    stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # Ctrl-C is for this one
                )
            except (OSError, zmq.ZMQError) as error:
                raise CannotPublish(f"cannot start the sending process: {error}") from error
            try:
                self._work.send_pyobj(setup)
                while not self._progress.ready:
                    self._require_running()
                    time.sleep(0.005)
            except BaseException:
                self._process.kill()
                self._end()
                raise
        return self._process

    def _end(self) -> None:
        """Waits for the process, which ends by itself."""
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EventsClosed("the publisher is closed")

    def _require_running(self) -> None:
        ended = self._process.poll() is not None
        if failure := self._progress.failure:
            raise CannotPublish(failure.decode(errors="replace"))
        if ended:
            code = self._process.returncode
            raise CannotPublish(f"the sending process has ended, exit code {code}")

    def _hand_over(self) -> None:
        self._require_running()
        waiting = self._given - self._progress.done
        if not waiting:
            self._lane.rewind()
        if waiting >= WAITING or self._lane.is_full:
            self._postponed += 1
        elif (told := self._events.collect()) is not None:
            self._give(Work.of(time.time(), told, self._lane))

    def _give(self, work: Work) -> None:
        self._work.send_pyobj(work)
        self._given += 1
