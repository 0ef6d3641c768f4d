"""One thread: these tensors are too small to be worth waking more. Kernels run without a GPU."""

import torch

from tests.attention import interpreter

torch.set_num_threads(1)
if not torch.cuda.is_available():
    interpreter.enable()
