"""The events, and the bytes that carry them.

The names, fields and bytes are vLLM's, so that what consumes vLLM's events consumes these. Fields
that vLLM has beyond these are absent, as they are there while they have their default.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

BlockHash: TypeAlias = int | bytes
"""Of a whole block and all that lies before it on its path: 64 bits as an integer, or all bytes."""


class _Event(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """Sent as a map whose `type` is the class's name."""


class BlockStored(_Event, frozen=True):
    """Whole blocks that follow each other on a path can be matched from now on."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    """Of the block in front of the first, which is stored already; None at the path's beginning."""
    token_ids: list[int]
    """Of all these blocks, `block_size` each."""
    block_size: int
    lora_id: int | None
    """Always None: adapters go by name."""
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str | int | None, ...]] | None = None
    """For each block, the parts of its namespace; None in the default one."""


class BlockRemoved(_Event, frozen=True):
    """These blocks cannot be matched any more; none is in front of one that still can."""

    block_hashes: list[BlockHash]
    medium: str | None


class AllBlocksCleared(_Event, frozen=True):
    """Nothing can be matched but what is stored after this."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """What is sent at once, as an array."""

    ts: float
    """Seconds since the epoch."""
    events: list[Event]
    data_parallel_rank: int | None = None


def as_array(event: Event) -> list[Any]:
    """The event as an array: its name and its fields in order, without defaults at the end."""
    values = [type(event).__name__, *msgspec.structs.astuple(event)]
    if isinstance(event, BlockStored) and event.extra_keys is None:
        values.pop()
    return values


def num_blocks(event: Event) -> int:
    """How many blocks it tells of."""
    return 0 if isinstance(event, AllBlocksCleared) else len(event.block_hashes)
