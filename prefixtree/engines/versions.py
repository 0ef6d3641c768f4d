"""Which versions of a serving engine an adapter was tested with."""

from __future__ import annotations

import warnings
from importlib.metadata import version


class UntestedVersion(UserWarning):
    """An adapter runs with a version of its engine that it was not tested with."""


def warn_if_untested(distribution: str, tested: tuple[str, ...]) -> None:
    """Warn `UntestedVersion` unless the installed version is one of `tested` or a patch of one.

    `tested` are prefixes of versions: "0.5.23" stands for 0.5.23 and 0.5.23.post1. Engines change
    their inner interfaces from release to release, so that a failure elsewhere is explained by
    this line. Raises `importlib.metadata.PackageNotFoundError` where there is no such
    distribution.
    """
    installed = version(distribution)
    if not any(installed == known or installed.startswith(f"{known}.") for known in tested):
        warnings.warn(
            f"{distribution} is {installed}; prefixtree was tested with {', '.join(tested)} only",
            UntestedVersion,
            stacklevel=2,
        )
