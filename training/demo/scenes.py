"""Synthetic scenes: one coloured handwritten digit on a coloured background, with captions.

A scene depends on its random generator only, so (seed, index) fix it. Captions describe the scene
in varying detail. The prompts for zero-shot classification are here too.
"""

import math
from dataclasses import dataclass

import numpy as np

from training.data.records import Pixels
from training.demo.digits import Digits, Floats, Labels, Placement, ink_mask

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COLORS = {
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "red": (220, 35, 40),
    "green": (40, 160, 60),
    "blue": (40, 75, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 135, 25),
    "purple": (130, 45, 175),
    "pink": (245, 140, 195),
    "brown": (115, 70, 35),
    "cyan": (60, 205, 225),
}
COLOR_NAMES = tuple(COLORS)
BACKGROUNDS = ("plain", "gradient", "noisy", "striped", "checked")

_MIN_CONTRAST = 130.0  # smallest RGB distance between ink and background
_JITTER = 14.0  # largest deviation per channel from a named colour

# For example {word} seven, {numeral} 7, {ink} a red, {color} red, {ground} a green, {kind} striped.
_CAPTIONS_DIGIT = (
    "a photo of the handwritten digit {word}",
    "a handwritten {word}",
    "a photo of the number {numeral}",
    "the digit {numeral} written by hand",
    "{word}",
    "{numeral}",
)
_CAPTIONS_SCENE = (
    "{ink} {numeral} on {ground} background",
    "a photo of {ink} {word} on {ground} background",
    "{ink} handwritten digit {word} on {ground} {kind} background",
    "the number {numeral} written in {color} on {ground} {kind} background",
    "{ink} {word}",
    "a handwritten {numeral} on {ground} background",
)
_CAPTIONS_COLOR = (
    "{ink} digit on {ground} background",
    "a photo of {ink} digit",
    "a handwritten digit on {ground} {kind} background",
)
DIGIT_PROMPTS = _CAPTIONS_DIGIT[:4]
INK_PROMPTS = ("a photo of {ink} digit",)
_SHARES = (0.4, 0.5, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Contents of a scene: digit 0..9, names out of `COLORS`, and one of `BACKGROUNDS`."""

    digit: int
    ink: str
    ground: str
    kind: str


PLAIN = ("black", "white", "plain")


def draw_scene(
    rng: np.random.Generator, ink: Floats, digit: int, image_size: int
) -> tuple[Pixels, Scene]:
    """Draws one digit (8, 8) into a random scene, uint8 (image_size, image_size, 3)."""
    image, _, scene = draw_masked_scene(rng, ink, digit, image_size)
    return image, scene


def draw_masked_scene(
    rng: np.random.Generator, ink: Floats, digit: int, image_size: int
) -> tuple[Pixels, Floats, Scene]:
    """Draws a scene as `draw_scene`, with the digit's coverage of each pixel, float32 (H, W)."""
    name, ground_name = _contrasting_colors(rng)
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    ground = draw_background(rng, kind, shade(rng, ground_name), image_size)
    mask = ink_mask(vary_pen(rng, ink), image_size, _placement(rng))
    image = ground + (shade(rng, name) - ground) * mask[:, :, None]
    scene = Scene(digit=digit, ink=name, ground=ground_name, kind=kind)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), mask, scene


def draw_page(
    rng: np.random.Generator, ink: Floats, digit: int, image_size: int
) -> tuple[Pixels, Scene]:
    """Draws one digit (8, 8) as dark ink on a light page, slightly displaced."""
    mask = ink_mask(vary_pen(rng, ink), image_size, _placement(rng))[:, :, None]
    page, pen = rng.uniform(235, 255), rng.uniform(0, 40)
    image = np.repeat(page + (pen - page) * mask, 3, axis=2)
    name, ground, kind = PLAIN
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), Scene(
        digit=digit, ink=name, ground=ground, kind=kind
    )


