"""The trees and heads that attention is measured on: those of the published systems, and ours.

A tree is written as the nodes of its levels and their tokens, as in `level_tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from prefixtree.bench.trees import Tree, level_tree, tree


@dataclass(frozen=True)
class Shape:
    """One decode step: a tree with a query on each of its sequences, the heads, the block size."""

    suite: str
    name: str
    tree: Tree
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    block_size: int = 16

    @property
    def heads(self) -> str:
        return f"{self.num_q_heads}/{self.num_kv_heads}"

    @property
    def path_tokens(self) -> int:
        """Tokens of all paths together: what is read where nothing is shared."""
        return int(self.tree.path_lengths().sum())

    @property
    def flops(self) -> int:
        """Floating-point operations of the attention, shared or not."""
        return 4 * self.num_q_heads * self.head_dim * self.path_tokens

    def path_bytes(self, itemsize: int) -> int:
        """Bytes of K and V of all paths together, for elements of so many bytes."""
        return 2 * self.num_kv_heads * self.head_dim * itemsize * self.path_tokens


class UnknownSuite(ValueError):
    """No shapes of that name; the message says which there are."""


Levels = tuple[Sequence[int], Sequence[int]]

_DOUBLING = (1, 2, 4, 8, 16, 32, 64, 128, 1024)
_FASTTREE: tuple[Levels, ...] = (
    ((1, 2, 64), (8, 256, 32)),
    ((1, 4, 256), (8, 256, 32)),
    ((1, 4, 8, 256), (8, 256, 256, 32)),
    ((1, 256), (256, 32)),
    ((1, 1024), (2048, 32)),
    ((1, 16, 64), (1024, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
    ((1, 10), (4000, 400)),
    (_DOUBLING, (16,) * 9),
    (_DOUBLING, (256, 128, 64, *(16,) * 6)),
    ((1, 8, 16, 32, 64, 128, 1024), (256, 128, 64, *(16,) * 4)),
    ((1, 16, 32, 64, 128, 1024), (256, 128, 64, *(16,) * 3)),
)
_PAT: tuple[Levels, ...] = (
    ((1, 10), (4096, 416)),
    ((1, 2, 64), (1024, 256, 256)),
    ((1, 4, 256), (32, 256, 32)),
    ((1, 8, 512), (32, 512, 256)),
    ((1, 8, 512), (32, 2048, 256)),
    ((1, 8, 512), (512, 512, 256)),
    ((1, 4, 16, 64, 256, 1024), (256, 32, 256, 64, 32, 256)),
    ((2, 8, 16, 256), (256, 256, 32, 32)),
    ((4, 16, 256, 512), (512, 32, 128, 32)),
    ((8, 16, 32, 256), (512, 512, 256, 32)),
    ((256,), (1024,)),
    ((256,), (4096,)),
)
_DEFT_PROMPTS = (1000, 2000, 4000, 6000, 8000, 16_000, 20_000)
_HYDRAGEN = ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
_SMALL: tuple[tuple[Levels, tuple[int, int]], ...] = (
    (((1, 32), (2048, 64)), (32, 8)),
    (((1, 32), (2048, 64)), (8, 8)),
    (((1, 4, 32), (512, 256, 64)), (32, 8)),
    (((1, 4, 16, 64), (512, 128, 64, 32)), (32, 8)),
)


def fasttree() -> Iterator[Shape]:
    """FastTree (MLSys 2025)."""
    for levels, heads in product(_FASTTREE, ((16, 1), (32, 8), (32, 32))):
        yield Shape("fasttree", _named(levels), level_tree(*levels), *heads)


def pat() -> Iterator[Shape]:
    """PAT (ASPLOS 2026): trees, forests, and batches that share nothing."""
    for levels, heads in product(_PAT, ((32, 32), (16, 8), (32, 8), (64, 8))):
        yield Shape("pat", _named(levels), level_tree(*levels), *heads, block_size=32)


def deft() -> Iterator[Shape]:
    """DeFT (arXiv 2404.00242): few-shot prompts and trees of drafts, heads of Llama 3.1 8B."""
    for samples, prompt in product((20, 30, 50), _DEFT_PROMPTS):
        levels = (1, samples), (prompt, 400)
        yield Shape("deft", _named(levels), level_tree(*levels), 32, 8)
    for drafts, prompt in product((32, 64), _DEFT_PROMPTS):
        name = f"{drafts} drafts on {prompt}"
        yield Shape("deft", name, _draft_tree(drafts, prompt), 32, 8)


def hydragen() -> Iterator[Shape]:
    """Hydragen's microbenchmark (arXiv 2402.05099), and suffixes of any length between its own."""
    for (batch, prefix), suffix in product(_HYDRAGEN, range(0, 513, 16)):
        samples = level_tree((1, batch), (prefix, suffix)) if suffix else _one_node(prefix, batch)
        yield Shape("hydragen", f"{batch} on {prefix} + {suffix}", samples, 8, 1)
    for batch, prefix in _HYDRAGEN:
        suffixes = np.random.default_rng(batch).integers(1, 513, batch)
        ragged = level_tree((1, batch), (prefix, suffixes))
        yield Shape("hydragen", f"{batch} on {prefix} + 1 to 512", ragged, 8, 1)


