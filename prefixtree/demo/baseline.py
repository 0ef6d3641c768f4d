"""The same work by transformers alone: `model.generate` with its own cache, nothing shared."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prefixtree.demo.job import Job, Outcome
from prefixtree.engines.sampling import sample, streams


class SeededDraw(LogitsProcessor):
    """Leaves generate() no choice but the token that this project's sampler draws.

    streams: [B], the random streams of the rows. positions: [B], those of the first new tokens.
    """

    def __init__(self, streams: NDArray[np.void], positions: NDArray[np.int64]) -> None:
        self._streams = streams
        self._positions = positions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [B, V] logits; returns 0 at the drawn token of each row and -inf elsewhere."""
        drawn = torch.from_numpy(sample(scores, self._streams, self._positions)).to(scores.device)
        self._positions = self._positions + 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0.0)


class _Tick(StoppingCriteria):
    """Stops nothing: generate() calls it once a step, which moves the progress bar."""

    def __init__(self, progress: "tqdm[Any]") -> None:
        self._progress = progress

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self._progress.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_generate(model: PreTrainedModel, job: Job, label: str) -> Outcome:
    """All samples of all prompts in one left-padded batch, rows in the order of `job.rows`.

    All params of the job must agree in temperature, max_new_tokens and stop tokens.
    """
    params = job.params[0]
    rows = [job.prompts[problem] for problem, _ in job.rows]
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(rows):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if params.temperature > 0:
        streams_of_rows = np.concatenate([streams(p, range(p.n)) for p in job.params])
        processors.append(SeededDraw(streams_of_rows, mask.sum(dim=1).numpy()))
    with tqdm(total=len(rows) * params.max_new_tokens, desc=label, unit="token") as progress:
        began = time.perf_counter()
        # generate() refuses num_return_sequences with do_sample=False; with it, it would repeat
        # each prompt before the prefill, which is what `rows` does.
        output: Any = model.generate(  # type: ignore[operator]
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Tick(progress)]),
            eos_token_id=list(params.stop_tokens) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, width:].tolist()
        seconds = time.perf_counter() - began
    layers = output.past_key_values.layers
    return Outcome(
        tokens=_by_problem(job, [_until_stop(row, params.stop_tokens) for row in new]),
        tokens_computed=len(rows) * output.past_key_values.get_seq_length(),
        kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        seconds=seconds,
    )


def _until_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    """Without the padding that generate() writes behind a stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[: end + 1]


def _by_problem(job: Job, rows: list[list[int]]) -> list[list[list[int]]]:
    remaining = iter(rows)
    return [[next(remaining) for _ in range(params.n)] for params in job.params]
