"""Ways to compute one attention over shared KV, behind one protocol: ours and those of torch.

Each reads the very same K and V. A way that needs them laid out otherwise copies them when it is
made, which is not timed: it is measured at its best.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import attention
from prefixtree.bench.inputs import Inputs
from prefixtree.bench.trees import node_slots, path_nodes, path_slots, unshared
from prefixtree.columns import Int64s

MOST_COPIED = {"cpu": 2 << 30, "cuda": 16 << 30}
"""Bytes that a contender may lay out anew."""


class Unavailable(Exception):
    """This contender cannot run on this shape or machine; the message says why."""


class Contender(Protocol):
    """One way to compute the attention of one shape."""

    name: ClassVar[str]
    plans: ClassVar[bool]
    """Whether `plan` does anything."""

    def __init__(self, inputs: Inputs) -> None:
        """Raises Unavailable."""

    def plan(self) -> None:
        """What is done once a step, before the first layer. Timed by itself."""

    def run(self) -> torch.Tensor:
        """What is done once a layer: [S, Hq, d]."""


class Ours:
    name: ClassVar[str] = "prefixtree"
    plans: ClassVar[bool] = True

    def __init__(self, inputs: Inputs, backend: str | None = None) -> None:
        self.inputs = inputs
        self.backend = backend
        self.forest = self._forest()
        self.plan()

    def _forest(self) -> attention.Forest:
        return self.inputs.forest

    def plan(self) -> None:
        shape = self.inputs.shape
        self.planned = attention.plan(
            self.forest,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=self.inputs.dtype,
            device=self.inputs.device,
            backend=self.backend,
        )

    def run(self) -> torch.Tensor:
        inputs = self.inputs
        return attention.run(self.planned, inputs.q, inputs.k_cache, inputs.v_cache)[0]


class OursUnshared(Ours):
    """The same plans and kernels, told of no sharing: each sequence is a chain on the same KV."""

    name: ClassVar[str] = "not shared"

    def _forest(self) -> attention.Forest:
        return unshared(self.inputs.forest)


class SdpaPerSequence:
    """torch's attention on one sequence after the other, each gathered from its blocks."""

    name: ClassVar[str] = "SDPA gathered"
    plans: ClassVar[bool] = False

    def __init__(self, inputs: Inputs) -> None:
        _require_copy(inputs, inputs.shape.path_bytes(inputs.dtype.itemsize))
        self.queries = _grouped(inputs)
        # As it gathers fastest: all heads of a token side by side.
        self.rows = tuple(rows.contiguous() for rows in inputs.slot_rows())
        self.paths = [inputs.indices(slots) for slots in path_slots(inputs.forest)]

    def plan(self) -> None:
        pass

    def run(self) -> torch.Tensor:
        k_rows, v_rows = self.rows
        outs = []
        for q, slots in zip(torch.split(self.queries, 1), self.paths, strict=True):
            k, v = (rows.index_select(0, slots).transpose(0, 1)[None] for rows in (k_rows, v_rows))
            outs.append(scaled_dot_product_attention(q, k, v))
        return torch.cat(outs).flatten(1, 2)


class SdpaPadded:
    """torch's attention on all sequences at once, gathered and padded beforehand."""

    name: ClassVar[str] = "SDPA padded"
    plans: ClassVar[bool] = False

    def __init__(self, inputs: Inputs) -> None:
        paths = path_slots(inputs.forest)
        lengths = np.array([len(slots) for slots in paths])
        longest, shape = int(lengths.max()), inputs.shape
        token_bytes = 2 * shape.num_kv_heads * shape.head_dim * inputs.dtype.itemsize
        _require_copy(inputs, len(paths) * longest * token_bytes)
        slots = np.zeros((len(paths), longest), np.int64)
        seen = np.arange(longest) < lengths[:, None]
        slots[seen] = np.concatenate(paths)
        index = inputs.indices(slots.ravel())
        k, v = (rows.index_select(0, index) for rows in inputs.slot_rows())
        self.k, self.v = _heads_apart(k, len(paths)), _heads_apart(v, len(paths))
        self.mask = None
        if not seen.all():
            hidden = torch.from_numpy(np.where(seen, 0.0, -np.inf)[:, None, None])
            self.mask = hidden.to(inputs.device, inputs.dtype)
        self.queries = _grouped(inputs)

    def plan(self) -> None:
        pass

    def run(self) -> torch.Tensor:
        out = scaled_dot_product_attention(self.queries, self.k, self.v, attn_mask=self.mask)
        return out.flatten(1, 2)


