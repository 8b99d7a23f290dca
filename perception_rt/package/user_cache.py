"""Folders of this user's cache, private ones, where packages are kept."""

import os
import stat
import sys
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def user_cache(name: str) -> Path:
    """Path of `perception_rt/name` below $XDG_CACHE_HOME or the system's own cache.

    Raises:
        OSError: there is no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if Path(given).is_absolute():
            base = Path(given)
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return base / "perception_rt" / name


def make_private(folder: Path) -> None:
    """Makes a folder for this user alone; PermissionError if others can write to it."""
    for parent in (*reversed(folder.parents), folder):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(None, "it is not a folder", str(folder))
    if hasattr(os, "geteuid") and (
        info.st_uid != os.geteuid() or info.st_mode & _WRITABLE_BY_OTHERS
    ):
        raise PermissionError(None, "others can write to it", str(folder))
