"""The command `demo`, from its options to its exit status."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import attention
from prefixtree.__main__ import main
from prefixtree.demo import run


@pytest.fixture
def short(tmp_path: Path) -> list[str]:
    """Options for a run on two short prompts: 2 samples of 8 tokens of each."""
    path = tmp_path / "own.jsonl"
    texts = ["def largest(a, b):\n    return", "def largest(a, b, c):\n    return"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return ["demo", "--prompts", str(path), "--samples", "2", "--max-new-tokens", "8"]


def test_help_names_the_command_and_loads_no_torch() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['prefixtree', '--help']\n"
        "try:\n"
        "    runpy.run_module('prefixtree', run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\s+demo\s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problems", "0"], "--problems: expected a whole number >= 1, not '0'"),
        (["--samples", "-1"], "--samples: expected a whole number >= 1, not '-1'"),
        (["--max-new-tokens", "2.5"], "--max-new-tokens: expected a whole number >= 1, not '2.5'"),
        (["--block-size", "x"], "--block-size: expected a whole number >= 1, not 'x'"),
        (["--seed", "-3"], "--seed: expected a whole number >= 0, not '-3'"),
        (["--temperature", "-0.5"], "--temperature: expected a number >= 0, not '-0.5'"),
        (["--temperature", "nan"], "--temperature: expected a number >= 0, not 'nan'"),
        (["--temperature", "inf"], "--temperature: expected a number >= 0, not 'inf'"),
        (["--problem-set", "x"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_input_that_cannot_be_used_is_named_and_gives_status_2(
    tmp_path: Path, short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"prompt": 1}\n')
    for options, message in (
        (["demo", "--prompts", str(bad)], f"{bad}, line 2: field 'prompt' must be a string"),
        (["demo", "--prompts", str(tmp_path / "none")], "No such file"),
        (["demo", "--problems", "99999"], "99999 problems asked for"),
        (["demo", "--model", str(tmp_path / "none")], f"cannot load the model {tmp_path / 'none'}"),
        ([*short, "--max-new-tokens", "2000000"], "the model's 1048576 positions"),
    ):
        assert main(options) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_a_run_as_a_user_starts_it_computes_and_keeps_less_for_identical_tokens() -> None:
    options = ["--problems", "2", "--samples", "2", "--max-new-tokens", "4", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "prefixtree", "demo", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    assert done.stdout.count("16 of 16") == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+)x (?:fewer|less)", done.stdout)]
    # Four sequences of which by far the most tokens are in the header.
    assert len(ratios) == 2
    assert min(ratios) > 3
    assert "pins 4" in done.stdout
    # Both ways show their progress, and never among the results.
    assert done.stderr.count("100%") >= 2
    assert "%|" not in done.stdout


def test_temperature_0_runs_greedily_only(
    short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--temperature", "0"]) == 0
    output = capsys.readouterr().out
    assert "greedy " in output
    assert "temperature 0" not in output
    assert output.count("32 of 32") == 1


def test_the_first_prompts_of_a_file_are_taken(
    short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--problems", "1", "--temperature", "0"]) == 0
    output = capsys.readouterr().out
    assert "1 problem from" in output
    assert "16 of 16" in output


def test_one_wrong_token_gives_status_1_and_is_named(
    short: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = run.run_shared

    def corrupted(*args: Any) -> Any:
        outcome, tree = honest(*args)
        tokens = [[list(sample) for sample in samples] for samples in outcome.tokens]
        tokens[1][0][5] ^= 1
        return replace(outcome, tokens=tokens), tree

    monkeypatch.setattr(run, "run_shared", corrupted)
    assert main(short) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("31 of 32") == 2
    found = re.findall(
        r"first in problem 1 \(line 2\), sample 0, new token 5: "
        r"transformers has (\d+) .*?, prefixtree (\d+) .*?; their logits are \S+ and \S+",
        output,
    )
    assert len(found) == 2
    assert all(int(expected) ^ 1 == int(actual) for expected, actual in found)


def test_wrong_kv_gives_status_1(
    short: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = attention.write

    def damaged(k: torch.Tensor, v: torch.Tensor, *caches_and_slots: Any, **how: Any) -> None:
        write(k, v.flip(0), *caches_and_slots, **how)

    monkeypatch.setattr(attention, "write", damaged)
    assert main(short) == 1
    assert "DIFFERS" in capsys.readouterr().out


def save_tiny_model(path: Path) -> None:
    """A model in bfloat16 with penalties of its own, over the bytes of text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, repetition_penalty=50.0, top_k=3, eos_token_id=list(range(0, 256, 4))
    )
    model.save_pretrained(path)


def test_a_model_from_a_directory_runs_in_float32_to_its_own_stop_tokens(
    tmp_path: Path, short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "tiny")
    assert main([*short, "--samples", "8", "--model", str(tmp_path / "tiny")]) == 0
    output = capsys.readouterr().out
    assert "LlamaForCausalLM" in output
    assert "random weights" not in output
    for same, total in re.findall(r"(\d+) of (\d+)", output):
        assert same == total
        assert 16 <= int(total) < 2 * 8 * 8
    assert "float32" in output


def test_a_prompt_longer_than_the_model_is_refused(
    tmp_path: Path, short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "tiny")
    options = ["--model", str(tmp_path / "tiny"), "--max-new-tokens", "100"]
    assert main([*short, *options]) == 2
    assert "line 1 has 29 tokens: with 100 new ones" in capsys.readouterr().err