class FlashPerLevel:
    """Hydragen's way: a call of flash attention for each level of the tree, then merges.

    For uniform trees only: all nodes of a level with equally many tokens and sequences. K and V of
    each level are laid out as the call reads them fastest.
    """

    name: ClassVar[str] = "flash per level"
    plans: ClassVar[bool] = False

    def __init__(self, inputs: Inputs) -> None:
        slots = node_slots(inputs.forest)
        self.levels = []
        for nodes in uniform_levels(inputs):
            index = inputs.indices(np.concatenate([slots[node] for node in nodes.tolist()]))
            k, v = (rows.index_select(0, index) for rows in inputs.slot_rows())
            self.levels.append((_heads_apart(k, len(nodes)), _heads_apart(v, len(nodes))))
        self.queries = _grouped(inputs)

    def plan(self) -> None:
        pass

    def run(self) -> torch.Tensor:
        total: attention.Partial | None = None
        _, kv_heads, group, head_dim = self.queries.shape
        for k, v in self.levels:
            # The queries below a node are rows of one matrix: [nodes, Hkv, queries * group, d].
            q = self.queries.view(len(k), -1, kv_heads, group, head_dim)
            q = q.transpose(1, 2).flatten(2, 3)
            o, lse = _flash(q, k, v)
            rows = len(k), kv_heads, -1, group
            part = attention.Partial(
                o.reshape(*rows, head_dim).transpose(1, 2).flatten(0, 1).float(),
                lse.reshape(rows).transpose(1, 2).flatten(0, 1),
            )
            total = part if total is None else attention.merge(total, part)
        assert total is not None
        return total.o.to(self.queries.dtype).flatten(1, 2)


def uniform_levels(inputs: Inputs) -> list[Int64s]:
    """The nodes of each level of a uniform tree, in the order of the sequences below them.

    Raises Unavailable for another.
    """
    levels = []
    for path_node in path_nodes(inputs.forest):
        first = np.flatnonzero(np.append(True, path_node[1:] != path_node[:-1]))
        nodes = path_node[first]
        sequences = np.diff(first, append=len(path_node))
        together = len(np.unique(nodes)) == len(nodes)
        equal = (nodes >= 0).all() and len(set(sequences)) == 1
        if not (together and equal and len(set(inputs.forest.length[nodes])) == 1):
            raise Unavailable("its levels are not uniform")
        levels.append(nodes)
    return levels


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention [n, Hkv, rows, d] with its log-sum-exp [n, Hkv, rows]."""
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return o, lse


def _grouped(inputs: Inputs) -> torch.Tensor:
    """Queries with the heads of a KV head as rows of one matrix: [S, Hkv, group, d]."""
    shape = inputs.shape
    return inputs.q.view(inputs.num_sequences, shape.num_kv_heads, -1, shape.head_dim)


def _heads_apart(rows: torch.Tensor, items: int) -> torch.Tensor:
    """KV [items * tokens, Hkv, d] as [items, Hkv, tokens, d], contiguous."""
    return rows.view(items, -1, *rows.shape[1:]).transpose(1, 2).contiguous()


def _require_copy(inputs: Inputs, num_bytes: int) -> None:
    most = MOST_COPIED[inputs.device.type]
    if num_bytes > most:
        raise Unavailable(f"its copy of KV has {num_bytes / 2**30:.1f} GiB, at most {most >> 30}")
