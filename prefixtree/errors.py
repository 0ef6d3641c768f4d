"""What the cache refuses. Every refused call leaves the cache as it was."""

from __future__ import annotations


class PrefixTreeError(Exception):
    """Base of the cache's own errors (the allocator has its own: `OutOfBlocks`, `DoubleFree`)."""


class InvalidTokens(PrefixTreeError, ValueError):
    """Tokens are not a non-empty 1-d run of integers in 0..2**31-1."""


class InvalidLength(PrefixTreeError, ValueError):
    """A length or count lies outside what the sequence allows."""


class InvalidBatch(PrefixTreeError, ValueError):
    """A batch names a sequence twice, or one of another cache."""


class InvalidNamespace(PrefixTreeError, TypeError):
    """A namespace is neither a string nor a tuple of strings, integers and None."""


class PriorityUnused(PrefixTreeError, RuntimeError):
    """The cache's eviction policy does not look at priorities."""


class NotPinned(PrefixTreeError, RuntimeError):
    """The pin was taken off before."""


class PrefixGone(PrefixTreeError, LookupError):
    """The prefix was evicted since it was matched; nobody held it."""


class NotHeld(PrefixTreeError, RuntimeError):
    """The call needs a prefix that is held, or held just once."""


class NotPreempted(PrefixTreeError, RuntimeError):
    """A sequence that runs or is closed cannot be resumed."""


class CacheBroken(PrefixTreeError, RuntimeError):
    """The cache found its own state wrong before and refuses to hand out KV ever since."""


class SequenceClosed(PrefixTreeError, RuntimeError):
    """The sequence is closed, or preempted."""


class NotAligned(PrefixTreeError, RuntimeError):
    """A plain block table was asked of a cache that shares to the token."""


class NotCommitted(PrefixTreeError, RuntimeError):
    """The call needs KV that is not written yet."""


class RollbackPastFork(PrefixTreeError, ValueError):
    """A rollback would reach into tokens that the sequence shares with those forked off it."""


class SlotRange(PrefixTreeError, IndexError):
    """Slots were asked for positions that the sequence does not have."""


class InvalidSnapshot(PrefixTreeError, ValueError):
    """A file is no snapshot, is damaged or contradicts itself, or does not fit the storage."""


class DecodeFailed(PrefixTreeError, RuntimeError):
    """The function that was given to turn tokens into text raised, or returned something else."""


class TierFailed(PrefixTreeError, RuntimeError):
    """The function that was given to tell a node's tier raised, or returned something else."""


class CannotServe(PrefixTreeError, OSError):
    """The inspector cannot listen where it was told to: the port is in use, or not allowed."""


class CannotPublish(PrefixTreeError, OSError):
    """KV events cannot be sent: the port is in use, the address is none, or sending failed."""


class EventsClosed(PrefixTreeError, RuntimeError):
    """The KV events, or what publishes them, were closed before."""
