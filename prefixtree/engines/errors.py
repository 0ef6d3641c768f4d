"""The errors of the engine and of its adapters."""

from __future__ import annotations

from prefixtree.errors import PrefixTreeError


class EngineError(PrefixTreeError):
    """Base of every error that the engines raise on purpose."""


class UnsupportedModel(EngineError, ValueError):
    """A model that cannot run on the paged cache with unchanged results."""


class UnsupportedAttention(EngineError, ValueError):
    """An attention call with an argument that is not implemented and would change the result."""


class ModelClosed(EngineError, RuntimeError):
    """A forward pass after the model was given back."""


class InvalidStep(EngineError, ValueError):
    """Arrays of one forward pass that do not fit together."""


class InvalidSampling(EngineError, ValueError):
    """A sampling parameter outside its range."""


class InvalidLogits(EngineError, ValueError):
    """Logits to sample from whose largest value is not finite. Attribute: `rows`."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows)
        self.rows = rows

    def __str__(self) -> str:
        return f"the largest logit of rows {self.rows} is not finite"


class PromptTooLong(EngineError, ValueError):
    """A prompt that can never run here."""


class TooManySamples(EngineError, ValueError):
    """A request for more samples than may run at once."""


class UnknownRequest(EngineError, LookupError):
    """An id that no request was given."""


class EngineBusy(EngineError, RuntimeError):
    """A call that needs an engine without requests."""


class UnsupportedCache(EngineError, ValueError):
    """A serving engine wants more of its prefix cache than there is here."""
