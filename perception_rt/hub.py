"""Packages on a Hugging Face hub: uploads them, fetches them, and finds those that were fetched.

A package is fetched as regular files into a private folder of the cache, because the hub's own
cache consists of links, which `load` refuses. It is published there by one rename after every byte
was verified, under its id; so an expected id that is in the cache needs no network. An interrupted
fetch is continued by the next one. Importing this module loads no library.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.package.manifest import MANIFEST_FILE, FileEntry, Manifest, parse
from perception_rt.package.names import locate as find_package
from perception_rt.package.reader import open_package, verify_package
from perception_rt.package.user_cache import make_private, user_cache
from perception_rt.targets import TARGETS

PREFIX = "hf:"
CARD_FILE = "README.md"

_ANSWER_SECONDS = 10.0
_PART = r"[A-Za-z0-9](?:\w|[.-](?=\w))*"
_NAME = re.compile(rf"(?:hf:)?({_PART}/{_PART})(?:@(\w[\w./-]{{0,199}}))?", re.ASCII)
_MAX_REPO = 96
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"sha256:[0-9a-f]{64}")
_CACHE = "hub"
_REFS = ".refs"  # folder of files that hold the id of a revision
_LOCKS = ".locks"
_WORK = "get"  # in names of folders that are being filled
_LOGIN = "log in with 'hf auth login'"
_OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A package on the hub.

    Attributes:
        repo: organisation and name of the model repository.
        revision: branch, tag or commit; None for the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + ("" if self.revision is None else f"@{self.revision}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """An uploaded package: its name with the commit that has it, and its id."""

    name: Name
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """Commit of a revision, and the files in it with their sizes, where the hub says them."""

    commit: str
    files: dict[str, int | None]


def parse_name(text: str) -> Name:
    """The parts of "org/name" or "org/name@revision", with or without "hf:".

    Raises:
        InputError: the text is no such name.
    """
    match = _NAME.fullmatch(text)
    if match is None or len(match[1]) > _MAX_REPO or ".." in text:
        raise InputError(
            f"{text!a:.80} does not name a package on the hub: write {PREFIX}org/name or "
            f"{PREFIX}org/name@revision"
        )
    return Name(repo=match[1], revision=match[2])


def locate(name: str, expect: str | None = None) -> tuple[Path, str | None]:
    """Returns the folder of a package in the cache, and `expect`; fetches what is not there.

    A commit, or an expected id, that was fetched before needs no network. For a branch or tag, the
    hub is asked for its commit, unless HF_HUB_OFFLINE is set.

    Args:
        name: "hf:org/name" or "hf:org/name@revision".
        expect: the required package id; packages with executable engines need it.

    Raises:
        InputError: the name or the id is malformed.
        PackageError: the package cannot be fetched, is damaged, or is not the expected one.
    """
    parsed = parse_name(name)
    if expect is not None:
        _check_id(expect)
    with _reporting(parsed):
        cache = user_cache(_CACHE)
        make_private(cache)
        folder = None if expect is None else _cached(cache, expect)
        if folder is None:
            folder = _find(parsed, expect, cache)
    return folder, expect


def find_cached(package_id: str) -> Path | None:
    """Returns the folder of a package that was fetched before; None if it is not in the cache."""
    try:
        return _cached(user_cache(_CACHE), package_id) if _ID.fullmatch(package_id) else None
    except OSError:  # there is no home directory
        return None


def pull(name: str, out: str | os.PathLike[str] | None = None, expect: str | None = None) -> Path:
    """Fetches and verifies a package; returns its folder. A damaged copy is fetched again.

    Args:
        name: "org/name" or "org/name@revision", with or without "hf:".
        out: folder to make; None for one in the cache, which later calls use again.
        expect: the required package id; packages with executable engines need it.

    Raises:
        InputError: the name or the id is malformed, or `out` exists or has no parent.
        PackageError: the package cannot be fetched, is damaged, or is not the expected one.
    """
    parsed = parse_name(name)
    if out is None:
        folder = locate(str(parsed), expect)[0]
        try:
            verify_package(folder, expect=expect)
        except PackageError:
            shutil.rmtree(folder, ignore_errors=True)
            folder = locate(str(parsed), expect)[0]
        return folder
    if expect is not None:
        _check_id(expect)
    target = Path(os.path.abspath(out))  # noqa: PTH100 - links stay as they are
    if os.path.lexists(target):
        raise InputError(f"{os.fspath(out)!a:.160} exists: name a folder that does not")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {os.fspath(out)!a:.160}: its folder is missing")
    with _reporting(parsed):
        listing = _ask(parsed)
        manifest = _manifest(parsed, listing, expect)
        _fetch(parsed, listing, manifest, target)
    return target


def push(
    package: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    message: str | None = None,
) -> Pushed:
    """Verifies a package and uploads it as one commit; makes the repository if there is none.

    Files of the repository that do not belong to the package stay. A repository without a
    README.md gets one that says how to load the package.

    Args:
        package: the package's folder, or a name that `load` takes.
        name: "org/name", or "org/name@branch" for another branch than the default one.
        private: whether a new repository is private.
        message: first line of the commit's message; None for the name and id of the package.

    Raises:
        InputError: the name is malformed.
        PackageError: the package is damaged, or the hub refuses the upload.
    """
    parsed = parse_name(name)
    if _is_commit(parsed):
        raise InputError(f"{parsed} names a commit: push to a branch")
    folder, expect = find_package(package)
    manifest = verify_package(folder, expect=expect)
    with _reporting(parsed, "uploaded"):
        hub = _library()
        api = hub.HfApi()
        api.create_repo(parsed.repo, private=private or None, exist_ok=True)
        if parsed.revision is not None:
            api.create_branch(parsed.repo, branch=parsed.revision, exist_ok=True)
        operations = [
            hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=Path(folder) / file)
            for file in (*manifest.content.files, MANIFEST_FILE)
        ]
        if CARD_FILE not in _ask(parsed).files:
            card = _card(parsed, manifest).encode()
            operations.append(hub.CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card))
        commit = api.create_commit(
            parsed.repo,
            operations,
            commit_message=message or f"{manifest.content.name} {manifest.id}",
            revision=parsed.revision,
        )
        pushed = Name(repo=parsed.repo, revision=commit.oid)
        _check_listed(pushed, _ask(pushed), manifest)
    return Pushed(name=pushed, id=manifest.id)


def hide_bars() -> None:
    """Switches the progress bars of huggingface_hub off, for a log or a pipe."""
    _library().utils.disable_progress_bars()


def _find(name: Name, expect: str | None, cache: Path) -> Path:
    """The folder of a package that may have been fetched under its revision before."""
    offline = _library().constants.HF_HUB_OFFLINE
    listing = None if offline or _is_commit(name) else _ask(name)
    known = name if listing is None else Name(repo=name.repo, revision=listing.commit)
    folder = _remembered(cache, known, expect)
    if folder is not None:
        if listing is not None:
            _remember(name, _id_of(folder))
        return folder
    listing = _ask(name) if listing is None else listing
    manifest = _manifest(name, listing, expect)
    folder = _cached(cache, manifest.id)
    if folder is None:
        folder = _folder(cache, manifest.id)
        _fetch(name, listing, manifest, folder)
    for revision in {name.revision, listing.commit}:
        _remember(Name(repo=name.repo, revision=revision), manifest.id)
    return folder


def _manifest(name: Name, listing: _Listing, expect: str | None) -> Manifest:
    """The manifest of a package that may be fetched: PackageError names what speaks against it."""
    size = listing.files.get(MANIFEST_FILE, -1)
    if size == -1:
        raise PackageError(f"{name}: no engine package: the repository has no {MANIFEST_FILE}")
    if size is not None and size > DEFAULT_LIMITS.manifest_bytes:
        raise PackageError(f"{name}: manifest: {size} bytes are more than the limit")
    with tempfile.TemporaryDirectory() as work:
        file = _download(name, listing, MANIFEST_FILE, Path(work))
        with file.open("rb") as stream:
            data = stream.read(DEFAULT_LIMITS.manifest_bytes + 1)
    try:
        manifest = parse(data)
    except PackageError as error:
        raise PackageError(f"{name}: {error}") from None
    if expect is not None and manifest.id != expect:
        raise PackageError(f"{name}: the package id is {manifest.id}, expected {expect}")
    _check_engines(name, manifest, expect)
    _check_listed(name, listing, manifest)
    return manifest


def _is_commit(name: Name) -> bool:
    return name.revision is not None and _COMMIT.fullmatch(name.revision) is not None


def _check_id(expect: str) -> None:
    if not isinstance(expect, str) or not _ID.fullmatch(expect):
        raise InputError(
            f"expect must be 'sha256:' and 64 lower-case hex digits, not {expect!a:.80}"
        )


def _check_engines(name: Name, manifest: Manifest, expect: str | None) -> None:
    """PackageError for engines whose package the caller did not name by its id."""
    content = manifest.content
    targets = [TARGETS.get(content.backend_of(graph)) for graph in content.graphs]
    if expect is None and any(target is None or target.has_engines for target in targets):
        raise PackageError(
            f"{name} may have engines, which are code for a GPU: if you trust it, pass "
            f"expect={manifest.id!r}, or --expect {manifest.id}"
        )


def _check_listed(name: Name, listing: _Listing, manifest: Manifest) -> None:
    """PackageError unless the repository has each file of the manifest, with its size."""
    for file, entry in manifest.content.files.items():
        if file not in listing.files:
            raise PackageError(f"{name}: the package is incomplete: the repository lacks {file}")
        size = listing.files[file]
        if size not in (None, entry.size_bytes):
            raise PackageError(f"{name}: {file} has {size} bytes instead of {entry.size_bytes}")


def _fetch(name: Name, listing: _Listing, manifest: Manifest, target: Path) -> None:
    """Fills a hidden folder beside `target`, verifies it and renames it."""
    mark = hashlib.sha256(f"{name.repo}@{listing.commit}".encode()).hexdigest()[:16]
    work = target.with_name(f".{target.name}.{_WORK}-{mark}")
    lock = _private_file(_LOCKS, str(work))
    with _library().utils.WeakFileLock(lock):
        if os.path.lexists(target):  # another process was faster
            open_package(target, expect=manifest.id).close()
            return
        _fill(name, listing, manifest, work)
        work.rename(target)


def _fill(name: Name, listing: _Listing, manifest: Manifest, work: Path) -> None:
    """Fetches the files of a package into `work`, where an earlier try may have left some."""
    work.mkdir(mode=0o700, exist_ok=True)
    by_size: Callable[[tuple[str, FileEntry]], int] = lambda item: item[1].size_bytes  # noqa: E731
    for file, _ in sorted(manifest.content.files.items(), key=by_size):
        _download(name, listing, file, work)
    shutil.rmtree(work / ".cache", ignore_errors=True)  # notes of huggingface_hub
    (work / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    try:
        verify_package(work, expect=manifest.id)
    except PackageError as error:
        shutil.rmtree(work, ignore_errors=True)
        reason = str(error).removeprefix(f"{work}: ")
        raise PackageError(f"{name}: {reason}") from None


def _download(name: Name, listing: _Listing, file: str, folder: Path) -> Path:
    """Fetches one file below a folder, as a regular file; continues what an earlier try left."""
    hub = _library()
    return Path(hub.hf_hub_download(name.repo, file, revision=listing.commit, local_dir=folder))


def _ask(name: Name) -> _Listing:
    """Asks the hub about a revision, in one request that is not repeated if it fails."""
    info = (
        _library()
        .HfApi()
        .repo_info(name.repo, revision=name.revision, files_metadata=True, timeout=_ANSWER_SECONDS)
    )
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise PackageError(f"{name}: the hub names no commit of it")
    return _Listing(
        commit=info.sha, files={file.rfilename: file.size for file in info.siblings or ()}
    )


def _folder(cache: Path, package_id: str) -> Path:
    return cache / package_id.removeprefix("sha256:")


def _cached(cache: Path, package_id: str) -> Path | None:
    """The folder of a package in the cache, whose contents `load` verifies; None if unusable."""
    folder = _folder(cache, package_id)
    try:
        open_package(folder, expect=package_id).close()
    except PackageError:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
        return None
    return folder


def _id_of(folder: Path) -> str:
    return f"sha256:{folder.name}"


def _private_file(folder: str, key: str) -> Path:
    """Path of the cache's own file for a key, in a folder that is made if it is missing."""
    parent = user_cache(_CACHE) / folder
    make_private(parent)
    return parent / hashlib.sha256(key.encode()).hexdigest()


