"""The printed report, at most 80 columns wide."""

import platform
import textwrap
from pathlib import Path

import torch
import transformers

from prefixtree.demo.job import Difference, Job, Outcome, agreement, tokens_asked
from prefixtree.demo.model import TextModel, next_logits
from prefixtree.view import TreeView
from prefixtree.view_text import Decode

WIDTH = 80
TREE_CHILDREN = 4


def heading(
    text_model: TextModel,
    prompts_file: Path | None,
    tokens: list[list[int]],
    samples: int,
    seed: int,
) -> str:
    """What is about to run, and on what. `tokens`: those of each prompt."""
    source = (
        f"from {prompts_file}"
        if prompts_file
        else f"from Python {platform.python_version()}'s standard library, signature and docstring "
        "of a function each, behind a header of whole functions"
    )
    columns = enumerate(zip(*tokens, strict=False))
    shortest, longest = min(map(len, tokens)), max(map(len, tokens))
    common = next((at for at, column in columns if len(set(column)) > 1), shortest)
    lines = {
        "model": text_model.description,
        "prompts": f"{len(tokens)} problem{'s' * (len(tokens) > 1)} {source}; {shortest:,} to "
        f"{longest:,} tokens each, the first {common:,} the same in all",
        "samples": f"{samples} of each problem, seed {seed}: {len(tokens) * samples} sequences in "
        "one batch, which transformers pads to the longest",
        "machine": f"{text_model.model.device.type}, {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}",
    }
    return "\n".join(_paragraph(label, text) for label, text in lines.items())


def comparison(mode: str, job: Job, plain: Outcome, shared: Outcome) -> str:
    """A table of what `plain` (transformers) and `shared` (prefixtree) took for the same tokens."""
    asked = f"{tokens_asked(job, plain):,}"
    same, total = agreement(plain, shared)
    ratio = plain.seconds / shared.seconds
    rows = [
        (mode, "transformers", "prefixtree", ""),
        ("  tokens asked for", asked, asked, ""),
        (
            "  tokens computed",
            f"{plain.tokens_computed:,}",
            f"{shared.tokens_computed:,}",
            f"{plain.tokens_computed / shared.tokens_computed:.1f}x fewer",
        ),
        (
            "  KV memory",
            _mebibytes(plain.kv_bytes),
            _mebibytes(shared.kv_bytes),
            f"{plain.kv_bytes / shared.kv_bytes:.1f}x less",
        ),
        (
            "  time",
            f"{plain.seconds:.2f} s",
            f"{shared.seconds:.2f} s",
            f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower",
        ),
        ("  identical new tokens", "", f"{same:,} of {total:,}", ""),
    ]
    return "\n" + "\n".join(
        f"{label:<24}{left:>16}{right:>18}{ratio:>18}".rstrip()
        for label, left, right, ratio in rows
    )


def difference(
    problem: str, job: Job, plain: Outcome, found: Difference, text_model: TextModel
) -> str:
    """Where the first token differs, and how close the model's choice was there."""
    text = (
        f"first in problem {found.problem} ({problem}), sample {found.sample}, new token "
        f"{found.position}: transformers has {_token(found.expected, text_model.decode)}, "
        f"prefixtree {_token(found.actual, text_model.decode)}"
    )
    if found.expected is not None and found.actual is not None:
        before = plain.tokens[found.problem][found.sample][: found.position]
        logits = next_logits(text_model.model, job.prompts[found.problem] + before)
        left, right = logits[found.expected].item(), logits[found.actual].item()
        text += f"; their logits are {left:.6f} and {right:.6f}, {abs(left - right):.1e} apart"
    return _paragraph("DIFFERS", text)


def tree(mode: str, view: TreeView, decode: Decode) -> str:
    """The cache's tree with a legend."""
    return (
        f"\nThe tree in the run above, {mode}\n"
        "(pins: sequences running through a node, hits: how often one joined it)\n"
        f"{view.render(decode, width=WIDTH, max_children=TREE_CHILDREN)}"
    )


def _paragraph(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:<9}", subsequent_indent=" " * 9)


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _token(token: int | None, decode: Decode) -> str:
    return "ended" if token is None else f"{token} {decode([token])!r}"
