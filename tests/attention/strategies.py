"""Ragged forests, and tensors for them, for tests of anything that attends."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from attention import Forest, NodeSets
from attention.problem import FLOAT8_DTYPES

STRIDES = (
    "beside",
    "plain",
    "interleaved",
    "heads apart",
    "padded heads",
    "padded slots",
    "padded blocks",
    "other layout",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Node:
    """A node to build: its parent's index, its tokens, and where its first block begins."""

    parent: int
    length: int
    offset: int = 0
    shares_block: bool = False  # begins in its parent's last block, right behind the parent


@dataclass(frozen=True)
class Case:
    """Everything that one run of attention is given, but for the tensors' values.

    Strides "latent" make the values a view of the keys (multi-head latent attention), "beside" put
    a token's values of a head behind its keys.
    """

    source: Forest | NodeSets
    num_blocks: int
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_head_dim: int | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    layout: str = "NHD"
    strides: str = "plain"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sink_tokens: int = 0
    temperature: tuple[float, ...] | None = None
    log_weight: tuple[float, ...] | None = None
    alibi_slopes: tuple[float, ...] | None = None
    k_scale: tuple[float, ...] | None = None
    v_scale: tuple[float, ...] | None = None
    batch_invariant: bool = False

    @property
    def forest(self) -> Forest:
        assert isinstance(self.source, Forest)
        return self.source


