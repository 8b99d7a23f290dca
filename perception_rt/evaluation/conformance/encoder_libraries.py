"""Encoders of timm and open_clip, as `EncoderLibrary`.

Legend: N images or texts, H W pixels, D embedding channels, T tokens, P patches, C width.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perception_rt.checkpoint.timm_encoder import MODELS
from perception_rt.errors import InputError
from perception_rt.evaluation.conformance.library import is_hub_name, released_name
from perception_rt.package.manifest import Content

Array = np.ndarray[Any, Any]

# Names of the released models. A -Tiling model is another set of weights of the same architecture.
_TIMM = {
    **{ours: f"{theirs}.fb" for theirs, ours in MODELS.items()},
    **{
        f"{ours}-Tiling": f"{theirs}.fb_tiling"
        for theirs, ours in MODELS.items()
        if "-Lang-" in ours
    },
}
_OPEN_CLIP = {
    "PE-Core-T16-384": "PE-Core-T-16-384",
    "PE-Core-S16-384": "PE-Core-S-16-384",
    "PE-Core-B16-224": "PE-Core-B-16",
    "PE-Core-L14-336": "PE-Core-L-14-336",
    "PE-Core-G14-448": "PE-Core-bigG-14-448",
}
_OPEN_CLIP_TAG = "meta"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def open_timm(content: Content, weights: str | None) -> tuple["TimmEncoder", str]:
    """A model of timm at the package's image size; see `open_library`."""
    timm = import_module("timm")
    size = _image_size(content)
    overlay: dict[str, Any] | None = None
    if weights is None:
        name = released_name(content, _TIMM, "timm")
    elif is_hub_name(weights):
        name = f"hf-hub:{weights}"
    elif Path(weights).is_dir():
        name = f"local-dir:{weights}"
    else:
        name = released_name(content, _TIMM, "timm")
        overlay = {"file": weights, "hf_hub_id": None}
    model = timm.create_model(
        name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay
    ).eval()
    data = import_module("timm.data")
    config = data.resolve_data_config({"input_size": (3, *size)}, model=model)
    transform = data.create_transform(**config, is_training=False)
    return TimmEncoder(model, transform), weights or name


def open_open_clip(content: Content, weights: str | None) -> tuple["OpenClipEncoder", str]:
    """A model of open_clip at the package's image size; see `open_library`."""
    open_clip = import_module("open_clip")
    pretrained: str | None = None
    preprocessing: dict[str, Any] = {}
    if weights is None:
        name, pretrained = released_name(content, _OPEN_CLIP, "open_clip"), _OPEN_CLIP_TAG
    elif is_hub_name(weights):
        name = f"hf-hub:{weights}"
    elif Path(weights).is_dir():
        name = f"local-dir:{weights}"
    else:
        name, pretrained = released_name(content, _OPEN_CLIP, "open_clip"), weights
        # A file has no preprocessing, and open_clip's default is that of other models.
        released = open_clip.get_pretrained_cfg(name, _OPEN_CLIP_TAG)
        preprocessing = {f"image_{key}": released[key] for key in _PREPROCESSING}
    model, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=pretrained, **preprocessing
    )
    size = _image_size(content)
    theirs = model.visual.image_size
    theirs = (theirs, theirs) if isinstance(theirs, int) else tuple(theirs)
    if size != theirs:
        raise InputError(
            f"the package takes images of {size[0]}x{size[1]} pixels, open_clip's model "
            f"{theirs[0]}x{theirs[1]}: compare a package without --image-size"
        )
    tokenizer = open_clip.get_tokenizer(name)
    return OpenClipEncoder(model.eval(), transform, tokenizer), weights or name


def _image_size(content: Content) -> tuple[int, int]:
    """Height and width of a package's images."""
    return int(content.image["height"]), int(content.image["width"])


class _TorchEncoder:
    """The part that both libraries share: a tower of timm, and torch.

    Args:
        tower: timm's vision transformer.
        transform: maps a Pillow image to a tensor (3, H, W).
    """

    def __init__(self, tower: Any, transform: Callable[[Image.Image], Any]) -> None:
        self._tower = tower
        self._transform = transform

    def pixels(self, picture: Image.Image) -> Array:
        """As `EncoderLibrary.pixels`."""
        pixels: Array = self._transform(picture).numpy()
        return pixels

    def tokens(self, pixels: Array) -> Array:
        """As `EncoderLibrary.tokens`."""
        return one_by_one(self._tower.forward_features, pixels)

    def blocks(self, pixels: Array) -> Sequence[Array]:
        """As `EncoderLibrary.blocks`."""
        torch = import_module("torch")
        with torch.inference_mode():
            found = self._tower.forward_intermediates(
                torch.from_numpy(pixels), intermediates_only=True, output_fmt="NLC"
            )
        return [block.numpy() for block in found]


class TimmEncoder(_TorchEncoder):
    """A model of timm."""

    logit_scale: float | None = None

    def outputs(self, pixels: Array) -> Array:
        """As `EncoderLibrary.outputs`."""
        return one_by_one(self._tower, pixels)

    def tokenize(self, texts: Sequence[str]) -> Array:
        """InputError: timm has no text towers."""
        raise InputError("timm has no text towers")

    texts = tokenize


class OpenClipEncoder(_TorchEncoder):
    """A model of open_clip, whose vision tower is one of timm."""

    def __init__(
        self, model: Any, transform: Callable[[Image.Image], Any], tokenizer: Callable[..., Any]
    ) -> None:
        super().__init__(model.visual.trunk, transform)
        self._model = model
        self._tokenizer = tokenizer
        self.logit_scale: float | None = float(model.logit_scale.detach().exp())

    def outputs(self, pixels: Array) -> Array:
        """As `EncoderLibrary.outputs`."""
        return one_by_one(self._model.encode_image, pixels)

    def tokenize(self, texts: Sequence[str]) -> Array:
        """As `EncoderLibrary.tokenize`."""
        ids: Array = self._tokenizer(list(texts)).numpy()
        return ids

    def texts(self, ids: Array) -> Array:
        """As `EncoderLibrary.texts`."""
        return one_by_one(self._model.encode_text, ids)


def one_by_one(function: Callable[[Any], Any], rows: Array) -> Array:
    """Runs a function of torch on one row after the other, so that memory stays small."""
    torch = import_module("torch")
    with torch.inference_mode():
        found = [function(torch.from_numpy(rows[i : i + 1])).numpy() for i in range(len(rows))]
    return np.concatenate(found)
