"""Memory that outlives a call, for pieces of KV on their way to a product.

A large tensor made anew is often memory that the system has yet to hand out and blank, which takes
longer than to fill it.
"""

import threading

import torch


class _Buffers(threading.local):
    """Bytes by number, of one thread: plans that run side by side share none."""

    def __init__(self) -> None:
        self.by_number: dict[int, torch.Tensor] = {}


_BUFFERS = _Buffers()


def workspace(
    number: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A contiguous tensor of anything, valid until this thread asks for the same number again.

    On a CPU; elsewhere a new one, since torch keeps that memory, and asks no stream to wait.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    buffer = _BUFFERS.by_number.get(number)
    if buffer is None or len(buffer) < count:
        buffer = torch.empty(count, dtype=torch.uint8)
        _BUFFERS.by_number[number] = buffer
    return buffer[:count].view(dtype).view(shape)
