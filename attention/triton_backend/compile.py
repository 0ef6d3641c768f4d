"""Compiles kernels ahead of time for any architecture, without a GPU of it."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def compile_for(arch: str, kernel: Any, arguments: dict[str, Any]) -> CompiledKernel:
    """What a launch of `kernel` with these arguments would compile on a GPU of that architecture.

    Args:
        arch: "sm_90", "gfx942" and the like.
        kernel: a kernel of this package.
        arguments: as `launch` passes them; tensors may be on any device and are taken to begin at
            a multiple of 16 bytes.

    Seconds a kernel; the results are in Triton's cache afterwards.
    """
    signature, constants = {}, {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and _is_int(value, 1)):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (specialized and _is_int(value) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: arguments[name] for name in _OPTIONS if name in arguments}
    return triton.compile(source, target=_target(arch), options=options)


def _is_int(value: Any, expected: int | None = None) -> bool:
    return isinstance(value, int) and expected in (None, value)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
