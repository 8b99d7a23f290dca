"""Calibration inputs: seeded synthetic images and texts, or a user's own for fp8."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.config import TextConfig
from perception_rt.errors import InputError
from perception_rt.processing.clip_bpe import VOCAB_SIZE, ClipTokenizer
from perception_rt.processing.image import ImageSpec, load_image

Array = np.ndarray[Any, Any]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_IMAGES, _SYNTHETIC_IMAGES = 32, 8

MAX_PROMPT_TOKENS = 512  # in all prompts together
_PROMPTS_FILE, _MAX_PROMPT_BYTES = "prompts.txt", 64 * 1024

TEXTS = (
    "a photo of a cat sitting on a red sofa",
    "two people riding bicycles along the river at sunset",
    "diagram of a neural network",
    "7",
)
# Texts on which int8 is judged; its layers are measured on TEXTS.
JUDGED_TEXTS = (
    *TEXTS,
    "a photo of the digit four",
    "the number zero, written by hand",
    "a big dog, a small cat and a 9 on one picture",
    "an aerial view of a harbour with many small boats",
    "the dog is not in the picture",
    "handwriting",
    "A black-and-white portrait of an old man with a hat and a pipe, seen from the side",
    "blue",
    "a bowl of soup, two slices of bread and a glass of water on a wooden table",
    "GT-R 2014 for sale!",
    "on the street by the street sign, a street artist",
    "3 4 5",
)
PROMPTS = (
    "Describe this image in detail.",
    "How many people are in the picture, and what are they doing? Answer in one sentence.",
    "What does the sign on the left say? Quote the text exactly, with its numbers: 3, 14, 2026.",
    "Is the statement true that 17 + 25 = 42? Explain step by step.",
)


def images(count: int, height: int, width: int, *, seed: int = 0) -> Array:
    """Synthetic images of coloured shapes over gradients and noise, uint8 (count, H, W, 3).

    They have smooth areas, edges and texture at several scales, so activations spread as they do on
    photographs and not as on white noise.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    result = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        canvas = np.stack([_gradient(rng, x, y) for _ in range(3)], axis=-1)
        for _ in range(12):
            inside = _ellipse(rng, x, y)
            canvas[inside] = 0.2 * canvas[inside] + 0.8 * rng.random(3)
        canvas += rng.normal(0, 0.04, canvas.shape)
        result[index] = (canvas.clip(0, 1) * 255).astype(np.uint8)
    return result


def calibration_images(folder: Path | None, spec: ImageSpec) -> Array:
    """Up to 32 images of a folder, or 8 synthetic ones, uint8 (n, H, W, 3).

    Raises:
        InputError: the folder has no JPEG, PNG or WebP file, or one is damaged.
    """
    if folder is None:
        return images(_SYNTHETIC_IMAGES, spec.height, spec.width)
    return np.stack([load_image(file, spec) for file in calibration_files(folder)])


def prompts(folder: Path | None) -> tuple[str, ...]:
    """The lines of `prompts.txt` in a folder; built-in questions if there is no such file.

    Raises:
        InputError: the file is empty, not text, or larger than 64 KiB.
    """
    file = None if folder is None else folder / _PROMPTS_FILE
    if file is None or not file.exists():
        return PROMPTS
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_PROMPT_BYTES + 1)
        lines = tuple(line.strip() for line in data.decode().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--calibration: {file} cannot be read as text") from None
    if not lines or len(data) > _MAX_PROMPT_BYTES:
        raise InputError(f"--calibration: {file} must have 1 to {_MAX_PROMPT_BYTES} bytes of text")
    return lines


def calibration_files(folder: Path) -> list[Path]:
    """The files of `calibration_images`: every n-th by name, so that they are at most 32.

    Raises:
        InputError: the folder has no JPEG, PNG or WebP file.
    """
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise InputError(f"--calibration {folder}: {error.strerror}") from None
    if not files:
        raise InputError(f"--calibration {folder} has no {', '.join(_SUFFIXES)} files")
    return files[:: -(-len(files) // _MAX_IMAGES)]


def caption_ids(config: TextConfig, texts: Sequence[str] = TEXTS) -> Array:
    """Token ids of captions, int64 (n, T); random ids unless the vocabulary is CLIP's."""
    if config.vocab_size == VOCAB_SIZE and config.context_length >= 3:
        return ClipTokenizer(context_length=config.context_length)(texts)
    rng = np.random.default_rng(0 if texts is TEXTS else 1)
    return rng.integers(0, config.vocab_size, (len(texts), config.context_length), np.int64)


def _gradient(rng: np.random.Generator, x: Array, y: Array) -> Array:
    a, b, c = rng.uniform(-1, 1, 3)
    wave: Array = 0.5 + 0.25 * a * np.sin(6.0 * (b * x + c * y) + rng.uniform(0, 6))
    return wave + 0.25 * b * x


def _ellipse(rng: np.random.Generator, x: Array, y: Array) -> Array:
    cx, cy = rng.random(2)
    rx, ry = rng.uniform(0.02, 0.3, 2)
    inside: Array = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
    return inside
