"""Writing K and V to slots: torch operations and the kernel, held to a loop over the tokens."""

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
from attention import InvalidSlots, WriteMismatch
from attention.write import _write_slots

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _interpreted() -> ModuleType:
    """A copy of the kernel's module in which the kernel is interpreted."""
    importlib.import_module("triton.language")  # which is not to be interpreted with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.find_spec("attention.triton_backend.write")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


interpreted = _interpreted()
WRITERS = {"torch": _write_slots, "triton": interpreted.write_slots}


class Write(NamedTuple):
    """The arguments of a write, the caches as [num_blocks, block_size, num_kv_heads, dim]."""

    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


@st.composite
def writes(draw: st.DrawFn) -> Write:
    num_blocks, block_size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    heads, tokens = draw(st.sampled_from((1, 2, 3, 8))), draw(st.integers(0, 7))
    dims = draw(st.sampled_from(((64, 64), (80, 80), (5, 3), (192, 128), (576, 512))))
    dtype = draw(st.sampled_from(DTYPES))
    cache_dtype = draw(st.sampled_from((*DTYPES, *FLOAT8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Some of the slots are none, and the others distinct.
    num_slots = num_blocks * block_size
    slots = torch.randperm(max(num_slots, tokens), generator=generator)[:tokens]
    slots[slots >= num_slots] = draw(st.sampled_from((-1, -5, num_slots)))
    slots[torch.rand(tokens, generator=generator) < 0.2] = -1
    per_token = draw(st.sampled_from(("plain", "of one projection", "transposed")))
    by = draw(st.sampled_from(("NHD", "HND", "interleaved", "dimensions first")))
    values, caches, scales = [], [], []
    for dim in dims:
        x = 300 * torch.randn(tokens, heads, dim, generator=generator)
        match per_token:
            case "of one projection":
                x = torch.cat([x, x], dim=1)[:, heads:]
            case "transposed":
                x = x.transpose(0, 2).contiguous().transpose(0, 2)
        values.append(x.to(dtype))
        # Behind the blocks lies one more, that is none of the cache's.
        behind, zeros = num_blocks + 1, functools.partial(torch.zeros, dtype=cache_dtype)
        match by:
            case "NHD":
                cache = zeros(behind, block_size, heads, dim)
            case "HND":
                cache = zeros(behind, heads, block_size, dim).transpose(1, 2)
            case "interleaved":
                cache = zeros(behind, 2, block_size, heads, dim)[:, 1]
            case _:
                cache = zeros(dim, heads, block_size, behind).permute(3, 2, 1, 0)
        caches.append(cache[:num_blocks])
        scale = torch.rand(draw(st.sampled_from(((heads,), (1,), ()))), generator=generator) + 0.1
        scales.append(draw(st.sampled_from((None, scale))))
    slots = slots.to(draw(st.sampled_from((torch.int64, torch.int32))))
    if draw(st.booleans()):
        slots = slots.repeat_interleave(2)[::2]
    return Write(*values, *caches, slots, *scales)


def expected(write: Write) -> list[torch.Tensor]:
    """The caches after a write, token by token."""
    caches = []
    for values, cache, scale in (
        (write.k, write.k_cache, write.k_scale),
        (write.v, write.v_cache, write.v_scale),
    ):
        cache = cache.clone()
        block_size = cache.shape[1]
        for token, slot in enumerate(write.slots.tolist()):
            if not 0 <= slot < cache.shape[0] * block_size:
                continue
            for head, row in enumerate(values[token]):
                if scale is not None:
                    row = row if row.dtype == torch.float64 else row.float()
                    row = row / scale.expand(values.shape[1])[head]
                if cache.dtype in FLOAT8:
                    info = torch.finfo(cache.dtype)
                    row = row.float().clip(info.min, info.max)
                cache[slot // block_size, slot % block_size, head] = row.to(cache.dtype)
        caches.append(cache)
    return caches


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def bytes_set(tensor: torch.Tensor) -> int:
    return int(tensor.contiguous().view(torch.uint8).count_nonzero())


@pytest.mark.parametrize("writer", WRITERS)
@given(writes())
@settings(max_examples=60)
def test_the_bits_that_are_written(writer: str, write: Write) -> None:
    want = expected(write)
    WRITERS[writer](*write)
    for cache, expected_cache in zip((write.k_cache, write.v_cache), want, strict=True):
        if writer == "triton" and cache.dtype == torch.bfloat16:
            # The interpreter cuts where GPUs round to nearest.
            torch.testing.assert_close(cache, expected_cache, rtol=2**-7, atol=0)
        else:
            assert same_bits(cache, expected_cache)
        everything = torch.tensor([], dtype=cache.dtype).set_(cache.untyped_storage())
        assert bytes_set(everything) == bytes_set(cache)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_of_every_number_of_16_bits(writer: str, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    k, v = every.view(torch.bfloat16), every.view(torch.float16)
    caches = [torch.zeros(1, 64, 1, 1024).to(dtype) for _ in "kv"]
    slots = torch.arange(64)
    WRITERS[writer](k.view(64, 1, -1), v.view(64, 1, -1), *caches, slots, None, None)
    for values, cache in zip((k, v), caches, strict=True):
        info = torch.finfo(dtype)
        want = values.float().clip(info.min, info.max).to(dtype).float()
        torch.testing.assert_close(cache.float().flatten(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_of_numbers_between(dtype: torch.dtype) -> None:
    # Around every tie between two neighbours: it, and the float32 next to it on either side.
    codes = torch.arange(2**8, dtype=torch.uint8).view(dtype).float()
    finite = codes[codes.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    below, above = (torch.nextafter(ties, torch.tensor(x)) for x in (-torch.inf, torch.inf))
    values = torch.cat([ties, below, above]).view(1, 1, -1)
    cache = torch.zeros(1, 1, *values.shape[1:]).to(dtype)
    interpreted.write_slots(values, values, cache, cache, torch.tensor([0]), None, None)
    assert same_bits(cache.flatten(), values.flatten().to(dtype))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *FLOAT8])
def test_the_kernel_compiles(arch: str, cache_dtype: torch.dtype) -> None:
    from attention.triton_backend import write
    from attention.triton_backend.compile import compile_for

    k = torch.zeros(4, 8, 128, dtype=torch.bfloat16)
    cache = torch.zeros(2, 16, 8, 128, dtype=torch.bfloat16).to(cache_dtype)
    scale = None if cache_dtype == torch.bfloat16 else torch.ones(8)
    slots = torch.zeros(4, dtype=torch.int32)
    arguments = write.arguments_of(k, k, cache, cache, slots, scale, scale)
    assert compile_for(arch, write.write_kernel, arguments).asm


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "k": torch.randn(3, 2, 8, generator=generator),
        "v": torch.randn(3, 2, 4, generator=generator),
        "k_cache": torch.zeros(5, 4, 2, 8).to(dtype),
        "v_cache": torch.zeros(5, 4, 2, 4).to(dtype),
        "slots": torch.tensor([7, -1, 0]),
    }


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_both_layouts(layout: str) -> None:
    written = tensors()
    if layout == "HND":
        for name in ("k_cache", "v_cache"):
            written[name] = written[name].transpose(1, 2).contiguous()
    attention.write(**written, layout=layout)
    for values, cache in ((written["k"], written["k_cache"]), (written["v"], written["v_cache"])):
        cache = cache.transpose(1, 2) if layout == "HND" else cache
        assert cache[1, 3].equal(values[0])
        assert cache[0, 0].equal(values[2])
        assert cache.count_nonzero() == values[::2].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_what_is_written_is_what_a_run_reads(dtype: torch.dtype) -> None:
    written = tensors(dtype)
    scale = torch.tensor([0.5, 2.0])
    attention.write(**written, k_scale=scale, v_scale=scale)
    read = written["k_cache"].float()[1, 3] * scale[:, None]
    torch.testing.assert_close(read, written["k"][0], rtol=2**-4, atol=2**-9)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another number of tokens": (
        {"slots": torch.arange(2)},
        r"k has shape \(3, 2, 8\), expected \(2, 2, 8\)",
    ),
    "other heads": ({"k": torch.zeros(3, 4, 8)}, r"k has shape \(3, 4, 8\), expected \(3, 2, 8\)"),
    "another head_dim": (
        {"v": torch.zeros(3, 2, 8)},
        r"v has shape \(3, 2, 8\), expected \(3, 2, 4\): .* v_cache in the layout NHD",
    ),
    "the other layout": ({"layout": "HND"}, r"k has shape .*, expected \(3, 4, 8\).* layout HND"),
    "no layout": ({"layout": "NH"}, r"layout is 'NH', expected one of \('NHD', 'HND'\)"),
    "a cache of slots": (
        {"k_cache": torch.zeros(20, 2, 8)},
        r"k_cache has shape \(20, 2, 8\), expected 4 dimensions",
    ),
    "caches of different sizes": (
        {"v_cache": torch.zeros(4, 4, 2, 4)},
        r"v_cache has shape \(4, 4, 2, 4\), expected \(5, 4, 2, 'any'\)",
    ),
    "slots of two dimensions": ({"slots": torch.zeros(3, 1).long()}, r"slots have shape \(3, 1\)"),
    "slots that are no integers": (
        {"slots": torch.zeros(3)},
        "slots have dtype torch.float32, expected torch.int64 or int32",
    ),
    "integers": (
        {"k": torch.zeros(3, 2, 8).int()},
        "k has dtype torch.int32, expected one of",
    ),
    "a cache of integers": (
        {"k_cache": torch.zeros(5, 4, 2, 8).int()},
        "k_cache has dtype torch.int32, expected one of .*float8_e5m2",
    ),
    "caches of different dtypes": (
        {"v_cache": torch.zeros(5, 4, 2, 4).half()},
        "v_cache has dtype torch.float16, expected that of k_cache, torch.float32",
    ),
    "another device": (
        {"slots": torch.arange(3, device="meta")},
        "slots is on meta, expected the device of k_cache, cpu",
    ),
    "a scale for each query head": (
        {"k_scale": torch.ones(4)},
        r"k_scale has shape \(4,\), expected \(2,\) or \(1,\) or \(\)",
    ),
    "a scale in half": (
        {"v_scale": torch.ones(2).half()},
        "v_scale has dtype torch.float16, expected torch.float32",
    ),
    "a scale elsewhere": ({"v_scale": torch.ones(2, device="meta")}, "v_scale is on meta, "),
}


@pytest.mark.parametrize("what", BAD)
def test_tensors_that_do_not_fit(what: str) -> None:
    change, message = BAD[what]
    given = tensors() | change
    with pytest.raises(WriteMismatch, match=message):
        attention.write(**given)
    assert not given["k_cache"].count_nonzero()
    assert not given["v_cache"].count_nonzero()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([3, 20, -1], r"slots\[1\] is 20, expected -1 to 19"),
        ([3, -1, -2], r"slots\[2\] is -2, expected -1 to 19"),
        ([3, 4, 3], "slot 3 occurs twice, expected it once"),
    ],
)
def test_slots_are_looked_at_on_request(slots: list[int], message: str) -> None:
    given = tensors() | {"slots": torch.tensor(slots)}
    with pytest.raises(InvalidSlots, match=message):
        attention.write(**given, check_slots=True)
    assert not given["k_cache"].count_nonzero()
    attention.write(**given)
    attention.write(**tensors() | {"slots": torch.tensor([-1, 2, -1])}, check_slots=True)


def test_a_compiled_write_is_one_node_and_mutates_the_caches() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    written, want = tensors(torch.float8_e4m3fn), tensors(torch.float8_e4m3fn)

    @torch.compile(backend=counter, fullgraph=True)
    def layer(**arguments: Any) -> torch.Tensor:
        attention.write(**arguments)
        return arguments["k_cache"].float().sum()

    total = layer(**written)
    attention.write(**want)
    assert same_bits(written["k_cache"], want["k_cache"])
    assert same_bits(written["v_cache"], want["v_cache"])
    assert total == want["k_cache"].float().sum()
    (graph,) = counter.graphs
    calls = [node.target for node in graph.graph.nodes if "prefixtree" in str(node.target)]
    assert calls == [torch.ops.prefixtree.write.default]
    with pytest.raises(WriteMismatch, match="k has shape"):
        layer(**written | {"slots": torch.arange(2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_what_it_says(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    torch.library.opcheck(
        torch.ops.prefixtree.write.default, (*given.values(), "NHD", None, None, False)
    )
