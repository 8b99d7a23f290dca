"""Finds the packages that are shipped with the library, `demo:pe` and `demo:plm`.

Installers may hard-link or symlink the files of a wheel, and a package with links is refused. So a
demo is copied to a private folder below the user's cache when it is first used, and opened there
with the id of the shipped manifest. A damaged copy is replaced.
"""

import hashlib
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from perception_rt.demo import package_paths
from perception_rt.errors import InputError, PackageError
from perception_rt.package.manifest import MANIFEST_FILE, Manifest, parse
from perception_rt.package.user_cache import make_private, user_cache

_WORK = ".copy-"  # begins the names of folders of copies that are being made
_STALE_S = 3600.0


def locate(path: str, expect: str | None = None) -> tuple[Path, str | None]:
    """Replaces the name of a demo by its folder and its id.

    Args:
        path: "demo:pe" or "demo:plm".
        expect: the required package id; None for any.

    Raises:
        InputError: there is no demo of this name.
        PackageError: the demo is not installed whole, or cannot be copied.
    """
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
    folder = _usable(path, shipped, manifest, _digests(data, manifest))
    return folder, manifest.id if expect is None else expect


def cache_folder() -> Path:
    """Folder of the copies; OSError if there is no home directory."""
    return user_cache("demo")


def _usable(name: str, shipped: Path, manifest: Manifest, digests: Mapping[str, str]) -> Path:
    """A folder with the demo: its copy, or what was installed if that can be opened in place."""
    try:
        folder = cache_folder()
        make_private(folder)
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


def _is_whole(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether a folder holds exactly these files, and no links."""
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
