"""Compares an encoder package with a library's model.

Legend: N pictures or texts, H W pixels, D embedding channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from perception_rt.config import PeConfig
from perception_rt.evaluation.conformance.library import EncoderLibrary
from perception_rt.evaluation.conformance.report import (
    Check,
    Comparison,
    Layer,
    first_below,
    least_cosine,
    lowest_cosine,
    share_equal,
)
from perception_rt.evaluation.conformance.samples import TEXTS, sample_pictures
from perception_rt.evaluation.tasks import OnProgress
from perception_rt.package.pe_graphs import read_segments
from perception_rt.processing.clip_bpe import ClipTokenizer, TextSpec
from perception_rt.processing.image import load_image, normalize
from perception_rt.runtime.embedder import Embedder

Array = np.ndarray[Any, Any]

# Normalised pixels: a step of 8 bits is 0.0039 or more, since no std is above 1.
_PIXELS = 1e-4
_SCALE = 1e-4  # of the factor on cosines, relative
_LAYER_PICTURES = 2  # all blocks of a large tower are held at once
_SEED = 0

PREPROCESSING, TOWER, TEXTS_PART = "preprocessing", "vision tower", "text tower"


class EncoderComparison:
    """Compares one package with one model of a library.

    Args:
        engine: the package.
        library: the library's model.
        model_only: whether to leave out the preprocessing.
        on_progress: called after each step.
    """

    def __init__(
        self,
        engine: Embedder,
        library: EncoderLibrary,
        *,
        model_only: bool,
        on_progress: OnProgress,
    ) -> None:
        content = engine.manifest.content
        self._engine = engine
        self._library = library
        self._model_only = model_only
        self._on_progress = on_progress
        self._content = content
        self._config = PeConfig.from_dict(content.architecture)
        self._limit = least_cosine(content.target)
        self._pictures = sample_pictures()
        spec = engine.image_spec
        self._pixels = np.stack(
            [normalize(load_image(picture, spec), spec) for picture in self._pictures]
        )
        self._notes: list[str] = []

    def run(self) -> Comparison:
        """Compares; InputError if the two are not the same model."""
        checks = [] if self._model_only else [self._preprocessing()]
        tower = self._tower()
        self._on_progress("steps", 2, 3)
        checks += [*tower, *self._texts()]
        layers: list[Layer] = []
        location = ""
        if not all(check.passed for check in tower):
            layers, location = self._locate()
        self._on_progress("steps", 3, 3)
        return Comparison(checks=checks, layers=layers, location=location, notes=self._notes)

    def _preprocessing(self) -> Check:
        """Pixels of both sides; where they differ, how much the outputs do."""
        theirs = np.stack([self._library.pixels(picture) for picture in self._pictures])
        self._on_progress("steps", 1, 3)
        name = "pixels of the pictures"
        difference = float(np.abs(self._pixels - theirs).max())
        check = Check(
            name=name, part=PREPROCESSING, kind="difference", value=difference, limit=_PIXELS
        )
        if not check.passed:
            spec = self._engine.image_spec
            self._notes.append(
                f"the package's preprocessing is {spec.resize}, {spec.interpolation}, mean "
                f"{list(spec.mean)}, std {list(spec.std)}, crop {spec.crop_pct:g}"
            )
            cosine = lowest_cosine(self._outputs(self._pixels), self._outputs(theirs), "outputs")
            self._notes.append(f"it moves the library's own outputs to a cosine of {cosine:.6f}")
        return check

    def _tower(self) -> list[Check]:
        """Outputs of float pixels and of pictures, against the library on the same pixels."""
        expected = self._outputs(self._pixels)
        found = self._engine.encode_pixels(self._pixels)
        checks = [self._cosine("outputs of equal pixels", TOWER, found, expected)]
        if self._config.vision.pool_type != "none":
            found = self._engine.embed_images(self._pictures)
            checks.append(self._cosine("embeddings of the pictures", TOWER, found, expected))
        return checks

    def _outputs(self, pixels: Array) -> Array:
        """The library's outputs, of all tokens where the package returns those."""
        if self._config.vision.pool_type == "none":
            return self._library.tokens(pixels)
        return self._library.outputs(pixels)

    def _texts(self) -> list[Check]:
        """Token ids, outputs of texts and the factor on cosines."""
        content, library = self._content, self._library
        if content.text is None or self._config.text is None:
            return []
        if library.logit_scale is None:
            self._notes.append("texts were not compared: the library has no text tower")
            return []
        spec = TextSpec.from_dict(content.text, "text")
        checks = []
        if spec.tokenizer is None:
            ids = self._some_ids()
            self._notes.append("token ids were not compared: the package has no tokenizer")
        else:
            ids = library.tokenize(TEXTS)
            ours = ClipTokenizer(context_length=spec.context_length)(TEXTS)
            equal = share_equal(ours.ravel(), ids.ravel())
            checks.append(
                Check(name="token ids", part="tokenizer", kind="equal", value=equal, limit=1.0)
            )
        found = self._engine.encode_tokens(ids)
        checks.append(self._cosine("outputs of texts", TEXTS_PART, found, library.texts(ids)))
        scale = abs(self._engine.logit_scale / library.logit_scale - 1)
        return [
            *checks,
            Check(
                name="factor on cosines, relative", part="logit scale", kind="difference",
                value=scale, limit=_SCALE,
            ),
        ]  # fmt: skip

    def _some_ids(self) -> Array:
        """Random ids whose largest, the end of the text, is last."""
        text = self._config.text
        assert text is not None
        random = np.random.default_rng(_SEED)
        ids = random.integers(0, text.vocab_size - 1, (len(TEXTS), text.context_length), np.int64)
        ids[:, -1] = text.vocab_size - 1
        return ids

    def _cosine(self, name: str, part: str, ours: Array, theirs: Array) -> Check:
        value = lowest_cosine(ours, theirs, name)
        return Check(name=name, part=part, kind="cosine", value=value, limit=self._limit)

    def _locate(self) -> tuple[list[Layer], str]:
        """Compares the blocks that the package returns, and names the first that differs."""
        segments = read_segments(self._content.graphs, self._config)
        taps = [index for part in segments for index in part]
        if not taps:
            return [], "unknown, since the package was exported without outputs of blocks"
        theirs = self._library.blocks(self._pixels[:_LAYER_PICTURES])
        layers = []
        for done, index in enumerate(taps, 1):
            ours = self._engine.features(self._pictures[:_LAYER_PICTURES], index)
            # (N, h, w, C) and (N, P, C) -> (N, h * w * C), since single tokens of a quantised
            # package vary more than their sum.
            mine, other = ours.reshape(len(ours), -1), theirs[index].reshape(len(ours), -1)
            cosine = lowest_cosine(mine, other, f"outputs of block {index}")
            layers.append(Layer(name=f"block {index}", cosine=cosine))
            self._on_progress("blocks", done, len(taps))
        return layers, self._describe(layers, taps)

    def _describe(self, layers: Sequence[Layer], taps: Sequence[int]) -> str:
        position = first_below(layers, self._limit)
        if position is None:
            return f"behind {layers[-1].name}: the final norm, the pooling or the projection"
        found = str(layers[position])
        if taps[position] == 0:
            return f"{found}, or the patch embedding in front of it"
        before = taps[position - 1] if position else -1
        if before + 1 < taps[position]:
            return f"{found}, or a block in front of it"
        return found
