"""What the cache holds, told to routers and remote stores as it changes.

`KVEvents` turns a cache's changes into events, `ZmqPublisher` sends them as vLLM does. Needs the
extra `events`; without it the import raises ImportError.

    events = KVEvents(cache)
    publisher = ZmqPublisher(events, "tcp://127.0.0.1:5557", replay_endpoint="tcp://127.0.0.1:5558")
    while serving:
        ...                  # a step of the engine
        publisher.publish()  # by the thread that uses the cache
    publisher.flush()        # before a pause
"""

try:
    import msgspec  # noqa: F401
    import zmq  # noqa: F401
except ImportError as error:
    raise ImportError(
        "KV events need msgspec and pyzmq: pip install 'prefixtree[events]'"
    ) from error

from prefixtree.events.messages import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
)
from prefixtree.events.publisher import PublisherStats, ZmqPublisher
from prefixtree.events.source import KVEvents

__all__ = [
    "AllBlocksCleared",
    "BlockHash",
    "BlockRemoved",
    "BlockStored",
    "Event",
    "EventBatch",
    "KVEvents",
    "PublisherStats",
    "ZmqPublisher",
]