def draw_all(digits: Digits, image_size: int, *, seed: int) -> tuple[Pixels, Labels]:
    """Draws one scene per digit.

    Returns:
        Images uint8 (N, image_size, image_size, 3) and ink colours int64 (N,), indices into
        `COLOR_NAMES`.
    """
    drawn = [
        draw_scene(np.random.default_rng((seed, i)), ink, int(label), image_size)
        for i, (ink, label) in enumerate(zip(digits.ink, digits.labels, strict=True))
    ]
    colors = [COLOR_NAMES.index(scene.ink) for _, scene in drawn]
    return np.stack([image for image, _ in drawn]), np.array(colors, dtype=np.int64)


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Returns a random true sentence about a scene."""
    group = (_CAPTIONS_DIGIT, _CAPTIONS_SCENE, _CAPTIONS_COLOR)[rng.choice(3, p=_SHARES)]
    return describe(group[rng.integers(len(group))], scene)


def describe(template: str, scene: Scene) -> str:
    """Fills a caption template."""
    return template.format(
        word=WORDS[scene.digit],
        numeral=scene.digit,
        ink=_with_article(scene.ink),
        color=scene.ink,
        ground=_with_article(scene.ground),
        kind=scene.kind,
    )


def digit_prompts() -> list[list[str]]:
    """Returns for each digit the sentences whose mean embedding represents it."""
    return [_prompts(DIGIT_PROMPTS, digit=i) for i in range(10)]


def ink_prompts() -> list[list[str]]:
    """Returns for each of `COLOR_NAMES` the sentences whose mean embedding represents it."""
    return [_prompts(INK_PROMPTS, ink=name) for name in COLOR_NAMES]


def _prompts(templates: tuple[str, ...], *, digit: int = 0, ink: str = "black") -> list[str]:
    scene = Scene(digit=digit, ink=ink, ground="white", kind="plain")
    return [describe(t, scene) for t in templates]


def _with_article(color: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color}"


def _contrasting_colors(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        ink, ground = (COLOR_NAMES[i] for i in rng.integers(len(COLOR_NAMES), size=2))
        if math.dist(COLORS[ink], COLORS[ground]) >= _MIN_CONTRAST:
            return ink, ground


def shade(rng: np.random.Generator, name: str) -> Floats:
    """A named colour with jitter, float32 (3,)."""
    return (np.array(COLORS[name]) + rng.uniform(-_JITTER, _JITTER, size=3)).astype(np.float32)


def vary_pen(rng: np.random.Generator, ink: Floats) -> Floats:
    """Makes the pen thinner or bolder."""
    return ink ** np.float32(rng.uniform(0.7, 1.4))


def _placement(rng: np.random.Generator) -> Placement:
    size = rng.uniform(0.65, 0.95)
    room = (1.0 - size) / 2
    return Placement(
        size=size,
        x=0.5 + rng.uniform(-room, room),
        y=0.5 + rng.uniform(-room, room),
        angle=rng.uniform(-0.25, 0.25),
        shear=rng.uniform(-0.2, 0.2),
        stretch=rng.uniform(0.8, 1.2),
    )


def draw_background(rng: np.random.Generator, kind: str, color: Floats, size: int) -> Floats:
    """Background in shades of one colour, float32 (size, size, 3)."""
    x = np.arange(size, dtype=np.float32)[None, :]
    y = np.arange(size, dtype=np.float32)[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    period = size * rng.uniform(0.15, 0.4)
    match kind:
        case "gradient":
            amount = (along - along.min()) / np.ptp(along)
        case "noisy":
            amount = rng.random((size, size), dtype=np.float32)
        case "striped":
            amount = (along % period < period / 2).astype(np.float32)
        case "checked":
            amount = ((x // (period / 2) + y // (period / 2)) % 2).astype(np.float32)
        case _:
            amount = np.zeros((size, size), dtype=np.float32)
    # Shade towards white or black, whichever is farther, so that it is visible and keeps its name.
    target = np.float32(255.0 if color.mean() < 128.0 else 0.0)
    return color + (target - color) * (np.float32(0.28) * amount[:, :, None])
