"""Opens packages and returns only bytes whose hash matches the manifest.

All files are opened once, without following links, and stay open (`folders`).
Bytes are hashed through the descriptor that they are read from, so replacing or removing a package
does not disturb its readers. ONNX graphs are scanned before they are returned.
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self, TypeVar

from perception_rt.errors import PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.contract import GraphSpec
from perception_rt.package.folders import Folder, open_folder, read_blocks
from perception_rt.package.manifest import MANIFEST_FILE, FileEntry, Manifest, parse
from perception_rt.package.names import locate
from perception_rt.package.onnx_scan import check_graph
from perception_rt.targets import ONNX

_T = TypeVar("_T")
_State = tuple[int, int, int]  # size and times of a file

_CAN_RELEASE = hasattr(mmap, "MADV_DONTNEED")
_OPEN_ATTEMPTS = 64  # while the package is being replaced


class Package:
    """An open package, made by `open_package`.

    Several threads may use it, but not while one calls `close`.
    """

    def __init__(self, manifest: Manifest, fds: Mapping[str, int], shown: str) -> None:
        self.manifest = manifest
        self._fds = dict(fds)
        self._shown = shown
        self._maps: dict[str, memoryview] = {}
        self._verified: dict[str, _State] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.content.name

    def graph(self, name: str) -> GraphSpec:
        """Specification of the graph `name`; PackageError if there is none."""
        graphs = self.manifest.content.graphs
        if name not in graphs:
            raise PackageError(f"{self._shown}: no graph {name!a:.80}, there are {sorted(graphs)}")
        return graphs[name]

    def read(self, file: str) -> bytes:
        """The bytes of a small file, hashed at each call.

        Raises:
            PackageError: the manifest lists no such file, or its hash does not match.
        """
        fd, entry = self._listed(file)
        _check_size(self._shown, file, fd, entry)
        data = _read(self._shown, file, fd, entry.size_bytes)
        self._compare(file, hashlib.sha256(data).hexdigest())
        return data

    def read_graph(self, name: str, *, domains: frozenset[str] | None = None) -> bytes:
        """The bytes of an ONNX graph.

        Args:
            name: name of the graph.
            domains: operator domains that it may use; None allows all.

        Raises:
            PackageError: there is no such graph, it is not in ONNX, or `check_graph` refuses it.
        """
        spec = self.graph(name)
        if spec.kind != ONNX:
            raise PackageError(
                f"{self._shown}: graph {name!a:.80} is of kind {spec.kind}, not ONNX"
            )
        data = self.read(spec.file)
        check_graph(data, spec, self.manifest.content.files, domains=domains)
        return data

    def map(self, file: str) -> memoryview:
        """The bytes of a file as a read-only mapping.

        They are hashed at the first call, and again if the file has changed since. Arrays over the
        mapping may outlive the package.

        Raises:
            PackageError: the manifest lists no such file, or its size or hash does not match.
        """
        fd, entry = self._listed(file)
        with self._lock:
            if self._verified.get(file) != self._state(file, fd):
                self._verify(file)
            if file not in self._maps:
                self._maps[file] = self._mapped(file, fd, entry.size_bytes)
            return self._maps[file]

    def _mapped(self, file: str, fd: int, size_bytes: int) -> memoryview:
        if size_bytes == 0:  # mmap refuses empty files
            return memoryview(b"")
        try:
            return memoryview(mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # no memory, or the file was cut just now
            raise PackageError(f"{self._shown}: {file} cannot be mapped into memory") from None

    def release(self, file: str) -> None:
        """Releases the resident pages of a mapping; later reads load them from the file again."""
        with self._lock:
            view = self._maps.get(file)
            if view is not None and isinstance(view.obj, mmap.mmap) and _CAN_RELEASE:
                view.obj.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Hashes all files that were not hashed yet, several at a time.

        Raises:
            PackageError: names a file whose size or hash does not match.
        """
        files = self.manifest.content.files
        with self._lock, ThreadPoolExecutor(os.cpu_count()) as pool:
            pending = sorted(
                set(files) - self._verified.keys(),
                key=lambda file: files[file].size_bytes,
                reverse=True,
            )
            try:
                for _ in pool.map(self._verify, pending):
                    pass  # raises the exception of a failed call
            except RuntimeError:  # the interpreter is ending, and a daemon thread loads a package
                for file in pending:
                    self._verify(file)

    def close(self) -> None:
        """Closes the files; mappings that are in use stay valid."""
        fds, self._fds = self._fds, {}
        self._maps.clear()
        for fd in fds.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _listed(self, file: str) -> tuple[int, FileEntry]:
        files = self.manifest.content.files
        if file not in files:
            raise PackageError(f"{self._shown}: no file {file!a:.80} in this package")
        if file not in self._fds:
            raise PackageError(f"{self._shown}: the package is closed")
        return self._fds[file], files[file]

    def _verify(self, file: str) -> None:
        fd, entry = self._listed(file)
        state = self._state(file, fd)
        _check_size(self._shown, file, fd, entry)
        digest = hashlib.sha256()
        try:
            for block in read_blocks(fd, entry.size_bytes):
                digest.update(block)
        except OSError as error:
            raise _unreadable(self._shown, file, error) from None
        self._compare(file, digest.hexdigest())
        self._verified[file] = state

    def _state(self, file: str, fd: int) -> _State:
        """Size and times of a file; a write changes at least one."""
        try:
            info = os.fstat(fd)
        except OSError as error:
            raise _unreadable(self._shown, file, error) from None
        return info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def _compare(self, file: str, sha256: str) -> None:
        if sha256 != self.manifest.content.files[file].sha256:
            raise PackageError(f"{self._shown}: {file} is damaged: its SHA-256 is {sha256}")


