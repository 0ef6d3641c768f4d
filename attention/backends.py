"""Which backend runs a plan: the one that was asked for, or the fastest that can."""

import importlib.util

import torch

from attention.errors import UnsupportedBackend
from attention.problem import Problem

BACKENDS = ("reference", "torch", "triton")

# What the kernels are written for.
MAX_HEAD_DIM = 256
LATENT_HEAD_DIMS = (576, 512)
MIN_CAPABILITY = (8, 0)


def choose(backend: str | None, problem: Problem) -> str:
    """The backend to run a problem with: `backend`, or by the problem where that is None.

    Raises:
        UnsupportedBackend: there is no such backend, or it cannot run the problem.
    """
    if backend is None:
        # The interpreter is there to test kernels, not to be chosen.
        on_gpu = problem.device.type == "cuda"
        return "triton" if on_gpu and what_triton_lacks(problem) is None else "torch"
    if backend not in BACKENDS:
        raise UnsupportedBackend(
            f"backend is {backend!r}, expected one of {BACKENDS}, or None for the fastest that can"
        )
    if backend == "triton" and (lacking := what_triton_lacks(problem)) is not None:
        raise UnsupportedBackend(
            f'backend is "triton", but {lacking}; backend="torch" runs this plan'
        )
    return backend


def what_triton_lacks(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem on its device; None: they can."""
    return _kernel_lacks(problem) or device_lacks(problem.device)


def _kernel_lacks(problem: Problem) -> str | None:
    head_dims = (problem.head_dim, problem.value_head_dim)
    if problem.dtype == torch.float64:
        return "no kernel takes a q of torch.float64 (float32, bfloat16 and float16 are)"
    if max(head_dims) > MAX_HEAD_DIM and head_dims != LATENT_HEAD_DIMS:
        return (
            f"no kernel has head_dim {head_dims[0]} and value_head_dim {head_dims[1]} "
            f"(up to {MAX_HEAD_DIM} each, or {LATENT_HEAD_DIMS[0]} and {LATENT_HEAD_DIMS[1]})"
        )
    return None


def device_lacks(device: torch.device) -> str | None:
    """Why kernels cannot run on a device; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        import triton

        if triton.knobs.runtime.interpret:
            return None
        return "the device is cpu, where kernels run under TRITON_INTERPRET=1 only"
    if device.type != "cuda":
        return f"the device is {device}, and kernels are for CUDA, ROCm"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        if not architecture.startswith("gfx9"):
            return f"{device} is a GPU of {architecture}, and kernels are for gfx9xx"
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{device} has compute capability {capability[0]}.{capability[1]}, and kernels are "
            f"for {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} and above"
        )
    return None
