"""Opens a package and gives the object that runs it."""

import os

from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.reader import open_package
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.session import check_backend
from perception_rt.targets import get_target

MAX_THREADS = 1024


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    expect: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Embedder:
    """Loads an engine package and verifies all its bytes; engines open when first needed.

    Args:
        path: the package directory.
        backend: "auto" for the one that the package was exported for, or a backend's name.
        device: "cpu" or "cuda"; one that cannot be had is an error, never another device.
        threads: of one engine call; None for one per physical core.
        expect: the package id ("sha256:...") that must be found there.
        limits: bounds on the package and on everything that is embedded.

    Raises:
        PackageError: the package is damaged, unsafe, or not the expected one.
        BackendError: the backend or device cannot be had here.
        InputError: an argument is unusable.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a package is named by a path, not by a {type(path).__name__}")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise InputError(f"threads must be an integer from 1 to {MAX_THREADS}, not {threads!r:.40}")
    package = open_package(path, expect=expect, limits=limits)
    try:
        built_for = package.manifest.content.target.backend
        name = built_for if backend == "auto" else backend
        get_target(name)
        if name not in (built_for, "reference"):
            raise PackageError(f"this package was exported for backend {built_for}, not {name}")
        check_backend(package, backend=name, device=device)
        package.verify()
        return Embedder(package, backend=name, device=device, threads=threads, limits=limits)
    except BaseException:
        package.close()
        raise
