"""Sample pictures, texts and questions: shipped demo pictures, and synthetic ones.

Their sizes are wide, tall, square, small and large, so that every way of resizing shows.
"""

import numpy as np
from PIL import Image

from perception_rt.demo import pictures_path

TEXTS = (
    "a photo of a cat",
    "Two dogs, running!",
    "the digit three in red",
    "",
    "na\u00efve caf\u00e9 \u4e2d\u6587",
    "a long text about nothing " * 20,
)
QUESTIONS = ("What is two plus three?", "Describe the picture, then name its colours.")
# Answers are compared on few tiles, since all would take minutes.
QUESTION_TILES = 4

_DEMO = ("digit_3.png", "locate.png", "colour.png", "read.png")
_SIZES = ((640, 360), (333, 500), (900, 900), (40, 24))  # width, height
_SEED = 0


def sample_pictures() -> list[Image.Image]:
    """RGB pictures, the same on every call."""
    demo = []
    for name in _DEMO:
        with Image.open(pictures_path() / name) as file:
            demo.append(file.convert("RGB"))
    random = np.random.default_rng(_SEED)
    synthetic = []
    for width, height in _SIZES:
        colours = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC))
        noise = random.integers(-12, 13, smooth.shape, np.int16)
        synthetic.append(Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)))
    return [*demo, *synthetic]


def question_picture() -> Image.Image:
    """The wide synthetic picture, for a question."""
    return sample_pictures()[len(_DEMO)]
