"""What all layers of one type share in one forward pass: slots, forest and plans."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

import attention
from prefixtree.engines.errors import UnsupportedAttention


class Step:
    """One batch of the library's continuous batching, for the layers of one allocator.

    Attributes: batch (the object the library made for this pass and gives to each of its layers),
    slots (int64 [T], of the new tokens, on the device), queries (T).
    """

    def __init__(
        self,
        batch: object,
        slots: torch.Tensor,
        blocks: torch.Tensor,
        query_ends: torch.Tensor,
        kv_ends: torch.Tensor,
        block_size: int,
    ) -> None:
        """
        slots: see above. blocks: int64 [blocks of all sequences, one after the other], or empty
        where all tokens are new. query_ends, kv_ends: int32 [S + 1], running sums of each
        sequence's new tokens and of all its tokens. All are copied to the host, once a step.
        """
        if slots.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedAttention(
                "plans change from step to step, which a captured graph would not see: give "
                "ContinuousBatchingConfig(use_cuda_graph=False)"
            )
        self.batch = batch
        self.slots = slots
        starts = query_ends.cpu().numpy()
        lengths = np.diff(kv_ends.cpu().numpy())
        self.queries = int(starts[-1])
        if self.queries != len(slots):
            raise UnsupportedAttention(
                f"a batch of {self.queries} tokens is padded to {len(slots)}: padding, which "
                "compiled forward passes ask for, is not implemented"
            )
        self._longest = int(lengths.max())
        counts = -(-lengths // block_size)
        ids = blocks.cpu().numpy() if len(blocks) else _written(slots, starts, counts, block_size)
        tables = np.zeros((len(counts), counts.max()), np.int64)
        tables[np.arange(counts.max()) < counts[:, None]] = ids
        self._forest = attention.forest_from_block_tables(tables, lengths, starts, block_size)
        self._plans: dict[tuple[int | None, int], attention.Plan] = {}

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attention.run`, with a plan that the layers before have made if one of them has."""
        if window is not None and window >= self._longest:
            window = None
        key = window, q.shape[1]
        if key not in self._plans:
            self._plans[key] = attention.plan(
                self._forest,
                num_q_heads=q.shape[1],
                num_kv_heads=k_cache.shape[2],
                head_dim=q.shape[2],
                value_head_dim=v_cache.shape[3],
                dtype=q.dtype,
                device=q.device,
                window=window,
            )
        return attention.run(self._plans[key], q, k_cache, v_cache, scale=scale, softcap=softcap)


def _written(
    slots: torch.Tensor, starts: NDArray[np.int32], counts: NDArray[np.int32], block_size: int
) -> NDArray[np.int64]:
    """Blocks of sequences all of whose tokens are new: those of every block's first token."""
    first = np.repeat(starts[:-1], counts)
    block = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids: NDArray[np.int64] = slots.cpu().numpy()[first + block * block_size] // block_size
    return ids
