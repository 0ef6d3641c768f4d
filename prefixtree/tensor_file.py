"""Safetensors files that are written whole or not at all, with a checksum over all their bytes.

safetensors' own writers want every tensor in memory at once, and leave half a file when the disk is
full. Reading is theirs, behind the checksum.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import xxhash

from prefixtree.errors import InvalidSnapshot

CHUNK_BYTES = 1 << 24
"""Read, hashed and written at a time."""

_CHECKSUM = "checksum"  # xxh3-128 of the file with zeros in the place of its digits
_UNKNOWN = "0" * 32
_LARGEST_HEADER = 100_000_000  # what safetensors reads


class TensorSource(NamedTuple):
    """A tensor to be written, piece after piece."""

    name: str
    dtype: str
    """As safetensors names it: "I32", "BF16"."""
    item_bytes: int
    shape: tuple[int, ...]
    pieces: Iterable[Any]
    """Contiguous buffers that together hold the tensor, row-major and little-endian."""


class TensorSlice(Protocol):
    def __getitem__(self, rows: slice) -> Any: ...


class TensorFile(Protocol):
    """What is used of an open `safetensors.safe_open`."""

    def keys(self) -> Sequence[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> Any: ...
    def get_slice(self, name: str) -> TensorSlice: ...


def write(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Iterable[TensorSource]
) -> None:
    """Writes a new file next to `path`, waits for the disk, and puts it in the place of `path`.

    Whatever fails, what was at `path` is still there and nothing else. Raises OSError, as the
    subclass that says why, naming `path`. Holds one piece in memory at a time.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(16)}.tmp"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            with open(temporary, "xb") as file:
                _write(file, metadata, tensors)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"the snapshot is not written: {why}", str(path)) from error


def _write(file: BinaryIO, metadata: Mapping[str, str], tensors: Iterable[TensorSource]) -> None:
    # The widest items first, so that every tensor starts at a multiple of its item size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.item_bytes)
    header: dict[str, Any] = {"__metadata__": {_CHECKSUM: _UNKNOWN, **metadata}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.item_bytes * math.prod(tensor.shape)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digits = 8 + text.index(_UNKNOWN.encode())
    whole = xxhash.xxh3_128()
    for piece in _pieces(text, tensors):
        whole.update(piece)
        file.write(piece)
    file.seek(digits)
    file.write(whole.hexdigest().encode())


def _pieces(text: bytes, tensors: Iterable[TensorSource]) -> Iterator[Any]:
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        yield from tensor.pieces


def _sync_folder(folder: Path) -> None:
    """Makes the renaming last, where the file system can: not all let a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Header(NamedTuple):
    """What a file says about itself."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    """Name to {"dtype": str, "shape": list of int, ...}."""


def read_header(path: str | os.PathLike[str], wanted: Mapping[str, str]) -> Header:
    """The header of a file whose metadata holds `wanted` and whose checksum is right.

    Raises `InvalidSnapshot` for any other file, OSError when it cannot be read. O(file).
    """
    with open(path, "rb") as file:
        text = _header_text(file)
        try:
            tensors = json.loads(text)
            metadata = tensors.pop("__metadata__")
            known = {name: metadata.get(name) for name in (*wanted, _CHECKSUM)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InvalidSnapshot("no snapshot: it has no header of a snapshot") from None
        for name, value in wanted.items():
            if known[name] != value:
                raise InvalidSnapshot(f"{name} is {known[name]!r:.80}, expected {value!r}")
        _verify(file, text, known[_CHECKSUM])
    return Header(metadata, tensors)


def _header_text(file: BinaryIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise InvalidSnapshot(
            f"no snapshot, or a truncated one: {size} bytes, with a header said to have {length}"
        )
    return file.read(length)


def _verify(file: BinaryIO, text: bytes, checksum: object) -> None:
    digits = checksum.encode() if isinstance(checksum, str) and checksum.isascii() else b""
    if len(digits) != len(_UNKNOWN) or digits not in text:
        raise InvalidSnapshot(f"checksum is {checksum!r:.80}, expected 32 hexadecimal digits")
    whole = xxhash.xxh3_128(struct.pack("<Q", len(text)))
    whole.update(text.replace(digits, _UNKNOWN.encode(), 1))
    while piece := file.read(CHUNK_BYTES):
        whole.update(piece)
    if whole.hexdigest() != checksum:
        raise InvalidSnapshot(
            f"the contents have checksum {whole.hexdigest()}, expected {checksum}: truncated or"
            " changed"
        )


def open_tensors(path: str | os.PathLike[str], header: Header, framework: str) -> TensorFile:
    """The tensors of a file whose header was read before, as "np" arrays or "pt" tensors.

    Raises `InvalidSnapshot` when safetensors finds it malformed, or the file is another one by
    now; ImportError when safetensors is missing.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "restoring a snapshot needs safetensors: pip install 'prefixtree[snapshot]'"
        ) from error
    try:
        opened: TensorFile = safe_open(path, framework=framework)
    except SafetensorError as error:
        raise InvalidSnapshot(f"not a safetensors file: {error}") from None
    # Each checksum stands for one content, so equal ones mean the file that was verified.
    if (opened.metadata() or {}).get(_CHECKSUM) != header.metadata[_CHECKSUM]:
        raise InvalidSnapshot("the file was replaced while it was read")
    return opened
