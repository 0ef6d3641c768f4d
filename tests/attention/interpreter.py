"""Triton's interpreter in place of a GPU, with what it gets wrong of bfloat16 put right.

It keeps bfloat16 as bare bits: products of matrices multiply the bits as integers, and rounding is
towards zero.
"""

import os
from typing import Any

import numpy as np
import numpy.typing as npt


def enable() -> None:
    """Run kernels imported from now on on the CPU. Call before Triton's language is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(_from_bits(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(builder, a, b, *rest)

    def cast_impl(builder: Any, x: Any, to: Any) -> Any:
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bits(x.data), tl.bfloat16)
        return cast(builder, x, to)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = cast_impl


def _from_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
