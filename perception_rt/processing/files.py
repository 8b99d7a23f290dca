"""Opening the files that a user names: regular files only, and never waiting for one."""

import io
import os
import stat

from perception_rt.errors import InputError


def path_name(source: str | os.PathLike[str], kind: str) -> tuple[str, str]:
    """The path as a string, and `kind` with the path as typed, to begin messages with."""
    path = os.fspath(source)
    if not isinstance(path, str):
        raise InputError(f"{kind} path must be a string, not {type(path).__name__}")
    return path, f"{kind} {path!r:.200}"


def open_regular_file(path: str, name: str) -> io.FileIO:
    """Opens a regular file for reading; InputError, beginning with `name`, for anything else.

    A pipe without a writer, a terminal or a device is refused, not waited for.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - opening may act on a device
        file = io.FileIO(os.open(path, flags), "rb") if regular else None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{name} is not a path") from None
    if file is not None and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    if file is not None:  # replaced since it was looked at
        file.close()
    raise InputError(f"{name} is not a regular file")
