"""The engine on a stand-in model that sees every wrong slot: what is computed when, and by whom."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator import InvalidArgument, OutOfBlocks
from prefixtree import InvalidTokens
from prefixtree.engines.engine import Engine
from prefixtree.engines.errors import (
    EngineBusy,
    InvalidLogits,
    InvalidSampling,
    PromptTooLong,
    TooManySamples,
    UnknownRequest,
)
from prefixtree.engines.requests import Event
from prefixtree.engines.sampling import SamplingParams
from tests.engines.models import PathModel


def engine_of(num_blocks: int = 64, block_size: int = 4, **limits: int) -> Engine:
    return Engine(PathModel(num_blocks, block_size), **limits)


def sampled(count: int, **more: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "seed": 3, **more})


def check_empty(engine: Engine) -> None:
    assert engine.idle
    engine.cache.check()
    assert engine.cache.stats().open_sequences == 0
    engine.cache.clear()
    assert engine.cache.stats().free_blocks == engine.model.num_blocks


def drain(engine: Engine) -> dict[tuple[int, int], list[Event]]:
    """Runs to the end; the events of each sample, which end with the first finish reason."""
    by_sample: dict[tuple[int, int], list[Event]] = {}
    for event in engine.stream():
        events = by_sample.setdefault(event[:2], [])
        assert not events or events[-1].finish_reason is None
        events.append(event)
    assert all(events[-1].finish_reason for events in by_sample.values())
    return by_sample


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


# ---------------------------------------------------------------------------- what runs together


def test_running_samples_take_a_token_of_every_step_while_a_long_prompt_is_computed():
    engine = engine_of(max_batch_tokens=8)
    first = engine.submit([1, 2, 3], sampled(20))
    engine.step()
    engine.submit(range(30), sampled(2))
    for _ in range(4):  # 30 tokens in chunks of 7
        assert [event.request_id for event in engine.step()] == [first]
    assert [event.request_id for event in engine.step()] == [first, first + 1]
    assert engine.model.batches == [3, 8, 8, 8, 8, 3]
    drain(engine)
    check_empty(engine)


def test_no_step_has_more_tokens_or_samples_than_allowed():
    engine = engine_of(max_batch_tokens=6, max_running=3)
    prompts = [[7, i, *range(i)] for i in range(8)]
    for prompt in prompts:
        engine.submit(prompt, sampled(5))
    running = []
    while not engine.idle:
        running.append(len({event.request_id for event in engine.step()}))
    assert max(engine.model.batches) == 6
    assert max(running) == 3
    check_empty(engine)


def test_a_prompt_in_the_making_takes_its_place():
    engine = engine_of(max_batch_tokens=8, max_running=1)
    for prompt in (range(10), [70, 71]):  # the first leaves room in its second step
        engine.submit(prompt, sampled(3))
    order = [event.request_id for event in engine.stream()]
    assert order == [0, 0, 0, 1, 1, 1]
    check_empty(engine)


def test_the_batch_budget_limits_the_samples_too():
    engine = engine_of(max_batch_tokens=2)
    with pytest.raises(TooManySamples, match="n is 3, but 2"):
        engine.submit([1], sampled(1, n=3))
    assert [len(samples) for samples in engine.generate([[1, 2], [3]], sampled(4, n=2))] == [2, 2]
    check_empty(engine)


def test_a_shared_prefix_is_computed_once_even_when_nobody_has_it_yet():
    engine = engine_of()
    prefix = list(range(20))
    prompts = [[*prefix, 50 + i, 60 + i] for i in range(5)]
    completions = engine.generate(prompts, sampled(3))
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert completion.tokens == engine.model.generated(prompt, sampled(3))
    assert engine.stats().prefill_tokens == 20 + 5 * 2
    assert engine.stats().prompt_tokens == 5 * 22
    check_empty(engine)


def test_equal_prompts_are_computed_once():
    engine = engine_of()
    completions = engine.generate([list(range(9))] * 4, sampled(3))
    assert completions == [completions[0]] * 4
    # The last token of a prompt that is cached whole is computed again, for its logits.
    assert engine.stats().prefill_tokens == 9 + 3
    check_empty(engine)


def test_a_request_that_waits_for_a_prefix_does_not_hold_up_others():
    engine = engine_of()
    shared = list(range(20))
    ids = [engine.submit(prompt, sampled(2)) for prompt in (shared, [*shared, 70], [80, 81])]
    assert [event.request_id for event in engine.step()] == [ids[0], ids[2]]
    assert [event.request_id for event in engine.step()] == [ids[0], ids[2], ids[1]]
    drain(engine)
    check_empty(engine)


def test_samples_share_their_prompt():
    engine = engine_of(num_blocks=10)
    (samples,) = engine.generate([list(range(16))], sampled(4, n=6))
    for index, sample in enumerate(samples):
        assert sample.tokens == engine.model.generated(range(16), sampled(4), index)
    assert len({tuple(sample.tokens) for sample in samples}) > 1
    stats = engine.stats()
    assert (stats.prefill_tokens, stats.prompt_tokens, stats.preemptions) == (16, 96, 0)
    assert stats.decode_tokens == 6 * 3
    assert stats.peak_blocks == 4 + 6
    assert stats.steps == 4
    check_empty(engine)


# ------------------------------------------------------------------------------------ full pools


def test_the_most_recent_is_preempted():
    engine = engine_of(num_blocks=6)
    prompts = [range(8), range(20, 28), range(40, 48)]
    for prompt in prompts:
        engine.submit(prompt, sampled(10))
    assert [event.request_id for event in engine.step()] == [0, 1, 2]
    # Each needs a third block now. Without the last there is room for the first two, until these
    # need a fourth one, four steps later.
    for _ in range(4):
        assert [event.request_id for event in engine.step()] == [0, 1]
    assert [event.request_id for event in engine.step()] == [0]
    assert engine.stats().preemptions == 2
    for (request, _), events in drain(engine).items():
        wanted = engine.model.generated(prompts[request], sampled(10))
        assert tokens_of(events) == wanted[-len(events) :]
        assert events[-1].finish_reason == "length"
    check_empty(engine)


def test_the_preempted_go_on_in_their_order_before_new_requests():
    engine = engine_of(num_blocks=6)
    for prompt in (range(8), range(20, 28), range(40, 48)):
        engine.submit(prompt, sampled(6))
    engine.step()
    engine.submit([80], sampled(1))  # there would be room for it at once
    engine.submit([81], sampled(1))
    first = {}
    for at, event in enumerate(engine.stream()):
        first.setdefault(event.request_id, at)
    assert engine.stats().preemptions > 0
    assert sorted(first, key=first.__getitem__) == [0, 1, 2, 3, 4]
    check_empty(engine)


def test_a_preempted_prompt_keeps_what_was_computed_of_it():
    engine = engine_of(num_blocks=8, max_batch_tokens=6)
    engine.submit(range(4), sampled(8))
    engine.step()
    engine.submit(range(30, 54), sampled(3))
    # The first has 2 blocks, the second the other 6; when the first needs a third, 20 tokens of the
    # second are computed, and the block of the rest is free again.
    for _ in range(4):
        engine.step()
    assert engine.stats().preemptions == 0
    engine.step()
    assert engine.stats().preemptions == 1
    events = drain(engine)
    assert tokens_of(events[1, 0]) == engine.model.generated(range(30, 54), sampled(3))
    assert engine.stats().prefill_tokens == 4 + 24
    check_empty(engine)


def test_without_room_for_one_more_token_the_last_sample_ends():
    engine = engine_of(num_blocks=4)
    (completion,), (other,) = engine.generate([list(range(10)), [80, 81]], sampled(30))
    # 16 tokens fit, and a token more, behind which nothing is computed, comes out of the last.
    assert completion.finish_reason == "out_of_blocks"
    assert completion.tokens == engine.model.generated(range(10), sampled(7))
    assert other.finish_reason == "out_of_blocks"
    assert other.tokens == engine.model.generated([80, 81], sampled(15))
    check_empty(engine)


def test_a_prompt_as_large_as_the_cache_gives_one_token():
    engine = engine_of(num_blocks=4)
    (completion,) = engine.generate([range(16)], sampled(1))[0]
    assert completion == (engine.model.generated(range(16), sampled(1)), "length")
    (completion,) = engine.generate([range(16)], sampled(2))[0]
    assert completion == (engine.model.generated(range(16), sampled(1)), "out_of_blocks")
    check_empty(engine)


def test_samples_that_do_not_fit_side_by_side_run_one_after_the_other():
    engine = engine_of(num_blocks=4)
    (samples,) = engine.generate([range(12)], sampled(4, n=3))
    for index, sample in enumerate(samples):
        assert sample == (engine.model.generated(range(12), sampled(4), index), "length")
    assert engine.stats().preemptions > 0
    check_empty(engine)


def test_a_scattered_prefix_is_given_up_for_a_prompt_that_fits_only_without():
    engine = engine_of(num_blocks=5)
    chain = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    for prompt in chain:
        engine.generate([prompt], sampled(1))
    assert engine.cache.match([1, 2, 3, 4]).cached == 4
    prompt = [1, 2, 3, 4, *range(20, 34)]  # 18 tokens in 5 blocks, or 4 + ceil(14 / 4) with those
    with pytest.raises(OutOfBlocks):
        engine.cache.open(prompt)
    (completion,) = engine.generate([prompt], sampled(3))[0]
    assert completion == (engine.model.generated(prompt, sampled(3)), "length")
    check_empty(engine)


def test_a_prompt_waits_for_blocks_while_something_runs():
    engine = engine_of(num_blocks=6)
    engine.submit(range(12), sampled(5))
    engine.step()
    engine.submit(range(40, 60), sampled(2))
    seen = [event.request_id for event in engine.step() + engine.step()]
    assert seen == [0, 0]
    events = drain(engine)
    assert tokens_of(events[1, 0]) == engine.model.generated(range(40, 60), sampled(2))
    assert engine.stats().preemptions == 0
    check_empty(engine)


def test_blocks_that_somebody_else_holds_are_missing():
    engine = engine_of(num_blocks=4)
    other = engine.cache.open(range(60, 70))
    engine.submit(range(12), sampled(2))
    with pytest.raises(OutOfBlocks):
        engine.step()
    other.close()
    assert tokens_of(drain(engine)[0, 0]) == engine.model.generated(range(12), sampled(2))
    check_empty(engine)


# --------------------------------------------------------------------------------- how they end


def test_stop_tokens_end_a_sample_and_belong_to_it():
    engine = engine_of()
    prompt = [5, 6, 7]
    tokens = engine.model.generated(prompt, sampled(12))
    for at in (0, 4, 11):
        stop = tokens[at]
        params = sampled(12, stop_tokens=(96_000, stop))
        (completion,) = engine.generate([prompt], params)[0]
        assert completion == (tokens[: tokens.index(stop) + 1], "stop")
    check_empty(engine)


def test_every_request_has_its_own_stop_tokens_and_length():
    engine = engine_of()
    prompts = [[i, i + 1] for i in range(6)]
    plain = [engine.model.generated(prompt, sampled(9)) for prompt in prompts]
    params = [
        sampled(9),
        sampled(9, stop_tokens=(plain[1][3],)),
        sampled(1),
        sampled(9, stop_tokens=(plain[3][0], plain[3][1])),
        sampled(4),
        sampled(9, stop_tokens=tuple(plain[4])),  # of another request
    ]
    completions = engine.generate(prompts, params)
    for prompt, own, (completion,) in zip(plain, params, completions, strict=True):
        wanted = prompt[: own.max_new_tokens]
        stops = [i for i, token in enumerate(wanted) if token in own.stop_tokens]
        assert completion.tokens == wanted[: stops[0] + 1 if stops else None]
        assert completion.finish_reason == ("stop" if stops else "length")
    assert [c.finish_reason for (c,) in completions].count("stop") >= 2
    check_empty(engine)


def test_samples_of_one_request_end_apart():
    engine = engine_of()
    texts = [engine.model.generated([9], sampled(8), index) for index in range(4)]
    params = sampled(8, n=4, stop_tokens=(texts[0][0], texts[1][2]))
    (samples,) = engine.generate([[9]], params)
    for text, sample in zip(texts, samples, strict=True):
        stops = [i for i, token in enumerate(text) if token in params.stop_tokens]
        assert sample.tokens == text[: stops[0] + 1 if stops else None]
    assert len(samples[0].tokens) == 1
    assert len(samples[1].tokens) <= 3
    check_empty(engine)


def test_the_last_position_of_the_model_ends_a_sample():
    engine = Engine(PathModel(16, 4, max_positions=10))
    (completion,) = engine.generate([range(7)], sampled(20))[0]
    # Positions 7, 8 and 9 are computed, and the token sampled behind the last one is the fourth.
    assert completion == (engine.model.generated(range(7), sampled(4)), "length")
    assert len(engine.generate([range(10)], sampled(20))[0][0].tokens) == 1
    with pytest.raises(PromptTooLong, match="11 tokens for 10 positions"):
        engine.submit(range(11), sampled(1))
    check_empty(engine)


def test_events_come_in_the_order_of_the_tokens_and_end_once():
    engine = engine_of(num_blocks=8, max_batch_tokens=5)
    prompts = [[1, 2, 3], [1, 2, 4, 5, 6, 7, 8], [9] * 6]
    ids = [engine.submit(prompt, sampled(6, n=2)) for prompt in prompts]
    by_sample = drain(engine)
    assert sorted(by_sample) == [(request, sample) for request in ids for sample in (0, 1)]
    for (request, index), events in by_sample.items():
        wanted = engine.model.generated(prompts[request], sampled(6), index)
        assert tokens_of(events) == wanted
        assert events[-1] == (request, index, wanted[-1], "length")
    check_empty(engine)


def test_a_stream_that_is_left_goes_on_later():
    engine = engine_of()
    prompts = [[1, 2], [3], [4, 5, 6]]
    for prompt in prompts:
        engine.submit(prompt, sampled(5))
    texts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while not engine.idle:
        for event in engine.stream():  # a new one for each event
            texts[event.request_id].append(event.token)
            break
    assert list(texts.values()) == [engine.model.generated(p, sampled(5)) for p in prompts]
    check_empty(engine)


def test_on_event_sees_everything_that_is_returned():
    engine = engine_of()
    seen: list[Event] = []
    completions = engine.generate([[1], [2, 3]], sampled(4, n=2), on_event=seen.append)
    for request, samples in enumerate(completions):
        for index, sample in enumerate(samples):
            events = [event for event in seen if event[:2] == (request, index)]
            assert tokens_of(events) == sample.tokens
            assert events[-1].finish_reason == sample.finish_reason


# ------------------------------------------------------------------------------------------ abort


def test_abort_ends_a_request_wherever_it_is():
    engine = engine_of(max_batch_tokens=8, max_running=4)
    params = sampled(6, n=2)
    decoding = engine.submit([1, 2], params)
    engine.step()
    prefilling = engine.submit(range(10, 40), params)
    engine.step()
    waiting = engine.submit([70, 71], params)
    kept = engine.submit([80, 81], params)
    engine.step()
    for request in (waiting, prefilling, decoding):
        engine.abort(request)
        engine.cache.check()
    assert engine.cache.stats().open_sequences == 0
    by_sample = drain(engine)
    for request in (waiting, prefilling, decoding):
        for index in (0, 1):
            assert by_sample[request, index] == [(request, index, None, "aborted")]
    for index in (0, 1):
        wanted = engine.model.generated([80, 81], sampled(6), index)
        assert tokens_of(by_sample[kept, index]) == wanted
    check_empty(engine)


def test_abort_leaves_finished_samples_as_they_are():
    engine = engine_of()
    first = engine.model.generated([1], sampled(6), 0)
    request = engine.submit([1], sampled(6, n=2, stop_tokens=(first[0],)))
    other = engine.submit([2], sampled(6))
    assert (request, 0, first[0], "stop") in engine.step()
    engine.abort(request)
    engine.abort(request)
    by_sample = drain(engine)
    assert by_sample[request, 1] == [(request, 1, None, "aborted")]
    assert (request, 0) not in by_sample
    assert len(by_sample[other, 0]) == 5
    engine.abort(request)
    assert engine.idle
    check_empty(engine)


def test_abort_from_a_callback():
    engine = engine_of()

    def stop_second(event: Event) -> None:
        if event.request_id == 1:
            engine.abort(1)

    completions = engine.generate([[1], [2], [3]], sampled(5), stop_second)
    reasons = [samples[0].finish_reason for samples in completions]
    assert reasons == ["length", "aborted", "length"]
    assert completions[1][0].tokens == engine.model.generated([2], sampled(1))
    check_empty(engine)


def test_a_preempted_sample_can_be_aborted():
    engine = engine_of(num_blocks=4)
    engine.submit(range(8), sampled(8))
    late = engine.submit(range(20, 28), sampled(8))
    while engine.stats().preemptions == 0:
        engine.step()
    engine.abort(late)
    by_sample = drain(engine)
    assert by_sample[late, 0] == [(late, 0, None, "aborted")]
    assert by_sample[0, 0][-1].finish_reason == "length"
    check_empty(engine)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        (range(17), sampled(1), PromptTooLong, "17 tokens for 16 slots of the cache"),
        ([1, 97], sampled(1), InvalidTokens, r"token 97 at 1, expected ids 0\.\.96"),
        ([], sampled(1), InvalidTokens, "empty"),
        ([1, -1], sampled(1), InvalidTokens, "-1"),
        ([1.5], sampled(1), InvalidTokens, "integers"),
        ([1], sampled(1, n=9), TooManySamples, "n is 9, but 8 samples"),
    ],
)
def test_requests_that_can_never_run_are_refused_and_hold_up_nobody(prompt, params, error, message):
    engine = engine_of(num_blocks=4, max_running=8)
    first = engine.submit([1, 2], sampled(3))
    with pytest.raises(error, match=message):
        engine.submit(prompt, params)
    second = engine.submit([3], sampled(3))
    assert second == first + 1
    assert sorted(drain(engine)) == [(first, 0), (second, 0)]
    with pytest.raises(error, match=message):
        engine.generate([[4], prompt], [sampled(1), params])
    assert engine.idle
    check_empty(engine)


def test_the_other_errors_of_calls():
    engine = engine_of()
    with pytest.raises(InvalidSampling, match="1 params for 2 prompts"):
        engine.generate([[1], [2]], [sampled(1)])
    with pytest.raises(UnknownRequest, match="request 0 of 0"):
        engine.abort(0)
    request = engine.submit([1], sampled(3))
    for unknown in (-1, request + 1):
        with pytest.raises(UnknownRequest):
            engine.abort(unknown)
    with pytest.raises(EngineBusy, match="1 unfinished requests and 0 events"):
        engine.generate([[1]], sampled(1))
    engine.abort(request)
    with pytest.raises(EngineBusy, match="0 unfinished requests and 1 events"):
        engine.generate([[1]], sampled(1))
    drain(engine)
    for limits in ({"max_batch_tokens": 0}, {"max_running": 0}):
        with pytest.raises(InvalidArgument, match=next(iter(limits))):
            engine_of(**limits)
    check_empty(engine)


def test_a_prompt_array_is_not_shared_with_the_caller():
    engine = engine_of()
    prompt = np.array([1, 2, 3], np.int32)
    engine.submit(prompt, sampled(3))
    prompt[:] = 90
    assert tokens_of(drain(engine)[0, 0]) == engine.model.generated([1, 2, 3], sampled(3))


class Unreliable(PathModel):
    """Fails in every third pass, after it has written KV: by an error, or by logits of NaN."""

    error: BaseException | None = None

    def forward(self, *arguments: object) -> torch.Tensor:
        logits = super().forward(*arguments)
        if len(self.batches) % 3 == 2:
            if self.error is not None:
                raise self.error
            logits[:] = float("nan")
        return logits


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (None, InvalidLogits),
        (RuntimeError("device lost"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_step_that_failed_can_be_tried_again(error, seen):
    model = Unreliable(12, 4)
    model.error = error
    engine = Engine(model, max_batch_tokens=9)
    prompts = [list(range(5)), list(range(5)) * 4, [60, 61]]
    for prompt in prompts:
        engine.submit(prompt, sampled(7, n=2))
    texts: dict[tuple[int, int], list[int]] = {}
    failures = 0
    while not engine.idle:
        try:
            for event in engine.step():
                texts.setdefault(event[:2], []).append(event.token)
        except seen:
            failures += 1
            engine.cache.check()
    assert failures > 3
    for (request, index), tokens in texts.items():
        assert tokens == model.generated(prompts[request], sampled(7), index)
    assert len(texts) == 6
    check_empty(engine)


def test_an_error_in_generate_leaves_no_request():
    def fail(event: Event) -> None:
        raise LookupError("no")

    engine = engine_of()
    with pytest.raises(LookupError):
        engine.generate([[1, 2], [3]], sampled(4, n=2), fail)
    check_empty(engine)
    assert engine.generate([[1, 2]], sampled(2))[0][0].tokens == engine.model.generated(
        [1, 2], sampled(2)
    )


# --------------------------------------------------------------------------------- any schedule

requests = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
    st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 8),
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 0.7]),
        top_k=st.sampled_from([0, 2]),
        seed=st.integers(0, 3),
        stop_tokens=st.sampled_from([(), (1,)]),
    ),
    st.integers(0, 4),  # steps before the next one comes
    st.one_of(st.none(), st.integers(0, 6)),  # steps after which it is aborted
)


@given(
    st.lists(requests, min_size=1, max_size=7),
    st.integers(4, 16),
    st.integers(1, 5),
    st.integers(3, 24),
)
def test_no_schedule_changes_loses_or_doubles_a_token(work, num_blocks, block_size, max_batch):
    """A vocabulary of 3 tokens, so that prompts and what is generated meet again and again."""
    model = PathModel(num_blocks, block_size, vocab_size=3)
    engine = Engine(model, max_batch_tokens=max_batch, max_running=5)
    events: dict[tuple[int, int], list[Event]] = {}
    accepted, aborts, step = {}, {}, 0

    def run(steps: int) -> None:
        nonlocal step
        for _ in range(steps):
            for request in [r for r, due in aborts.items() if due <= step]:
                del aborts[request]
                engine.abort(request)
            for event in engine.step():
                events.setdefault(event[:2], []).append(event)
            step += 1

    for prompt, params, pause, abort_after in work:
        if len(prompt) > num_blocks * block_size:
            with pytest.raises(PromptTooLong):
                engine.submit(prompt, params)
            continue
        request = engine.submit(prompt, params)
        accepted[request] = (prompt, params)
        if abort_after is not None:
            aborts[request] = step + abort_after
        run(pause)
    while not engine.idle:
        run(1)
        engine.cache.check()

    assert sorted(events) == [(r, i) for r in accepted for i in range(accepted[r][1].n)]
    for (request, index), history in events.items():
        prompt, params = accepted[request]
        wanted = model.generated(prompt, params, index)
        stops = [i for i, token in enumerate(wanted) if token in params.stop_tokens]
        wanted = wanted[: stops[0] + 1] if stops else wanted
        reasons = [event.finish_reason for event in history]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        if reasons[-1] in ("stop", "length"):
            assert tokens_of(history) == wanted
            assert reasons[-1] == ("stop" if stops else "length")
        elif reasons[-1] == "out_of_blocks":
            assert tokens_of(history) == wanted[: num_blocks * block_size - len(prompt) + 1]
        else:
            assert reasons[-1] == "aborted"
            assert tokens_of(history) == wanted[: len(history) - 1]
    stats = engine.stats()
    assert stats.peak_blocks <= num_blocks
    assert max(model.batches, default=0) <= max_batch
    assert sum(model.batches) == stats.prefill_tokens + stats.decode_tokens
    check_empty(engine)
