"""Memory for what calls gather, copy and weigh, kept from one to the next.

What is allocated anew for each call costs more than the copy: the system hands out such memory page
by page, and takes it back in between.
"""

import threading

import torch

# Who has which buffer: K and V as gathered; what products copy of keys, values and queries, and
# their weights.
GATHERED, KEYS, VALUES, QUERIES, WEIGHTS = 0, 2, 3, 4, 5
# A buffer that is asked to be larger is not kept.
MOST_KEPT = 16 << 20


class _Buffers(threading.local):
    """Of one thread, so that what another one gathers does not come into the way."""

    def __init__(self) -> None:
        self.bytes: dict[int, torch.Tensor] = {}


_buffers = _Buffers()


def scratch(
    number: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Uninitialised [rows, width].

    On a CPU it is the thread's buffer of that number: whoever asks for it next overwrites it.
    """
    size = rows * width * dtype.itemsize
    if device.type != "cpu" or size > MOST_KEPT:
        return torch.empty((rows, width), dtype=dtype, device=device)
    buffer = _buffers.bytes.get(number)
    if buffer is None or len(buffer) < size:
        # As an ordinary tensor it can be written to in inference mode and outside of it.
        with torch.inference_mode(False):
            buffer = _buffers.bytes[number] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(rows, width)