def _ref(name: Name) -> Path:
    """The file that holds the id of a revision, for the hub in use."""
    return _private_file(_REFS, f"{_library().constants.ENDPOINT} {name}")


def _remember(name: Name, package_id: str) -> None:
    """Notes the id of a revision, for the day when the hub cannot be asked."""
    ref = _ref(name)
    with tempfile.NamedTemporaryFile("w", dir=ref.parent, delete=False) as file:
        file.write(package_id)
    Path(file.name).replace(ref)


def _remembered(cache: Path, name: Name, expect: str | None) -> Path | None:
    """The folder of a revision that was fetched before; None if it is not in the cache."""
    try:
        package_id = _ref(name).read_text("ascii")
    except (OSError, ValueError):
        return None
    if not _ID.fullmatch(package_id):
        return None
    if expect is not None and package_id != expect:
        raise PackageError(f"{name}: the package id is {package_id}, expected {expect}")
    folder = _cached(cache, package_id)
    if folder is not None:
        with open_package(folder) as package:
            _check_engines(name, package.manifest, expect)
    return folder


def _card(name: Name, manifest: Manifest) -> str:
    """A README.md for a repository that has none."""
    content = manifest.content
    target = f"{content.target.backend}, {content.target.precision}"
    license_note = content.weights.get("license")
    lines = [
        "---",
        "library_name: perception_rt",
        "---",
        f"# {content.name}",
        "",
        f"An engine package of perception_rt: {target}.",
        *([] if license_note is None else ["", f"Weights: {license_note}"]),
        "",
        "```python",
        "import perception_rt as prt",
        "",
        f'model = prt.load("{name}", expect="{manifest.id}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _library() -> Any:
    """The module huggingface_hub; PackageError with the remedy if it is not installed."""
    try:
        hub = import_module("huggingface_hub")
        import_module("huggingface_hub.constants")
        import_module("huggingface_hub.errors")
        import_module("huggingface_hub.utils")
    except ImportError:
        raise PackageError(
            "huggingface_hub is not installed, which fetches and uploads packages: "
            'pip install "perception_rt[hub]"'
        ) from None
    return hub


@contextmanager
def _reporting(name: Name, done: str = "fetched") -> Iterator[None]:
    """Turns every error but our own into a PackageError with a reason and a remedy."""
    try:
        yield
    except (PackageError, InputError):
        raise
    # Besides its own errors, the hub's client raises those of its transport, which may change.
    except Exception as error:
        raise PackageError(_reason(name, done, error)) from error


def _reason(name: Name, done: str, error: Exception) -> str:
    """Describes an error and its remedy. Classes go from special to general."""
    errors = _library().errors
    if isinstance(error, errors.GatedRepoError):
        return f"{name} needs its terms accepted: accept them on its page, and {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: {name.repo} has no such revision on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is not on the hub, or not visible to you: {_LOGIN}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name} is not in the cache, and offline mode is on: unset {_OFFLINE}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{name} cannot be {done} without an account: {_LOGIN}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{name} cannot be {done} with this account (status {status}): {_LOGIN}"
    if status is not None:
        return f"{name} cannot be {done}: the hub answers with status {status}"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename!a:.160}"
        return f"{name} cannot be {done}: {error.strerror}{where}"
    return (
        f"{name} cannot be {done} ({type(error).__name__}): check the network and the free disk "
        f"space; {_OFFLINE}=1 uses what is in the cache"
    )
