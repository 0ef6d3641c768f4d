"""Errors of the attention package: each names the value it met and what it expected."""


class InvalidForest(ValueError):
    """The arrays of a forest contradict each other or the limits they are checked against."""


class PlanMismatch(ValueError):
    """The tensors given to a run are not the ones its plan was made for."""


class UnsupportedBackend(ValueError):
    """The backend asked for cannot run the plan; the message says what is missing."""


class WriteMismatch(ValueError):
    """The tensors given to a write do not fit each other."""


class InvalidSlots(ValueError):
    """A slot to write to lies in no block, or occurs twice."""


class PlanFull(ValueError):
    """What a plan is updated to does not fit into its tensors: make a new plan."""


class PlanExhausted(RuntimeError):
    """A plan was advanced as often as it reserved room for: make a new plan."""
