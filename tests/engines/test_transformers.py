"""Models of the transformers library on the paged cache: same logits, named refusals."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import attention
from prefixtree import PrefixCache
from prefixtree.engines.errors import (
    InvalidStep,
    ModelClosed,
    UnsupportedAttention,
    UnsupportedModel,
)
from prefixtree.engines.transformers import PagedModel
from tests.engines.models import KINDS, VOCAB, reference, tiny_model

# float32 sums of a few hundred products of size 1, in another order, through three layers: some
# hundred units in the last place of logits of size 4 (4 * 2**-23 = 5e-7 each).
CLOSE = {"rtol": 0, "atol": 1e-4}

SHARED = np.random.default_rng(1).integers(0, VOCAB, 13)


def text(*tail: int) -> np.ndarray:
    return np.concatenate([SHARED, np.array(tail, np.int64)])


def expected(kind: str, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return reference(kind)(torch.as_tensor(tokens)[None], use_cache=False).logits[0]


def extend(paged: PagedModel, cache: PrefixCache, work: list) -> torch.Tensor:
    """One pass over (sequence, tokens, start, stop) of each; the logits of all their tokens."""
    slots = [sequence.slots(start, stop) for sequence, _, start, stop in work]
    forest = cache.forest(
        [sequence for sequence, _, _, _ in work],
        kv_lens=[stop for _, _, _, stop in work],
        query_lens=[stop - start for _, _, start, stop in work],
    )
    tokens = np.concatenate([tokens[start:stop] for _, tokens, start, stop in work])
    positions = np.concatenate([np.arange(start, stop) for _, _, start, stop in work])
    rows = np.arange(len(tokens))
    logits = paged.forward(tokens, positions, np.concatenate(slots), forest, rows)
    for sequence, _, _, stop in work:
        sequence.commit(stop)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_packed_passes_give_the_logits_of_full_ones(kind):
    """Chunks, shared prefixes that are split inside a block, and one-token steps side by side."""
    prompts = [text(*range(9)), text(1, 2, 3), np.arange(40, 60)]
    cache = PrefixCache(64, 4)
    with PagedModel(tiny_model(kind), 64, 4) as paged:
        first = cache.open(prompts[0])
        logits = extend(paged, cache, [(first, prompts[0], 0, 10)])
        torch.testing.assert_close(logits, expected(kind, prompts[0])[:10], **CLOSE)
        logits = extend(paged, cache, [(first, prompts[0], 10, 21)])
        torch.testing.assert_close(logits, expected(kind, prompts[0])[10:21], **CLOSE)
        second, third = cache.open(prompts[1]), cache.open(prompts[2])
        assert second.cached_len == len(SHARED)
        logits = extend(
            paged,
            cache,
            [
                (third, prompts[2], 0, 17),
                (first, prompts[0], 21, 22),
                (second, prompts[1], 13, 16),
            ],
        )
        wanted = [
            expected(kind, prompts[2])[:17],
            expected(kind, prompts[0])[21:22],
            expected(kind, prompts[1])[13:16],
        ]
        torch.testing.assert_close(logits, torch.cat(wanted), **CLOSE)
        assert logits.dtype == torch.float32
        assert not logits.requires_grad


def cached(paged: PagedModel, prompt: np.ndarray, num_blocks: int = 16):
    cache = PrefixCache(num_blocks, 4)
    sequence = cache.open(prompt)
    return cache, sequence, extend(paged, cache, [(sequence, prompt, 0, len(prompt))])


def test_a_query_without_a_slot_is_not_written():
    prompt = text(5, 6)
    with PagedModel(tiny_model(), 16, 4) as paged:
        cache, sequence, logits = cached(paged, prompt)
        last = len(prompt) - 1
        for tensor in (*paged.storage.k, *paged.storage.v):
            assert tensor[sequence.slots(last, last + 1) // 4].abs().sum() > 0
        before = [tensor.clone() for tensor in (*paged.storage.k, *paged.storage.v)]
        forest = cache.forest([sequence])
        query = paged.forward(
            prompt[last:], np.array([last]), np.array([-1]), forest, np.array([0])
        )
        torch.testing.assert_close(query[0], logits[last], **CLOSE)
        # Another token, not written either: its K and V are nowhere, so the attention sees the old.
        other = paged.forward(
            prompt[last:] + 1, np.array([last]), np.array([-1]), forest, np.array([0])
        )
        assert (other[0] - logits[last]).abs().max() > 0.1
        after = [*paged.storage.k, *paged.storage.v]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_logits_at_the_wanted_rows_only():
    prompt = text(5, 6)
    with PagedModel(tiny_model(), 16, 4) as paged:
        cache, sequence, logits = cached(paged, prompt)
        count = len(prompt)
        forest = cache.forest([sequence], query_lens=[count])
        slots = sequence.slots(0, count)
        for rows in ([7, 2, 14], [0], []):
            some = paged.forward(prompt, np.arange(count), slots, forest, np.array(rows, np.int64))
            assert some.shape == (len(rows), VOCAB)
            torch.testing.assert_close(some, logits[rows], **CLOSE)


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("llama", {}, [None]),
        ("mistral", {}, [7]),
        ("mistral", {"sliding_window": 15}, [None]),  # as long as the text: no limit
        ("mistral", {"sliding_window": 14}, [14]),
        ("gemma3", {}, [5, None]),
    ],
)
def test_one_plan_for_each_distinct_window(monkeypatch, kind, changes, windows):
    planned = []

    def plan(*args, **kwargs):
        planned.append(kwargs["window"])
        return make_plan(*args, **kwargs)

    make_plan = attention.plan
    monkeypatch.setattr(attention, "plan", plan)
    with PagedModel(tiny_model(kind, **changes), 16, 4) as paged:
        cached(paged, text(5, 6))
    assert planned == windows


def test_sizes_come_from_the_model():
    model = tiny_model("qwen3").to(torch.bfloat16)
    with PagedModel(model, 16, 4) as paged:
        assert paged.storage.k[0].shape == (16, 4, 2, 16)
        assert len(paged.storage.k) == len(paged.storage.v) == 2
        assert paged.storage.dtype == torch.bfloat16
        assert (paged.vocab_size, paged.max_positions) == (VOCAB, 512)
        assert cached(paged, text(1))[2].dtype == torch.bfloat16


def test_the_model_is_given_back():
    model = tiny_model()
    prompt = torch.as_tensor(text(1, 2))[None]
    before = model(prompt).logits
    with PagedModel(model, 16, 4) as paged:
        assert model.config._attn_implementation == "prefixtree"
        cached(paged, text(1, 2))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(prompt).logits, before)
    paged.close()
    with PagedModel(model, 16, 4):
        pass
    with pytest.raises(ModelClosed):
        cached(paged, text(1, 2))


def test_a_model_of_another_paged_model_is_refused():
    model = tiny_model()
    with PagedModel(model, 16, 4) as paged:
        with pytest.raises(UnsupportedModel, match="another PagedModel"):
            PagedModel(model, 16, 4)
        cached(paged, text(1, 2))


def test_a_bound_model_runs_through_forward_only():
    model = tiny_model()
    with (
        PagedModel(model, 16, 4),
        pytest.raises(UnsupportedAttention, match=r"PagedModel\.forward"),
    ):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_storage_that_cannot_be_made_leaves_the_model_as_it_was():
    model = tiny_model()
    with pytest.raises(ValueError, match="num_blocks"):
        PagedModel(model, 0, 4)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1, 2]}, r"tokens has shape \(2,\), the forest 3 queries"),
        ({"positions": [1]}, "positions has shape"),
        ({"slots": [0, 1, 2, 3]}, "slots has shape"),
        ({"tokens": [1, VOCAB, 2]}, rf"tokens\[1\] is {VOCAB}, expected 0\.\.{VOCAB - 1}"),
        ({"tokens": [1, 2, -1]}, r"tokens\[2\] is -1"),
        ({"slots": [0, -2, 2]}, r"slots\[1\] is -2, expected -1\.\.63"),
        ({"slots": [64, 1, 2]}, r"slots\[0\] is 64"),
        ({"logits_at": [3]}, r"logits_at\[0\] is 3, expected 0\.\.2"),
        ({"logits_at": [0, -1]}, r"logits_at\[1\] is -1"),
    ],
)
def test_arrays_that_do_not_fit_are_named_and_nothing_is_written(changes, message):
    with PagedModel(tiny_model(), 16, 4) as paged:
        cache = PrefixCache(16, 4)
        sequence = cache.open([1, 2, 3])
        arrays = {"tokens": [1, 2, 3], "positions": [0, 1, 2], "slots": [0, 1, 2]}
        arrays |= {"logits_at": [2], **changes}
        arrays = {name: np.array(values) for name, values in arrays.items()}
        forest = cache.forest([sequence], query_lens=[3])
        with pytest.raises(InvalidStep, match=message):
            paged.forward(forest=forest, **arrays)
        assert not any(tensor.any() for tensor in paged.storage.k)


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def causal_lm(model_type: str, **special: object) -> torch.nn.Module:
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in TINY.items() if hasattr(known, name)}
    config = AutoConfig.for_model(model_type, **{**sizes, **special})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


UNSUPPORTED = {
    "no transformers model": (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers"),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ).eval(),
        "encoder-decoder",
    ),
    "text and images": (
        lambda: Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**TINY, "vocab_size": 262_208 // 1024},
                vision_config={**TINY, "image_size": 28, "patch_size": 14},
            )
        ).eval(),
        "composed of several models",
    ),
    "no head": (lambda: LlamaModel(LlamaConfig(**TINY)).eval(), "no language-model head"),
    "training": (lambda: causal_lm("llama").train(), "training mode"),
    "own attention code": (
        lambda: causal_lm("gptj", n_embd=32, n_layer=1, n_head=2, rotary_dim=8),
        "attention interface",
    ),
    "not causal": (lambda: BertLMHeadModel(BertConfig(**TINY)).eval(), "not causal"),
    "rotation of the longest": (
        lambda: causal_lm(
            "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "'dynamic'",
    ),
    "linear attention": (
        lambda: causal_lm(
            "qwen3_next",
            num_hidden_layers=4,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        "'linear_attention' are not plain attention",
    ),
    "chunked attention": (
        lambda: causal_lm(
            "llama4_text", num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8
        ),
        "'chunked_attention' are not plain attention",
    ),
    "KV of another layer": (
        lambda: causal_lm(
            "gemma3n_text",
            num_hidden_layers=15,
            num_kv_shared_layers=5,
            layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 3,
            intermediate_size=[48] * 15,
            laurel_rank=8,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            activation_sparsity_pattern=[0.0] * 15,
        ),
        "attends to other KV than that it wrote",
    ),
    "sinks": (lambda: causal_lm("gpt_oss", num_local_experts=2), "gives s_aux"),
    "a mask of its own": (lambda: causal_lm("doge"), "gives attention_mask"),
    "keywords kept back": (lambda: causal_lm("stablelm"), "pass unknown keywords on"),
    "a window it does not tell": (
        lambda: causal_lm("phimoe", sliding_window=7, num_local_experts=2),
        "window of 7 in its configuration",
    ),
}


class Layer(torch.nn.Module):
    """Stands in for the attention of the second layer of a tiny Llama."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        model = tiny_model()
        self.inner = model.model.layers[1].self_attn
        self.inner.config = model.config
        self.run = forward
        self.model = [model]
        model.model.layers[1].self_attn = self

    def forward(self, **arguments: object) -> object:
        return self.run(self.inner, **arguments)


