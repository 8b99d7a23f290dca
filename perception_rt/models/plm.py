"""A Perception Language Model: tower, projector and decoder, under the reference's names.

Legend: N batch, T tokens, I tiles, S tile side in pixels, h grid side, r pooling ratio, C decoder
width, D tower width, V vocabulary.
"""

from torch import Tensor, nn

from perception_rt.errors import InputError
from perception_rt.models.decoder import Decoder
from perception_rt.models.layers import Attention, sdpa_attention
from perception_rt.models.vision import VisionTower
from perception_rt.plm_config import PlmConfig


def pool_tokens(x: Tensor, ratio: int) -> Tensor:
    """Averages r x r neighbours of a square grid: (N, h*h, C) -> (N, (h/r)**2, C)."""
    n, tokens, width = x.shape
    side = round(tokens**0.5) // ratio
    blocks = x.reshape(n, side, ratio, side, ratio, width)  # (N, h/r, r, h/r, r, C)
    # (N, h/r, h/r, C) -> (N, (h/r)**2, C)
    return blocks.mean(dim=(2, 4)).reshape(n, side * side, width)


class VisionProjector(nn.Module):
    """Turns patch tokens into image tokens: linear, GELU, mean of r x r neighbours, linear.

    The reference takes the mean last. A mean and a linear layer commute, so taking it before the
    second layer gives the same function with 1 / r**2 of that layer's work.
    """

    def __init__(self, config: PlmConfig) -> None:
        super().__init__()
        self.ratio = config.pooling_ratio
        dim = config.decoder.dim
        layers = [nn.Linear(config.vision.width, dim), nn.GELU(), nn.Linear(dim, dim)]
        self.projector = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(I, h*h, D) -> (I, (h/r)**2, C)."""
        first, gelu, second = self.projector
        x = gelu(first(x))
        return second(x if self.ratio == 1 else pool_tokens(x, self.ratio))


class PerceptionLM(Decoder):
    """A Perception Language Model with the parameter names of the checkpoints.

    Args:
        config: the architecture.
        attention: attention kernel of all blocks.
    """

    def __init__(self, config: PlmConfig, *, attention: Attention = sdpa_attention) -> None:
        super().__init__(config.decoder, attention=attention)
        self.config = config
        self.vision_model = VisionTower(config.vision, attention=attention)
        self.vision_projector = VisionProjector(config)

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Normalised float tiles (I, 3, S, S) -> image tokens (I, (h/r)**2, C)."""
        tower = self.vision_model
        tokens = tower.forward_features(pixels, norm=True, strip_class_token=True)
        return self.vision_projector(tokens)

    def embed(self, tokens: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Token ids (N, T) and tiles (I, 3, S, S) -> input embeddings (N, T, C).

        The embeddings of the tiles replace those of the image tokens, in order.

        Raises:
            InputError: the number of image tokens is not the one that the tiles make.
        """
        hidden = self.tok_embeddings(tokens)
        places = tokens == self.config.image_token_id
        if pixels is None:
            return hidden
        image = self.encode_tiles(pixels).flatten(0, 1)  # (I, (h/r)**2, C) -> (I * (h/r)**2, C)
        if int(places.sum()) != len(image):
            raise InputError(
                f"the ids have {int(places.sum())} image tokens and the tiles make {len(image)}"
            )
        # places (N, T) -> (N, T, 1), broadcast over channels.
        return hidden.masked_scatter(places[..., None], image.to(hidden.dtype))

    def forward(self, tokens: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Token ids (N, T) and the tiles (I, 3, S, S) of all rows, in order -> logits (N, T, V)."""
        return self.decode(self.embed(tokens, pixels))
