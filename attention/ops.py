"""The operators' library, and handles: tensors that stand for plans in the graphs of compilers.

Objects of Python cannot go into a graph but as constants, and with a constant each step's plan
would be compiled anew.
"""

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

from attention.errors import PlanMismatch

if TYPE_CHECKING:
    from attention.plan import Plan

LIBRARY = torch.library.Library("prefixtree", "FRAGMENT")

_numbers = itertools.count()
_plans: weakref.WeakValueDictionary[int, "Plan"] = weakref.WeakValueDictionary()


def handle_of(plan: "Plan") -> torch.Tensor:
    """A new handle of a plan, int64 [1] on the CPU. It does not keep the plan alive."""
    number = next(_numbers)
    _plans[number] = plan
    with torch.inference_mode(False):
        return torch.full((1,), number, dtype=torch.int64, device="cpu")


def plan_of(handle: torch.Tensor) -> "Plan":
    """The plan of a handle.

    Raises:
        PlanMismatch: the plan is gone.
    """
    number = int(handle.item())
    plan = _plans.get(number)
    if plan is None:
        raise PlanMismatch(f"the plan of handle {number} is gone, expected one that is kept")
    return plan
