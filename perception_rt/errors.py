"""Errors that perception_rt raises on purpose.

A message names the thing, the value and the limit, but no memory address and no foreign repr.
`assert` checks our own invariants; every failure that a user can cause is one of these errors.
"""


class PerceptionError(Exception):
    """Base class of all errors of this library.

    Its text is one line: control characters, which a path may contain, are escaped.
    """

    def __str__(self) -> str:
        return escaped(super().__str__())


class InputError(PerceptionError, ValueError):
    """A user's value is unusable: an image, a text, an option, a configuration."""


class SampleError(InputError):
    """A sample of a data set is unusable. The message is the same for all that have the defect.

    Attributes:
        detail: particulars of this sample, such as a path; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


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


class QueueFullError(CapacityError):
    """Too many requests wait already; the same request may be accepted later."""


def describe(value: object) -> str:
    """Shows a rejected argument in a message: a plain number itself, anything else by its type."""
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if type(value) in (bool, int, float) else f"a {type(value).__name__}"


def escaped(text: str) -> str:
    r"""Writes characters that cannot be printed as `repr` does, such as `\x1b` and `\n`.

    A terminal would obey some of them, and a line break would forge a line of a log.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
