"""A consumer at the other end of the sockets, written from the wire format."""

from __future__ import annotations

import time
from typing import Any, Self

import msgspec
import zmq

from prefixtree.events import ZmqPublisher

from .mirror import Mirror

SECONDS = 60
END = b"\xff" * 8


class Consumer:
    """Follows a publisher: a mirror of its cache, and how it learned of what it missed."""

    def __init__(
        self, endpoint: str, replay_endpoint: str, block_size: int, limit: int = 0
    ) -> None:
        """`limit`: batches that wait to be read before some are lost; 0 for none."""
        self.mirror = Mirror(block_size)
        self.expected = 0
        self.missed = 0
        self.asked: list[int] = []
        self.context = zmq.Context()
        self.context.linger = 0
        self.sub = self.context.socket(zmq.SUB)
        self.sub.rcvhwm = limit
        self.sub.subscribe(b"")
        self.sub.connect(endpoint)
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.rcvhwm = 0
        self.dealer.connect(replay_endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy()

    def ask(self, first: int) -> list[list[bytes]]:
        """Topic, number and batch of all that the publisher has from `first` on."""
        self.dealer.send_multipart([b"", first.to_bytes(8, "big")])
        answers = []
        while True:
            assert self.dealer.poll(1000 * SECONDS), "no answer"
            empty, *answer = self.dealer.recv_multipart()
            assert empty == b""
            if answer[1] == END:
                assert answer == [b"", END, b""]
                return answers
            answers.append(answer)

    def catch_up(self, first: int) -> None:
        """What was missed from `first` on."""
        self.asked.append(first)
        for _, number, payload in self.ask(first):
            self.receive(int.from_bytes(number, "big"), payload, asked=True)

    def receive(self, number: int, payload: bytes, asked: bool = False) -> None:
        if number < self.expected:
            return
        _, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        if number > self.expected:
            if not asked:
                self.missed += number - self.expected
                self.catch_up(self.expected)
                return
            # More was missed than is kept.
            first = events[0]
            assert first == {"type": "AllBlocksCleared"} or first == ["AllBlocksCleared"]
        self.expected = number + 1
        for event in events:
            self.mirror.apply(event)

    def read(self) -> None:
        """Takes in what has arrived."""
        while self.sub.poll(0):
            _, number, payload = self.sub.recv_multipart()
            self.receive(int.from_bytes(number, "big"), payload)

    def follow(self, publisher: ZmqPublisher) -> None:
        """Reads on until all is known that the cache holds."""
        settle(publisher, self)
        publisher.flush()  # what earlier calls have left
        settle(publisher, self)
        batches = publisher.stats().batches
        while self.expected < batches:
            if not self.sub.poll(200):
                self.catch_up(self.expected)  # the last ones were lost
                continue
            _, number, payload = self.sub.recv_multipart()
            self.receive(int.from_bytes(number, "big"), payload)


def settle(publisher: ZmqPublisher, consumer: Consumer) -> None:
    """Waits until the publisher has sent what it was given."""
    end = time.monotonic() + SECONDS
    while publisher.stats().waiting:
        assert time.monotonic() < end
        time.sleep(0.001)
    consumer.ask(2**63)  # answered when the work before it is done


def join(publisher: ZmqPublisher, consumer: Consumer) -> None:
    """Waits until the consumer gets what is sent."""
    end = time.monotonic() + SECONDS
    while not consumer.sub.poll(10):
        assert time.monotonic() < end
        publisher.resync()


def numbers(answers: list[list[bytes]]) -> list[int]:
    return [int.from_bytes(answer[1], "big") for answer in answers]


def contents(answers: list[list[bytes]]) -> list[Any]:
    return [msgspec.msgpack.decode(answer[2]) for answer in answers]
