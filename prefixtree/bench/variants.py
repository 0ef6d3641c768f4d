"""All that one run of attention can be varied in, as a list to check against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from attention import Forest
from prefixtree.bench.trees import Tree, forest_of, level_tree, tree

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("NHD", "HND")


class Variant(NamedTuple):
    """One problem to check; the options are those of `attention.plan` and `attention.run`.

    Attributes:
        tree: name of one of `TREES`.
        alibi, kv_scales, node_weights: with random ALiBi slopes, scales of K and V for each KV
            head, temperature and log-weight for each node.
    """

    tree: str = "ragged"
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    value_head_dim: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    layout: str = "NHD"
    window: int | None = None
    sink_tokens: int = 0
    softcap: float | None = None
    scale: float | None = None
    alibi: bool = False
    kv_scales: bool = False
    node_weights: bool = False
    batch_invariant: bool = False

    @property
    def name(self) -> str:
        """What differs from the plainest one."""
        changed = {
            field: value
            for field, value in self._asdict().items()
            if value != self._field_defaults[field]
        }
        shown = (field if value is True else f"{field} {value}" for field, value in changed.items())
        return ", ".join(shown) or "plain"


def variants() -> list[Variant]:
    """Each once: all trees in all dtypes and layouts, then head sizes, groups and options."""
    return list(dict.fromkeys(_variants()))


def interpretable(of: list[Variant]) -> list[Variant]:
    """What Triton's interpreter computes right of variants, in their place.

    It multiplies bfloat16 as bits, so float16 stands for it; and numpy rounds a product by the
    row's place in the matrix, so nothing is claimed of equal bits in other batches.
    """
    return list(
        dict.fromkeys(
            variant._replace(
                dtype="float16" if variant.dtype == "bfloat16" else variant.dtype,
                batch_invariant=False,
            )
            for variant in of
        )
    )


def _variants() -> Iterator[Variant]:
    plain = Variant()
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for name in TREES:
                yield plain._replace(tree=name, dtype=dtype, layout=layout)
    for dtype in DTYPES:
        for head_dim in (32, 80, 96, 128, 256):
            yield plain._replace(head_dim=head_dim, dtype=dtype)
    yield plain._replace(head_dim=192, value_head_dim=128)
    for dtype in ("bfloat16", "float16"):
        latent = plain._replace(num_q_heads=16, num_kv_heads=1, head_dim=576, value_head_dim=512)
        yield latent._replace(dtype=dtype)
    for group in (1, 3, 5, 6, 7, 8, 16, 32):
        for name in ("ragged", "drafts"):
            yield plain._replace(num_q_heads=2 * group, tree=name)
    options: list[Variant] = [
        plain._replace(window=1),
        plain._replace(window=33),
        plain._replace(window=20, sink_tokens=4),
        plain._replace(softcap=20.0),
        plain._replace(scale=0.3),
        plain._replace(alibi=True),
        plain._replace(node_weights=True),
        plain._replace(kv_scales=True),
        plain._replace(window=50, sink_tokens=2, softcap=30.0, alibi=True, node_weights=True),
    ]
    for option in options:
        for dtype in ("bfloat16", "float32"):
            for name in ("ragged", "prompt", "drafts"):
                yield option._replace(dtype=dtype, tree=name)
    for kv_dtype in ("float8_e4m3fn", "float8_e5m2"):
        for layout in LAYOUTS:
            yield plain._replace(kv_dtype=kv_dtype, kv_scales=True, layout=layout)
        yield plain._replace(kv_dtype=kv_dtype, head_dim=128, kv_scales=True, tree="wide")
    for dtype in DTYPES:
        for name in TREES:
            yield plain._replace(batch_invariant=True, dtype=dtype, tree=name)


def _ragged() -> tuple[Tree, int, list[int]]:
    """Nodes of 1 to 60 tokens anywhere below others, some on their parent's last block."""
    rng = np.random.default_rng(7)
    parent = np.append([-1, -1], [rng.integers(0, node) for node in range(2, 30)])
    # A block's rest has room for one child.
    first_child = np.zeros(30, np.bool_)
    first_child[np.unique(parent[2:], return_index=True)[1] + 2] = True
    length = rng.integers(1, 60, 30)
    leaf = rng.integers(0, 30, 12)
    shaped = tree(parent, length, leaf, first_child)
    chunk = np.minimum(rng.integers(1, 9, 12), shaped.path_lengths())
    return shaped, 16, chunk.tolist()


def _prompt() -> tuple[Tree, int, list[int]]:
    """A chunk of a prompt behind a cached prefix, one whole prompt, and decodes beside them."""
    shaped = tree(np.array([-1, 0, 0, -1]), np.array([70, 90, 5, 45]), np.array([1, 2, 3]))
    return shaped, 16, [85, 2, 45]


def _drafts() -> tuple[Tree, int, list[int]]:
    """A query on every token of a tree of drafts."""
    draft = np.arange(24)
    parent = np.append(-1, draft // 3)
    length = np.append(130, np.ones(24, np.int64))
    return tree(parent, length, 1 + draft), 8, [1] * 24


def _wide() -> tuple[Tree, int, list[int]]:
    """More sequences on a node than a tile has rows, on blocks of odd size."""
    lengths = 1 + np.arange(150) % 7
    return level_tree((1, 150), (50, lengths)), 5, [1] * 150


def _chain() -> tuple[Tree, int, list[int]]:
    """Nodes of one token, one below the other, in blocks of one token."""
    return tree(np.arange(-1, 39), np.ones(40, np.int64), np.array([39, 20])), 1, [1, 3]


def _forest() -> tuple[Tree, int, list[int]]:
    """Four levels under two roots."""
    return level_tree((2, 4, 16, 32), (64, 16, 8, 3)), 16, [1] * 32


def _long() -> tuple[Tree, int, list[int]]:
    """One sequence that must be cut for balance, beside a short one."""
    return tree(np.array([-1, 0, 0]), np.array([16, 3000, 7]), np.array([1, 2])), 32, [1, 1]


def _single() -> tuple[Tree, int, list[int]]:
    """One token, one query."""
    return tree(np.array([-1]), np.array([1])), 16, [1]


TREES = {
    "ragged": _ragged,
    "prompt": _prompt,
    "drafts": _drafts,
    "wide": _wide,
    "chain": _chain,
    "forest": _forest,
    "long": _long,
    "single": _single,
}
"""Small trees that are odd in one way each: the tree, its block size, queries of each sequence."""


def forest_named(name: str) -> tuple[Forest, int]:
    """The forest of one of `TREES`, its blocks in no order, and the number of blocks."""
    shaped, block_size, query_len = TREES[name]()
    forest, num_blocks = forest_of(shaped, block_size, shuffle=3)
    return replace(forest, query_len=np.array(query_len, np.int64)), num_blocks
