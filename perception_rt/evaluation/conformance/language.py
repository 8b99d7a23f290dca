"""Compares a language model package with a library's model.

Legend: T tokens, n tiles, S tile side in pixels.
"""

from typing import Any

import numpy as np
from PIL import Image

from perception_rt.evaluation.conformance.library import LanguageLibrary
from perception_rt.evaluation.conformance.report import (
    Check,
    Comparison,
    Layer,
    first_below,
    least_cosine,
    lowest_cosine,
    share_equal,
)
from perception_rt.evaluation.conformance.samples import (
    QUESTION_TILES,
    QUESTIONS,
    question_picture,
    sample_pictures,
)
from perception_rt.evaluation.tasks import OnProgress
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.package import contract
from perception_rt.package.reader import Package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import normalize
from perception_rt.processing.tiles import TileSpec, load_tiles
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request

Array = np.ndarray[Any, Any]

# Tiles are resized by Pillow here and as tensors by transformers: steps of 8 bits that may differ.
_TILE_STEPS = 2.5
_TOKENS = 16


class LanguageComparison:
    """Compares one package with one model of a library.

    Args:
        engine: the loaded package.
        package: the same package, open.
        library: the library's model.
        threads: threads of an engine call.
        model_only: whether to leave out tiles and prompts.
        on_progress: called after each step.
    """

    def __init__(
        self,
        engine: Generator,
        package: Package,
        library: LanguageLibrary,
        *,
        threads: int | None,
        model_only: bool,
        on_progress: OnProgress,
    ) -> None:
        content = package.manifest.content
        self._engine = engine
        self._package = package
        self._library = library
        self._graphs = PlmEngine(package, backend=engine.backend, device="cpu", threads=threads)
        self._model_only = model_only
        self._on_progress = on_progress
        self._config = PlmConfig.from_dict(content.architecture)
        self._tiles = TileSpec.from_dict(content.image)
        self._exact = content.target.precision == "fp32"
        self._tile_limit = least_cosine(content.target)
        self._limit = least_cosine(content.target, decoder=True)
        self._pictures = sample_pictures()
        self._notes: list[str] = []

    def run(self) -> Comparison:
        """Compares; InputError if the two are not the same model."""
        checks = [] if self._model_only else [self._preprocessing()]
        self._on_progress("steps", 1, 4)
        text, picture = QUESTIONS
        cases = {"text": (text, None), "picture": (picture, question_picture())}
        failed = False
        layers: list[Layer] = []
        location = ""
        for done, (name, (question, image)) in enumerate(cases.items(), 2):
            if not self._model_only:
                checks += self._prompts(name, question, image)
            ids, pixels = self._prompt(question, image, QUESTION_TILES)
            found = [*self._features(pixels), *self._answers(name, ids, pixels)]
            checks += found
            self._on_progress("steps", done, 4)
            if not failed and not all(check.passed for check in found):
                failed = True
                layers, location = self._locate(ids, pixels)
        self._on_progress("steps", 4, 4)
        return Comparison(checks=checks, layers=layers, location=location, notes=self._notes)

    def _preprocessing(self) -> Check:
        """Tiles of all pictures; another number of tiles is an infinite difference."""
        worst = 0.0
        for picture in self._pictures:
            ours = normalize(load_tiles(picture, self._tiles), self._tiles.tile)
            theirs = self._library.tiles(picture)
            same = ours.shape == theirs.shape
            worst = max(worst, float(np.abs(ours - theirs).max()) if same else float("inf"))
        limit = _TILE_STEPS / (255 * min(self._tiles.tile.std))
        return Check(
            name="tiles of the pictures", part="preprocessing", kind="difference", value=worst,
            limit=limit,
        )  # fmt: skip

    def _prompt(
        self, question: str, image: Image.Image | None, max_tiles: int
    ) -> tuple[Array, Array | None]:
        """Token ids (T,) and normalised tiles (n, 3, S, S) that the package makes of a question."""
        preprocessor = RequestPreprocessor(
            self._package, self._config, limits=DEFAULT_LIMITS, cached=False, clock=lambda: 0.0
        )
        request = Request(
            question,
            images=[] if image is None else [image],
            max_tiles=min(max_tiles, self._tiles.max_tiles),
            max_new_tokens=_TOKENS,
        )
        preprocessor.check(request)
        state = preprocessor.prepare(request)
        tiles = state.tiles
        return state.ids, None if tiles is None else normalize(tiles, self._tiles.tile)

    def _prompts(self, name: str, question: str, image: Image.Image | None) -> list[Check]:
        """The ids of the library's chat template, if it has one, with all tiles."""
        theirs = self._library.prompt(question, image)
        if theirs is None:
            note = "prompts were not compared: the library's weights have no chat template"
            if note not in self._notes:
                self._notes.append(note)
            return []
        ids, _ = self._prompt(question, image, self._tiles.max_tiles)
        equal = share_equal(ids, theirs)
        return [
            Check(name=f"token ids, {name}", part="prompt", kind="equal", value=equal, limit=1.0)
        ]

    def _features(self, pixels: Array | None) -> list[Check]:
        """Image tokens of a question's tiles."""
        if pixels is None:
            return []
        ours, theirs = self._graphs.encode_pixels(pixels), self._library.image_features(pixels)
        value = lowest_cosine(ours, theirs, "image features")
        return [
            Check(
                name="image features", part="tile encoder", kind="cosine", value=value,
                limit=self._tile_limit,
            )
        ]  # fmt: skip

    def _answers(self, name: str, ids: Array, pixels: Array | None) -> list[Check]:
        """Logits after the prompt, and greedy tokens: in float32 they must be equal."""
        theirs = self._library.logits(ids, pixels)
        ours = self._engine.prefill_logits(ids, pixels)
        value = lowest_cosine(_centred(ours), _centred(theirs), "logits")
        logits = Check(
            name=f"logits, {name}", part="model", kind="cosine", value=value, limit=self._limit
        )
        tokens = self._engine.generate_tokens(ids, pixels, max_new_tokens=_TOKENS)
        expected = self._library.greedy(ids, pixels, _TOKENS)
        equal = share_equal(np.asarray(tokens, np.int64), expected)
        if not self._exact:
            self._notes.append(f"greedy tokens, {name}: {equal:.0%} of {_TOKENS} equal")
            return [logits]
        greedy = Check(
            name=f"greedy tokens, {name}", part="model", kind="equal", value=equal, limit=1.0
        )
        return [logits, greedy]

    def _locate(self, ids: Array, pixels: Array | None) -> tuple[list[Layer], str]:
        """Compares the image features, and the values that each decoder layer caches."""
        layers = []
        hidden = self._graphs.embed(ids)
        if pixels is not None:
            features = self._graphs.encode_pixels(pixels)
            cosine = lowest_cosine(features, self._library.image_features(pixels), "image features")
            layers.append(Layer(name="image features", cosine=cosine))
            if not cosine >= self._tile_limit:
                return layers, f"{layers[0]}: the tile encoder, or its projector"
            hidden[ids == self._config.image_token_id] = features.reshape(-1, features.shape[-1])
        pairs = zip(self._values(hidden), self._library.values(ids, pixels), strict=True)
        for index, (mine, other) in enumerate(pairs):
            # All together, since single tokens of a quantised package vary more than their sum.
            cosine = lowest_cosine(mine.ravel(), other.ravel(), f"values of decoder layer {index}")
            layers.append(Layer(name=f"values of decoder layer {index}", cosine=cosine))
        position = first_below(layers, self._limit)
        if position is None:
            return layers, f"behind the {layers[-1].name}: that layer's rest, or the output head"
        where = "embedding" if layers[position].name.endswith(" 0") else "rest of the layer"
        return layers, f"{layers[position]}, or the {where} in front of them"

    def _values(self, hidden: Array) -> list[Array]:
        """Values of each layer (K, T, E) after hidden states (T, C), which run in pieces."""
        length = len(hidden)
        cache = self._graphs.new_cache(1, max(length, self._graphs.smallest_row))
        assert isinstance(cache, CacheBlock)
        for start in range(0, length, contract.CHUNK_TOKENS):
            piece = hidden[start : start + contract.CHUNK_TOKENS]
            past = np.asarray([start], np.int32)
            last = np.asarray([[len(piece) - 1]], np.int64)
            self._graphs.forward(np.ascontiguousarray(piece[None]), past, cache, slice(0, 1), last)
        return [values[0, :, :length].astype(np.float32) for values in cache.values]


def _centred(logits: Array) -> Array:
    """Logits without their mean, which no probability depends on and which hides differences."""
    rows: Array = logits - logits.mean()
    return rows
