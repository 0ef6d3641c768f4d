"""Which backend a plan is run with."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attention
from attention import UnsupportedBackend
from attention.backends import choose
from attention.problem import Problem
from tests.attention.strategies import Case, Node, build_forest, tensors

PROBLEM = Problem(
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    value_head_dim=128,
    dtype=torch.bfloat16,
    kv_dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    layout="NHD",
    window=None,
    sink_tokens=0,
    batch_invariant=False,
)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the compute capability that CUDA devices claim."""

    def claim(*capability: int) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return claim


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the architecture that ROCm devices claim."""

    def claim(name: str) -> None:
        monkeypatch.setattr(torch.version, "hip", "7.0")
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return claim


@pytest.mark.parametrize("newer", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_gets_the_kernels(capability: Any, newer: tuple[int, int]) -> None:
    capability(*newer)
    assert choose(None, PROBLEM) == "triton"
    assert choose("triton", PROBLEM) == "triton"


def test_an_old_gpu_gets_torch(capability: Any) -> None:
    capability(7, 5)
    assert choose(None, PROBLEM) == "torch"
    message = r'"triton", but cuda:0 has compute capability 7.5, .* 8.0 and above; backend="torch"'
    with pytest.raises(UnsupportedBackend, match=message):
        choose("triton", PROBLEM)


@pytest.mark.parametrize("name", ["gfx90a:sramecc+:xnack-", "gfx942", "gfx950"])
def test_rocm_gets_the_kernels(architecture: Any, name: str) -> None:
    architecture(name)
    assert choose(None, PROBLEM) == "triton"


def test_another_rocm_gets_torch(architecture: Any) -> None:
    architecture("gfx1100")
    assert choose(None, PROBLEM) == "torch"
    with pytest.raises(UnsupportedBackend, match=r"cuda:0 is a GPU of gfx1100, .* gfx9xx"):
        choose("triton", PROBLEM)


WITHOUT_KERNEL: dict[str, tuple[dict[str, Any], str]] = {
    "float64": (
        {"dtype": torch.float64, "kv_dtype": torch.float64},
        "no kernel takes a q of torch.float64",
    ),
    "wide heads": ({"head_dim": 288}, "no kernel has head_dim 288 and value_head_dim 128"),
    "wide values": ({"value_head_dim": 512}, "no kernel has head_dim 128 and value_head_dim 512"),
}


@pytest.mark.parametrize("what", WITHOUT_KERNEL)
def test_a_problem_without_kernel_gets_torch(capability: Any, what: str) -> None:
    capability(9, 0)
    change, message = WITHOUT_KERNEL[what]
    problem = replace(PROBLEM, **change)
    assert choose(None, problem) == "torch"
    with pytest.raises(UnsupportedBackend, match=message):
        choose("triton", problem)


def test_wide_heads_and_large_groups_have_a_kernel(capability: Any) -> None:
    capability(9, 0)
    for widest in (
        replace(PROBLEM, num_q_heads=130),
        replace(PROBLEM, head_dim=256, value_head_dim=256),
        replace(PROBLEM, num_q_heads=64, num_kv_heads=1, head_dim=576, value_head_dim=512),
    ):
        assert choose(None, widest) == "triton"


def test_other_devices_get_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device in ("cpu", "meta"):
        problem = replace(PROBLEM, device=torch.device(device))
        assert choose(None, problem) == "torch"
        with pytest.raises(UnsupportedBackend, match=f"the device is {device}"):
            choose("triton", problem)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_cpu = replace(PROBLEM, device=torch.device("cpu"))
    assert choose("triton", on_cpu) == "triton"
    assert choose(None, on_cpu) == "torch"


def test_no_triton_no_kernels(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability(9, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choose(None, PROBLEM) == "torch"
    with pytest.raises(UnsupportedBackend, match="the package triton is not installed"):
        choose("triton", PROBLEM)


def test_the_plan_names_its_backend() -> None:
    forest, num_blocks = build_forest(4, [Node(-1, 6), Node(0, 5)], [(1, 2), (0, 1)])
    given = tensors(Case(forest, num_blocks))
    results = {}
    for backend in (None, "torch", "reference"):
        plan = attention.plan(
            forest,
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=32,
            dtype=torch.float32,
            backend=backend,
        )
        assert plan.backend == (backend or "torch")
        results[backend] = attention.run(plan, *given)
    for mine, reference in zip(results["torch"], results["reference"], strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference)
    with pytest.raises(UnsupportedBackend, match=r"backend is 'cuda', expected one of \('ref"):
        attention.plan(
            forest, num_q_heads=1, num_kv_heads=1, head_dim=8, dtype=torch.half, backend="cuda"
        )
