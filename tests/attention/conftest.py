"""One thread: these tensors are too small to be worth waking more, least of all beside other tests."""

import torch

torch.set_num_threads(1)
