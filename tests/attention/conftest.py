"""One thread: these tensors are too small to be worth waking more."""

import torch

torch.set_num_threads(1)
