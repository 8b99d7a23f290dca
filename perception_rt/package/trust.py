"""Ids of the packages that this user exported on this machine; their engines may be loaded.

A TensorRT engine is code for a GPU, and a digest does not show who built it. So an engine is loaded
only if the caller names the package's id or an export noted it here. The file
`perception_rt/built` in the state directory has one id per line.
"""

import os
from pathlib import Path


def built_file() -> Path:
    """Path of the file of ids, below $XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "perception_rt" / "built"


def remember(package_id: str) -> None:
    """Notes that this user exported a package; OSError if the file cannot be written."""
    try:
        file = built_file()
    except RuntimeError as error:  # no home directory
        raise OSError(str(error)) from None
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{package_id}\n".encode("ascii"))
    finally:
        os.close(fd)


def is_remembered(package_id: str) -> bool:
    """Whether this user exported a package here.

    False if others can write the file of ids, or if the system does not tell who can.
    """
    if not hasattr(os, "geteuid"):
        return False
    try:
        with built_file().open("rb") as stream:
            info = os.fstat(stream.fileno())
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                return False
            lines = stream.read().split(b"\n")
    except (OSError, RuntimeError):  # no file, or no home directory
        return False
    return package_id.encode("ascii") in lines
