"""Elements of columns are overwritten on a device as on the host."""

import torch

from attention.triton_backend.buffers import scatter


def test_a_patch_of_32_bits_overwrites_its_places() -> None:
    into = torch.zeros(6, dtype=torch.int32)
    scatter(into, torch.tensor([[4, 1], [7, -9]], dtype=torch.int32))
    assert into.tolist() == [0, -9, 0, 0, 7, 0]
