"""The work by prefixtree: every shared prefix computed and kept once."""

import time

from tqdm import tqdm
from transformers import PreTrainedModel

from prefixtree.demo.job import Job, Outcome
from prefixtree.engines.engine import Engine
from prefixtree.engines.requests import Event
from prefixtree.engines.transformers import PagedModel
from prefixtree.view import TreeView


def run_shared(
    model: PreTrainedModel, job: Job, block_size: int, label: str
) -> tuple[Outcome, TreeView]:
    """All samples of all prompts through an engine with an empty cache.

    Also returns the tree as it was when half of the tokens were there, or, when stop tokens ended
    the samples before that, at the end. The pool has room for all sequences without any sharing,
    so nothing is evicted; memory is counted by the blocks that were in use.

    Raises UnsupportedModel and PromptTooLong, as the engine does.
    """
    num_blocks = sum(
        params.n * -(-(len(prompt) + params.max_new_tokens) // block_size)
        for prompt, params in zip(job.prompts, job.params, strict=True)
    )
    total = sum(params.n * params.max_new_tokens for params in job.params)
    halfway: list[TreeView] = []
    with (
        PagedModel(model, num_blocks, block_size) as paged,
        tqdm(total=total, desc=label, unit="token") as progress,
    ):
        began = time.perf_counter()
        engine = Engine(paged, max_running=len(job.rows), max_batch_tokens=max(2048, len(job.rows)))

        def watch(event: Event) -> None:
            progress.update(event.token is not None)
            if progress.n == total // 2 and not halfway:
                halfway.append(engine.cache.tree())

        completions = engine.generate(job.prompts, job.params, on_event=watch)
        seconds = time.perf_counter() - began
        stats = engine.stats()
        outcome = Outcome(
            tokens=[[completion.tokens for completion in samples] for samples in completions],
            tokens_computed=stats.prefill_tokens + stats.decode_tokens,
            kv_bytes=stats.peak_blocks * paged.storage.num_bytes // num_blocks,
            seconds=seconds,
        )
        return outcome, halfway[0] if halfway else engine.cache.tree()
