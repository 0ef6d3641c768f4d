"""Snapshots: what comes back is what was there, and nothing else is ever let in."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import prefixtree as pt
from allocator import KVMismatch, KVStorage, OutOfBlocks
from prefixtree import snapshot, tensor_file

from .model import Namespace

NAMESPACES: list[Namespace] = ["", "b", "ü\ud800", ("a", 1, None), ("a", "1", None), ()]
POLICIES = ["lru", "mru", "fifo", "lfu", "slru"]
NUM_BLOCKS = 24

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
a_step = st.one_of(
    st.tuples(
        st.just("open"),
        st.sampled_from(NAMESPACES),
        tokens,
        st.floats(0, 1),
        st.booleans(),
    ),
    st.tuples(st.just("append"), st.integers(0, 9), tokens),
    st.tuples(st.just("fork"), st.integers(0, 9)),
    st.tuples(st.just("rollback"), st.integers(0, 9), st.integers(1, 4)),
    st.tuples(st.just("close"), st.integers(0, 9)),
    st.tuples(st.just("pin"), st.sampled_from(NAMESPACES), tokens),
    st.tuples(st.just("evict"), st.integers(1, 3)),
)
steps = st.lists(a_step, min_size=1, max_size=25)


class Run:
    """A cache, and what runs on it."""

    def __init__(self, block_size: int, script: list[Any], eviction: str = "lru") -> None:
        self.cache = pt.PrefixCache(NUM_BLOCKS, block_size, eviction=eviction)
        self.running: list[pt.Sequence] = []
        self.pins: list[pt.Pin] = []
        for what, *arguments in script:
            with suppress(OutOfBlocks, pt.RollbackPastFork, pt.InvalidLength, pt.NotCommitted):
                getattr(self, what)(*arguments)

    def open(self, namespace: Namespace, prompt: list[int], part: float, ends: bool) -> None:
        sequence = self.cache.open(prompt, namespace=namespace)
        self.running.append(sequence)
        sequence.commit(max(sequence.committed, round(part * len(prompt))))
        if ends:
            self.running.remove(sequence)
            sequence.close()

    def some(self, index: int) -> list[pt.Sequence]:
        return [self.running[index % len(self.running)]] if self.running else []

    def append(self, index: int, added: list[int]) -> None:
        for sequence in self.some(index):
            self.cache.append([sequence], added, [len(added)])
            sequence.commit(len(sequence) - len(added) // 2)

    def fork(self, index: int) -> None:
        for sequence in self.some(index):
            self.running.extend(sequence.fork(2))

    def rollback(self, index: int, count: int) -> None:
        for sequence in self.some(index):
            sequence.rollback(count)

    def close(self, index: int) -> None:
        for sequence in self.some(index):
            self.running.remove(sequence)
            sequence.close()

    def pin(self, namespace: Namespace, prefix: list[int]) -> None:
        self.pins.append(self.cache.pin(prefix, namespace=namespace))

    def evict(self, count: int) -> None:
        self.cache.evict(count)

    def stop(self) -> None:
        for sequence in self.running:
            sequence.close()
        for pin in self.pins:
            pin.unpin()
        self.running, self.pins = [], []


Paths = dict[tuple[Namespace, tuple[int, ...]], list[int]]


def paths(cache: pt.PrefixCache) -> Paths:
    """The slots of every node's path."""
    tree = cache._tree
    namespace_of = {root: name for name, root in tree.roots()}
    found: Paths = {}
    for node in np.flatnonzero(np.asarray(tree.nodes.length)).tolist():
        path = [step for step in tree.path(node) if not tree.is_root(step)]
        ids = np.frombuffer(b"".join(map(tree.edge, path)), np.int32)
        slots = np.concatenate([tree.slots(step, 0, tree.nodes.length[step]) for step in path])
        found[namespace_of[tree.root_above(node)], tuple(ids.tolist())] = slots.tolist()
    return found


