"""An SGLang engine that generates until it is killed, as `endless SPEC` run as a module.

SPEC as for `scenarios`; the tokens so far are in `tokens.json` in the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.engines.sglang import scenarios


def main(spec: dict[str, Any]) -> None:
    engine = scenarios.start(spec)
    (text,) = scenarios.prompts(7, count=1, shared_tokens=200, own_tokens=5)
    tokens = Path(spec["folder"], "tokens.json")
    while True:
        for chunk in engine.generate(
            input_ids=text, sampling_params=scenarios.greedy(1000), stream=True
        ):
            draft = tokens.with_suffix(".draft")
            draft.write_text(json.dumps(chunk["output_ids"]))
            draft.rename(tokens)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
