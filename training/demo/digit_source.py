"""Training pairs of PE-Demo: handwritten digits in synthetic scenes, with captions.

A sample is fixed by the seed and its number. Step s uses the numbers s * B to s * B + B - 1, where
B is the batch size over all ranks.
"""

import numpy as np
from PIL import Image

from perception_rt.config import PeConfig
from perception_rt.processing.image import resize_image
from training.data.loader import Read
from training.data.pair_batch import Captions, Pair, Sizes, square
from training.data.records import Pixels
from training.demo.digits import Digits, training_digits
from training.demo.scenes import caption, draw_page, draw_scene
from training.recipe.pairs import PairDataConfig


class DigitSource:
    """Draws endless random scenes of the training digits, without the validation split.

    Args:
        config: the recipe's section `data`.
        model: architecture that images and captions are prepared for.
        seed: RNG seed.
        sizes: image sides in pixels by step; None for the model's own.
    """

    def __init__(
        self, config: PairDataConfig, model: PeConfig, *, seed: int, sizes: Sizes | None = None
    ) -> None:
        digits = training_digits()
        self.digits = digits.part(slice(0, len(digits) - config.validation))
        self.config = config
        self.seed = seed
        self.sizes = sizes or (lambda _: (model.vision.image_size,))
        self.captions = Captions(model)

    def sample(self, number: int, size: int) -> tuple[Pixels, str]:
        """Draws one sample of the run: image uint8 (size, size, 3) and caption."""
        rng = np.random.default_rng((self.seed, number))
        row = int(rng.integers(len(self.digits)))
        draw = draw_page if rng.random() < self.config.plain_fraction else draw_scene
        label = int(self.digits.labels[row])
        image, scene = draw(rng, self.digits.ink[row], label, size)
        return image, caption(rng, scene)

    def read(self, lane: int, position: int) -> Read[Pair]:
        """See `Source.read`."""
        number = position * self.config.batch_size + lane
        sizes = self.sizes(position)
        # Drawn once and resized: the noise of a scene depends on the size that it is drawn at.
        image, text = self.sample(number, max(sizes))
        drawn = Image.fromarray(image)
        views = tuple(resize_image(drawn, square(size))[None] for size in sizes)  # (1, H, W, 3)
        row = Pair(views=views, tokens=self.captions(text), name=str(number))
        return Read(row=row, position=position + 1)


def validation_digits(config: PairDataConfig) -> Digits:
    """Returns the last `config.validation` training digits, which `DigitSource` leaves out."""
    digits = training_digits()
    return digits.part(slice(len(digits) - config.validation, len(digits)))
