"""The command `bench decode`, on sizes so small that the figures mean nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import attention
from prefixtree import PrefixCache
from prefixtree.__main__ import main
from prefixtree.bench import decode
from prefixtree.bench.decode import (
    BLOCK_SIZE,
    MODES,
    WARM_UP,
    Decoding,
    Scenario,
    Setup,
    Sizes,
    median_seconds,
    open_all,
    points_of,
)
from prefixtree.bench.decoder import MODELS, Decoder, ModelShape
from prefixtree.bench.measure import Rounds

CPU = torch.device("cpu")
SHAPE = ModelShape(layers=2, hidden=64, num_q_heads=4, num_kv_heads=2, intermediate=96, vocab=50)
SCENARIOS = {
    "batch": Scenario(33, samples=5),
    "single": Scenario(1),
    "two levels": Scenario(40, 70, problems=3, samples=2),
    "one level": Scenario(40, 70, problems=3, samples=2, shares_problem=False),
}


def setup_for(scenario: Scenario, steps: int, backend: str | None = None) -> Setup:
    torch.manual_seed(0)
    model, blocks = Decoder(SHAPE, torch.float32, CPU), scenario.blocks(steps)
    return Setup(model, blocks, torch.float32, CPU, backend)


def test_every_experiment_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", SHAPE)
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    options = ["--batches", "1,3", "--prefix", "20", "--prefixes", "5,17", "--problems", "2"]
    options += ["--samples", "2", "--steps", "2", "--seconds", "60"]
    options += ["--json", str(file), "--plot", str(picture)]
    assert main(["bench", "decode", *options]) == 0
    figures = json.loads(file.read_text())
    points = {(p["experiment"], p["label"]): p for p in figures["points"]}
    assert list(points) == [
        ("batch", "1"),
        ("batch", "3"),
        ("prefix", "5"),
        ("prefix", "17"),
        ("levels", "one"),
        ("levels", "two"),
    ]
    for (_, label), point in points.items():
        modes = MODES[:1] if label == "one" else MODES
        assert list(point["tokens_per_s"]) == list(modes)
        assert all(rate > 0 for rate in point["tokens_per_s"].values())
        assert point["steps"] == 2
    assert points["prefix", "17"]["batch"] == 3
    assert points["levels", "two"]["batch"] == 4
    assert figures["model"] == "tiny"
    assert picture.stat().st_size > 0
    assert "2400+400" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", SHAPE)
    monkeypatch.setattr(decode, "_room", lambda *_: 40)
    file = tmp_path / "figures.json"
    options = ["bench", "decode", "--batches", "1", "--prefix", "20", "--prefixes", "2000"]
    assert main([*options, "--steps", "1", "--json", str(file)]) == 0
    small, large = json.loads(file.read_text())["points"][:2]
    assert small["missing"] is None
    assert large["missing"] == f"{Scenario(2000).blocks(3)} blocks of KV needed, memory for 40"
    assert large["tokens_per_s"] == {}
    monkeypatch.setattr(decode, "_room", lambda *_: 0)
    assert main([*options, "--steps", "1"]) == 2
    assert "--model tiny: memory for 0 blocks of KV" in capsys.readouterr().err


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_the_blocks_counted_are_enough(scenario: Scenario) -> None:
    steps = 20
    setup = setup_for(scenario, steps)
    _, taken = median_seconds(setup, scenario, MODES, Rounds(steps - WARM_UP, 60.0))
    assert taken == steps - WARM_UP


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_sequences_stand_on_the_tree_of_the_scenario(scenario: Scenario) -> None:
    cache = PrefixCache(scenario.blocks(4), BLOCK_SIZE)
    sequences = open_all(cache, scenario)
    assert len(sequences) == scenario.batch
    prompts = [tuple(sequence.tokens().tolist()) for sequence in sequences]
    assert {len(prompt) for prompt in prompts} == {scenario.few_shot + scenario.problem}
    assert len({prompt[: scenario.few_shot] for prompt in prompts}) == 1
    copies = scenario.problems if scenario.shares_problem else scenario.batch
    assert len(set(prompts)) == (copies if scenario.problem else 1)
    assert cache.stats().cached_tokens == scenario.few_shot + copies * scenario.problem


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_sharing_changes_the_time_and_not_the_tokens(scenario: Scenario) -> None:
    found = []
    for mode, backend in zip((*MODES, MODES[0]), (None, None, None, "reference"), strict=True):
        decoding = Decoding(setup_for(scenario, 6, backend), scenario, mode)
        tokens = []
        for _ in range(6):
            decoding.step()
            tokens.append(decoding.tokens.copy())
        # The positions of the next tokens.
        assert set(decoding.positions.tolist()) == {scenario.few_shot + scenario.problem + 6}
        found.append(np.array(tokens))
    shared, unshared, without, reference = found
    assert shared.tolist() == unshared.tolist() == reference.tolist()
    assert shared.tolist() != without.tolist()


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("mode", MODES[:2])
def test_advanced_plans_decode_what_new_ones_do(
    scenario: Scenario, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 2 * BLOCK_SIZE + 3  # past the ends of blocks
    found = []
    for reserve, plans in ((0, steps), (4, steps // 5)):
        setup = setup_for(scenario, steps)
        setup.reserve = reserve
        made: list[attention.Forest] = []
        plan_of = setup.plan
        monkeypatch.setattr(setup, "plan", lambda f, m=made, p=plan_of: (m.append(f), p(f))[1])
        decoding = Decoding(setup, scenario, mode)
        tokens = []
        for _ in range(steps):
            decoding.step()
            tokens.append(decoding.tokens.copy())
        assert len(made) == plans
        found.append(np.array(tokens))
    assert found[0].tolist() == found[1].tolist()


def test_a_decode_step_is_what_dense_attention_gives() -> None:
    model = Decoder(SHAPE, torch.float32, CPU)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    positions = torch.arange(len(tokens))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def dense(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept.append((k, v))
        return causal(q, k, v)

    at_once = model.step(tokens, positions, dense)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(SHAPE.layers)]

    def growing(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen[layer].append((k, v))
        keys, values = (torch.cat(parts) for parts in zip(*seen[layer], strict=True))
        torch.testing.assert_close(keys, kept[layer][0][: len(keys)])
        return causal(q, keys, values)

    one_by_one = [
        model.step(tokens[i : i + 1], positions[i : i + 1], growing) for i in range(len(tokens))
    ]
    assert torch.cat(one_by_one).tolist() == at_once.tolist()


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last rows of a causal attention [T, heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    late = torch.arange(len(k)) > torch.arange(len(k) - len(q), len(k))[:, None]
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(late, -torch.inf).softmax(2), v)


def test_a_rotation_depends_on_distances_only() -> None:
    from prefixtree.bench.decoder import _rotated

    frequencies = Decoder(SHAPE, torch.float32, CPU).frequencies
    q, k = torch.randn(2, 16)

    def product(at_q: int, at_k: int) -> float:
        turned = []
        for x, position in ((q, at_q), (k, at_k)):
            angle = position * frequencies
            turned.append(_rotated(x, angle.cos(), angle.sin()))
        return float(turned[0] @ turned[1])

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 8), abs=1e-4)


def test_points_are_those_of_hydragen() -> None:
    points = points_of(Sizes((1, 8), 100, (10, 20), 2400, 400, 2, 4))
    assert [(point.experiment, point.label) for point in points] == [
        ("batch", "1"),
        ("batch", "8"),
        ("prefix", "10"),
        ("prefix", "20"),
        ("levels", "one"),
        ("levels", "two"),
    ]
    assert points[3].scenario == Scenario(20, samples=8)
    assert points[5].scenario == Scenario(2400, 400, 2, 4)
    assert points[4].scenario == Scenario(2400, 400, 2, 4, shares_problem=False)


def test_models_have_the_sizes_of_their_names() -> None:
    assert MODELS["7b"].parameters == pytest.approx(6.74e9, rel=0.01)
    assert MODELS["13b"].parameters == pytest.approx(13.0e9, rel=0.01)
    assert MODELS["7b"].token_bytes(2) == 2**19
