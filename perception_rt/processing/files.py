"""Opens files that users name: regular files only, and without waiting."""

import io
import os
import stat

from perception_rt.errors import InputError


def path_name(source: str | os.PathLike[str], kind: str) -> tuple[str, str]:
    """Returns the path as a string, and a name for messages: `kind` and the path."""
    path = os.fspath(source)
    if not isinstance(path, str):
        raise InputError(f"{kind} path must be a string, not {type(path).__name__}")
    return path, f"{kind} {path!r:.200}"


def open_regular_file(path: str, name: str) -> io.FileIO:
    """Opens a regular file for reading.

    Pipes, terminals and devices are refused at once, since reading them could block.

    Raises:
        InputError: the path is missing, unreadable or not a regular file; starts with `name`.
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
    if file is not None:  # replaced between stat and open
        file.close()
    raise InputError(f"{name} is not a regular file")
