"""KVStorage against a loop that writes one token and one head at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator import InvalidArgument, KVMismatch, KVStorage, SlotOutOfRange

LAYOUTS = ["NHD", "HND"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def numbered(count: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values that all differ, in order, as far as the dtype tells them apart."""
    return torch.arange(1, count * heads * dim + 1).view(count, heads, dim).to(dtype)


def small(layout: str = "NHD", **arguments) -> KVStorage:
    """2 layers, 3 blocks of 4 slots, 2 heads, head_dim 5, value_head_dim 3; one token written."""
    storage = KVStorage(
        2, 3, 4, 2, 5, dtype=torch.float32, layout=layout, value_head_dim=3, **arguments
    )
    storage.write(1, torch.tensor([6]), torch.full((1, 2, 5), 7.0), torch.full((1, 2, 3), 8.0))
    return storage


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    num_layers=st.integers(1, 2),
    num_blocks=st.integers(1, 4),
    block_size=st.integers(1, 5),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    value_head_dim=st.none() | st.integers(1, 4),
    data=st.data(),
)
def test_writes_land_where_a_plain_loop_puts_them(
    layout, dtype, num_layers, num_blocks, block_size, heads, head_dim, value_head_dim, data
) -> None:
    storage = KVStorage(
        num_layers,
        num_blocks,
        block_size,
        heads,
        head_dim,
        dtype=dtype,
        layout=layout,
        value_head_dim=value_head_dim,
    )
    dims = {"k": head_dim, "v": head_dim if value_head_dim is None else value_head_dim}
    num_slots = num_blocks * block_size
    expected = {
        name: torch.zeros(num_layers, num_slots, heads, dim, dtype=dtype)
        for name, dim in dims.items()
    }
    slot_lists = st.lists(st.integers(0, num_slots - 1), unique=True)
    for step in range(data.draw(st.integers(0, 3), "writes")):
        layer = data.draw(st.integers(0, num_layers - 1), "layer")
        slots = data.draw(slot_lists, "slots")
        values = {
            name: numbered(len(slots), heads, dim, dtype) * (step + 1) for name, dim in dims.items()
        }
        if data.draw(st.booleans(), "strided"):
            # As a projection often hands them over: heads before tokens in memory.
            values = {
                name: value.transpose(0, 1).contiguous().transpose(0, 1)
                for name, value in values.items()
            }
        storage.write(layer, torch.tensor(slots, dtype=torch.int64), **values)
        for name, value in values.items():
            for row, slot in enumerate(slots):
                for head in range(heads):
                    expected[name][layer, slot, head] = value[row, head]

    every_slot = torch.arange(num_slots)
    for layer in range(num_layers):
        for name, tensors in (("k", storage.k), ("v", storage.v)):
            for slot in range(num_slots):
                block, offset = divmod(slot, block_size)
                for head in range(heads):
                    place = (offset, head) if layout == "NHD" else (head, offset)
                    found = tensors[layer][block][place]
                    assert torch.equal(found, expected[name][layer, slot, head])
        k, v = storage.read(layer, every_slot)
        assert torch.equal(k, expected["k"][layer])
        assert torch.equal(v, expected["v"][layer])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_dtype_and_size(layout: str, dtype: torch.dtype) -> None:
    storage = KVStorage(3, 6, 4, 2, 8, dtype=dtype, layout=layout, value_head_dim=5)
    assert len(storage.k) == len(storage.v) == 3
    inner = (4, 2) if layout == "NHD" else (2, 4)
    for k, v in zip(storage.k, storage.v, strict=True):
        assert k.shape == (6, *inner, 8)
        assert v.shape == (6, *inner, 5)
        assert k.dtype == v.dtype == dtype
    assert storage.bytes_per_token == 3 * 2 * (8 + 5) * dtype.itemsize
    assert storage.num_bytes == 6 * 4 * storage.bytes_per_token


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokens_of_a_head_lie_side_by_side_on_a_cpu_only(layout: str) -> None:
    sizes = {"dtype": torch.float32, "layout": layout}
    heads = 2 if layout == "NHD" else 1
    for tensor in KVStorage(1, 6, 4, 2, 8, **sizes).k:
        for head in tensor.unbind(heads):
            assert head.is_contiguous()
    assert KVStorage(1, 6, 4, 2, 8, **sizes, device="meta").k[0].is_contiguous()
    with torch.device("meta"):
        assert KVStorage(1, 6, 4, 2, 8, **sizes).device.type == "cpu"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_never_written_hold_zeros(layout: str) -> None:
    storage = small(layout)
    for layer in range(2):
        others = [slot for slot in range(12) if (layer, slot) != (1, 6)]
        k, v = storage.read(layer, torch.tensor(others))
        assert not k.any()
        assert not v.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_gives_copies_in_the_order_asked_for(layout: str) -> None:
    storage = small(layout)
    slots = torch.tensor([6, 0, 6])
    k, v = storage.read(1, slots)
    assert k[:, 0, 0].tolist() == [7, 0, 7]
    assert v[:, 1, 2].tolist() == [8, 0, 8]
    k.zero_()
    v.zero_()
    k, v = storage.read(1, slots[:1])
    assert k.unique().tolist() == [7]
    assert v.unique().tolist() == [8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_slots_at_all(layout: str) -> None:
    storage = small(layout)
    none = torch.empty(0, dtype=torch.int64)
    storage.write(0, none, torch.empty(0, 2, 5), torch.empty(0, 2, 3))
    k, v = storage.read(0, none)
    assert k.shape == (0, 2, 5)
    assert v.shape == (0, 2, 3)


def test_gradients_stop_at_the_storage() -> None:
    storage = small()
    k = torch.ones(1, 2, 5, requires_grad=True)
    storage.write(0, torch.tensor([1]), k * 2, torch.ones(1, 2, 3, requires_grad=True))
    assert not storage.k[0].requires_grad
    assert not storage.v[0].requires_grad
    read_k, _ = storage.read(0, torch.tensor([1]))
    assert not read_k.requires_grad
    assert read_k.unique().tolist() == [2]


def test_inference_mode_may_come_and_go() -> None:
    with torch.inference_mode():
        storage = small()
        k, v = torch.ones(1, 2, 5), torch.ones(1, 2, 3)
        storage.write(0, torch.tensor([0]), k, v)
    storage.write(0, torch.tensor([1]), k, v)
    assert storage.read(0, torch.tensor([0, 1]))[0].unique().tolist() == [1]


def test_slots_on_the_cpu_serve_a_storage_on_another_device() -> None:
    storage = KVStorage(1, 3, 4, 2, 5, dtype=torch.float32, device="meta")
    values = torch.empty(2, 2, 5, device="meta")
    slots = torch.tensor([3, 1])
    storage.write(0, slots, values, values)
    storage.write(0, slots.to("meta"), values, values)
    with pytest.raises(SlotOutOfRange, match="slot 12"):
        storage.write(0, torch.tensor([3, 12]), values, values)
    assert storage.device == torch.device("meta")


SLOTS, K, V = torch.tensor([6, 1]), torch.ones(2, 2, 5), torch.ones(2, 2, 3)

BAD_SLOTS = {
    "a layer too many": (2, SLOTS, KVMismatch, r"layer is 2, expected 0\.\.1"),
    "a negative layer": (-1, SLOTS, KVMismatch, "layer is -1"),
    "int32 slots": (0, SLOTS.int(), KVMismatch, r"torch\.int32"),
    "slots in a matrix": (0, SLOTS[None], KVMismatch, r"\(1, 2\)"),
    "slots elsewhere": (0, SLOTS.to("meta"), KVMismatch, "slots are on meta"),
    "a slot past the end": (1, torch.tensor([6, 12]), SlotOutOfRange, r"slot 12, expected 0\.\.11"),
    "a negative slot": (1, torch.tensor([6, -1]), SlotOutOfRange, "slot -1"),
}

BAD_VALUES = {
    "k too long": (torch.ones(3, 2, 5), V, r"k has shape \(3, 2, 5\), expected \(2, 2, 5\)"),
    "k that would broadcast": (torch.ones(1, 2, 5), V, r"k has shape \(1, 2, 5\)"),
    "k with other heads": (torch.ones(2, 1, 5), V, r"k has shape \(2, 1, 5\)"),
    "k in a matrix": (torch.ones(2, 10), V, r"k has shape \(2, 10\)"),
    "v as wide as k": (K, K, r"v has shape \(2, 2, 5\), expected \(2, 2, 3\)"),
    "k of another dtype": (K.double(), V, r"k has dtype torch\.float64, expected torch\.float32"),
    "v of another dtype": (K, V.half(), r"v has dtype torch\.float16"),
    "k elsewhere": (K.to("meta"), V, "k is on meta, expected cpu"),
    "v elsewhere": (K, V.to("meta"), "v is on meta"),
}


def assert_untouched(storage: KVStorage) -> None:
    fresh = small(storage.layout)
    for found, expected in zip((*storage.k, *storage.v), (*fresh.k, *fresh.v), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BAD_SLOTS)
def test_wrong_slots_are_named_and_nothing_is_written(name: str, layout: str) -> None:
    layer, slots, error, message = BAD_SLOTS[name]
    storage = small(layout)
    with pytest.raises(error, match=message):
        storage.write(layer, slots, K, V)
    with pytest.raises(error, match=message):
        storage.read(layer, slots)
    assert_untouched(storage)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BAD_VALUES)
def test_wrong_values_are_named_and_nothing_is_written(name: str, layout: str) -> None:
    k, v, message = BAD_VALUES[name]
    storage = small(layout)
    with pytest.raises(KVMismatch, match=message):
        storage.write(1, SLOTS, k, v)
    assert_untouched(storage)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"num_kv_heads": 1.5}, "num_kv_heads is 1.5"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"value_head_dim": 0}, "value_head_dim is 0"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"layout": "NDH"}, "layout is 'NDH'"),
    ],
)
def test_arguments_of_no_storage(arguments: dict, message: str) -> None:
    good = {
        "num_layers": 1,
        "num_blocks": 1,
        "block_size": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "dtype": torch.float32,
    }
    with pytest.raises(InvalidArgument, match=message):
        KVStorage(**{**good, **arguments})
