"""Errors of the attention package: each names the value it met and what it expected."""


class InvalidForest(ValueError):
    """The arrays of a forest contradict each other or the limits they are checked against."""


class PlanMismatch(ValueError):
    """The tensors given to a run are not the ones its plan was made for."""


class PlanExhausted(RuntimeError):
    """A plan was advanced as often as it reserved room for: make a new plan."""
