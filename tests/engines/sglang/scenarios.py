"""Runs one SGLang engine through all scenarios: `python -m tests.engines.sglang.scenarios SPEC`.

SPEC is JSON: {"kind", "options" (of the engine), "folder" (to work in)}; results go to
`results.json` in the folder. A process of its own, because an engine leaves state behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.sglang import watch
from tests.engines.tiny_models import VOCAB, save_tiny_model

POOL = 1500
CHUNK = 64

_ENTRY_POINTS = """[sglang.srt.platforms]
prefixtree_test_cpu = prefixtree.engines.sglang.plugin:platform
[sglang.srt.plugins]
prefixtree_test_watch = tests.engines.sglang.watch:register
"""


def start(spec: dict[str, Any]) -> Any:
    """The engine of a SPEC."""
    folder = Path(spec["folder"])
    _prepare(folder)
    from sglang.srt.entrypoints.engine import Engine

    return Engine(
        model_path=str(save_tiny_model(spec["kind"], folder / "model")),
        device="cpu",
        dtype="float32",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        max_total_tokens=POOL,
        chunked_prefill_size=CHUNK,
        schedule_conservativeness=0.1,  # admits more than fits, so that requests are retracted
        log_level="error",
        **spec["options"],
    )


def main(spec: dict[str, Any]) -> None:
    engine = start(spec)
    results: dict[str, Any] = {}
    for scenario in (shared, several, long, crowded, coming_and_going, namespaces, flushed):
        results[scenario.__name__] = scenario(engine)
    results["calls"] = watch.read(os.environ[watch.FILE])
    Path(spec["folder"], "results.json").write_text(json.dumps(results))
    engine.shutdown()


def _prepare(folder: Path) -> None:
    """The entry points, as if a package with them were installed, and the file of the counts."""
    info = folder / "prefixtree_test-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prefixtree-test\nVersion: 0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    counts = folder / "counts"
    np.zeros(len(watch.NAMES), np.int64).tofile(counts)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "SGLANG_PLATFORM": "prefixtree_test_cpu",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        watch.FILE: str(counts),
    }
    sys.path.insert(0, str(folder))


def prompts(seed: int, count: int, shared_tokens: int, own_tokens: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    head = random.integers(3, VOCAB, shared_tokens).tolist()
    return [
        head + random.integers(3, VOCAB, own_tokens + index % 7).tolist() for index in range(count)
    ]


def shared(engine: Any) -> Any:
    """Requests with one prefix, cold and then warm."""
    texts = prompts(1, count=6, shared_tokens=50, own_tokens=5)
    return [_generate(engine, texts, 20) for _ in range(2)]


def several(engine: Any) -> Any:
    """Several samples of each prompt."""
    texts = prompts(2, count=3, shared_tokens=30, own_tokens=9)
    return _generate(engine, texts, 24, n=3)


def long(engine: Any) -> Any:
    """Prompts of many chunks, the second of which shares some with the first."""
    texts = prompts(3, count=3, shared_tokens=230, own_tokens=100)
    return [_generate(engine, [text], 12) for text in texts]


def crowded(engine: Any) -> Any:
    """More than the pool holds: cached prefixes are evicted, and running requests retracted."""
    texts = [
        text for seed in range(4) for text in prompts(40 + seed, 7, shared_tokens=20, own_tokens=15)
    ]
    # For requests that would ignore the end of text, SGLang reserves all they may need.
    params = greedy(90) | {"ignore_eos": False}
    return [_result(answer) for answer in engine.generate(input_ids=texts, sampling_params=params)]


def coming_and_going(engine: Any) -> Any:
    """Requests arrive at random, and some are aborted when they have a few of their many tokens."""
    random = np.random.default_rng(5)
    texts = [text for seed in range(5) for text in prompts(50 + seed, 6, 25, 10)]
    arrival = random.uniform(0, 1.5, len(texts))
    aborted_at = np.where(random.random(len(texts)) < 0.3, random.integers(0, 9, len(texts)), -1)

    async def run(index: int) -> dict[str, Any]:
        await asyncio.sleep(arrival[index])
        name, last = f"coming-{index}", aborted_at[index]
        parts = await engine.async_generate(
            input_ids=texts[index],
            sampling_params=greedy(40 if last < 0 else 200),
            rid=name,
            stream=True,
        )
        following = asyncio.ensure_future(anext(parts))
        if last == 0:  # as soon as the engine knows of it
            while name not in engine.tokenizer_manager.rid_to_state and not following.done():
                await asyncio.sleep(0)
            engine.tokenizer_manager.abort_request(name)
        answer = await following
        async for answer in parts:
            if 0 < last <= len(answer["output_ids"]):
                engine.tokenizer_manager.abort_request(name)
                last = -1
        return _result(answer)

    async def run_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(run(index) for index in range(len(texts))))

    return engine.loop.run_until_complete(run_all())


def namespaces(engine: Any) -> Any:
    """One prompt in three namespaces, twice each: its first run finds nothing in any of them."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    (text,) = prompts(6, count=1, shared_tokens=60, own_tokens=5)
    results = []
    for _ in range(2):
        for keys in ({"extra_key": "a"}, {"extra_key": "b"}, {"extra_key": "a", "cache_salt": "s"}):
            request = GenerateReqInput(input_ids=text, sampling_params=greedy(8), **keys)
            answer = engine.tokenizer_manager.generate_request(request, None)
            results.append(_result(engine.loop.run_until_complete(answer.__anext__())))
    return results


def flushed(engine: Any) -> Any:
    """After a flush nothing is cached, and all of the pool is there again."""
    (text,) = prompts(1, count=1, shared_tokens=50, own_tokens=5)
    before = _generate(engine, [text], 4)
    # It is refused until the scheduler has seen the last request off.
    success = any(engine.flush_cache().success or time.sleep(0.1) for _ in range(50))
    return {"success": success, "before": before, "after": _generate(engine, [text], 4)}


def greedy(length: int, n: int = 1) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": length, "ignore_eos": True, "n": n}


def _generate(engine: Any, texts: list[list[int]], length: int, n: int = 1) -> list[Any]:
    answers = engine.generate(input_ids=texts, sampling_params=greedy(length, n))
    return [_result(answer) for answer in answers]


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    info = answer["meta_info"]  # what was aborted while it waited has little of it
    return {
        "tokens": answer["output_ids"],
        "cached": info.get("cached_tokens", 0),
        "finish": info["finish_reason"]["type"],
        "retractions": info.get("num_retractions", 0),
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