@contextmanager
def saved(cache: pt.PrefixCache, storage: KVStorage | None = None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.snapshot"
        cache.save(path, storage)
        assert os.listdir(folder) == [path.name]
        yield path


def restored(cache: pt.PrefixCache, **options: Any) -> pt.PrefixCache:
    with saved(cache) as path:
        return pt.PrefixCache.restore(path, **options)


@given(st.integers(1, 5), steps)
def test_what_is_committed_comes_back_in_its_slots(block_size: int, script: list[Any]) -> None:
    run = Run(block_size, script)
    before, stats = paths(run.cache), run.cache.stats()
    lengths = [(len(sequence), sequence.committed) for sequence in run.running]
    copy = restored(run.cache)

    run.cache.check()
    assert (paths(run.cache), run.cache.stats()) == (before, stats)
    assert [(len(sequence), sequence.committed) for sequence in run.running] == lengths

    copy.check()
    assert paths(copy) == before
    after = copy.stats()
    assert (after.cached_tokens, after.nodes) == (stats.cached_tokens, len(before))
    assert (after.open_sequences, after.pinned_tokens) == (0, 0)
    assert (after.num_blocks, after.block_size) == (NUM_BLOCKS, block_size)
    for (namespace, prefix), slots in before.items():
        assert copy.match([*prefix, 7], namespace=namespace) == (len(prefix), 0)
        with copy.open(prefix, namespace=namespace) as sequence:
            assert sequence.slots(0, len(prefix)).tolist() == slots
    copy.check()
    copy.clear()
    copy.check()
    assert copy.stats().free_blocks == NUM_BLOCKS
    assert paths(copy) == {}


@given(st.integers(1, 5), steps)
def test_blocks_in_use_are_not_handed_out(block_size: int, script: list[Any]) -> None:
    copy = restored(Run(block_size, script).cache)
    used, free = (
        {slot for slots in paths(copy).values() for slot in slots},
        copy.stats().free_blocks,
    )
    assert free == NUM_BLOCKS - len({slot // block_size for slot in used})
    if free:
        sequence = copy.open([9] * (free * block_size))
        sequence.commit(free * block_size)
        assert not used & set(sequence.slots(0, len(sequence)).tolist())
        assert (copy.stats().free_blocks, copy.stats().evicted_tokens) == (0, 0)
        copy.check()


@given(st.integers(1, 5), steps, st.sampled_from(POLICIES))
def test_what_rests_goes_in_the_same_order(block_size: int, script: list[Any], policy: str) -> None:
    run = Run(block_size, script, policy)
    run.stop()
    copy = restored(run.cache, eviction=policy)
    while run.cache.stats().cached_tokens:
        assert run.cache.evict(1) == copy.evict(1)
        assert paths(run.cache) == paths(copy)
    assert copy.stats().cached_tokens == 0


@given(st.integers(1, 5), steps)
def test_what_is_in_use_goes_last(block_size: int, script: list[Any]) -> None:
    run = Run(block_size, script)
    kept = Run(block_size, script)
    kept.cache.clear()
    in_use = paths(kept.cache).keys()
    copy = restored(run.cache)
    while run.cache.evict(1).blocks:
        copy.evict(1)
        assert paths(run.cache) == paths(copy)
    while copy.stats().cached_tokens:
        copy.evict(1)
        assert {path[0] for path in paths(copy)} <= {path[0] for path in in_use}


@given(st.integers(1, 5), steps, steps)
def test_life_goes_on(block_size: int, script: list[Any], more: list[Any]) -> None:
    run = Run(block_size, script)
    run.cache = restored(run.cache)
    run.running, run.pins = [], []
    for what, *arguments in more:
        with suppress(OutOfBlocks, pt.RollbackPastFork, pt.InvalidLength, pt.NotCommitted):
            getattr(run, what)(*arguments)
        run.cache.check()
    again = restored(run.cache)
    again.check()
    assert paths(again) == paths(run.cache)


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_what_comes_later_is_newer(policy: str) -> None:
    cache = pt.PrefixCache(8, 2)
    for token in range(6):
        with cache.open([token]) as sequence:
            sequence.commit(1)
    cache.evict(3)
    copy = restored(cache, eviction=policy)
    for token in (7, 8):
        with copy.open([token]) as sequence:
            sequence.commit(1)
    copy.evict(3)
    assert list(paths(copy)) == [("", (7,)), ("", (8,))]


def test_a_tail_that_went_on_below_others_tokens_shares_its_block_with_an_ancestor() -> None:
    """The block's other node is not the parent but further up."""
    cache = pt.PrefixCache(8, 8)
    first = cache.open([1, 2])
    first.commit(2)
    second = first.fork(1)[0]
    for sequence in (first, second):
        cache.append([sequence], [3])
    second.commit(3)
    cache.append([first], [4])
    first.commit(4)
    cache.check()
    tree = cache._tree
    parent = tree.nodes.parent[first._tail]
    assert not set(tree.blocks.get(parent).tolist()) & set(tree.blocks.get(first._tail).tolist())
    copy = restored(cache)
    copy.check()
    assert paths(copy) == paths(cache)


def test_the_empty_cache() -> None:
    copy = restored(pt.PrefixCache(3, 2), thread_safe=True, eviction="fifo")
    copy.check()
    assert (copy.num_blocks, copy.block_size, copy.stats().free_blocks) == (3, 2, 3)
    with copy.open([1, 2, 3]) as sequence:
        sequence.commit(3)
    assert copy.match([1, 2, 3]).cached == 3


def test_saving_replaces_the_last_snapshot(tmp_path: Path) -> None:
    cache = pt.PrefixCache(8, 2)
    path = tmp_path / "it"
    for token in range(3):
        with cache.open([token, token]) as sequence:
            sequence.commit(2)
        cache.save(str(path))
    assert pt.PrefixCache.restore(str(path)).stats().nodes == 3
    assert os.listdir(tmp_path) == ["it"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_torch_for_a_tree_alone(tmp_path: Path) -> None:
    script = f"""
import sys
import prefixtree
assert not {{"torch", "safetensors", "xxhash"}} & sys.modules.keys()
prefixtree.PrefixCache(16, 4).save({str(tmp_path / "it")!r})
prefixtree.PrefixCache.restore({str(tmp_path / "it")!r}).check()
print("torch" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_safetensors_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pt.PrefixCache(4, 2).save(tmp_path / "it")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"prefixtree\[snapshot\]"):
        pt.PrefixCache.restore(tmp_path / "it")


# K and V


def some_cache(block_size: int = 4) -> pt.PrefixCache:
    """Splits inside blocks, a hole in the blocks in use, two namespaces, a running sequence."""
    cache = pt.PrefixCache(NUM_BLOCKS, block_size)
    gone = cache.open([5] * 9)
    for prompt in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9], [1, 2, 3, 4, 5, 8, 8, 8]):
        with cache.open(prompt) as sequence:
            sequence.commit(len(prompt))
    with cache.open([1, 2], namespace=("a", 1)) as sequence:
        sequence.commit(2)
    gone.close()
    sequence = cache.open([1, 2, 3, 9, 9, 9])
    sequence.commit(5)
    return cache


def storage_for(block_size: int = 4, **changed: Any) -> KVStorage:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_blocks": NUM_BLOCKS,
        "block_size": block_size,
        "num_kv_heads": 2,
        "head_dim": 3,
        "dtype": torch.float32,
        "value_head_dim": 5,
    }
    return KVStorage(**{**sizes, **changed})


def fill(storage: KVStorage) -> KVStorage:
    generator = torch.Generator().manual_seed(1)
    for tensor in (*storage.k, *storage.v):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return storage


@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 24])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_k_and_v_of_the_blocks_in_use_come_back(
    dtype: torch.dtype, layout: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", chunk_bytes)
    cache = some_cache()
    storage, copy = (storage_for(dtype=dtype, layout=layout) for _ in range(2))
    fill(storage)
    with saved(cache, storage) as path:
        restored = pt.PrefixCache.restore(path, copy)
        with safe_open(path, "pt") as file:
            assert file.get_tensor("v.1").dtype == dtype
        # Whoever wants the tree alone need not have the tensors.
        assert paths(pt.PrefixCache.restore(path)) == paths(cache)
    restored.check()
    assert paths(restored) == paths(cache)
    used = sorted({slot // 4 for slots in paths(cache).values() for slot in slots})
    assert used[-1] >= len(used), "there is a hole"
    for before, after in zip((*storage.k, *storage.v), (*copy.k, *copy.v), strict=True):
        expected = torch.zeros_like(before)
        expected[used] = before[used]
        assert torch.equal(after.view(torch.uint8), expected.view(torch.uint8))


def test_an_empty_cache_has_no_k_and_v() -> None:
    storage = fill(storage_for())
    before = storage.k[0].clone()
    with saved(pt.PrefixCache(NUM_BLOCKS, 4), storage) as path:
        pt.PrefixCache.restore(path, storage).check()
    assert torch.equal(storage.k[0], before)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_layers": 1},
        {"num_layers": 3},
        {"num_blocks": NUM_BLOCKS + 1},
        {"block_size": 8},
        {"num_kv_heads": 1},
        {"head_dim": 4},
        {"value_head_dim": 3},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float8_e4m3fnuz},
        {"layout": "HND"},
        {"layout": "HND", "num_kv_heads": 4},
    ],
    ids=str,
)
def test_another_storage_is_refused_and_not_written_to(changed: dict[str, Any]) -> None:
    other = storage_for(**changed)
    saved_heads = {"num_kv_heads": changed["num_kv_heads"]} if len(changed) > 1 else {}
    with (
        saved(some_cache(), fill(storage_for(**saved_heads))) as path,
        pytest.raises(pt.InvalidSnapshot, match=r"expected|the storage has"),
    ):
        pt.PrefixCache.restore(path, other)
    assert not any(tensor.any() for tensor in (*other.k, *other.v))


def test_a_snapshot_without_k_and_v_does_not_fill_a_storage() -> None:
    with saved(some_cache()) as path, pytest.raises(pt.InvalidSnapshot, match="no K and V"):
        pt.PrefixCache.restore(path, storage_for())


@pytest.mark.parametrize(
    "changed", [{"num_blocks": 7}, {"block_size": 5}, {"dtype": torch.float8_e4m3fnuz}], ids=str
)
def test_a_storage_that_is_not_the_caches_is_not_saved(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KVMismatch):
        some_cache().save(tmp_path / "it", storage_for(**changed))
    assert os.listdir(tmp_path) == []


def test_an_unknown_policy_leaves_the_storage_as_it_was() -> None:
    other = storage_for()
    with saved(some_cache(), fill(storage_for())) as path, pytest.raises(ValueError, match="lru"):
        pt.PrefixCache.restore(path, other, eviction="random")
    assert not other.k[0].any()


# Damage


@pytest.fixture(scope="module")
def whole() -> bytes:
    with saved(some_cache(), fill(storage_for())) as path:
        return path.read_bytes()


def refused(content: bytes, storage: KVStorage | None = None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it"
        path.write_bytes(content)
        with pytest.raises(pt.InvalidSnapshot) as caught:
            pt.PrefixCache.restore(path, storage)
    return str(caught.value)


def test_what_is_whole_is_accepted(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(whole)
    pt.PrefixCache.restore(tmp_path / "it", storage_for()).check()


@given(data=st.data())
def test_any_changed_byte_is_refused(whole: bytes, data: st.DataObject) -> None:
    head = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(st.integers(0, head - 1), st.integers(head, len(whole) - 1))
    at = data.draw(places, label="at")
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255), label="xor")
    refused(bytes(changed))


def test_every_truncation_is_refused(whole: bytes) -> None:
    for length in (*range(64), *range(64, len(whole), 29), len(whole) - 1):
        refused(whole[:length])


@pytest.mark.parametrize("more", [b"\0", b" " * 8, b"x" * 5000])
def test_a_longer_file_is_refused(whole: bytes, more: bytes) -> None:
    assert "checksum" in refused(whole + more)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 64,
        b"\xff" * 64,
        pickle.dumps({"a": 1}),
        (16).to_bytes(8, "little") + b"[1, 2, 3]       ",
        (16).to_bytes(8, "little") + b'{"__metadata__":',
        (24).to_bytes(8, "little") + b'{"__metadata__": [1, 2]}',
        (20000).to_bytes(8, "little") + b"[" * 20000,
        (99).to_bytes(8, "little") + b"{}",
    ],
    ids=repr,
)
def test_what_is_no_snapshot_is_refused(content: bytes) -> None:
    assert "no snapshot" in refused(content)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "it", {"format": "np"})
    with pytest.raises(pt.InvalidSnapshot, match="format is 'np', expected 'prefixtree-snapshot'"):
        pt.PrefixCache.restore(tmp_path / "it")


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it"
    some_cache().save(path)
    header = tensor_file.read_header(path, snapshot.KIND)
    pt.PrefixCache(3, 2).save(path)
    with pytest.raises(pt.InvalidSnapshot, match="replaced"):
        tensor_file.open_tensors(path, header, "np")


# Intent: the checksum is right, the contents are not


Arrays = dict[str, Any]


def rewritten(path: Path, change: Callable[[Arrays, dict[str, str]], None]) -> None:
    """Changes the arrays and metadata of a snapshot, and computes a new checksum."""
    arrays = {name: values.copy() for name, values in load_file(path).items()}
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    change(arrays, metadata)
    metadata.pop("checksum", None)
    names = {"uint8": "U8", "int32": "I32", "int64": "I64", "float32": "F32"}
    tensor_file.write(
        path,
        metadata,
        [
            tensor_file.TensorSource(
                name, names[values.dtype.name], values.itemsize, values.shape, [values.tobytes()]
            )
            for name, values in arrays.items()
        ],
    )


def put(name: str, index: int, value: int) -> Callable[[Arrays, dict[str, str]], None]:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        arrays[name][index] = value

    return change


def replace(name: str, make: Callable[[Any], Any]) -> Callable[[Arrays, dict[str, str]], None]:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        arrays[name] = make(arrays[name])

    return change


def drop(name: str) -> Callable[[Arrays, dict[str, str]], None]:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        del arrays[name]

    return change


def says(name: str, value: str) -> Callable[[Arrays, dict[str, str]], None]:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        metadata[name] = value

    return change


def names(value: Any) -> Callable[[Arrays, dict[str, str]], None]:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return replace("namespaces", lambda _: np.frombuffer(text, np.uint8))


def cycle(arrays: Arrays, metadata: dict[str, str]) -> None:
    """Two nodes, each below the other."""
    below = int(np.flatnonzero(arrays["parent"] >= 0)[0])
    arrays["parent"][arrays["parent"][below]] = below


def twin_roots(arrays: Arrays, metadata: dict[str, str]) -> None:
    """The node of another namespace moves over, where a node begins with its token."""
    arrays["parent"][arrays["parent"] == -2] = -1
    arrays["namespaces"] = np.frombuffer(b'[""]', np.uint8)


def share_between_namespaces(arrays: Arrays, metadata: dict[str, str]) -> None:
    """A node without children takes a block of another path, with slots of its own there."""
    node = int(np.flatnonzero(arrays["parent"] == -2)[0])
    at = held(arrays)[:node].sum()
    full = arrays["blocks"] == arrays["blocks"][at]
    assert full.sum() == 1
    other = int(np.flatnonzero(arrays["parent"] == -1)[0])
    assert arrays["length"][other] <= 3
    arrays["blocks"][at] = arrays["blocks"][held(arrays)[:other].sum()]
    arrays["offset"][node], arrays["length"][node] = 3, 1
    start = arrays["length"][:node].sum()
    arrays["tokens"] = np.delete(arrays["tokens"], start + 1)


def held(arrays: Arrays) -> Any:
    return -(-(arrays["offset"] + arrays["length"]) // 4)


TAMPERED = {
    "version": (says("version", "2"), "version is '2', expected '1'"),
    "format": (says("format", "x"), "format is 'x'"),
    "no blocks": (says("num_blocks", "0"), "num_blocks is '0'"),
    "negative": (says("num_blocks", "-4"), "num_blocks is '-4'"),
    "no number": (says("block_size", "four"), "block_size is 'four'"),
    "superscript": (says("block_size", "²"), "block_size is '²'"),
    "too many": (says("num_blocks", "4294967296"), "'4294967296', expected 1..2147483647"),
    "digits": (says("block_size", "9" * 6000), "block_size is '999"),
    "fewer blocks": (says("num_blocks", "3"), r"blocks\[\d+\] is \d+, expected 0..2"),
    "other block size": (says("block_size", "2"), "expected 0..1|blocks, expected"),
    "larger block size": (says("block_size", "64"), "blocks, expected|on both"),
    "cycle": (cycle, "starts at"),
    "own parent": (put("parent", 1, 1), "node 1 starts at"),
    "parent far": (put("parent", 2, 99), r"parent\[2\] is 99"),
    "parent below": (put("parent", 2, -9), r"parent\[2\] is -9"),
    "start": (put("start", 1, 2), "node 1 starts at 2"),
    "start huge": (put("start", 1, 2**63 - 1), r"start\[1\] is 9223372036854775807"),
    "length 0": (put("length", 0, 0), r"length\[0\] is 0"),
    "length negative": (put("length", 0, -(2**63)), r"length\[0\] is -9"),
    "length huge": (put("length", 0, 2**63 - 1), r"length\[0\] is 9223372036854775807"),
    "offset": (put("offset", 0, 4), r"offset\[0\] is 4, expected 0..3"),
    "offset negative": (put("offset", 0, -1), r"offset\[0\] is -1"),
    "token": (put("tokens", 0, -1), r"tokens\[0\] is -1"),
    "block": (put("blocks", 0, NUM_BLOCKS), r"blocks\[0\] is 24, expected 0..23"),
    "block negative": (put("blocks", 0, -1), r"blocks\[0\] is -1"),
    "last_used": (put("last_used", 0, 2**63 - 1), r"last_used\[0\]"),
    "created": (put("created", 0, 2**63 - 1), r"created\[0\]"),
    "uses": (put("uses", 0, -(2**63)), r"uses\[0\]"),
    "one slot twice": (
        replace("blocks", lambda blocks: np.full_like(blocks, blocks[0])),
        "cannot be on both nodes",
    ),
    "one slot of a parent": (put("offset", 1, 0), "cannot be on both nodes 4 and 1"),
    "siblings alike": (twin_roots, "two children of node -1 begin with"),
    "no path": (share_between_namespaces, "cannot be on both nodes"),
    "tokens missing": (replace("tokens", lambda t: t[:-1]), r"tokens, expected \d+"),
    "tokens too many": (replace("tokens", lambda t: np.append(t, t[:1])), r"tokens, expected"),
    "blocks missing": (replace("blocks", lambda b: b[:-1]), "blocks, expected"),
    "blocks too many": (replace("blocks", lambda b: np.append(b, b[:1])), "blocks, expected"),
    "shorter field": (replace("uses", lambda u: u[:-1]), r"uses is I64 \[\d+\], expected"),
    "two dimensions": (replace("parent", lambda p: p[None]), "expected"),
    "no dimension": (replace("tokens", lambda t: t[0]), "expected"),
    "other dtype": (replace("length", lambda t: t.astype(np.int32)), "length is I32"),
    "floats": (replace("tokens", lambda t: t.astype(np.float32)), "tokens is F32"),
    "missing": (drop("offset"), "offset is nothing"),
    "no parents": (drop("parent"), "parent is nothing"),
    "no tokens": (drop("tokens"), "tokens is nothing"),
    "no namespaces": (drop("namespaces"), "namespaces is nothing"),
    "namespaces broken": (names(b"["), "namespaces cannot be read"),
    "namespaces deep": (names(b"[" * 100_000), "namespaces cannot be read"),
    "namespaces bytes": (names(b'["\xff"]'), "namespaces cannot be read"),
    "namespaces number": (names(1), "namespaces cannot be read"),
    "namespace number": (names(["", 1]), "namespaces cannot be read"),
    "namespace bool": (names(["", [True]]), "namespaces cannot be read"),
    "namespace nested": (names(["", [["a"]]]), "namespaces cannot be read"),
    "namespace digits": (names(b'["", [' + b"9" * 5000 + b"]]"), "namespaces cannot be read"),
    "namespace twice": (names(["", ""]), "twice"),
    "namespace unused": (names(["", "a", "b"]), "3 namespaces, but nodes in 2"),
    "namespace missing": (names([""]), r"parent\[\d+\] is -2, expected -1"),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_contents_that_contradict_themselves_are_refused(tampered: str) -> None:
    change, message = TAMPERED[tampered]
    with saved(some_cache()) as path:
        rewritten(path, change)
        with pytest.raises(pt.InvalidSnapshot, match=message):
            pt.PrefixCache.restore(path)


def test_the_rewriting_of_these_tests_is_not_what_is_refused() -> None:
    cache = some_cache()
    with saved(cache) as path:
        rewritten(path, lambda arrays, metadata: None)
        assert paths(pt.PrefixCache.restore(path)) == paths(cache)


@pytest.mark.parametrize(
    ("prompts", "above", "below"),
    [
        ([[1, 1], [2, 2, 2, 2], [2, 2, 2, 2, 3]], 0, 2),
        ([[2, 2, 2, 2], [2, 2, 2, 2, 3], [1, 1]], 2, 1),
    ],
)
def test_a_block_shared_with_a_cousin_far_away_is_refused(
    prompts: list[list[int]], above: int, below: int
) -> None:
    """Neither the parent nor any other ancestor holds the block, and the slots are disjoint."""
    cache = pt.PrefixCache(8, 4)
    for prompt in prompts:
        with cache.open(prompt) as sequence:
            sequence.commit(len(prompt))
    with saved(cache) as path:

        def change(arrays: Arrays, metadata: dict[str, str]) -> None:
            arrays["blocks"][below] = arrays["blocks"][above]
            arrays["offset"][below] = 3

        rewritten(path, change)
        with pytest.raises(
            pt.InvalidSnapshot, match=f"cannot be on both nodes {above} and {below}"
        ):
            pt.PrefixCache.restore(path)


INTERESTING = [-(2**63), -(2**31), -3, -2, -1, 0, 1, 2, 3, 4, 5, 8, 31, 2**31 - 1, 2**62, 2**63 - 1]


@given(st.integers(1, 5), steps, st.data())
def test_numbers_changed_on_purpose_give_a_right_cache_or_none(
    block_size: int, script: list[Any], data: st.DataObject
) -> None:
    with saved(Run(block_size, script).cache) as path:

        def change(arrays: Arrays, metadata: dict[str, str]) -> None:
            for _ in range(data.draw(st.integers(1, 3), label="changes")):
                name = data.draw(st.sampled_from(sorted(arrays)), label="name")
                values = arrays[name]
                if not len(values):
                    continue
                limits = np.iinfo(values.dtype)
                at = data.draw(st.integers(0, len(values) - 1), label="at")
                if data.draw(st.booleans(), label="copy"):
                    values[at] = values[data.draw(st.integers(0, len(values) - 1), label="from")]
                else:
                    value = data.draw(st.sampled_from(INTERESTING), label="value")
                    values[at] = min(max(value, limits.min), limits.max)

        rewritten(path, change)
        try:
            cache = pt.PrefixCache.restore(path)
        except pt.InvalidSnapshot:
            return
        cache.check()
        cache.open([9] * block_size * NUM_BLOCKS).close()
        cache.check()


@given(data=st.data())
def test_bytes_changed_on_purpose_give_a_right_cache_or_none(
    whole: bytes, data: st.DataObject
) -> None:
    """As above, but in the raw file: header, names, offsets, and the checksum made right."""
    changed = bytearray(whole)
    head = 8 + int.from_bytes(whole[:8], "little")
    digits = whole.index(b'"checksum":"') + 12
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.integers(0, head - 1), label="at")
        if at not in range(digits, digits + 32):
            changed[at] = data.draw(st.sampled_from(b'\0 "0123456789-,:[]{}IFU\xff'), label="to")
    changed[digits : digits + 32] = b"0" * 32
    changed[digits : digits + 32] = xxhash.xxh3_128_hexdigest(bytes(changed)).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it"
        path.write_bytes(changed)
        for storage in (None, storage_for()):
            try:
                cache = pt.PrefixCache.restore(path, storage)
            except pt.InvalidSnapshot:
                continue
            cache.check()


# Writing


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "it"
    with pytest.raises(FileNotFoundError, match="snapshot is not written") as caught:
        some_cache().save(path)
    assert caught.value.filename == str(path)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "no").write_text("file")
    with pytest.raises(NotADirectoryError, match="snapshot is not written"):
        some_cache().save(tmp_path / "no" / "it")


def test_a_folder_in_the_place_of_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    with pytest.raises(IsADirectoryError, match="snapshot is not written"):
        some_cache().save(tmp_path / "it")
    assert os.listdir(tmp_path) == ["it"]


def test_a_name_too_long_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="snapshot is not written") as caught:
        some_cache().save(tmp_path / ("x" * 300))
    assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_snapshot(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it"
    pt.PrefixCache(3, 2).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    cache = some_cache()
    with pytest.raises(OSError, match="not written: No space left on device") as caught:
        cache.save(path, fill(storage_for()))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert (os.listdir(tmp_path), path.read_bytes()) == (["it"], before)
    cache.check()


def test_whatever_fails_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Iterator[Any]:
        yield b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "_kv_pieces", fail)
    with pytest.raises(KeyboardInterrupt):
        some_cache().save(tmp_path / "it", storage_for())
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pt.PrefixCache.restore(tmp_path / "it")
    with pytest.raises(OSError, match="directory"):
        pt.PrefixCache.restore(tmp_path)


def test_whole_block_sharing_and_the_reserved_block_come_back(tmp_path: Path) -> None:
    cache = pt.PrefixCache(16, 2, align="block", reserve_block_0=True)
    for tokens in ([1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 7]):
        with cache.open(tokens) as sequence:
            sequence.commit(len(tokens))
    cache.save(tmp_path / "it")
    copy = pt.PrefixCache.restore(tmp_path / "it")
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 7], [1, 8]):
        assert copy.match(tokens) == cache.match(tokens)
    assert copy.stats().free_blocks == cache.stats().free_blocks
    with copy.open([1, 2, 3, 4, 8, 8, 8]) as sequence:
        assert sequence.cached_len == 4
        assert 0 not in sequence.block_table()
    copy.check()
    copy.clear()
    assert copy.stats().free_blocks == 15
