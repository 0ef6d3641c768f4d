"""A soak: the state machine, example after example, until it has done so many steps.

    python -m tests.prefixtree.soak --steps 1000000 --seed 1

Rounds of examples with consecutive seeds, so that memory stays bounded and a failure is found again
by starting with the seed of its round. A failing example is shrunk and printed.
"""

from __future__ import annotations

import argparse
import os
import random
from time import perf_counter

os.environ["HYPOTHESIS_PROFILE"] = "long"  # read at the imports below

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .test_state_machine import Caching

ROUND = settings(
    max_examples=100,
    stateful_step_count=100,
    phases=[Phase.generate, Phase.shrink],
    database=None,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


class Counted(Caching):
    """Counts what is checked: a step is a rule and all that must hold after it."""

    steps_done = 0

    def teardown(self) -> None:
        super().teardown()
        Counted.steps_done += self.steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.prefixtree.soak")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    options = parser.parse_args()
    began, number = perf_counter(), options.seed
    while Counted.steps_done < options.steps:
        print(f"seed {number}: ", end="", flush=True)
        run_state_machine_as_test(seed(number)(Counted), settings=ROUND)
        print(f"{Counted.steps_done} steps clean, {perf_counter() - began:.0f} s", flush=True)
        number += 1


if __name__ == "__main__":
    main()
