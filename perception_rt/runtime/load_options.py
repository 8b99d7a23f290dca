"""Loading options, and the opening of a package that all model families share."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from perception_rt.cores import available_cores
from perception_rt.errors import InputError, PackageError, describe
from perception_rt.families import Family, get_family
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.contract import ENGINE_SEQUENCES
from perception_rt.package.reader import Package, open_package
from perception_rt.package.trust import is_remembered
from perception_rt.processing.image_options import Background, ImageOptions, image_options
from perception_rt.records import INTEGER_BOUND, check_integer
from perception_rt.runtime.request import check_bool
from perception_rt.runtime.session import AUTO, check_backends

MAX_THREADS = 1024
THREADS_PER_CORE = 2  # more would only wait for each other
MAX_BATCH = 256
FEATURE_CACHE_BYTES = 512 * 2**20
PREFIX_CACHE_BYTES = 1024 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The arguments of `perception_rt.load`, which documents them, without the path."""

    backend: str = AUTO
    device: str = "cpu"
    threads: int | None = None
    expect: str | None = None
    limits: Limits | None = DEFAULT_LIMITS
    kv_bytes: int | None = None
    max_batch: int = 8
    cache: bool = True
    feature_cache_bytes: int = FEATURE_CACHE_BYTES
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    cache_dir: str | os.PathLike[str] | None = None
    formats: Iterable[str] = ()
    background: Background | None = None
    images: ImageOptions = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", image_options(self.formats, self.background))
        for name, least, most in (
            ("threads", 1, MAX_THREADS),
            ("kv_bytes", 1, INTEGER_BOUND - 1),
            ("max_batch", 1, MAX_BATCH),
            ("feature_cache_bytes", 0, INTEGER_BOUND - 1),
            ("prefix_cache_bytes", 0, INTEGER_BOUND - 1),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("threads", "kv_bytes"):
                object.__setattr__(self, name, check_integer(name, value, least, most))
        if self.threads is not None:
            _check_cores(self.threads)
        if self.cache_dir is not None:
            _check_path("cache_dir", self.cache_dir)
            if not os.fspath(self.cache_dir):  # would be the working directory
                raise InputError("cache_dir is empty; name a directory, such as '.'")
        check_bool("cache", self.cache)
        if not isinstance(self.limits, Limits | None):
            raise InputError(f"limits must be a Limits or None, not {describe(self.limits)}")

    @property
    def effective_limits(self) -> Limits:
        """The limits; `DEFAULT_LIMITS` for None."""
        return DEFAULT_LIMITS if self.limits is None else self.limits


@contextmanager
def open_model(
    path: str | os.PathLike[str], options: LoadOptions, family: Family | None = None
) -> Iterator[Package]:
    """Opens a package and verifies all its bytes; closes it if the block raises.

    Args:
        path: the package directory, or a name: "demo:pe" or "demo:plm" for a shipped model,
            "hf:org/name@revision" for a package on a hub.
        options: the backend and device to check, the expected id and the limits.
        family: the family that the package must be of; None for any.

    Raises:
        PackageError: the package is damaged, unsafe, or not the expected one.
        BackendError: the backend or the device is not available.
        InputError: an argument is unusable, or the package is of another family.
    """
    _check_path("path", path)
    package = open_package(path, expect=options.expect, limits=options.effective_limits)
    try:
        content = package.manifest.content
        found = get_family(content.family)
        if family is not None and found != family:
            right = found.runtime.rpartition(":")[2]
            raise InputError(
                f"{content.name} is {found.label} (family {found.name}): use {right}.load"
            )
        targets = check_backends(content, backend=options.backend, device=options.device)
        if any(target.has_engines for target in targets):
            _check_trust(package, pinned=options.expect is not None)
            check_integer("max_batch", options.max_batch, 1, ENGINE_SEQUENCES)
        package.verify()
        yield package
    except BaseException:
        package.close()
        raise


def _check_trust(package: Package, *, pinned: bool) -> None:
    """PackageError unless the caller named the package or exported it on this machine."""
    package_id = package.manifest.id
    if not (pinned or is_remembered(package_id)):
        raise PackageError(
            f"package {package.name!r} has engines, which are code for a GPU, and was not exported "
            f"on this machine: pass expect={package_id!r} if you trust it"
        )


def _check_cores(threads: int) -> None:
    cores = available_cores()
    if threads > THREADS_PER_CORE * cores:
        raise InputError(
            f"threads is {threads}, but this process may use {cores} cores: use at most "
            f"{THREADS_PER_CORE * cores}, or None for one per physical core"
        )


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} must be a path, not a {type(value).__name__}")
