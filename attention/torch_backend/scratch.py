"""Memory that calls gather into, kept from one to the next.

What is allocated anew for each call costs more than the copy: the system hands out such memory page
by page, and takes it back in between.
"""

import threading

import torch

# A buffer that is asked to be larger is not kept.
MOST_KEPT = 16 << 20


class _Buffers(threading.local):
    """Of one thread, so that what another one gathers does not come into the way."""

    def __init__(self) -> None:
        self.bytes: dict[int, torch.Tensor] = {}


_buffers = _Buffers()


def scratch(number: int, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised [rows, like.shape[1]], of like's dtype and device.

    On a CPU it is the thread's buffer of that number: whoever asks for it next overwrites it.
    """
    shape = rows, like.shape[1]
    size = rows * like.shape[1] * like.itemsize
    if like.device.type != "cpu" or size > MOST_KEPT:
        return like.new_empty(shape)
    buffer = _buffers.bytes.get(number)
    if buffer is None or len(buffer) < size:
        # As an ordinary tensor it can be written to in inference mode and outside of it.
        with torch.inference_mode(False):
            buffer = _buffers.bytes[number] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(like.dtype).view(shape)
