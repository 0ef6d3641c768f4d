"""Hypothesis profiles: `default` repeats exactly and is short, `ci` is longer, `long` is a soak.

Choose one with the environment variable HYPOTHESIS_PROFILE.
"""

import gc
import os

from hypothesis import HealthCheck, settings

# Building a cache, a model and a copy of both is slow next to drawing an integer, and a slow
# machine is no defect of the code under test: no test here fails on a clock.
COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)

settings.register_profile(
    "default",
    COMMON,
    derandomize=True,
    max_examples=100,
    stateful_step_count=40,
)
settings.register_profile("ci", COMMON, derandomize=True, max_examples=500, stateful_step_count=50)
settings.register_profile(
    "long", COMMON, derandomize=False, max_examples=20_000, stateful_step_count=100
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """Half a million objects of torch, triton and the tests themselves are not walked again and
    again by the garbage collector, nor by the tests that run it."""
    gc.collect()
    gc.freeze()