def ours() -> Iterator[Shape]:
    """What the others leave out."""
    long_leaf = np.full(64, 64)
    long_leaf[17] = 16_384
    zipf = _zipf_tree(16, 256)
    chain = tree(np.arange(-1, 128), np.append(1024, np.ones(128, np.int64)), np.full(32, 128))
    bushes = level_tree((1, 2, 4, 8, 16, 32, 64, 128, 256), (512, *(1,) * 8))
    off = level_tree((1, 4, 64), (1000, 203, 37))
    first_child = np.append(True, off.parent[1:] != off.parent[:-1]) & (off.parent >= 0)
    off = off._replace(continues=first_child)
    for name, shaped in (
        ("one long branch", level_tree((1, 64), (1024, long_leaf))),
        ("Zipf fan-out", zipf),
        ("chain of nodes of 1", chain),
        ("bush of nodes of 1", bushes),
        ("splits inside blocks", off),
    ):
        yield Shape("ours", name, shaped, 32, 8)
    for group in (1, 3, 5, 6, 7, 8, 16):
        levels = (1, 8, 64), (1024, 256, 64)
        yield Shape("ours", f"group of {group}", level_tree(*levels), 4 * group, 4)
    for length in (512, 8192, 65_536):
        yield Shape("ours", f"batch 1, {length}", _one_node(length, 1), 32, 8)


def small() -> Iterator[Shape]:
    """Trees for a CPU."""
    for levels, heads in _SMALL:
        yield Shape("small", _named(levels), level_tree(*levels), *heads)


SUITES: dict[str, Callable[[], Iterator[Shape]]] = {
    "small": small,
    "fasttree": fasttree,
    "pat": pat,
    "deft": deft,
    "hydragen": hydragen,
    "ours": ours,
}


def shapes_of(suites: Sequence[str]) -> list[Shape]:
    """All shapes of these suites. Raises UnknownSuite."""
    for suite in suites:
        if suite not in SUITES:
            raise UnknownSuite(f"no shapes {suite!r}, expected {', '.join(SUITES)}")
    return [shape for suite in suites for shape in SUITES[suite]()]


def _named(levels: Levels) -> str:
    """nodes / tokens; what the last levels have in common is written once."""
    nodes, tokens = levels
    same = next(i for i in range(len(tokens)) if len(set(tokens[i:])) == 1)
    last = len(tokens) - same
    shown = [*map(str, tokens[:same]), f"{tokens[same]} x{last}" if last > 1 else f"{tokens[same]}"]
    return f"{','.join(map(str, nodes))} / {','.join(shown)}"


def _one_node(length: int, sequences: int) -> Tree:
    """All sequences at the end of one prompt."""
    leaf = np.zeros(sequences, np.int64)
    return tree(np.array([-1]), np.array([length]), leaf)


def _draft_tree(drafts: int, prompt: int) -> Tree:
    """Behind a prompt, a tree of draft tokens with four children each, a query on every one."""
    draft = np.arange(drafts)
    parent = np.append(-1, draft // 4)
    length = np.append(prompt, np.ones(drafts, np.int64))
    return tree(parent, length, 1 + draft)


def _zipf_tree(inner: int, leaves: int) -> Tree:
    """A prompt, `inner` nodes below, and leaves whose parents are drawn from a Zipf law."""
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, inner + 1)
    below = 1 + np.sort(rng.choice(inner, leaves, p=weight / weight.sum()))
    parent = np.concatenate([[-1], np.zeros(inner, np.int64), below])
    length = np.concatenate([[1024], np.full(inner, 256), np.full(leaves, 64)])
    return tree(parent, length, 1 + inner + np.arange(leaves))
