"""What vLLM learns of us when it starts."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("vllm")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from prefixtree.engines.vllm import plugin
from prefixtree.engines.vllm.attention import TreeAttentionBackend


@pytest.fixture(autouse=True)
def names_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFIXTREE_ATTENTION", raising=False)
    yield
    for backend in (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN):
        backend.clear_override()


def test_custom_is_the_trees_and_vllms_own_stay() -> None:
    plugin.register()
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is TreeAttentionBackend
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_the_cpu_platform_gets_it_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXTREE_ATTENTION", "1")
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is TreeAttentionBackend


@pytest.mark.parametrize(
    ("installed", "warns"), [("0.32.0", False), ("0.3.2", True), ("1.0", True)]
)
def test_other_versions_are_told_which_are_tested(
    monkeypatch: pytest.MonkeyPatch, installed: str, warns: bool
) -> None:
    monkeypatch.setattr(plugin, "_version", lambda: installed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin.check_version()
    texts = [str(one.message) for one in caught]
    assert any("tested with 0.32," in text and installed in text for text in texts) == warns
