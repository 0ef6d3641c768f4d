"""A cache's tree, and its K and V on request, in one file and back.

The file has the tree's logical form, one int array a field (N nodes, in the order that decides
between equals in eviction), not the rows of its tables:

| tensor | is |
|---|---|
| `parent` | [N] index of the node above; ~i for one that begins in `namespaces[i]` |
| `start`, `length`, `offset` | [N] as in `Forest` |
| those of `USAGE` | [N] what eviction policies look at |
| `tokens` | of all nodes, packed |
| `blocks` | of all nodes, packed; node i holds ceil((offset + length) / block_size) |
| `namespaces` | JSON: strings, and lists for tuples |
| `k.0`, `v.0`, ... | [blocks in use, ascending; then as in `KVStorage`] one a layer |

Nothing in a file is executed, and nothing of it is believed: `read` holds it against the checksum
and against all that a tree must be, before anything is made of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from allocator import BlockPool, KVMismatch
from prefixtree import tensor_file
from prefixtree.columns import Int32s
from prefixtree.errors import InvalidNamespace, InvalidSnapshot
from prefixtree.pins import Pins
from prefixtree.snapshot_check import check_nodes, expect, first_shared
from prefixtree.tensor_file import CHUNK_BYTES, TensorFile, TensorSource
from prefixtree.tree import Namespace, NodeTable, RadixTree, as_namespace

if TYPE_CHECKING:
    import torch

    from allocator import KVStorage

KIND = {"format": "prefixtree-snapshot", "version": "1"}

USAGE = ("last_used", "created", "uses")
"""The columns of `NodeTable` that live on for eviction policies."""

FIELDS = ("parent", "start", "length", "offset", *USAGE)

_NAMES = {"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8"}
_KV_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_MOST = 2**31 - 1  # blocks, and slots in each
_NODES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Snapshot:
    """What a file holds, found right."""

    num_blocks: int
    block_size: int
    align: Literal["token", "block"]
    reserve_block_0: bool
    namespaces: list[Namespace]
    fields: dict[str, npt.NDArray[Any]]
    tokens: Int32s
    blocks: Int32s
    file: TensorFile


def save(
    path: str | os.PathLike[str],
    tree: RadixTree,
    pool: BlockPool,
    reserved: Int32s,
    storage: KVStorage | None,
) -> None:
    """Writes what is committed; `PrefixCache.save` says what that means and raises.

    `reserved`: the block that is never handed out, if there is one.
    """
    nodes = tree.nodes
    rows = np.flatnonzero(np.asarray(nodes.length))
    namespaces = [(name, root) for name, root in tree.roots() if nodes.children[root]]
    index = np.zeros(len(nodes.used), np.int32)
    index[rows] = np.arange(len(rows))
    index[[root for _, root in namespaces]] = ~np.arange(len(namespaces), dtype=np.int32)

    fields = {name: np.asarray(getattr(nodes, name))[rows] for name in FIELDS}
    fields["parent"] = index[fields["parent"]]
    # What is in use now was used last.
    now = fields["last_used"].max(initial=0) + 1
    fields["last_used"][np.asarray(nodes.pins)[rows] > 0] = now
    counts = -(-(fields["offset"] + fields["length"]) // tree.block_size)
    blocks = tree.blocks.gather(rows, counts)

    names = json.dumps([name for name, _ in namespaces]).encode()
    tensors = [_source(name, values) for name, values in fields.items()]
    tensors.append(_source("blocks", blocks))
    tensors.append(_source("namespaces", np.frombuffer(names, np.uint8)))
    edges = (
        b"".join(map(tree.edge, rows[first : first + _NODES_AT_ONCE].tolist()))
        for first in range(0, len(rows), _NODES_AT_ONCE)
    )
    tensors.append(TensorSource("tokens", "I32", 4, (int(fields["length"].sum()),), edges))
    metadata = {
        **KIND,
        "num_blocks": str(pool.num_blocks),
        "block_size": str(pool.block_size),
        "align": str(tree.align),
        "reserved_blocks": str(len(reserved)),
    }
    if storage is not None:
        _require_fitting(storage, pool)
        metadata["layout"] = storage.layout
        tensors.extend(_kv_sources(storage, np.unique(blocks)))
    tensor_file.write(path, metadata, tensors)


def read(path: str | os.PathLike[str], storage: KVStorage | None) -> Snapshot:
    """A file's contents, found right and fitting `storage`; `PrefixCache.restore` says the rest."""
    header = tensor_file.read_header(path, KIND)
    num_blocks = _size(header.metadata, "num_blocks")
    block_size = _size(header.metadata, "block_size")
    align = _size(header.metadata, "align")
    expect(align in (1, block_size), f"align is {align}, expected 1 or {block_size}")
    reserved = header.metadata.get("reserved_blocks")
    expect(reserved in ("0", "1"), f"reserved_blocks is {reserved!r:.80}, expected 0 or 1")
    expect(num_blocks > int(reserved or 0), f"num_blocks is {num_blocks}, and 1 is reserved")
    if storage is not None:
        for name, found in (("num_blocks", num_blocks), ("block_size", block_size)):
            held = getattr(storage, name)
            expect(found == held, f"{name} is {found}, the storage has {held}")
    file = tensor_file.open_tensors(path, header, "np" if storage is None else "pt")

    def load(name: str, dtype: npt.DTypeLike, size: int | None = None) -> npt.NDArray[Any]:
        dtype = np.dtype(dtype)
        found = header.tensors.get(name, {"dtype": "nothing", "shape": [0]})
        shape = [found["shape"][0] if size is None and found["shape"] else size]
        expect(
            found["dtype"] == _NAMES[dtype.name] and found["shape"] == shape,
            f"{name} is {found['dtype']} {found['shape']}, expected {_NAMES[dtype.name]} {shape}",
        )
        # A copy: what is checked below must not change with the file.
        return np.asarray(file.get_tensor(name)).astype(dtype)

    namespaces = _namespaces(load("namespaces", np.uint8).tobytes())
    count = len(load("parent", np.int32))
    fields = {name: load(name, NodeTable.FIELDS[name], count) for name in FIELDS}
    tokens, blocks = load("tokens", np.int32), load("blocks", np.int32)
    check_nodes(fields, USAGE, len(namespaces), tokens, blocks, num_blocks, block_size, align)
    expect(reserved == "0" or bool((blocks > 0).all()), "block 0 is reserved, but on a node")
    fields["shares_first"] = first_shared(fields, blocks, block_size)
    if storage is not None:
        _require_kv(header, storage, len(np.unique(blocks)))
    return Snapshot(
        num_blocks=num_blocks,
        block_size=block_size,
        align="token" if align == 1 else "block",
        reserve_block_0=reserved == "1",
        namespaces=namespaces,
        fields=fields,
        tokens=tokens,
        blocks=blocks,
        file=file,
    )


