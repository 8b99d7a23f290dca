"""Dense features of images in chunks, and their raw patches as a baseline.

Legend: N images, h w grid, C width, P patch side in pixels.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.evaluation.outcomes import Float32
from perception_rt.evaluation.tasks import TaskOptions
from perception_rt.processing.image import load_image
from perception_rt.runtime.embedder import Embedder

_CHUNK = 32  # images whose features are in memory at once


def dense_features(
    engine: Embedder, images: Sequence[str], options: TaskOptions
) -> Iterator[Float32]:
    """Yields the features of each image, float32 (h, w, C).

    Args:
        engine: a loaded encoder.
        images: paths of images.
        options: `layer`, and `raw_patches` for the pixels of each patch instead, C = 3 * P * P
            values from 0 to 1.

    Raises:
        InputError: an image is unusable, or the package crops or pads images, so that its grid
            does not cover them.
    """
    spec = engine.image_spec
    if spec.resize != "squash" or spec.crop_pct != 1:
        raise InputError(
            f"dense tasks need a package that squashes images; this one resizes by {spec.resize!r}"
        )
    if options.raw_patches and options.layer is not None:
        raise InputError("--raw-patches and --layer exclude each other")
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        if options.raw_patches:
            yield from _raw_patches(engine, chunk)
        else:
            layer = -1 if options.layer is None else options.layer

            def fail(index: int, error: InputError, names: Sequence[str] = chunk) -> None:
                raise InputError(f"{names[index]!r:.200}: {error}")

            yield from engine.features(chunk, layer, on_error=fail)


def _raw_patches(engine: Embedder, images: Sequence[str]) -> Iterator[Float32]:
    spec, vision = (
        engine.image_spec,
        PeConfig.from_dict(engine.manifest.content.architecture).vision,
    )
    height, width = vision.grid_of(spec.height, spec.width)
    for image in images:
        pixels = load_image(image, spec).reshape(height, vision.patch_size, width, -1, 3)
        patches = pixels.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)  # (h, w, P * P * 3)
        yield patches.astype(np.float32) / np.float32(255)
