"""An engine with the tree and its attention that answers prompts until it is killed.

`python -m tests.engines.vllm.endless MODEL_FOLDER` prints a line for each answer.
"""

from __future__ import annotations

import json
import sys
from itertools import count

from tests.engines.vllm.scenarios import generate, make_llm, prompt, tokens_of


def main(folder: str, *_: str) -> None:
    llm = make_llm(folder, ("tree",))
    for seed in count():
        outputs = generate(llm, [prompt(seed, 100), prompt(0, 150)])
        print(json.dumps(tokens_of(outputs)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
