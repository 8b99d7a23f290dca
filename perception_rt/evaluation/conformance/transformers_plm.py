"""PerceptionLM of transformers, as `LanguageLibrary`.

Legend: n tiles, S tile side in pixels, T tokens, V vocabulary, C width, K key and value heads,
E channels per head.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from perception_rt.archs import PLM_MODELS
from perception_rt.evaluation.conformance.library import is_hub_name, released_name
from perception_rt.package.manifest import Content

Array = np.ndarray[Any, Any]

_NAMES = {name: f"facebook/{name.replace('PLM-', 'Perception-LM-')}" for name in PLM_MODELS}


def open_transformers(content: Content, weights: str | None) -> tuple["TransformersPlm", str]:
    """A PerceptionLM with its processor; see `open_library`."""
    torch, transformers = import_module("torch"), import_module("transformers")
    if weights is None:
        weights = released_name(content, _NAMES, "transformers")
    else:
        is_hub_name(weights)
    processor = transformers.AutoProcessor.from_pretrained(weights)
    model = transformers.AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32)
    return TransformersPlm(model.eval(), processor), weights


class TransformersPlm:
    """A model and its processor.

    Args:
        model: a `PerceptionLMForConditionalGeneration`.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._torch = import_module("torch")
        self._model = model
        self._processor = processor

    def tiles(self, picture: Image.Image) -> Array:
        """As `LanguageLibrary.tiles`."""
        found = self._processor.image_processor(picture, return_tensors="pt")
        tiles: Array = found["pixel_values"][0].numpy()
        return tiles

    def prompt(self, question: str, picture: Image.Image | None) -> Array | None:
        """As `LanguageLibrary.prompt`."""
        processor = self._processor
        if processor.chat_template is None and processor.tokenizer.chat_template is None:
            return None
        media = [] if picture is None else [{"type": "image"}]
        content = [*media, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        given = {} if picture is None else {"images": [picture]}
        # The template writes the token of the beginning itself.
        found = processor(text=text, add_special_tokens=False, return_tensors="pt", **given)
        ids: Array = found["input_ids"][0].numpy()
        return ids

    def logits(self, ids: Array, pixels: Array | None) -> Array:
        """As `LanguageLibrary.logits`."""
        with self._torch.inference_mode():
            found = self._model(**self._inputs(ids, pixels), logits_to_keep=1)
        logits: Array = found.logits[0, -1].numpy()
        return logits

    def greedy(self, ids: Array, pixels: Array | None, count: int) -> Array:
        """As `LanguageLibrary.greedy`."""
        ends = self._model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        with self._torch.inference_mode():
            found = self._model.generate(
                **self._inputs(ids, pixels),
                max_new_tokens=count,
                do_sample=False,
                # The package never picks it either.
                suppress_tokens=[self._model.config.image_token_id],
                pad_token_id=0,
            )
        tokens: Array = found[0, len(ids) :].numpy()
        stops = np.flatnonzero(np.isin(tokens, ends))
        return tokens[: stops[0]] if len(stops) else tokens

    def image_features(self, pixels: Array) -> Array:
        """As `LanguageLibrary.image_features`."""
        with self._torch.inference_mode():
            found = self._model.model.get_image_features(pixel_values=self._tiles(pixels))
        features: Array = found.pooler_output.numpy()
        return features

    def values(self, ids: Array, pixels: Array | None) -> Sequence[Array]:
        """As `LanguageLibrary.values`."""
        transformers = import_module("transformers")
        cache = transformers.DynamicCache()
        with self._torch.inference_mode():
            self._model(**self._inputs(ids, pixels), cache=cache, use_cache=True, logits_to_keep=1)
        return [layer.values[0].numpy() for layer in cache.layers]

    def _inputs(self, ids: Array, pixels: Array | None) -> dict[str, Any]:
        tokens = self._torch.from_numpy(ids)[None]  # (T,) -> (1, T)
        inputs = {"input_ids": tokens, "attention_mask": self._torch.ones_like(tokens)}
        return inputs if pixels is None else {**inputs, "pixel_values": self._tiles(pixels)}

    def _tiles(self, pixels: Array) -> Any:
        """Tiles (n, 3, S, S) of one picture, (1, n, 3, S, S)."""
        return self._torch.from_numpy(pixels)[None]
