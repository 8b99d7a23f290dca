"""Opens a package and gives the object that runs it, by the family of its model."""

import os
from typing import Any

from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.contract import ENGINE_SEQUENCES
from perception_rt.package.reader import Package, open_package
from perception_rt.package.trust import is_remembered
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import check_integer
from perception_rt.runtime.session import AUTO, check_backends

MAX_THREADS = 1024
MAX_BATCH = 256

_MIB = 1024 * 1024


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = AUTO,
    device: str = "cpu",
    threads: int | None = None,
    expect: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    kv_bytes: int | None = None,
    max_batch: int = 8,
    cache: bool = True,
    feature_cache_bytes: int = 512 * _MIB,
    prefix_cache_bytes: int = 1024 * _MIB,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Loads an engine package and verifies all its bytes; engines open when first needed.

    The arguments from `kv_bytes` to `prefix_cache_bytes` are for language models and mean nothing
    to an encoder.

    Args:
        path: the package directory.
        backend: "auto" runs each graph on the backend that it was exported for. A name runs all
            graphs on that backend, which must be able to: "onnxruntime" can run those of
            "tensorrt".
        device: "cpu", "cuda", or "tensorrt" for ONNX Runtime's own; never another than this.
        threads: of one engine call; None for one per physical core.
        expect: the package id ("sha256:...") that must be found there. Engines of TensorRT are
            code, and not loaded without it unless this user exported the package here.
        limits: bounds on the package and on everything that is asked of it.
        kv_bytes: bound on the keys and values of all requests at work; None for 2 GiB, or for what
            the longest sequence takes where that is more. Only what is used is touched.
        max_batch: requests of about the same length that are decoded together, 1 to 256; to 8
            by an engine of TensorRT.
        cache: whether features of images, and keys and values of prompts, are kept for later
            requests that begin with the same.
        feature_cache_bytes: bound on the first; 0 for none.
        prefix_cache_bytes: bound on the second; 0 for none.
        cache_dir: a private directory where both are kept too, each within its bound again; and
            what TensorRT for RTX compiles for this GPU, so that the next process starts faster.

    Returns:
        An `Embedder` for a Perception Encoder, a `Generator` for a Perception Language Model.

    Raises:
        PackageError: the package is damaged, unsafe, or not the expected one.
        BackendError: the backend or device cannot be had here.
        InputError: an argument is unusable.
    """
    _check_path("path", path)
    if threads is not None:
        check_integer("threads", threads, 1, MAX_THREADS)
    if cache_dir is not None:
        _check_path("cache_dir", cache_dir)
    _check_memory(kv_bytes, max_batch, cache, feature_cache_bytes, prefix_cache_bytes)
    package = open_package(path, expect=expect, limits=limits)
    try:
        targets = check_backends(package.manifest.content, backend=backend, device=device)
        if any(target.has_engines for target in targets):
            _check_trust(package, pinned=expect is not None)
            check_integer("max_batch", max_batch, 1, ENGINE_SEQUENCES)
        package.verify()
        common: dict[str, Any] = {
            "backend": backend, "device": device, "threads": threads, "limits": limits,
            "cache_dir": cache_dir,
        }  # fmt: skip
        if package.manifest.content.family == "pe":
            return Embedder(package, **common)
        return Generator(
            package,
            kv_bytes=kv_bytes,
            max_batch=max_batch,
            feature_cache_bytes=feature_cache_bytes if cache else 0,
            prefix_cache_bytes=prefix_cache_bytes if cache else 0,
            **common,
        )
    except BaseException:
        package.close()
        raise


def _check_memory(
    kv_bytes: int | None,
    max_batch: int,
    cache: bool,
    feature_cache_bytes: int,
    prefix_cache_bytes: int,
) -> None:
    """InputError unless the arguments of language models are usable."""
    check_integer("kv_bytes", 1 if kv_bytes is None else kv_bytes, 1)
    check_integer("max_batch", max_batch, 1, MAX_BATCH)
    check_integer("feature_cache_bytes", feature_cache_bytes, 0)
    check_integer("prefix_cache_bytes", prefix_cache_bytes, 0)
    if type(cache) is not bool:
        raise InputError(f"cache must be True or False, not a {type(cache).__name__}")


def _check_trust(package: Package, *, pinned: bool) -> None:
    """PackageError unless the caller named the package or exported it on this machine."""
    package_id = package.manifest.id
    if not (pinned or is_remembered(package_id)):
        raise PackageError(
            "its engines are code for a GPU, and it was not exported here: name the package that "
            f"you trust by expect={package_id!r}"
        )


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} must be a path, not a {type(value).__name__}")
