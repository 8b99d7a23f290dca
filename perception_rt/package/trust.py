"""Packages whose engines may be loaded: those that were exported by this user, here.

A TensorRT engine is code for a GPU. Its digest says that it is what its maker published, not who
that was, so it is loaded only if the caller names the package's id, or an export of this user did.
The ids stand in `perception_rt/built` of the state directory, a line each.
"""

import os
from pathlib import Path


def built_file() -> Path:
    """Where the ids are: below $XDG_STATE_HOME, or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "perception_rt" / "built"


def remember(package_id: str) -> None:
    """Notes that a package was exported here; OSError if that cannot be written."""
    try:
        file = built_file()
    except RuntimeError as error:  # there is no home
        raise OSError(str(error)) from None
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{package_id}\n".encode("ascii"))
    finally:
        os.close(fd)


def is_remembered(package_id: str) -> bool:
    """Whether a package was exported here; not, if the ids are not this user's own to write."""
    try:
        with built_file().open("rb") as stream:
            info = os.fstat(stream.fileno())
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                return False
            lines = stream.read().split(b"\n")
    except (OSError, RuntimeError):  # the latter without a home
        return False
    return package_id.encode("ascii") in lines
