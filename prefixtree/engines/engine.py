"""A small continuous-batching engine: prompts in, tokens out, every shared prefix computed once.

It shows what an engine does with the cache; a server would put a network in front of it. A step is
one forward pass over the newest token of every running sample and as many prompt tokens as the
budget leaves room for (Yu et al., Orca, OSDI 2022; Agrawal et al., Sarathi-Serve, OSDI 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from allocator.errors import InvalidArgument
from prefixtree.cache import PrefixCache
from prefixtree.columns import Int64s
from prefixtree.engines.errors import (
    EngineBusy,
    InvalidSampling,
    PromptTooLong,
    TooManySamples,
    UnknownRequest,
)
from prefixtree.engines.requests import Completion, Continuation, Event, FinishReason, Request
from prefixtree.engines.sampling import SamplingParams, sample
from prefixtree.engines.scheduler import Chunk, Scheduler
from prefixtree.errors import InvalidTokens
from prefixtree.forest import Forest
from prefixtree.tokens import TokensLike, as_prompt


class Model(Protocol):
    """What the engine runs: see `prefixtree.engines.transformers.PagedModel`."""

    num_blocks: int
    block_size: int
    vocab_size: int
    max_positions: int | None

    def forward(
        self, tokens: Int64s, positions: Int64s, slots: Int64s, forest: Forest, logits_at: Int64s
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class EngineStats:
    """Counted since the engine was made."""

    steps: int
    """Forward passes."""
    prompt_tokens: int
    """Tokens asked for: the length of the prompts, summed over all samples."""
    prefill_tokens: int
    """Tokens computed of prompts and, after a preemption, of what was generated before it."""
    decode_tokens: int
    """Tokens computed one by one, a step each."""
    preemptions: int
    peak_blocks: int
    """Most blocks that requests held at once; cached ones that none uses do not count."""


class Engine:
    """Runs requests on one model with one cache. One thread.

    Attributes: model, cache.
    """

    def __init__(
        self, model: Model, *, max_batch_tokens: int = 2048, max_running: int = 256
    ) -> None:
        """At most `max_batch_tokens` tokens a step and `max_running` samples at once.

        As a running sample takes a token of every step, no more than `max_batch_tokens` samples run
        at once either. Raises `InvalidArgument` unless both are >= 1.
        """
        for name, limit in (("max_batch_tokens", max_batch_tokens), ("max_running", max_running)):
            if limit < 1:
                raise InvalidArgument(f"{name} is {limit}, expected at least 1")
        self.model = model
        self.cache = PrefixCache(model.num_blocks, model.block_size)
        self._max_running = min(max_running, max_batch_tokens)
        self._scheduler = Scheduler(self.cache, max_batch_tokens, self._max_running)
        self._next_id = 0
        self._unfinished: dict[int, Request] = {}
        self._events: deque[Event] = deque()  # those that nobody has seen yet
        self._steps = self._prompt_tokens = self._prefill_tokens = self._decode_tokens = 0
        self._peak_blocks = 0

    @property
    def idle(self) -> bool:
        """No request is unfinished and no event is left to come."""
        return not self._unfinished and not self._events

    def stats(self) -> EngineStats:
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            preemptions=self._scheduler.preemptions,
            peak_blocks=self._peak_blocks,
        )

    def submit(self, prompt: TokensLike, params: SamplingParams) -> int:
        """Adds a request, which starts in one of the next steps. Returns its id.

        Raises `InvalidTokens` (ids of the model's vocabulary, at least one), `PromptTooLong` (for
        the whole cache, or for the positions of the model) or `TooManySamples` (for running at
        once), and changes nothing.
        """
        return self._enqueue(self._request(prompt, params))

    def abort(self, request_id: int) -> None:
        """Ends what is unfinished of a request; its "aborted" events come with the next step.

        A request that has finished stays as it is. Raises `UnknownRequest` for an id that no
        request was given.
        """
        if not 0 <= request_id < self._next_id:
            raise UnknownRequest(f"request {request_id} of {self._next_id} so far")
        request = self._unfinished.get(request_id)
        if request is not None:
            self._scheduler.remove(request)
            for index in sorted(request.unfinished):
                self._end(request, index, "aborted")

    def stream(self) -> Iterator[Event]:
        """Steps until the engine is idle. Requests may be submitted and aborted in between."""
        while not self.idle:
            if not self._events:
                self._step()
            # One by one: what a caller that stops here has not seen yet is still to come.
            while self._events:
                yield self._events.popleft()

    def generate(
        self,
        prompts: AbstractSequence[TokensLike],
        params: SamplingParams | AbstractSequence[SamplingParams],
        on_event: Callable[[Event], object] | None = None,
    ) -> list[list[Completion]]:
        """Runs prompts to their end. Returns for each prompt, in order, its n completions.

        params: one for all prompts or one for each. on_event: sees every event as it comes, and may
        abort. Raises `EngineBusy` unless the engine is idle, `InvalidSampling` for a wrong number
        of params, and what `submit` raises, all before anything runs. After an error in a step or
        in `on_event` none of the requests is left.
        """
        if not self.idle:
            raise EngineBusy(
                f"generate() with {len(self._unfinished)} unfinished requests and "
                f"{len(self._events)} events to come"
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidSampling(f"{len(each)} params for {len(prompts)} prompts")
        requests = [self._request(*pair) for pair in zip(prompts, each, strict=True)]
        for request in requests:
            self._enqueue(request)
        texts: dict[tuple[int, int], list[int]] = {}
        reasons: dict[tuple[int, int], FinishReason] = {}
        try:
            for event in self.stream():
                text = texts.setdefault(event[:2], [])
                if event.token is not None:
                    text.append(event.token)
                if event.finish_reason is not None:
                    reasons[event[:2]] = event.finish_reason
                if on_event is not None:
                    on_event(event)
        except BaseException:
            for request in requests:
                self.abort(request.id)
            self._events.clear()
            raise
        return [
            [Completion(texts[r.id, i], reasons[r.id, i]) for i in range(r.params.n)]
            for r in requests
        ]

    def step(self) -> list[Event]:
        """One forward pass. Returns all that happened since the step before.

        An error of the model or `InvalidLogits` leaves every request as it was, so that the step
        can be tried again.
        """
        self._step()
        events = list(self._events)
        self._events.clear()
        return events

    def _step(self) -> None:
        scheduler = self._scheduler
        slots, lost = scheduler.append()
        for work in lost:
            for index in work.samples:
                self._end(work.request, index, "out_of_blocks")
        try:
            scheduler.admit()
            chunks = scheduler.chunks()
            self._count_blocks()
            if not scheduler.running and not chunks:
                return
            fresh = [chunk.prefill.work for chunk in chunks if chunk.is_last]
            logits = self._forward(slots, chunks)
            rows = self._sample(logits, fresh)
        except BaseException:
            scheduler.undo_append()
            raise
        self.cache.commit(scheduler.running.batch)
        for chunk in chunks:
            chunk.prefill.sequence.commit(chunk.stop)
        self._steps += 1
        self._decode_tokens += len(scheduler.running)
        self._prefill_tokens += sum(chunk.stop - chunk.start for chunk in chunks)
        scheduler.settle(rows, self._report(rows, fresh), chunks)

    def _count_blocks(self) -> None:
        stats = self.cache.stats()
        self._peak_blocks = max(self._peak_blocks, stats.used_blocks - stats.evictable_blocks)

    def _forward(self, slots: Int64s, chunks: list[Chunk]) -> torch.Tensor:
        """Logits behind each running sample, then behind each prefill that gets done."""
        running = self._scheduler.running
        count = len(running)
        tokens, positions = [running.rows["token"]], [running.rows["position"]]
        all_slots, wanted = [slots], [np.arange(count)]
        for prefill, start, stop in chunks:
            tokens.append(prefill.work.tokens[start:stop].astype(np.int64))
            positions.append(np.arange(start, stop))
            # The last token of a prompt that is cached whole is a query only.
            is_written = start < prefill.sequence.committed
            nowhere = np.full(stop - start, -1)
            all_slots.append(nowhere if is_written else prefill.sequence.slots(start, stop))
            count += stop - start
            if stop == len(prefill.work.tokens):
                wanted.append(np.array([count - 1]))
        if chunks:
            sequences = [member.sequence for member in running.members]
            forest = self.cache.forest(
                sequences + [chunk.prefill.sequence for chunk in chunks],
                kv_lens=np.append(positions[0] + 1, [chunk.stop for chunk in chunks]),
                query_lens=[1] * len(running) + [chunk.stop - chunk.start for chunk in chunks],
            )
        else:
            forest = self.cache.forest(running.batch)
        return self.model.forward(
            np.concatenate(tokens),
            np.concatenate(positions),
            np.concatenate(all_slots),
            forest,
            np.concatenate(wanted),
        )

    def _sample(self, logits: torch.Tensor, fresh: list[Continuation]) -> NDArray[np.void]:
        """Rows with their next tokens: of the running samples, then of those behind `fresh`."""
        running = self._scheduler.running
        rows = np.concatenate([running.rows, *(work.rows() for work in fresh)])
        rows["position"][: len(running)] += 1
        fan_out = [1] * len(running) + [len(work.samples) for work in fresh]
        if len(rows) > len(fan_out):
            index = np.repeat(np.arange(len(fan_out)), fan_out)
            logits = logits[torch.from_numpy(index).to(logits.device)]
        rows["token"] = sample(logits, rows, rows["position"])
        rows["remaining"] -= 1
        return rows

    def _report(self, rows: NDArray[np.void], fresh: list[Continuation]) -> set[int]:
        """Makes the events of a step. Returns the rows that had their last token."""
        running = self._scheduler.running
        ids = running.request_ids + [work.request.id for work in fresh for _ in work.samples]
        samples = running.samples + [index for work in fresh for index in work.samples]
        tokens = rows["token"].tolist()
        reasons: list[FinishReason | None] = [None] * len(rows)
        stopped = set(running.stopped(rows["token"]).tolist())
        for row in range(len(running), len(rows)):
            if tokens[row] in self._unfinished[ids[row]].params.stop_tokens:
                stopped.add(row)
        ended = stopped | set(np.flatnonzero(rows["remaining"] == 0).tolist())
        for row in ended:
            reasons[row] = "stop" if row in stopped else "length"
            self._forget(self._unfinished[ids[row]], samples[row])
        self._events.extend(map(Event, ids, samples, tokens, reasons))
        return ended

    def _end(self, request: Request, index: int, reason: FinishReason) -> None:
        self._events.append(Event(request.id, index, None, reason))
        self._forget(request, index)

    def _forget(self, request: Request, index: int) -> None:
        request.unfinished.discard(index)
        if not request.unfinished:
            del self._unfinished[request.id]

    def _request(self, prompt: TokensLike, params: SamplingParams) -> Request:
        tokens = as_prompt(prompt).copy()
        model = self.model
        at = int(tokens.argmax())
        if tokens[at] >= model.vocab_size:
            expected = f"ids 0..{model.vocab_size - 1} of the model"
            raise InvalidTokens(f"token {tokens[at]} at {at}, expected {expected}")
        limits = {"slots of the cache": model.num_blocks * model.block_size}
        if model.max_positions is not None:
            limits["positions of the model"] = model.max_positions
        for what, limit in limits.items():
            if len(tokens) > limit:
                raise PromptTooLong(f"{len(tokens)} tokens for {limit} {what}")
        if params.n > self._max_running:
            raise TooManySamples(f"n is {params.n}, but {self._max_running} samples run at once")
        max_new_tokens = params.max_new_tokens
        if model.max_positions is not None:
            # The last token takes no position: nothing is computed behind it.
            max_new_tokens = min(max_new_tokens, model.max_positions - len(tokens) + 1)
        self._next_id += 1
        return Request(self._next_id - 1, tokens, params, max_new_tokens)

    def _enqueue(self, request: Request) -> int:
        samples = list(range(request.params.n))
        self._unfinished[request.id] = request
        self._scheduler.waiting.append(Continuation(request, request.prompt, samples))
        self._prompt_tokens += len(request.prompt) * len(samples)
        return request.id