def fill(snapshot: Snapshot, tree: RadixTree, pool: BlockPool, pins: Pins) -> None:
    """Makes a cache that was just made hold what the snapshot does."""
    tree.plant(snapshot.namespaces, snapshot.fields, snapshot.tokens, snapshot.blocks)
    pins.adopt()
    every = pool.allocate(pool.num_free)
    pool.retain(snapshot.blocks)
    pool.release(every)


def fill_storage(snapshot: Snapshot, storage: KVStorage) -> None:
    """Writes the snapshot's K and V to the blocks that they were in."""
    import torch

    used = np.unique(snapshot.blocks)
    with torch.no_grad():
        for name, tensor in _kv_tensors(storage):
            rows = snapshot.file.get_slice(name)
            for part in _parts(used, tensor):
                places = torch.from_numpy(used[part]).to(storage.device, torch.int64)
                tensor[places] = rows[part].to(storage.device)


def _source(name: str, values: npt.NDArray[Any]) -> TensorSource:
    return TensorSource(
        name, _NAMES[values.dtype.name], values.itemsize, values.shape, [values.data]
    )


def _size(metadata: dict[str, str], name: str) -> int:
    found = metadata.get(name, "")
    known = found.isdecimal() and len(found) <= 10 and 1 <= int(found) <= _MOST
    expect(known, f"{name} is {found!r:.80}, expected 1..{_MOST}")
    return int(found)


def _namespaces(text: bytes) -> list[Namespace]:
    try:
        found = json.loads(text)
        if not isinstance(found, list):
            raise ValueError("no list")
        names = [as_namespace(tuple(name) if isinstance(name, list) else name) for name in found]
    except (ValueError, RecursionError, InvalidNamespace) as error:
        raise InvalidSnapshot(f"namespaces cannot be read: {error}") from None
    expect(len(set(names)) == len(names), "a namespace is there twice")
    return names


def _require_fitting(storage: KVStorage, pool: BlockPool) -> None:
    found = storage.num_blocks, storage.block_size
    if found != (pool.num_blocks, pool.block_size):
        raise KVMismatch(
            f"the storage has {found[0]} blocks of {found[1]} slots, the cache"
            f" {pool.num_blocks} of {pool.block_size}"
        )
    if _kv_name(storage) not in _KV_NAMES.values():
        raise KVMismatch(f"dtype is {storage.dtype}, snapshots hold {', '.join(_KV_NAMES)}")


def _kv_name(storage: KVStorage) -> str:
    """safetensors' name of the dtype; of one that snapshots do not hold, torch's."""
    return _KV_NAMES.get(str(storage.dtype).removeprefix("torch."), str(storage.dtype))


def _require_kv(header: tensor_file.Header, storage: KVStorage, used: int) -> None:
    dtype = _kv_name(storage)
    expect("layout" in header.metadata, "the snapshot has no K and V, the storage expects them")
    layout = header.metadata["layout"]
    expect(layout == storage.layout, f"layout is {layout!r:.80}, expected {storage.layout!r}")
    for name, tensor in _kv_tensors(storage):
        shape = [used, *tensor.shape[1:]]
        found = header.tensors.get(name, {"dtype": "nothing", "shape": []})
        expect(
            found["dtype"] == dtype and found["shape"] == shape,
            f"{name} is {found['dtype']} {found['shape']}, expected {dtype} {shape}",
        )
    more = f"k.{storage.num_layers}"
    expect(more not in header.tensors, f"{more} is there, expected {storage.num_layers} layers")


def _kv_tensors(storage: KVStorage) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in range(storage.num_layers):
        yield f"k.{layer}", storage.k[layer]
        yield f"v.{layer}", storage.v[layer]


def _kv_sources(storage: KVStorage, used: Int32s) -> Iterator[TensorSource]:
    for name, tensor in _kv_tensors(storage):
        shape = (len(used), *tensor.shape[1:])
        pieces = _kv_pieces(tensor, used)
        yield TensorSource(name, _kv_name(storage), tensor.itemsize, shape, pieces)


def _kv_pieces(tensor: torch.Tensor, used: Int32s) -> Iterator[npt.NDArray[np.uint8]]:
    """These blocks as bytes, some at a time, so that the cache is not in memory twice."""
    import torch

    for part in _parts(used, tensor):
        places = torch.from_numpy(used[part]).to(tensor.device, torch.int64)
        yield tensor[places].contiguous().cpu().view(torch.uint8).numpy()


def _parts(used: Int32s, tensor: torch.Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (tensor[0].nbytes))
    return (slice(first, first + step) for first in range(0, len(used), step))
