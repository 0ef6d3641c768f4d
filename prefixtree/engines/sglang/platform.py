"""A platform for SGLang: a CPU without SGLang's own CPU kernels, which few builds have.

For tests and first steps, chosen by SGLANG_PLATFORM=prefixtree_cpu. A module of its own, since
SGLang loads it before most of itself can be imported.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

STOCK_ATTENTION = "torch_native"


class Cpu(CpuSRTPlatform):  # type: ignore[misc]
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return STOCK_ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"
