"""What all layers of one type share in one forward pass: slots, and a step over block tables."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.steps import Step


class Batch:
    """One batch of the library's continuous batching, for the layers of one allocator.

    Attributes: made_for (the object that the library made for this pass and gives to each of its
    layers), slots (int64 [T], of the new tokens, on the device), step (who attends to what).
    """

    def __init__(
        self,
        made_for: object,
        slots: torch.Tensor,
        blocks: torch.Tensor,
        query_ends: torch.Tensor,
        kv_ends: torch.Tensor,
        block_size: int,
        before: Batch | None = None,
    ) -> None:
        """
        slots: see above. blocks: int64 [blocks of all sequences, one after the other], or empty
        where all tokens are new. query_ends, kv_ends: int32 [S + 1], running sums of each
        sequence's new tokens and of all its tokens. All are copied to the host, once a step.
        before: the batch before this one, whose plans this one may go on with.
        """
        if slots.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedAttention(
                "plans change from step to step, which a captured graph would not see: give "
                "ContinuousBatchingConfig(use_cuda_graph=False)"
            )
        self.made_for = made_for
        self.slots = slots
        starts = query_ends.cpu().numpy().copy()  # the library writes the next batch over it
        lengths = np.diff(kv_ends.cpu().numpy())
        if int(starts[-1]) != len(slots):
            raise UnsupportedAttention(
                f"a batch of {starts[-1]} tokens is padded to {len(slots)}: padding, which "
                "compiled forward passes ask for, is not implemented"
            )
        counts = -(-lengths // block_size)
        ids = blocks.cpu().numpy() if len(blocks) else _written(slots, starts, counts, block_size)
        tables = np.zeros((len(counts), counts.max()), np.int32)
        tables[np.arange(counts.max()) < counts[:, None]] = ids
        last: Step | None = None if before is None else before.step
        self.step: Step = Step(tables, lengths, starts, block_size, last)


def _written(
    slots: torch.Tensor, starts: NDArray[np.int32], counts: NDArray[np.int32], block_size: int
) -> NDArray[np.int64]:
    """Blocks of sequences all of whose tokens are new: those of every block's first token."""
    first = np.repeat(starts[:-1], counts)
    block = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids: NDArray[np.int64] = slots.cpu().numpy()[first + block * block_size] // block_size
    return ids
