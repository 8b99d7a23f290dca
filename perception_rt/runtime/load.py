"""`load`: opens a package of any family and returns the object that runs it."""

import os
from collections.abc import Iterable

from perception_rt.families import get_family, import_named
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.image_options import Background
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.load_options import (
    FEATURE_CACHE_BYTES,
    PREFIX_CACHE_BYTES,
    LoadOptions,
    open_model,
)
from perception_rt.runtime.session import AUTO


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = AUTO,
    device: str = "cpu",
    threads: int | None = None,
    expect: str | None = None,
    limits: Limits | None = DEFAULT_LIMITS,
    kv_bytes: int | None = None,
    max_batch: int = 8,
    cache: bool = True,
    feature_cache_bytes: int = FEATURE_CACHE_BYTES,
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    cache_dir: str | os.PathLike[str] | None = None,
    formats: Iterable[str] = (),
    background: Background | None = None,
) -> Embedder | Generator:
    """Loads a package and verifies all its bytes. Each engine opens on first use.

    The arguments from `kv_bytes` to `prefix_cache_bytes` are for language models; an encoder
    ignores them.

    Args:
        path: the package directory, or a name: "demo:pe" or "demo:plm" for a shipped model,
            "hf:org/name@revision" for a package on a hub.
        backend: "auto" runs each graph on the backend that it was exported for. A name runs all
            graphs on that backend, which must be able to: "onnxruntime" can run those of
            "tensorrt".
        device: "cpu", "cuda", or "tensorrt" for ONNX Runtime's TensorRT provider. Loading fails
            if it is not available; no other device is used instead.
        threads: threads of one engine call, at most two per core that this process may use (its
            affinity, and the quota of its container); None for one per physical core.
        expect: the package id ("sha256:...") to require. TensorRT engines are code: without
            `expect`, they load only if this user exported the package on this machine.
        limits: bounds on the package and on all inputs; None for the defaults.
        kv_bytes: bytes for the key-value caches of all running requests; None for 2 GiB, or for
            one sequence of the longest length if that is more. Memory is touched as it is used.
        max_batch: most requests decoded together, 1 to 256; at most 8 with a TensorRT engine.
        cache: whether image features and prompt prefixes are kept for later requests.
        feature_cache_bytes: bytes of the image feature cache; 0 disables it.
        prefix_cache_bytes: bytes of the prompt prefix cache; 0 disables it.
        cache_dir: directory where both caches are kept as well, each up to the same size, and
            where TensorRT for RTX keeps what it compiles for this GPU. It must belong to this user,
            and no other user may be able to write to it.
        formats: image formats to accept beside JPEG, PNG and WebP: "gif", "bmp", "tiff", "avif",
            and "heic" with the extra of that name. Of an animation, the first frame counts.
        background: colour behind transparent pixels, such as "white", "#ffffff" or (255, 255, 255);
            None drops the alpha channel, as the reference does.

    Returns:
        An `Embedder` for a Perception Encoder, a `Generator` for a Perception Language Model.

    Raises:
        PackageError: the package is damaged, unsafe, or not the expected one.
        BackendError: the backend or the device is not available.
        InputError: an argument is unusable.
    """
    options = LoadOptions(
        backend=backend,
        device=device,
        threads=threads,
        expect=expect,
        limits=limits,
        kv_bytes=kv_bytes,
        max_batch=max_batch,
        cache=cache,
        feature_cache_bytes=feature_cache_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        cache_dir=cache_dir,
        formats=formats,
        background=background,
    )
    with open_model(path, options) as package:
        runtime = import_named(get_family(package.manifest.content.family).runtime)
        model: Embedder | Generator = runtime(package, options)
        return model
