"""Errors that perception_rt raises on purpose.

A message names the thing, the value and the limit, but no memory address and no foreign repr.
`assert` checks our own invariants; every failure that a user can cause is one of these errors.
"""


class PerceptionError(Exception):
    """Base class of all errors of this library."""


class InputError(PerceptionError, ValueError):
    """A user's value is unusable: an image, a text, an option, a configuration."""


class CheckpointError(PerceptionError):
    """Weights cannot be read, or do not fit the architecture."""


class ExportError(PerceptionError):
    """An export could not be completed, or its engine failed the fidelity gate."""


class PackageError(PerceptionError):
    """An engine package is damaged, incomplete or unsafe, or has another version."""


class BackendError(PerceptionError):
    """A backend is missing, cannot run here, or failed while running."""


class CapacityError(PerceptionError):
    """A request exceeds the memory, the queue or the context length; a smaller one may fit."""


def describe(value: object) -> str:
    """Shows a rejected argument in a message: a plain number itself, anything else by its type."""
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if type(value) in (bool, int, float) else f"a {type(value).__name__}"