def open_package(
    path: str | os.PathLike[str], *, expect: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Package:
    """Opens a package and checks everything except file contents, which `Package` checks on use.

    Args:
        path: the package directory, or a name: "demo:pe" or "demo:plm" for a shipped model,
            "hf:org/name@revision" for a package on a hub.
        expect: required package id, `sha256:...`; None accepts any. The manifest in the package
            shows damage; only an id from elsewhere shows a deliberate exchange.
        limits: bounds on the manifest and the number of files.

    Raises:
        PackageError: there is no package, it is incomplete or unsafe, or has another id.
    """
    path, expect = locate(path, expect)
    shown = os.fspath(path)
    return _in_directory(shown, lambda fd: _open_files(fd, shown, expect, limits))


def verify_package(path: str | os.PathLike[str], *, expect: str | None = None) -> Manifest:
    """Opens a package, hashes every file and scans every graph; returns the manifest.

    Raises:
        PackageError: the package is damaged, incomplete or unsafe, or has another id.
    """
    with open_package(path, expect=expect) as package:
        package.verify()
        for name, spec in package.manifest.content.graphs.items():
            if spec.kind == ONNX:
                package.read_graph(name)
        return package.manifest


def read_manifest(path: str | os.PathLike[str], *, expect: str | None = None) -> Manifest:
    """The manifest of a package, without a look at file contents.

    Args:
        path: as for `open_package`.
        expect: required package id, `sha256:...`; None accepts any.

    Raises:
        PackageError: there is no package, it has another id, or the directory holds a file that is
            not listed.
    """
    path, expect = locate(path, expect)
    shown = os.fspath(path)

    def read(directory: Folder) -> Manifest:
        with ExitStack() as stack:
            manifest = _load_manifest(directory, shown, DEFAULT_LIMITS)
            _check_id(manifest, shown, expect)
            _open_folders(directory, manifest, shown, stack)
            return manifest

    return _in_directory(shown, read)


def _check_id(manifest: Manifest, shown: str, expect: str | None) -> None:
    if expect is not None and manifest.id != expect:
        raise PackageError(f"{shown}: the package id is {manifest.id}, expected {expect!a:.80}")


def _in_directory(shown: str, action: Callable[[Folder], _T]) -> _T:
    """Returns `action(the open directory)`.

    A package that is replaced meanwhile vanishes while `action` runs. So a failure counts only if
    the path still names the open directory; otherwise `action` runs on the new one.
    """
    for _ in range(_OPEN_ATTEMPTS):
        directory = _open_directory(shown)
        try:
            return action(directory)
        except PackageError:
            if directory.is_at(shown):
                raise
        finally:
            directory.close()
    raise PackageError(f"{shown}: was replaced during each of {_OPEN_ATTEMPTS} attempts to open it")


def _open_directory(shown: str) -> Folder:
    try:
        return open_folder(shown)
    except FileNotFoundError:
        raise PackageError(f"{shown}: no engine package: it is missing") from None
    except OSError as error:
        raise PackageError(f"{shown}: no engine package: {error.strerror}") from None
    except ValueError:  # a NUL, or a lone surrogate
        raise PackageError(f"{shown!a:.80}: no engine package: not a path") from None


def _open_files(directory: Folder, shown: str, expect: str | None, limits: Limits) -> Package:
    manifest = _load_manifest(directory, shown, limits)
    _check_id(manifest, shown, expect)
    with ExitStack() as stack, ExitStack() as opened:
        folders = _open_folders(directory, manifest, shown, stack)
        fds: dict[str, int] = {}
        for path, entry in manifest.content.files.items():
            fds[path] = _open_file(folders, path, shown)
            opened.callback(os.close, fds[path])
            _check_size(shown, path, fds[path], entry)
        opened.pop_all()
        return Package(manifest, fds, shown)


def _load_manifest(directory: Folder, shown: str, limits: Limits) -> Manifest:
    fd = _open_file({"": directory}, MANIFEST_FILE, shown)
    try:
        data = _read(shown, MANIFEST_FILE, fd, limits.manifest_bytes + 1)
    finally:
        os.close(fd)
    try:
        return parse(data, limits)
    except PackageError as error:
        raise PackageError(f"{shown}: {error}") from None


def _open_folders(
    directory: Folder, manifest: Manifest, shown: str, stack: ExitStack
) -> dict[str, Folder]:
    """Opens the folders of a package; refuses any entry that the manifest does not imply."""
    files = manifest.content.files
    splits = [path.split("/") for path in files]
    folders = {"": directory}
    for folder in sorted({"/".join(s[:i]) for s in splits for i in range(1, len(s))}):
        parent, _, name = folder.rpartition("/")
        try:
            opened = folders[parent].folder(name)
        except OSError as error:
            raise PackageError(f"{shown}: cannot open {folder}: {error.strerror}") from None
        stack.callback(opened.close)
        folders[folder] = opened
    for folder, opened in folders.items():
        for name in opened.names():
            path = f"{folder}/{name}" if folder else name
            if path not in folders and path not in files and path != MANIFEST_FILE:
                raise PackageError(f"{shown}: {path!a:.160} does not belong to this package")
    return folders


def _open_file(folders: Mapping[str, Folder], path: str, shown: str) -> int:
    """Opens a regular file that has one name; follows no link and does not block on a pipe."""
    folder, _, name = path.rpartition("/")
    try:
        fd = folders[folder].file(name)
    except OSError as error:
        raise PackageError(f"{shown}: cannot open {path}: {error.strerror}") from None
    if fd is None:
        raise PackageError(f"{shown}: {path} is not a regular file with one name")
    return fd


def _check_size(shown: str, file: str, fd: int, entry: FileEntry) -> None:
    try:
        size_bytes = os.fstat(fd).st_size
    except OSError as error:
        raise _unreadable(shown, file, error) from None
    if size_bytes != entry.size_bytes:
        raise PackageError(f"{shown}: {file} has {size_bytes} bytes instead of {entry.size_bytes}")


def _read(shown: str, file: str, fd: int, size_bytes: int) -> bytes:
    try:
        return b"".join(read_blocks(fd, size_bytes))
    except OSError as error:
        raise _unreadable(shown, file, error) from None


def _unreadable(shown: str, file: str, error: OSError) -> PackageError:
    return PackageError(f"{shown}: {file} cannot be read: {error.strerror}")
