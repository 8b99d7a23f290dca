"""Photographs for benchmarks: scikit-learn's samples, and large JPEG files made of them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from perception_rt.errors import BackendError
from perception_rt.processing.image_loader import default_workers

SAMPLES = ("china.jpg", "flower.jpg")  # 640 x 427 pixels

_LEAST_CROP = 0.6  # share of each side
_NOISE = 6.0  # standard deviation, of 255: the grain of a small camera
_QUALITY = 90


def sample_photo(name: str) -> Path:
    """Path of a sample photograph of scikit-learn; BackendError if scikit-learn is missing."""
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "images" / name
        if path.is_file():
            return path
    raise BackendError("the photographs are scikit-learn's: pip install scikit-learn")


def write_photographs(
    folder: Path, count: int, width: int, height: int, *, seed: int = 0
) -> Sequence[Path]:
    """Writes JPEG files, each another crop of a sample photograph with noise.

    Args:
        folder: an existing directory.
        count: number of files.
        width: pixels of a row.
        height: rows.
        seed: RNG seed; the same seed gives the same files.

    Returns:
        The paths in order.
    """
    samples = []
    for name in SAMPLES:
        with Image.open(sample_photo(name)) as image:
            samples.append(image.convert("RGB"))
    noise = np.random.default_rng(seed).normal(0, _NOISE, (height, width, 1)).astype(np.int16)
    paths = [folder / f"{index:04}.jpg" for index in range(count)]

    def write(index: int) -> None:
        rng = np.random.default_rng((seed, index))
        sample = samples[index % len(samples)]
        crop = rng.uniform(_LEAST_CROP, 1) * np.array(sample.size)
        left, top = rng.uniform(0, 1, 2) * (np.array(sample.size) - crop)
        box = (left, top, left + crop[0], top + crop[1])
        large = sample.resize((width, height), Image.Resampling.BICUBIC, box=box)
        shifted = np.roll(noise, rng.integers(0, (height, width)), axis=(0, 1))
        pixels = np.clip(np.asarray(large) + shifted, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(paths[index], quality=_QUALITY)

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(write, range(count)))
    return paths
