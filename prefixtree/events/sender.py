"""The process that hashes and sends a publisher's events, so that the cache's process need not.

It is told by messages what changed, keeps what was told in a ledger of its own, and notes how far
it is. It ends when it is told to, and when the process that started it has ended.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import msgspec
import zmq

from prefixtree.columns import NOTHING
from prefixtree.errors import CannotPublish
from prefixtree.events.lane import Lane, LaneReader, Place
from prefixtree.events.ledger import Ledger, Told
from prefixtree.events.messages import AllBlocksCleared, Event, as_array, num_blocks
from prefixtree.events.progress import Progress, attach

END = (-1).to_bytes(8, "big", signed=True)

LINGER_MS = 1000
"""How long the end waits for consumers to be sent the rest."""


WORDS = 4000
"""Bytes of a failure that are told."""


class Setup(NamedTuple):
    """The first message."""

    ledger: Ledger
    endpoint: str
    replay_endpoint: str | None
    topic: bytes
    positional: bool
    rank: int
    kept: int
    """Batches kept for replay."""
    high_water_mark: int
    batch_blocks: int
    """Blocks that a batch tells of before the next one is begun."""


class Work(NamedTuple):
    """What is to be sent; None in its place ends the process."""

    ts: float
    told: Told | None = None
    """None: everything is to be told anew."""
    places: tuple[Place, ...] = ()
    """Where in the lane the changes' `removed`, `stored` and `tokens` lie, which are left out."""

    @classmethod
    def of(cls, ts: float, told: Told, lane: Lane) -> Self:
        """Puts the large arrays into the lane."""
        changes = told.changes
        places = tuple(map(lane.put, ([changes.removed], [changes.stored], changes.tokens)))
        rest = changes._replace(removed=NOTHING, stored=NOTHING, tokens=[])
        return cls(ts, told._replace(changes=rest), places)

    def whole(self, lane: LaneReader) -> Told | None:
        """What is told, as long as the lane is not rewound."""
        if self.told is None:
            return None
        removed, stored, tokens = map(lane.get, self.places)
        changes = self.told.changes._replace(removed=removed, stored=stored, tokens=[tokens])
        return self.told._replace(changes=changes)


class Sender:
    """The sockets that consumers connect to, and what was sent through them."""

    def __init__(self, setup: Setup, progress: Progress, lane: LaneReader) -> None:
        """Raises `CannotPublish` that names an endpoint which cannot be bound."""
        self._setup = setup
        self._lane = lane
        self._ledger = setup.ledger
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer: deque[bytes] = deque(maxlen=setup.kept)  # the latest batches
        self._fresh = 0  # the latest batch that begins with AllBlocksCleared
        self._progress = progress
        self._context = zmq.Context()
        self._context.linger = LINGER_MS
        self._pub = self._socket(zmq.PUB, setup.high_water_mark, setup.endpoint)
        # Twice the longest answer: ZeroMQ learns only by halves of it what was read.
        self.router = self._socket(zmq.ROUTER, 2 * setup.kept + 4, setup.replay_endpoint)

    def do(self, work: Work) -> None:
        """Sends what the work tells of."""
        told = work.whole(self._lane)
        if told is None:
            self.tell_everything(work.ts)
        else:
            self._send(work.ts, self._ledger.apply(told), self._setup.batch_blocks)
        self._progress.done += 1

    def tell_everything(self, ts: float) -> None:
        """Sends all that was told so far."""
        self._progress.resyncs += 1
        # So few batches that all of them are kept.
        limit = max(self._setup.batch_blocks, 2 * len(self._ledger) // self._setup.kept + 1)
        self._send(ts, self._ledger.everything(), limit)

    def answer(self, now: float) -> None:
        """Sends who asks for a replay what it wants."""
        request = self.router.recv_multipart()
        if len(request) != 3 or len(request[2]) != 8:
            return  # nobody who speaks this protocol
        client, _, wanted = request
        self._progress.replays += 1
        first = int.from_bytes(wanted, "big")
        if first < self._oldest:
            if self._fresh < self._oldest:
                self.tell_everything(now)
            first = self._fresh
        for number, payload in enumerate(self._buffer, self._oldest):
            if number >= first:
                frames = (client, b"", self._setup.topic, number.to_bytes(8, "big"), payload)
                self.router.send_multipart(frames)
        self.router.send_multipart((client, b"", b"", END, b""))

    def close(self) -> None:
        """Waits `LINGER_MS` for what consumers have not been sent yet."""
        self._pub.close()
        self.router.close()
        self._context.term()

    def _socket(self, kind: int, limit: int, endpoint: str | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.sndhwm = limit
        if endpoint is not None:
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise CannotPublish(f"cannot bind {endpoint!r}: {error}") from error
        return socket

    def _send(self, ts: float, events: Iterable[Event], limit: int) -> None:
        for batch in _batches(events, limit):
            told = [as_array(event) for event in batch] if self._setup.positional else batch
            if isinstance(batch[0], AllBlocksCleared):
                self._fresh = self._progress.batches
            payload = self._encoder.encode((ts, told, self._setup.rank))
            number = self._progress.batches.to_bytes(8, "big")
            self._pub.send_multipart((self._setup.topic, number, payload))
            self._buffer.append(payload)
            self._progress.batches += 1
            self._progress.blocks += sum(map(num_blocks, batch))

    @property
    def _oldest(self) -> int:
        """Number of the first batch that is kept."""
        return self._progress.batches - len(self._buffer)


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


def main() -> None:
    """With three arguments: the address that work is sent to, the file of the `Progress`, and the
    number of the lane's.

    Standard input ends when the process that started this one does.
    """
    address, path, file = sys.argv[1:]
    progress = attach(path)
    context = zmq.Context()
    try:
        _run(context.socket(zmq.PULL), address, progress, LaneReader(int(file)))
    except CannotPublish as error:
        progress.failure = str(error).encode()[:WORDS]
    except Exception as error:
        text = f"sending failed: {type(error).__name__}: {error}"
        progress.failure = text.encode()[:WORDS]
    context.destroy(linger=0)


def _run(work: zmq.Socket[bytes], address: str, progress: Progress, lane: LaneReader) -> None:
    work.rcvhwm = 0
    work.bind(address)
    parent = sys.stdin.fileno()
    poller = zmq.Poller()
    poller.register(work, zmq.POLLIN)
    poller.register(parent, zmq.POLLIN)
    if work not in dict(poller.poll()):
        return  # nobody is there any more
    sender = Sender(work.recv_pyobj(), progress, lane)
    try:
        progress.ready = 1
        poller.register(sender.router, zmq.POLLIN)
        sender.tell_everything(time.time())
        while True:
            found = dict(poller.poll())
            if sender.router in found:
                sender.answer(time.time())
            if work in found:
                given: Work | None = work.recv_pyobj()
                if given is None:
                    break
                sender.do(given)
            elif parent in found:
                break
    finally:
        sender.close()
