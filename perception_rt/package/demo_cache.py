"""Finds the packages that are shipped with the library, `demo:pe` and `demo:plm`.

Installers may hard-link or symlink the files of a wheel, and a package with links is refused. So a
demo is copied to a private folder below the user's cache when it is first used, and opened there
with the id of the shipped manifest. A damaged copy is replaced.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

from perception_rt.demo import package_paths
from perception_rt.errors import InputError, PackageError
from perception_rt.package.manifest import MANIFEST_FILE, Manifest, parse

_PREFIX = "demo:"
_WORK = ".copy-"  # begins the names of folders of copies that are being made
_STALE_S = 3600.0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def locate(
    path: str | os.PathLike[str], expect: str | None = None
) -> tuple[str | os.PathLike[str], str | None]:
    """Replaces the name of a demo by its folder and its id; returns anything else as it is.

    Args:
        path: a path, or "demo:pe" or "demo:plm".
        expect: the required package id; None for any.

    Raises:
        InputError: there is no demo of this name.
        PackageError: the demo is not installed whole, or cannot be copied.
    """
    if not is_demo(path):
        return path, expect
    demos = package_paths()
    if path not in demos:
        raise InputError(f"unknown demo {path!a:.60}; known are {' and '.join(demos)}")
    shipped = demos[path]
    try:
        data = (shipped / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise PackageError(
            f"{path} is not in this installation: {error.strerror}: reinstall perception_rt"
        ) from None
    manifest = parse(data)
    return _usable(
        path, shipped, manifest, _digests(data, manifest)
    ), expect if expect is not None else manifest.id


def is_demo(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether a path is the name of a demo; a Path, or a folder of another such name, is not."""
    if not isinstance(path, str) or not path.startswith(_PREFIX):
        return False
    return path in package_paths() or not os.path.lexists(path)


def cache_folder() -> Path:
    """Folder of the copies: `perception_rt/demo` below $XDG_CACHE_HOME or the system's own cache.

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
    return base / "perception_rt" / "demo"


def _usable(name: str, shipped: Path, manifest: Manifest, digests: Mapping[str, str]) -> Path:
    """A folder with the demo: its copy, or what was installed if that can be opened in place."""
    try:
        folder = cache_folder()
        _make_private(folder)
        copy = folder / f"{shipped.name}-{manifest.digest.rpartition(':')[2][:16]}"
        if not _is_whole(copy, digests):
            _copy(shipped, copy, digests)
        return copy
    except OSError as error:
        if _is_whole(shipped, digests):
            return shipped
        where = "" if error.filename is None else f" to {error.filename!a:.160}"
        raise PackageError(
            f"cannot copy {name}{where}: {error.strerror or error}; set XDG_CACHE_HOME to a folder "
            "of your own that can be written"
        ) from None


def _digests(data: bytes, manifest: Manifest) -> dict[str, str]:
    """SHA-256 of each file of a package, its manifest included."""
    files = {name: entry.sha256 for name, entry in manifest.content.files.items()}
    return {**files, MANIFEST_FILE: hashlib.sha256(data).hexdigest()}


def _make_private(folder: Path) -> None:
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


def _is_whole(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether a folder has these files and no other, none of them a link."""
    try:
        found = dict(_files(folder))
        return found.keys() == digests.keys() and all(
            _sha256(path) == digests[name] for name, path in found.items()
        )
    except OSError:
        return False


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each file below a folder; OSError for anything that has two names."""
    for path in folder.iterdir():
        info = path.lstat()
        if stat.S_ISDIR(info.st_mode):
            yield from ((f"{path.name}/{name}", file) for name, file in _files(path))
        elif stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
            yield path.name, path
        else:
            raise OSError(f"{path.name} is a link")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(shipped: Path, copy: Path, digests: Mapping[str, str]) -> None:
    """Publishes a verified copy by one rename; a damaged one at its place is removed."""
    _remove_stale(copy.parent)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=copy.parent) as work:
        new = Path(work) / "new"
        new.mkdir(mode=0o700)
        for name, digest in digests.items():
            (new / name).parent.mkdir(mode=0o700, exist_ok=True)
            (new / name).write_bytes(_read(shipped / name, digest))
        try:
            new.rename(copy)
        except OSError:
            if _is_whole(copy, digests):  # another process was faster
                return
            copy.rename(Path(work) / "old")
            new.rename(copy)


def _read(path: Path, digest: str) -> bytes:
    """The bytes of an installed file; PackageError unless they have the digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = error.strerror or type(error).__name__
    else:
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        problem = "its SHA-256 does not match"
    raise PackageError(f"the installed {path.name} is damaged: {problem}: reinstall perception_rt")


def _remove_stale(folder: Path) -> None:
    """Removes what interrupted copies left behind."""
    for work in folder.glob(f"{_WORK}*"):
        with suppress(OSError):
            if time.time() - work.stat().st_mtime > _STALE_S:
                shutil.rmtree(work)
