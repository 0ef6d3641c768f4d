"""The checks find what is wrong: every kind of damage, one at a time."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

import prefixtree as pt
from allocator import InvalidArgument, OutOfBlocks
from prefixtree.check import check_nodes, check_sample
from prefixtree.tree import ROOT


class Scene:
    """A small cache with a node of each kind, and hands on its insides.

    Nodes by name: `top` [1, 2, 3], pinned for good and by sequences; `middle` [4, 5, 6] below it,
    its first block shared; below that `lower` [7 .. 10], a leaf that shares its first block, `tail`
    [50, 51], committed, and `fresh` [60], uncommitted; `leaf` [7, 7]; `forked` [9, 9, 9] with the
    empty tails `goes_on` (behind it in its block) and `fork`; `space`, the root of a namespace with
    the leaf `inside` in it, and `other_space`. `free` is a row without a node.
    """

    def __init__(self) -> None:
        self.cache = cache = pt.PrefixCache(40, 4, reserve_block_0=True)
        self.done([*range(1, 11)])
        self.done([7, 7])
        self.done([5, 5, 5], namespace="a")
        self.done([6], namespace="b")
        self.pin = cache.pin([1, 2, 3])
        self.sequences = [cache.open([*range(1, 7), 50, 51]), cache.open([*range(1, 7), 60])]
        self.sequences[0].commit(8)
        original = cache.open([9, 9, 9])
        original.commit(3)
        self.sequences += [original, *original.fork(1)]
        self.tree, self.pool, self.pins = cache._tree, cache._pool, cache._pins
        self.nodes = self.tree.nodes
        self.tail, self.fresh, self.goes_on, self.fork = (one._tail for one in self.sequences)
        self.middle = self.nodes.parent[self.tail]
        self.top = self.nodes.parent[self.middle]
        self.lower = self.child(self.middle, 7)
        self.leaf = self.child(ROOT, 7)
        self.forked = self.child(ROOT, 9)
        self.space, self.other_space = self.tree.root_of("a"), self.tree.root_of("b")
        self.inside = self.child(self.space, 5)
        self.free = self.nodes.top
        cache.check()
        check_nodes(cache._state(), self.all())

    def done(self, prompt: list[int], namespace: str = "") -> None:
        with self.cache.open(prompt, namespace=namespace) as sequence:
            sequence.commit(len(prompt))

    def child(self, node: int, token: int) -> int:
        return self.tree.child(node, np.array([token], np.int32).tobytes())

    def all(self) -> Any:
        return self.nodes.rows()[1:]

    def block(self, node: int, at: int = 0) -> int:
        return int(self.tree.blocks.get(node)[at])

    def put_block(self, node: int, at: int, block: int) -> None:
        self.tree.blocks.get(node)[at] = block

    def hold(self, node: int, at: int, block: int) -> None:
        """As `put_block`, with reference counts that fit."""
        self.pool.retain([block])
        self.pool.release([self.block(node, at)])
        self.put_block(node, at, block)

    def set(self, **fields: Any) -> None:
        """`field__name=value` sets the field of the node of that name."""
        for key, value in fields.items():
            field, name = key.split("__")
            getattr(self.nodes, field)[getattr(self, name)] = value


class Damage(NamedTuple):
    """What is done, what the full check says, and what the checks of single nodes say if they can
    see it (None where only a recount can)."""

    do: Callable[[Scene], object]
    full: str
    nodes: str | None

    @classmethod
    def same(cls, do: Callable[[Scene], object], message: str) -> Damage:
        return cls(do, message, message)


def table(message: str, **fields: Any) -> Damage:
    return Damage.same(lambda scene: scene.set(**fields), message)


ORDER = "in the eviction order"

DAMAGES: dict[str, Damage] = {
    "parent is no row": table("which is no node", parent__leaf=10**6),
    "parent is negative": table("hangs below -1, which is no node", parent__leaf=-1),
    "parent is itself": Damage.same(
        lambda s: s.set(parent__lower=s.lower), "hangs below .*, which is no node"
    ),
    "parent is free": Damage.same(lambda s: s.set(parent__leaf=s.free), "which is free"),
    "parent is a tail": Damage.same(
        lambda s: s.set(parent__fresh=s.tail, start__fresh=8), "hangs below the tail"
    ),
    "parent is another": Damage.same(
        lambda s: s.set(parent__inside=ROOT), "is not found from its parent 0"
    ),
    "length is negative": table("has -1 tokens", length__lower=-1),
    "length is 0": table("neither in the tree nor a tail", length__leaf=0),
    "length is more": table("has 3 tokens but 8 bytes of them", length__leaf=3),
    "length is less": Damage(lambda s: s.set(length__leaf=1), "21 cached tokens, recount 20", None),
    "length of an inner node": table("not where its parent ends", length__top=2),
    "start": table("starts at 7, not where its parent ends, 6", start__lower=7),
    "a tail without writer": Damage(
        lambda s: s.set(writer__tail=0),
        "is not the tail of open sequence",
        "has writer 0, but open sequences say otherwise",
    ),
    "a node with a writer": table(
        "has writer 5, but open sequences say otherwise", writer__lower=5
    ),
    "a tail of another": Damage(
        lambda s: s.set(writer__tail=s.nodes.writer[s.fresh]),
        "is not the tail of open sequence",
        "is the tail of another open sequence",
    ),
    "an open sequence too many": Damage(
        lambda s: s.cache._open.update({99: s.leaf}),
        "is not the tail of open sequence 99",
        "has writer 0, but open sequences say otherwise",
    ),
    "an open sequence forgotten": Damage.same(
        lambda s: s.cache._open.pop(s.nodes.writer[s.tail]), "but open sequences say otherwise"
    ),
    "an open sequence on a free row": Damage(
        lambda s: s.cache._open.update({99: s.free}), "not the tail of open sequence 99", None
    ),
    "a namespace below another": Damage.same(
        lambda s: s.set(parent__space=s.other_space), "is not at the top"
    ),
    "a namespace without anything": Damage.same(
        lambda s: s.tree.add_root("c"), "is the root of a namespace without anything"
    ),
    "a namespace with a node for its root": Damage(
        lambda s: s.tree._root_of.update(c=s.leaf), "namespace 'c' has node", None
    ),
    "a root with tokens": Damage(
        lambda s: s.set(length__space=1), "namespace 'a' has node", "not where its parent ends"
    ),
    "the root with tokens": Damage(
        lambda s: s.nodes.length.__setitem__(ROOT, 1),
        "the root is not empty",
        "not where its parent ends, 1",
    ),
    "an empty tail is linked": table("is empty but linked", linked__fresh=1),
    "a node is not linked": table("has tokens but is not linked", linked__leaf=0),
    "a tail has committed more": table("2 tokens to be found of 3 committed", written__tail=3),
    "a tail has fewer tokens": Damage.same(
        lambda s: s.tree.tail_tokens.truncate(s.tail, 1), "has 1 tokens, 2 of them committed"
    ),
    "offset past the block": table("begins at 4 of a block", offset__leaf=4),
    "offset before the block": table("begins at -1 of a block", offset__leaf=-1),
    "a block too few": Damage.same(
        lambda s: s.tree.blocks.truncate(s.leaf, 0), "holds 0 blocks but needs 1"
    ),
    "a block too many": Damage.same(
        lambda s: s.tree.blocks.truncate(s.leaf, 2), "holds 2 blocks but needs 1"
    ),
    "a block past the pool": Damage.same(
        lambda s: s.put_block(s.leaf, 0, 40), "holds block 40 of 40"
    ),
    "a negative block": Damage.same(lambda s: s.put_block(s.leaf, 0, -1), "holds block -1 of 40"),
    "a free block": Damage.same(
        lambda s: s.put_block(s.leaf, 0, 39), "holds block 39, which has 0 references"
    ),
    "another node's block": Damage(
        lambda s: s.put_block(s.leaf, 0, s.block(s.inside)),
        "has 1 references but is on 0 nodes and 0 times aside",
        None,
    ),
    "a reference too many": Damage(
        lambda s: s.pool.retain([s.block(s.leaf)]),
        "has 2 references but is on 1 nodes and 0 times aside",
        None,
    ),
    "a reference too few": Damage(
        lambda s: s.pool._refs.__setitem__(s.block(s.middle), 1),
        "has 1 references but is on 2 nodes",
        None,
    ),
    "no reference": Damage(
        lambda s: s.pool._refs.__setitem__(s.block(s.leaf), 0),
        "is not free with 0 references",
        "free and .* used blocks are not all 40",
    ),
    "a block aside too many": Damage(
        lambda s: s.cache._tails._retired.update({s.tail: np.array([s.block(s.leaf)], np.int32)}),
        "has 1 references but is on 1 nodes and 1 times aside",
        None,
    ),
    "two nodes on a slot": Damage(
        lambda s: s.hold(s.leaf, 0, s.block(s.inside)), r"slot \d+ belongs to nodes", None
    ),
    "a block twice": Damage(
        lambda s: s.hold(s.lower, 1, s.block(s.lower)), "holds block .* twice", None
    ),
    "a block on two branches": Damage(
        lambda s: s.hold(s.lower, 0, s.block(s.leaf)),
        "which are not on one path",
        "misjudges who holds its first block",
    ),
    "shares, but does not say so": table(
        "misjudges who holds its first block", shares_first__lower=0
    ),
    "says that it shares what it does not": Damage.same(
        lambda s: (s.hold(s.lower, 0, s.pool.allocate(1)[0]), s.pool.release([s.block(s.lower)])),
        "misjudges who holds its first block",
    ),
    "says that it shares a block from its beginning": table(
        "shares a first block that it does not have", shares_first__leaf=1
    ),
    "says that it shares no block": table(
        "shares a first block that it does not have", shares_first__fork=1
    ),
    "too few bytes of tokens": Damage.same(
        lambda s: s.tree.tokens.__setitem__(s.lower, s.tree.tokens[s.lower][:4]),
        "has 4 tokens but 4 bytes of them",
    ),
    "another first token": Damage.same(
        lambda s: s.tree.tokens.__setitem__(s.leaf, bytes(8)), "is not found from its parent"
    ),
    "an edge is missing": Damage.same(
        lambda s: s.tree._child.pop(7 << 32 | ROOT), "is not found from its parent 0, which has -1"
    ),
    "an edge leads elsewhere": Damage.same(
        lambda s: s.tree._child.update({7 << 32 | ROOT: s.lower}), "is not found from its parent 0"
    ),
    "an edge too many": Damage(
        lambda s: s.tree._child.update({8 << 32 | ROOT: s.leaf}), "edges for", None
    ),
    "children of an inner node": Damage(
        lambda s: s.set(children__middle=3), "has 2 children, not 3 as said", None
    ),
    "children of the root": Damage(
        lambda s: s.nodes.children.__setitem__(ROOT, 9), "node 0 has 3 children, not 9", None
    ),
    "children of a leaf": Damage(
        lambda s: s.set(children__leaf=1),
        "has 0 children, not 1 as said",
        "with 0 pins and 1 children is in the eviction order",
    ),
    "a row is used and free": Damage(
        lambda s: s.nodes._free.append(s.leaf), "nodes counted, .* in use", None
    ),
    "cached tokens": Damage(
        lambda s: setattr(s.tree, "cached_tokens", 22), "22 cached tokens, recount 21", None
    ),
    "cached tokens beyond all blocks": Damage(
        lambda s: setattr(s.tree, "cached_tokens", 161), "161 cached tokens, recount", "161 cached"
    ),
    "branches": Damage(
        lambda s: setattr(s.tree, "branches", 9), "9 nodes with nodes below them, recount", None
    ),
    "pins of a leaf": Damage(
        lambda s: s.set(pins__leaf=1),
        "has 1 pins, 0 paths in use end there or pass",
        "with 1 pins and 0 children is in the eviction order",
    ),
    "pins grow downward": Damage(
        lambda s: s.set(pins__middle=9), "has 9 pins, 2 paths", "has 9 pins, more than .* above it"
    ),
    "pins of an inner node": Damage(
        lambda s: s.set(pins__top=9), "has 9 pins, 3 paths in use", None
    ),
    "negative pins": Damage(lambda s: s.set(pins__leaf=-1), "has -1 pins, 0 paths", "has -1 pins"),
    "no pins on a tail": Damage(
        lambda s: s.set(pins__tail=0),
        "has 0 pins, 1 paths",
        "with 0 pins and 0 children is not in the eviction order",
    ),
    "pinned for good twice": Damage(
        lambda s: s.cache._kept.append(s.top), "has 3 pins, 4 paths in use", None
    ),
    "a free row is pinned for good": Damage(
        lambda s: s.cache._kept.append(s.free), "is pinned for good, but free", None
    ),
    "evictable tokens": Damage(
        lambda s: setattr(s.pins, "evictable_tokens", 9), "9 evictable tokens, recount 10", None
    ),
    "negative evictable tokens": Damage(
        lambda s: setattr(s.pins, "evictable_tokens", -1),
        "-1 evictable tokens, recount 10",
        "-1 evictable of 21 cached tokens",
    ),
    "evictable blocks": Damage(
        lambda s: setattr(s.pins, "evictable_blocks", 5), "5 evictable blocks, recount 4", None
    ),
    "evictable blocks beyond all": Damage(
        lambda s: setattr(s.pins, "evictable_blocks", 41),
        "41 evictable blocks, recount 4",
        "41 evictable of .* used blocks",
    ),
    "a leaf not in the order": Damage.same(lambda s: s.pins.order.discard(s.leaf), f"not {ORDER}"),
    "an inner node in the order": Damage(
        lambda s: s.pins._enqueue(s.middle), f"{ORDER}, is no unpinned leaf", f"is {ORDER}"
    ),
    "the order counts one too many": Damage(
        lambda s: s.pins.order._key.update({s.middle: 0}), "leaves in the order", f"is {ORDER}"
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_and_named(name: str) -> None:
    damage = DAMAGES[name]
    for call in (lambda cache: cache.check(), lambda cache: cache.check(sample=1_000)):
        scene = Scene()
        damage.do(scene)
        with pytest.raises(pt.BrokenInvariant, match=damage.full):
            call(scene.cache)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checks_of_single_nodes_find_what_can_be_seen_there(name: str) -> None:
    damage = DAMAGES[name]
    scene = Scene()
    damage.do(scene)
    if damage.nodes is None:
        check_nodes(scene.cache._state(), scene.all())
    else:
        with pytest.raises(pt.BrokenInvariant, match=damage.nodes):
            check_nodes(scene.cache._state(), scene.all())


def test_an_odd_length_under_block_alignment() -> None:
    for look in (
        lambda cache: cache.check(),
        lambda cache: check_nodes(cache._state(), np.array([1])),
    ):
        cache = pt.PrefixCache(8, 4, align="block")
        with cache.open([1, 2, 3, 4]) as sequence:
            sequence.commit(4)
        cache._tree.nodes.length[1] = 3
        with pytest.raises(pt.BrokenInvariant, match="has 3 tokens, no multiple of 4"):
            look(cache)


@pytest.mark.parametrize(("field", "value"), [("start", 1), ("length", 2), ("parent", "middle")])
def test_damage_above_a_sampled_node_is_found_on_its_path(field: str, value: Any) -> None:
    """Also a path that leads round in circles."""
    scene = Scene()
    scene.set(**{f"{field}__top": getattr(scene, value) if value == "middle" else value})
    with pytest.raises(pt.BrokenInvariant, match=f"above or at {scene.lower}, does not start"):
        check_nodes(scene.cache._state(), np.array([scene.lower]))


def test_pins_above_a_sampled_node_are_compared_on_its_path() -> None:
    scene = Scene()
    scene.set(pins__top=1)
    with pytest.raises(pt.BrokenInvariant, match=f"node {scene.middle} has 2 pins, more than"):
        check_nodes(scene.cache._state(), np.array([scene.lower]))


def test_a_small_sample_finds_damage_sooner_or_later() -> None:
    """Each sample of 5 of these 1,001 nodes finds the one damaged with a probability of 1/200."""
    cache = pt.PrefixCache(2_000, 4)
    for leaf in range(1_000):
        with cache.open([1, 2, 2_000 + leaf]) as sequence:
            sequence.commit(3)
    state = cache._state()
    node = cache._tree.nodes.top // 2
    draw = np.random.default_rng(1)

    def look(times: int) -> None:
        for _ in range(times):
            check_sample(state, 5, draw)

    look(100)
    cache._tree.nodes.shares_first[node] ^= 1
    with pytest.raises(pt.BrokenInvariant, match=f"node {node} "):
        look(5_000)


def test_a_sample_of_a_table_with_few_nodes_left_looks_at_those() -> None:
    cache = pt.PrefixCache(2_000, 4)
    for leaf in range(1_000):
        with cache.open([leaf, 0]) as sequence:
            sequence.commit(2)
    cache.evict(990)
    draw = np.random.default_rng(1)

    def look(times: int) -> None:
        for _ in range(times):
            check_sample(cache._state(), 5, draw)

    look(20)
    node = int(cache._tree.nodes.rows()[-1])
    cache._pins.order.discard(node)
    with pytest.raises(pt.BrokenInvariant, match=f"node {node} "):
        look(5_000)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3"])
def test_a_sample_of_no_size_is_refused(bad: Any) -> None:
    cache = pt.PrefixCache(4)
    with pytest.raises(InvalidArgument, match=f"sample is {re.escape(repr(bad))}"):
        cache.check(sample=bad)
    cache.check(sample=3)


@pytest.mark.parametrize("align", ["token", "block"])
@pytest.mark.parametrize("seed", range(6))
def test_what_calls_do_is_never_called_damage(seed: int, align: Literal["token", "block"]) -> None:
    draw = random.Random(seed)
    cache = pt.PrefixCache(60, 3, align=align, reserve_block_0=bool(seed % 2))
    held: list[pt.Sequence] = []
    parked: list[pt.Sequence] = []
    pins: list[pt.Pin] = []

    def prompt() -> list[int]:
        return [draw.randrange(2) for _ in range(draw.randint(1, 14))]

    def one() -> pt.Sequence:
        return draw.choice(held)

    def drop() -> None:
        held.pop(draw.randrange(len(held))).close()

    def fork() -> None:
        sequence = one()
        sequence.commit(len(sequence))
        held.extend(sequence.fork(draw.randint(1, 3)))

    def roll_back() -> None:
        sequence = one()
        room = len(sequence) - max(1, sequence.fork_len)
        sequence.rollback(draw.randint(0, max(0, room)))

    def commit() -> None:
        sequence = one()
        sequence.commit(draw.randint(sequence.committed, len(sequence)))

    def preempt() -> None:
        parked.append(held.pop(draw.randrange(len(held))))
        parked[-1].preempt()

    def resume() -> None:
        if parked:
            sequence = parked.pop()
            try:
                sequence.resume()
                held.append(sequence)
            except OutOfBlocks:
                sequence.close()

    def namespace() -> str:
        return draw.choice(["", "a"])

    calls: list[Callable[[], object]] = [
        lambda: held.append(cache.open(prompt(), namespace=namespace())),
        lambda: pins.append(cache.pin(prompt(), namespace=namespace())),
        lambda: pins.pop().unpin() if pins else None,
        lambda: cache.evict(draw.randint(0, 6)),
        lambda: cache.forget(prompt()),
        resume,
    ]
    busy: list[Callable[[], object]] = [
        *[commit, commit, roll_back, fork, drop, preempt],
        lambda: cache.append([one()], [draw.randrange(2)]),
        lambda: cache.commit(draw.sample(held, draw.randint(1, len(held)))),
    ]
    for _ in range(250):
        try:
            draw.choice(calls + busy if held else calls)()
        except OutOfBlocks:
            drop()
        cache.check()
        check_nodes(cache._state(), cache._tree.nodes.rows()[1:])
