"""Plans executed with torch operations, on any device; the fast path on CPU."""

from attention.torch_backend.work import TorchWork

__all__ = ["TorchWork"]