class Tensors(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def build_forest(
    block_size: int,
    nodes: list[Node],
    sequences: list[tuple[int, int]],
    *,
    shuffle: int | None = None,
) -> tuple[Forest, int]:
    """A valid forest of nodes and sequences (leaf, query_len), and the number of blocks it needs.

    Blocks are handed out in the order of the nodes, or shuffled by the seed `shuffle`.
    """
    start: list[int] = []
    offset: list[int] = []
    blocks: list[list[int]] = []
    num_blocks = 0
    for node in nodes:
        first, shared = node.offset % block_size, []
        if node.parent >= 0:
            start.append(start[node.parent] + nodes[node.parent].length)
            parent_end = offset[node.parent] + nodes[node.parent].length
            if node.shares_block and parent_end % block_size:
                first, shared = parent_end % block_size, blocks[node.parent][-1:]
        else:
            start.append(0)
        new = -(-(first + node.length) // block_size) - len(shared)
        offset.append(first)
        blocks.append(shared + list(range(num_blocks, num_blocks + new)))
        num_blocks += new
    num_blocks += 2  # some that nothing uses
    ids = np.arange(num_blocks)
    if shuffle is not None:
        ids = np.random.default_rng(shuffle).permutation(num_blocks)
    return (
        Forest(
            block_size=block_size,
            parent=np.array([node.parent for node in nodes], np.int32),
            start=np.array(start, np.int64),
            length=np.array([node.length for node in nodes], np.int64),
            offset=np.array(offset, np.int32),
            block_ptr=np.cumsum([0, *map(len, blocks)], dtype=np.int64),
            blocks=ids[np.concatenate(blocks)].astype(np.int32),
            leaf=np.array([leaf for leaf, _ in sequences], np.int32),
            query_len=np.array([query_len for _, query_len in sequences], np.int64),
        ),
        num_blocks,
    )


def level_forest(levels: list[list[int]], block_size: int = 16) -> tuple[Forest, int]:
    """A tree given by the lengths of the nodes of each level, one decode query on each leaf.

    Child j of a level of m nodes below a level of n has the parent j * n // m.
    """
    nodes: list[Node] = []
    previous: list[int] = []
    for lengths in levels:
        level = []
        for j, length in enumerate(lengths):
            parent = previous[j * len(previous) // len(lengths)] if previous else -1
            level.append(len(nodes))
            nodes.append(Node(parent, length))
        previous = level
    return build_forest(block_size, nodes, [(leaf, 1) for leaf in previous])


# Shapes beyond what random forests reach: each exceeds one of the sizes at which work is cut.
LARGE = {
    "a prompt of many tiles": ([Node(-1, 1100)], [(0, 1100)]),
    "a chunk behind a cached prefix, beside decodes": (
        [Node(-1, 600), Node(0, 300), Node(0, 5), Node(0, 9)],
        [(2, 1), (1, 280), (3, 1), (3, 2)],
    ),
    "a whole path over several nodes beside a decode": (
        [Node(-1, 300), Node(0, 290, shares_block=True), Node(0, 40), Node(1, 30)],
        [(3, 620), (2, 1), (3, 400), (1, 20)],
    ),
    "a prefix longer than one gather": ([Node(-1, 9000), Node(0, 3)], [(1, 1), (1, 3), (0, 1)]),
    "more queries on a node than one call takes": (
        [Node(-1, 40)] + [Node(0, 1 + i % 5) for i in range(1200)],
        [(1 + i, 1) for i in range(1200)],
    ),
    "decodes of very different lengths": (
        [Node(-1, 2000), *(Node(0, 1 + 37 * i) for i in range(30))],
        [(1 + i, 1) for i in range(30)],
    ),
}


@st.composite
def forests(draw: st.DrawFn) -> tuple[Forest, int]:
    """Forests ragged in every way, with decode, chunk and whole-path queries mixed."""
    block_size = draw(st.integers(1, 32))
    num_roots = draw(st.integers(1, 3))
    num_nodes = draw(st.integers(num_roots, 14))
    longest = draw(st.sampled_from((3, 20, 70)))
    nodes = []
    continued: set[int] = set()
    for index in range(num_nodes):
        parent = -1 if index < num_roots else draw(st.integers(0, index - 1))
        shares_block = parent >= 0 and parent not in continued and draw(st.booleans())
        if shares_block:
            continued.add(parent)
        nodes.append(
            Node(
                parent,
                length=draw(st.integers(1, longest)),
                offset=draw(st.sampled_from((0, 0, 1, 5))),
                shares_block=shares_block,
            )
        )
    forest, num_blocks = build_forest(
        block_size,
        nodes,
        [(num_nodes - 1, 1)],
        shuffle=draw(st.none() | st.integers(0, 99)),
    )
    path_len = forest.start + forest.length
    sequences = []
    for leaf in draw(st.lists(st.integers(0, num_nodes - 1), min_size=1, max_size=7)):
        whole = int(path_len[leaf])
        query_len = draw(st.just(1) | st.integers(1, min(whole, 40)) | st.just(whole))
        sequences.append((leaf, query_len))
    return with_sequences(forest, sequences), num_blocks


def with_sequences(forest: Forest, sequences: list[tuple[int, int]]) -> Forest:
    """The same nodes under other sequences (leaf, query_len)."""
    return Forest(
        **{
            **vars(forest),
            "leaf": np.array([leaf for leaf, _ in sequences], np.int32),
            "query_len": np.array([query_len for _, query_len in sequences], np.int64),
        }
    )


@st.composite
def node_sets(draw: st.DrawFn) -> tuple[NodeSets, int]:
    """Sets of nodes: side by side, with gaps, shared at different positions, before the query."""
    block_size = draw(st.integers(1, 32))
    num_nodes = draw(st.integers(1, 8))
    longest = draw(st.sampled_from((3, 20, 70)))
    forest, num_blocks = build_forest(
        block_size,
        [
            Node(-1, draw(st.integers(1, longest)), offset=draw(st.sampled_from((0, 1, 5))))
            for _ in range(num_nodes)
        ],
        [(0, 1)],
        shuffle=draw(st.none() | st.integers(0, 99)),
    )
    member = st.tuples(st.integers(0, num_nodes - 1), st.sampled_from((0, 0, 7, 40, 100)))
    members = draw(
        st.lists(st.lists(member, min_size=1, max_size=6, unique=True), min_size=1, max_size=6)
    )
    return sets_of(
        forest,
        members,
        [draw(st.sampled_from((0, 3, 30, 80, 200))) for _ in members],
        [draw(st.just(1) | st.integers(1, 30)) for _ in members],
    ), num_blocks


def sets_of(
    forest: Forest,
    members: list[list[tuple[int, int]]],
    query_start: list[int],
    query_len: list[int],
) -> NodeSets:
    """The nodes of a forest, in sets (node, position of its first token) of sequences."""
    flat = [member for sequence in members for member in sequence]
    return NodeSets(
        block_size=forest.block_size,
        length=forest.length,
        offset=forest.offset,
        block_ptr=forest.block_ptr,
        blocks=forest.blocks,
        member_ptr=np.cumsum([0, *map(len, members)], dtype=np.int64),
        member=np.array([node for node, _ in flat], np.int32),
        member_start=np.array([start for _, start in flat], np.int64),
        query_start=np.array(query_start, np.int64),
        query_len=np.array(query_len, np.int64),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kv_dtypes: tuple[torch.dtype, ...] = FLOAT8_DTYPES,
    source: st.SearchStrategy[tuple[Forest | NodeSets, int]] | None = None,
) -> Case:
    """Something to attend to and all that a run can be varied in.

    kv_dtypes: of caches, besides the dtype of q.
    """
    nodes, num_blocks = draw(forests() | node_sets() if source is None else source)
    num_kv_heads = draw(st.sampled_from((1, 2, 3)))
    num_q_heads = num_kv_heads * draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 16)))
    head_dim = draw(st.sampled_from((32, 64, 80, 96, 128, 192, 256, 576)))
    strides = draw(st.sampled_from((*STRIDES, "latent")))
    value_head_dim = None
    if head_dim == 576:
        num_kv_heads, num_q_heads, value_head_dim, strides = 1, num_q_heads, 512, "latent"
    elif strides == "latent":
        value_head_dim = head_dim - 16
    elif draw(st.integers(0, 3)) == 0:
        value_head_dim = draw(st.sampled_from((16, 48, 128)))
    dtype = draw(st.sampled_from(dtypes))
    # Each option is off more often than on, or few cases would reach the paths without it.
    sometimes = st.integers(0, 3).map(lambda n: n == 0)
    window = draw(st.none() | st.sampled_from((1, 2, 9, 33, 100)))
    return Case(
        nodes,
        num_blocks,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        dtype=dtype,
        kv_dtype=draw(st.sampled_from(kv_dtypes)) if kv_dtypes and draw(sometimes) else None,
        layout=draw(st.sampled_from(("NHD", "HND"))),
        strides=strides,
        scale=draw(st.none() | st.sampled_from((0.02, 0.3))),
        softcap=draw(st.none() | st.sampled_from((1.5, 30.0))) if draw(sometimes) else None,
        window=window,
        sink_tokens=draw(st.sampled_from((0, 1, 4, 50))) if window else 0,
        temperature=_draw_each(draw, sometimes, (0.5, 1.0, 1.25), len(nodes.length)),
        log_weight=_draw_each(draw, sometimes, (-3.0, 0.0, 0.75), len(nodes.length)),
        alibi_slopes=_draw_each(draw, sometimes, (0.5, 0.03125, 0.00390625), num_q_heads),
        k_scale=_draw_each(draw, sometimes, (0.5, 1.25), draw(st.sampled_from((1, num_kv_heads)))),
        v_scale=_draw_each(draw, sometimes, (0.75, 3.0), draw(st.sampled_from((1, num_kv_heads)))),
    )


