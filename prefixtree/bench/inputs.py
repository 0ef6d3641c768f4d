"""Random tensors for a shape, and what their attention is, exactly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from allocator import KVStorage
from attention import Forest
from prefixtree.bench.shapes import Shape
from prefixtree.bench.trees import forest_of, path_slots
from prefixtree.columns import Int64s


class Inputs(NamedTuple):
    """A shape with tensors for it: q [S, Hq, d]; caches [num_blocks, block_size, Hkv, d]."""

    shape: Shape
    forest: Forest
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def num_sequences(self) -> int:
        return len(self.forest.leaf)

    def slot_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V by slot: [num_slots, Hkv, d], views of the caches."""
        return self.k_cache.flatten(0, 1), self.v_cache.flatten(0, 1)

    def indices(self, slots: Int64s) -> torch.Tensor:
        """Slots as an int64 tensor on the device."""
        return torch.from_numpy(slots).to(self.device)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed q, K and V; blocks lie as a cache hands them out, node by node."""
    forest, num_blocks = forest_of(shape.tree, shape.block_size)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    q = normal(len(forest.leaf), shape.num_q_heads, shape.head_dim)
    storage = KVStorage(
        1,
        num_blocks,
        shape.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        dtype=dtype,
        device=device,
    )
    (k_cache,), (v_cache,) = storage.k, storage.v
    return Inputs(
        shape, forest, q, k_cache.normal_(generator=generator), v_cache.normal_(generator=generator)
    )


class Sample(NamedTuple):
    """Exact results of some sequences: float64 [n, Hq, d]."""

    sequences: torch.Tensor
    out: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """The largest difference of these sequences' results in `out` [S, Hq, d]."""
        return float((out[self.sequences].double() - self.out).abs().max())


def exact_sample(inputs: Inputs, most: int = 16) -> Sample:
    """The results of up to `most` sequences, spread over the batch, by dense float64 attention."""
    chosen = np.unique(np.linspace(0, inputs.num_sequences - 1, most).astype(np.int64))
    forest = inputs.forest
    some = Forest(
        **{**vars(forest), "leaf": forest.leaf[chosen], "query_len": forest.query_len[chosen]}
    )
    k_rows, v_rows = inputs.slot_rows()
    outs = []
    for sequence, slots in zip(chosen.tolist(), path_slots(some), strict=True):
        index = inputs.indices(slots)
        k, v = k_rows[index].double(), v_rows[index].double()
        q = inputs.q[sequence].double().view(k.shape[1], -1, k.shape[2])  # [Hkv, group, d]
        logits = torch.einsum("hgd,thd->hgt", q, k) * inputs.shape.head_dim**-0.5
        outs.append(torch.einsum("hgt,thd->hgd", logits.softmax(2), v).flatten(0, 1))
    return Sample(inputs.indices(chosen), torch.stack(outs))