def no_attention(inner, hidden_states, **_):
    return hidden_states, None


def more_than_kv(inner, hidden_states, past_key_values, **_):
    return hidden_states + past_key_values.layers[1].state, None


def writes_twice(inner, **arguments):
    inner(**arguments)
    return inner(**arguments)


def ignores_the_cache(inner, past_key_values, **arguments):
    return inner(past_key_values=None, **arguments)


def more_heads(inner, **arguments):
    for projection in (inner.k_proj, inner.v_proj):
        projection.register_forward_hook(lambda *call: torch.cat([call[2], call[2]], dim=-1))
    return inner(**arguments)


def mixed_dtypes(inner, **arguments):
    inner.v_proj.register_forward_hook(lambda *call: call[2].double())
    return inner(**arguments)


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (no_attention, r"2 layers, of which \[0\] attend to cached KV"),
        (more_than_kv, "cannot run on a cache of keys and values alone"),
        (writes_twice, "layer 1 writes KV twice"),
        (ignores_the_cache, "layer 1 attends to other KV than that it wrote"),
        (more_heads, "the layers of LlamaForCausalLM differ"),
        (mixed_dtypes, "torch.float64, expected one dtype"),
    ],
)
def test_layers_that_are_not_plain_attention_are_named(attend, message):
    [model] = Layer(attend).model
    with pytest.raises(UnsupportedModel, match=message):
        PagedModel(model, 16, 4)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_gives_more_logits_than_asked_for_is_refused(monkeypatch):
    forward = LlamaForCausalLM.forward

    def all_logits(self, logits_to_keep=0, **arguments):
        return forward(self, **arguments)

    monkeypatch.setattr(LlamaForCausalLM, "forward", all_logits)
    with pytest.raises(UnsupportedModel, match=r"logits \(1, 2, 97\) for one wanted row"):
        PagedModel(tiny_model(), 16, 4)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_named_and_left_alone(name):
    make, message = UNSUPPORTED[name]
    model = make()
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(UnsupportedModel, match=message):
        PagedModel(model, 16, 4)
    after = getattr(getattr(model, "config", None), "_attn_implementation", None)
    assert after == implementation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.zeros(1, 1, 1, 1)),
        ("dropout", 0.1),
        ("head_mask", torch.ones(2)),
        ("position_bias", torch.zeros(1)),
        ("s_aux", torch.zeros(2)),
        ("is_causal", False),
        ("something_new", 3),
    ],
)
def test_arguments_that_change_the_result_are_refused(monkeypatch, name, value):
    """As if the model's own code had passed one more argument."""
    function = AttentionInterface()["prefixtree"]

    def with_argument(*args, **kwargs):
        if name == "attention_mask":
            return function(*args[:4], value, **kwargs)
        return function(*args, **{**kwargs, name: value})

    with PagedModel(tiny_model(), 16, 4) as paged:
        cached(paged, text(1))
        monkeypatch.setitem(AttentionInterface._global_mapping, "prefixtree", with_argument)
        wanted = "not causal" if name == "is_causal" else name
        with pytest.raises(UnsupportedAttention, match=wanted):
            cached(paged, text(1))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_transformers_the_error_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import prefixtree.engines.transformers"
    assert "ImportError" in (errors := python(code).stderr)
    assert "pip install prefixtree[transformers]" in errors


def test_torch_and_transformers_are_imported_by_those_who_use_them():
    code = """
import sys, prefixtree, prefixtree.engines
assert not {"torch", "transformers"} & set(sys.modules)
import prefixtree.engines.engine
assert "transformers" not in sys.modules
"""
    assert python(code).stderr == ""
