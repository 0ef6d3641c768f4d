"""The tensors of a schedule: columns of one buffer, of fixed capacity."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from attention.errors import PlanFull
from attention.forest import Int32Array, Int64Array

Values = npt.NDArray[np.integer] | npt.NDArray[np.floating]
Change = tuple[str, Int64Array | None, Values]
"""Name of a column, places in it (None: the first ones), and their values."""

_ALIGNMENT = 32  # columns begin at multiples of so many elements: 128 bytes


class Columns:
    """Named int32 (or float32) columns in one tensor on a device.

    On a CPU they are written in place. On a GPU those that come first, the staged ones, are written
    to a pinned copy and uploaded at once; the others are for kernels to write.
    """

    def __init__(self, capacity: Mapping[str, int], staged: int, device: torch.device) -> None:
        """Make columns of `capacity` elements each; the first `staged` of them go by the host."""
        self._capacity = dict(capacity)
        sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in capacity.values()]
        self._begin = dict(zip(capacity, accumulate(sizes, initial=0), strict=False))
        self._staged = sum(sizes[:staged])
        self._tensor = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        columns: tuple[torch.Tensor, ...] = self._tensor.split(sizes)
        self._columns = dict(zip(capacity, columns, strict=True))
        self._uploaded: torch.cuda.Event | None = None
        self._host = self._tensor if device.type == "cpu" else _pinned(self._staged)
        self._array: Int32Array = self._host.numpy()

    def __getitem__(self, name: str) -> torch.Tensor:
        """The column on the device, and what rounds its size up."""
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._begin

    def check(self, columns: Mapping[str, int]) -> None:
        """Raise PlanFull for the first column that cannot hold so many elements."""
        for name, size in columns.items():
            if size > self._capacity.get(name, 0):
                raise PlanFull(
                    f"{name} needs room for {size}, the plan has room for "
                    f"{self._capacity.get(name, 0)}"
                )

    def write(self, columns: Mapping[str, Values]) -> None:
        """Write the first elements of columns, and bring them to the device.

        Raises PlanFull where one of them cannot hold them; nothing is written then.
        """
        self.check({name: len(values) for name, values in columns.items()})
        if self._uploaded is not None:
            self._uploaded.synchronize()
        for name, values in columns.items():
            begin = self._begin[name]
            self._array[begin : begin + len(values)] = _as_int32(values)
        if self._host is not self._tensor:
            self._tensor[: self._staged].copy_(self._host, non_blocking=True)
            # The stream of the copy: that of the tensor's device, which may not be the current one.
            self._uploaded = torch.cuda.current_stream(self._tensor.device).record_event()

    def patch(self, changes: list[Change]) -> None:
        """Overwrite elements of columns on the device."""
        if self._host is self._tensor:
            for name, index, values in changes:
                begin = self._begin[name]
                column = self._array[begin : begin + self._capacity[name]]
                column[slice(len(values)) if index is None else index] = _as_int32(values)
            return
        total = sum(len(values) for _, _, values in changes)
        patch = _pinned(2, total)
        places, contents = patch.numpy()
        end = 0
        for name, index, values in changes:
            begin, end = end, end + len(values)
            places[begin:end] = np.arange(len(values)) if index is None else index
            places[begin:end] += self._begin[name]
            contents[begin:end] = _as_int32(values)
        # The allocator of pinned memory keeps the patch until it has been copied.
        scatter(self._tensor, patch.to(self._tensor.device, non_blocking=True))


def scatter(into: torch.Tensor, patch: torch.Tensor) -> None:
    """Overwrite elements of `into`: places, no one twice, and contents are the rows of `patch`."""
    places, contents = patch
    into.index_copy_(0, places.long(), contents)


def _pinned(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, pin_memory=True)


def _as_int32(values: Values) -> Values:
    return values.astype(np.float32).view(np.int32) if values.dtype.kind == "f" else values
