"""The models of a server: loads packages, finds them by id, and runs their engines in threads."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from perception_rt.errors import InputError
from perception_rt.families import get_family
from perception_rt.package.reader import read_manifest
from perception_rt.processing.clip_bpe import ClipTokenizer, TextSpec
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.load import load
from perception_rt.serve.batcher import Batcher
from perception_rt.serve.failures import ApiError
from perception_rt.serve.metrics import Metrics
from perception_rt.serve.options import ServeOptions

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """An encoder and its batchers.

    Attributes:
        name: id of the model.
        engine: the open package.
        texts: embeds strings.
        images: embeds encoded images.
        videos: embeds pairs of an encoded video and a number of frames.
        thread: the one thread that calls the engine.
        tokenizer: counts tokens; None for a model without texts.
    """

    name: str
    engine: Embedder
    texts: Batcher
    images: Batcher
    videos: Batcher
    thread: ThreadPoolExecutor
    tokenizer: ClipTokenizer | None

    def count_tokens(self, texts: list[str]) -> int:
        """Number of tokens of texts, start and end included, as far as they fit."""
        if self.tokenizer is None:
            return 0
        return int(np.sum(self.tokenizer(texts).argmax(axis=1) + 1))  # the end has the highest id


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatModel:
    """A language model.

    Attributes:
        name: id of the model.
        engine: the open package.
    """

    name: str
    engine: Generator


Model = EmbeddingModel | ChatModel


def model_paths(options: ServeOptions) -> dict[str, str]:
    """Model id to path of its package, from the manifests alone.

    Raises:
        InputError: two packages have one model id.
        PackageError: a manifest cannot be read, or a package has another id than expected.
    """
    paths = dict(options.names)
    for path in options.packages:
        if path in options.names.values():
            continue
        name = read_manifest(path, expect=options.expect.get(path)).content.name
        if name in paths:
            raise InputError(
                f"two packages have the model id {name!r}: name one with --name ID={path}"
            )
        paths[name] = path
    return paths


class Models:
    """All models by id. Close it to free the engines."""

    def __init__(self, options: ServeOptions, metrics: Metrics) -> None:
        """Loads every package.

        Raises:
            PerceptionError: as `perception_rt.load` and `model_paths`.
        """
        self.created = int(time.time())
        self._models: dict[str, Model] = {}
        self._closing = ExitStack()
        with ExitStack() as opened:
            for name, path in model_paths(options).items():
                engine = load(path, expect=options.expect.get(path), **options.load)
                opened.callback(engine.close)
                if isinstance(engine, Generator):
                    self._models[name] = ChatModel(name=name, engine=engine)
                else:
                    thread = opened.enter_context(ThreadPoolExecutor(1, f"embed-{name}"))
                    self._models[name] = _embedding_model(name, engine, thread, options, metrics)
            self._closing = opened.pop_all()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def chat(self, name: object) -> ChatModel:
        """The language model of an id; ApiError if there is none."""
        model = self.get(name)
        if not isinstance(model, ChatModel):
            raise ApiError(400, f"{model.name} is an encoder: use /v1/embeddings", param="model")
        return model

    def embedding(self, name: object) -> EmbeddingModel:
        """The encoder of an id; ApiError if there is none."""
        model = self.get(name)
        if not isinstance(model, EmbeddingModel):
            raise ApiError(
                400, f"{model.name} is a language model: use /v1/chat/completions", param="model"
            )
        return model

    def get(self, name: object) -> Model:
        """The model of an id; ApiError (404) if there is none."""
        if not isinstance(name, str):
            raise ApiError(400, "model must be a string", param="model")
        if name not in self._models:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r}; there are {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def describe(self, model: Model) -> Mapping[str, Any]:
        """The entry of a model in /v1/models."""
        manifest = model.engine.manifest
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "perception_rt",
            "family": get_family(manifest.content.family).label,
            "package": manifest.id,
        }

    def close(self) -> None:
        """Ends the threads and frees the engines; a second call does nothing."""
        self._closing.close()


def _embedding_model(
    name: str,
    engine: Embedder,
    thread: ThreadPoolExecutor,
    options: ServeOptions,
    metrics: Metrics,
) -> EmbeddingModel:
    def batcher(kind: str, run: Callable[[list[Any]], Any]) -> Batcher:
        return Batcher(
            run,
            thread,
            window_s=options.batch_window_ms / 1000,
            on_batch=partial(metrics.embedded, name, kind),
        )

    def embed_videos(items: list[tuple[bytes, int]]) -> Any:
        rows = [engine.embed_videos([video], num_frames=frames) for video, frames in items]
        return np.concatenate(rows)

    text = engine.manifest.content.text
    spec = None if text is None else TextSpec.from_dict(text, "text")
    known = spec is not None and spec.tokenizer is not None
    return EmbeddingModel(
        name=name,
        engine=engine,
        texts=batcher("text", engine.embed_texts),
        images=batcher("image", engine.embed_images),
        videos=batcher("video", embed_videos),
        thread=thread,
        tokenizer=ClipTokenizer(context_length=spec.context_length) if spec and known else None,
    )
