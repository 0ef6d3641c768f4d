"""The demo: the same completions twice, with transformers' generate and with prefixtree."""

from dataclasses import replace
from pathlib import Path

from prefixtree.demo import report
from prefixtree.demo.baseline import run_generate
from prefixtree.demo.job import Job, first_difference
from prefixtree.demo.model import TextModel, pretrained, random_llama
from prefixtree.demo.problems import NotEnoughProblems, Prompt, stdlib_prompts
from prefixtree.demo.prompts_file import PromptsFileError, load_prompts
from prefixtree.demo.shared import run_shared
from prefixtree.engines.sampling import SamplingParams
from prefixtree.errors import PrefixTreeError


class UnusableInput(ValueError):
    """A prompts file, a number of problems or a model that the demo cannot work with."""


def run_demo(
    *,
    problems: int,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    block_size: int,
    model: str | None,
    prompts_file: Path | None,
) -> bool:
    """Runs both ways greedily and at `temperature`, prints the report; True when no token differs.

    `model` None stands for the small Llama with random weights, `prompts_file` None for functions
    of the standard library; of a file, the first `problems` prompts are taken. Raises
    UnusableInput.
    """
    prompts = _prompts(prompts_file, problems)
    text_model = _text_model(model, seed)
    tokens = [text_model.encode(prompt.text) for prompt in prompts]
    _check_room(text_model, prompts, tokens, max_new_tokens)
    print(report.heading(text_model, prompts_file, tokens, samples, seed), flush=True)
    identical = True
    for mode_temperature in sorted({0.0, temperature}):
        mode = f"temperature {mode_temperature:g}" if mode_temperature else "greedy"
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            n=samples,
            temperature=mode_temperature,
            stop_tokens=text_model.stop_tokens,
        )
        # Each problem has a seed of its own, else sample i would draw alike in problems of the
        # same length.
        job = Job(tokens, [replace(params, seed=seed + i) for i in range(len(tokens))])
        try:
            shared, tree = run_shared(text_model.model, job, block_size, f"prefixtree, {mode}")
        except PrefixTreeError as error:
            raise UnusableInput(str(error)) from error
        plain = run_generate(text_model.model, job, f"transformers, {mode}")
        print(report.comparison(mode, job, plain, shared), flush=True)
        if difference := first_difference(plain, shared):
            identical = False
            name = prompts[difference.problem].name
            print(report.difference(name, job, plain, difference, text_model), flush=True)
    print(report.tree(mode, tree, text_model.decode))
    print("\nAll tokens are identical." if identical else "\nTOKENS DIFFER, see above.")
    return identical


def _prompts(prompts_file: Path | None, count: int) -> list[Prompt]:
    try:
        return load_prompts(prompts_file)[:count] if prompts_file else stdlib_prompts(count)
    except (NotEnoughProblems, PromptsFileError) as error:
        raise UnusableInput(str(error)) from error


def _text_model(name_or_path: str | None, seed: int) -> TextModel:
    if name_or_path is None:
        return random_llama(seed)
    try:
        return pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UnusableInput(f"cannot load the model {name_or_path}: {error}") from error


def _check_room(
    text_model: TextModel, prompts: list[Prompt], tokens: list[list[int]], max_new_tokens: int
) -> None:
    """Past its last position an engine stops and generate() goes on: that would compare nothing."""
    positions = getattr(text_model.model.config, "max_position_embeddings", None)
    for prompt, ids in zip(prompts, tokens, strict=True):
        if positions is not None and len(ids) + max_new_tokens > positions:
            raise UnusableInput(
                f"the prompt {prompt.name} has {len(ids)} tokens: with {max_new_tokens} new ones "
                f"that is more than the model's {positions} positions"
            )