def _draw_each(
    draw: st.DrawFn, sometimes: st.SearchStrategy[bool], values: tuple[float, ...], size: int
) -> tuple[float, ...] | None:
    if not draw(sometimes):
        return None
    return tuple(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))


def tensors(case: Case, seed: int = 0) -> Tensors:
    """Random q and caches for a case; every slot that no node owns holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(
        case.source.num_queries, case.num_q_heads, case.head_dim, generator=generator
    ).to(case.dtype)
    owned = owned_slots(case.source, case.num_blocks)
    caches = []
    both = _empty_cache(case, case.head_dim + (case.value_head_dim or case.head_dim))
    for head_dim in (case.head_dim, case.value_head_dim or case.head_dim):
        if case.strides == "latent" and caches:
            caches.append(caches[0][..., :head_dim])
            continue
        if case.strides == "beside":
            cache = both[..., case.head_dim :] if caches else both[..., :head_dim]
        else:
            cache = _empty_cache(case, head_dim)
        by_slot = cache if case.layout == "NHD" else cache.transpose(1, 2)
        values = torch.randn(by_slot.shape, generator=generator)
        values[~owned] = torch.nan
        by_slot.copy_(values)
        caches.append(cache)
    return Tensors(q, *caches)


def owned_slots(source: Forest | NodeSets, num_blocks: int) -> torch.Tensor:
    """bool [num_blocks, block_size]: which slots belong to a node."""
    owned = torch.zeros(num_blocks * source.block_size, dtype=torch.bool)
    for node in range(len(source.length)):
        owned[torch.from_numpy(node_slots(source, node))] = True
    return owned.view(num_blocks, source.block_size)


def node_slots(forest: Forest | NodeSets, node: int) -> np.ndarray:
    """Slot of each token of a node."""
    blocks = forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]].astype(np.int64)
    place = int(forest.offset[node]) + np.arange(forest.length[node])
    return blocks[place // forest.block_size] * forest.block_size + place % forest.block_size


def path_slots(forest: Forest, leaf: int) -> np.ndarray:
    """Slot of each token from the root to the end of a leaf."""
    slots: list[np.ndarray] = []
    while leaf >= 0:
        slots.insert(0, node_slots(forest, leaf))
        leaf = int(forest.parent[leaf])
    return np.concatenate(slots)


def _empty_cache(case: Case, head_dim: int) -> torch.Tensor:
    inner = (case.source.block_size, case.num_kv_heads)
    dtype = case.kv_dtype or case.dtype
    if case.layout == "HND":
        inner = inner[::-1]
    match case.strides:
        case "plain" | "latent" | "beside":
            return torch.empty(case.num_blocks, *inner, head_dim, dtype=dtype)
        case "interleaved":
            both = torch.empty(case.num_blocks, 2, *inner, head_dim, dtype=dtype)
            return both[:, 1]
        case "padded blocks":
            size = math.prod(inner) * head_dim
            wide = torch.empty(case.num_blocks, size + 8, dtype=dtype)
            return wide[:, :size].unflatten(1, (*inner, head_dim))
        case "heads apart":
            apart = (inner[1], case.num_blocks, inner[0])
            order = (1, 2, 0, 3)
            if case.layout == "HND":
                apart, order = (inner[0], case.num_blocks, inner[1]), (1, 0, 2, 3)
            return torch.empty(*apart, head_dim, dtype=dtype).permute(order)
        case "padded slots":
            # Or padded heads in HND.
            wide = torch.empty(case.num_blocks, inner[0], inner[1] * head_dim + 16, dtype=dtype)
            return wide[..., :-16].unflatten(2, (inner[1], head_dim))
        case "padded heads":
            wide = torch.empty(case.num_blocks, *inner, head_dim + 8, dtype=dtype)
            return wide[..., :head_dim]
        case _:
            other = torch.empty(case.num_blocks, *inner[::-1], head_dim, dtype=dtype)
            return other.transpose(1, 2)
