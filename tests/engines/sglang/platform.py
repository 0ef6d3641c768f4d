"""A platform on which SGLang runs on a CPU without its own CPU kernels; for tests only."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum


class CpuTestPlatform(CpuSRTPlatform):
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"


def activate() -> str:
    """The entry point: the name of the class."""
    return f"{__name__}:{CpuTestPlatform.__name__}"
