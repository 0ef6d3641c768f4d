"""FlashInfer's two ways to decode over paged KV: path by path, and cascaded over the levels.

Written for flashinfer-python 0.6.18. Its pages hold whole runs of one node or path, so the caches
are seen in pages as large as the tree's offsets and lengths allow, down to one token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from prefixtree.bench.contenders import Unavailable
from prefixtree.bench.inputs import Inputs
from prefixtree.bench.trees import node_slots, path_nodes, path_slots
from prefixtree.columns import Int64s

WORKSPACE_BYTES = 512 << 20


class _FlashInfer:
    """What both have in common; they set `wrapper`, and its pages: `page`, `kv` and `table`."""

    plans: ClassVar[bool] = True
    wrapper: Any
    page: int
    kv: tuple[torch.Tensor, torch.Tensor]
    table: list[Any]

    def __init__(self, inputs: Inputs) -> None:
        try:
            import flashinfer
        except ImportError as error:
            raise Unavailable(f"flashinfer cannot be imported: {error}") from None
        self.library: Any = flashinfer
        self.inputs = inputs
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)

    def plan(self) -> None:
        shape, dtype = self.inputs.shape, self.inputs.dtype
        self.wrapper.plan(
            *self.table,
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            self.page,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    def run(self) -> torch.Tensor:
        out: torch.Tensor = self.wrapper.run(self.inputs.q, self.kv)
        return out

    def _caches(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        k_rows, v_rows = self.inputs.slot_rows()
        pages = -1, page, *k_rows.shape[1:]
        return k_rows.view(pages), v_rows.view(pages)

    def _tensors(self, *arrays: Int64s) -> list[torch.Tensor]:
        return [torch.from_numpy(array.astype(np.int32)).to(self.inputs.device) for array in arrays]


class FlashInferDecode(_FlashInfer):
    """BatchDecodeWithPagedKVCacheWrapper: every path by itself, sharing unseen."""

    name: ClassVar[str] = "FlashInfer decode"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        forest = inputs.forest
        inner = np.intersect1d(forest.parent, np.arange(len(forest.parent)))
        sizes = [forest.block_size, *forest.offset.tolist(), *forest.length[inner].tolist()]
        self.page = int(np.gcd.reduce(sizes))
        self.kv = self._caches(self.page)
        self.table = self._tensors(*page_table(path_slots(forest), self.page))
        shape = inputs.shape
        # Its own advice: tensor cores pay for larger groups.
        tensor_cores = shape.num_q_heads // shape.num_kv_heads > 2
        self.wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_tensor_cores=tensor_cores
        )
        self.plan()


class FlashInferCascade(_FlashInfer):
    """MultiLevelCascadeAttentionWrapper: a launch for each level of the tree, merged in turn."""

    name: ClassVar[str] = "FlashInfer cascade"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        forest = inputs.forest
        self.page = int(np.gcd.reduce([forest.block_size, *forest.offset.tolist()]))
        self.kv = self._caches(self.page)
        slots = node_slots(forest)
        levels = []
        for nodes, query_ptr in ragged_levels(path_nodes(forest)):
            table = page_table([slots[node] for node in nodes.tolist()], self.page)
            levels.append(self._tensors(query_ptr, *table))
        self.table = [list(column) for column in zip(*levels, strict=True)]
        self.wrapper = self.library.MultiLevelCascadeAttentionWrapper(
            len(levels), self.workspace, "NHD"
        )
        self.plan()


def page_table(runs: list[Int64s], page: int) -> tuple[Int64s, Int64s, Int64s]:
    """Runs of slots as pages: where each run's begin in all of them, their ids, the last's tokens.

    Each `page` slots of a run must be a whole page, but for the end of the run.
    """
    lengths = np.array([len(slots) for slots in runs])
    ids = np.concatenate([slots[::page] // page for slots in runs])
    pages = -(-lengths // page)
    return np.append(0, np.cumsum(pages)), ids, lengths - (pages - 1) * page


def ragged_levels(table: Int64s) -> list[tuple[Int64s, Int64s]]:
    """For each level its nodes in the order of the sequences, and where each one's sequences begin.

    Raises Unavailable where a sequence ends above the last level or where a node's sequences do not
    stand together.
    """
    levels = []
    for path_node in table:
        if (path_node < 0).any():
            raise Unavailable("its levels must hold every sequence")
        first = np.flatnonzero(np.append(True, path_node[1:] != path_node[:-1]))
        nodes = path_node[first]
        if len(np.unique(nodes)) < len(nodes):
            raise Unavailable("its sequences must stand in the order of the tree")
        levels.append((nodes, np.append(first, len(path_node))))
    return levels
