"""Images, texts and videos to vectors, with an engine package.

Owns the order of things: decode, batch, run, normalise. It does not know which backend computes,
nor anything about a model that the manifest does not say.

Legend: N items, D embedding channels, L labels, h w grid, C width.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package import contract
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import Package
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSource, ImageSpec, load_image
from perception_rt.processing.video import VideoSource, load_video
from perception_rt.runtime.session import Session, open_session

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]
OnError = Callable[[int, InputError], None]
Item = TypeVar("Item")

MAX_BATCH = 256


class Embedder:
    """A loaded Perception Encoder package; `perception_rt.load` makes it.

    Each graph is opened when it is first needed. All methods may be called from several threads.

    Attributes:
        manifest: what the package says of itself.
        image_spec: how images are prepared.
        batch_size: how many items one call of the engine takes, unless a method is told otherwise.
            1 for an int8 engine, whose activation scales span a batch: so that a result does not
            depend on what else was asked for.
    """

    def __init__(
        self,
        package: Package,
        *,
        backend: str,
        device: str,
        threads: int | None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.manifest: Manifest = package.manifest
        content = package.manifest.content
        try:
            self._config = PeConfig.from_dict(content.architecture)
            self.image_spec = ImageSpec.from_dict(content.image)
        except InputError as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        self.batch_size = 1 if content.target.precision == "int8" else 8
        self._package = package
        self._backend = backend
        self._device = device
        self._threads = threads
        self._limits = limits
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._tokenizer = _tokenizer(package.manifest, limits)

    def embed_images(
        self,
        images: Sequence[ImageSource],
        *,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Array:
        """Unit image embeddings, float32 (N, D).

        Args:
            images: paths, encoded JPEG, PNG or WebP bytes, Pillow images, or uint8 (H, W, 3) RGB.
            batch_size: images per call of the engine, 1 to 256.
            on_progress: called with the numbers of images done and in all.
            on_error: called with the index of an unusable image and its error; its row is zero
                then, and the other rows are what they would be without it. None raises instead.

        Raises:
            InputError: an image is unusable, or the model has no pooled embedding.
        """
        self._require_pooled()

        def run(part: Sequence[ImageSource], start: int) -> Array:
            return self._images(part, start, contract.VISION, contract.EMBEDDING, on_error)

        return _unit(self._collect(self._batches(images, batch_size, on_progress, run), self.dim))

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
    ) -> Array:
        """Unit text embeddings, float32 (N, D).

        Args:
            texts: cut to the context length, as the reference does.
            batch_size: texts per call of the engine, 1 to 256.
            on_progress: called with the numbers of texts done and in all.

        Raises:
            InputError: a text is unusable, or the model has no text tower or no known tokenizer.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings, not one string")
        tokenizer = self._require_tokenizer()

        def run(part: Sequence[str], start: int) -> Array:
            return self._tokens(tokenizer(part))

        return _unit(self._collect(self._batches(texts, batch_size, on_progress, run), self.dim))

    def embed_videos(
        self,
        videos: Sequence[VideoSource],
        *,
        num_frames: int = 8,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
    ) -> Array:
        """Unit video embeddings, float32 (N, D): the mean of unit frame embeddings, made unit.

        Args:
            videos: paths, or uint8 (T, H, W, 3) RGB frames.
            num_frames: taken at equal distances, first and last included.
            batch_size: frames per call of the engine, 1 to 256.
            on_progress: called with the numbers of videos done and in all.
        """
        self._require_pooled()
        rows = []
        for index, video in enumerate(videos):
            frames = load_video(video, num_frames=num_frames, limits=self._limits)
            rows.append(self.embed_images(list(frames), batch_size=batch_size).mean(axis=0))
            if on_progress is not None:
                on_progress(index + 1, len(videos))
        return _unit(self._collect(iter([np.stack(rows)] if rows else []), self.dim))

    def classify(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> Array:
        """Zero-shot probabilities, float32 (N, L); each row sums to 1.

        Args:
            images: as in `embed_images`.
            labels: what to choose from, at least one.
            templates: sentences with `{}` for the label; a label's vector is the mean over them.
                None takes the labels as they are.
            on_progress: called with the numbers of images done and in all.
        """
        weights = self.embed_labels(labels, templates)
        embeddings = self.embed_images(images, on_progress=on_progress)
        logits = self.logit_scale * (embeddings @ weights.T)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        probabilities: Array = odds / odds.sum(axis=1, keepdims=True)
        return probabilities

    def embed_labels(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> Array:
        """Unit label embeddings for zero-shot use, float32 (L, D); see `classify`."""
        if isinstance(labels, str) or not labels:
            raise InputError("labels must be a list of at least one string")
        templates = ["{}"] if templates is None else list(templates)
        if not templates or not all("{}" in t for t in templates):
            raise InputError("templates must be strings that contain {}")
        texts = [t.replace("{}", label) for label in labels for t in templates]
        vectors = self.embed_texts(texts).reshape(len(labels), len(templates), -1)
        return _unit(vectors.mean(axis=1))

    def features(
        self,
        images: Sequence[ImageSource],
        layer: int = -1,
        *,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
    ) -> Array:
        """Dense features of a block, float32 (N, h, w, C): no class token, no final norm.

        Args:
            images: as in `embed_images`.
            layer: block index, from the front or, negative, from the end.
            batch_size: images per call of the engine, 1 to 256.
            on_progress: called with the numbers of images done and in all.

        Raises:
            InputError: no such block, or the package was exported without its output.
        """
        vision = self._config.vision
        if not -vision.layers <= layer < vision.layers:
            raise InputError(f"layer {layer} is out of range for {vision.layers} blocks")
        name = contract.tap_name(layer % vision.layers)
        graph = self.manifest.content.graphs.get(contract.FEATURES)
        if graph is None or name not in [t.name for t in graph.outputs]:
            raise InputError(f"this package was exported without the output of layer {layer}")

        def run(part: Sequence[ImageSource], start: int) -> Array:
            return self._images(part, start, contract.FEATURES, name, None)

        grid = vision.grid_of(self.image_spec.height, self.image_spec.width)
        rows = self._batches(images, batch_size, on_progress, run)
        tokens = self._collect(rows, grid[0] * grid[1] + int(vision.use_cls_token), vision.width)
        return tokens[:, int(vision.use_cls_token) :].reshape(-1, *grid, vision.width)

    def encode_pixels(self, pixels: Array) -> Array:
        """What the reference's vision `forward` returns, float32 (N, D) or (N, T, C).

        Args:
            pixels: float32 (N, 3, H, W), already normalised, of the package's image size.
        """
        pixels = np.asarray(pixels)
        return self._run(contract.PIXELS, contract.PIXELS_F32, pixels, contract.EMBEDDING)

    def encode_tokens(self, tokens: Array) -> Array:
        """What the reference's `encode_text(normalize=False)` returns, float32 (N, D).

        Args:
            tokens: int64 (N, context) ids below the vocabulary size.
        """
        return self._tokens(np.asarray(tokens))

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return self._config.vision.embed_dim

    @property
    def logit_scale(self) -> float:
        """The learned factor on cosines before the softmax."""
        text = self.manifest.content.text
        if text is None:
            raise InputError("this model has no text tower")
        return float(text["logit_scale"])

    def close(self) -> None:
        """Frees every engine and closes the package; a second call does nothing."""
        with self._lock:
            sessions, self._sessions = self._sessions, {}
            self._package.close()
        for session in sessions.values():
            session.close()

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _session(self, graph: str) -> Session:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = open_session(
                    self._package,
                    graph,
                    backend=self._backend,
                    device=self._device,
                    threads=self._threads,
                )
            return self._sessions[graph]

    def _run(self, graph: str, source: str, array: Array, output: str) -> Array:
        (result,) = self._session(graph).run({source: array}, [output])
        return result

    def _images(
        self,
        images: Sequence[ImageSource],
        start: int,
        graph: str,
        output: str,
        on_error: OnError | None,
    ) -> Array:
        """Runs a graph on images that are items `start` on of a call; unusable ones give zeros."""
        pixels, usable = [], []
        for index, image in enumerate(images):
            try:
                pixels.append(load_image(image, self.image_spec, limits=self._limits))
                usable.append(index)
            except InputError as error:
                if on_error is None:
                    raise InputError(f"image {start + index}: {error}") from None
                on_error(start + index, error)
        shape = [s for s in self._package.graph(graph).output(output).shape if isinstance(s, int)]
        rows = np.zeros((len(images), *shape), np.float32)
        if usable:
            rows[usable] = self._run(graph, contract.IMAGES_U8, np.stack(pixels), output)
        return rows

    def _tokens(self, tokens: Array) -> Array:
        text = self._config.text
        if text is None:
            raise InputError("this model has no text tower")
        outside = tokens.size and (tokens.min() < 0 or tokens.max() >= text.vocab_size)
        if outside:
            raise InputError(f"a token id is not in 0 to {text.vocab_size - 1}")
        return self._run(contract.TEXT, contract.TOKENS, tokens, contract.TEXT_EMBEDDING)

    def _batches(
        self,
        items: Sequence[Item],
        batch_size: int | None,
        on_progress: Progress | None,
        run: Callable[[Sequence[Item], int], Array],
    ) -> Iterator[Array]:
        """Results of `run` on parts of at most `batch_size` items."""
        size = self.batch_size if batch_size is None else batch_size
        if not 1 <= size <= MAX_BATCH:
            raise InputError(f"batch_size must be 1 to {MAX_BATCH}, not {size}")
        for start in range(0, len(items), size):
            yield run(items[start : start + size], start)
            if on_progress is not None:
                on_progress(min(start + size, len(items)), len(items))

    def _collect(self, rows: Iterator[Array], *shape: int) -> Array:
        """One array of all rows; an empty one of the right shape for none."""
        return np.concatenate([np.empty((0, *shape), np.float32), *rows])

    def _require_pooled(self) -> None:
        if self._config.vision.pool_type == "none":
            raise InputError(
                f"{self.manifest.content.name} has no pooled embedding; use features()"
            )

    def _require_tokenizer(self) -> ClipTokenizer:
        if self._config.text is None:
            raise InputError(f"{self.manifest.content.name} has no text tower")
        if self._tokenizer is None:
            raise InputError(
                f"{self.manifest.content.name} has a vocabulary of {self._config.text.vocab_size} "
                "that no tokenizer here belongs to; use encode_tokens()"
            )
        return self._tokenizer


def _tokenizer(manifest: Manifest, limits: Limits) -> ClipTokenizer | None:
    text = manifest.content.text
    if text is None or text.get("tokenizer") is None:
        return None
    if text["tokenizer"] != "clip_bpe":
        raise PackageError("the package names a tokenizer that is not known here; known: clip_bpe")
    return ClipTokenizer(context_length=int(text["context_length"]), limits=limits)


def _unit(rows: Array) -> Array:
    """Rows divided by their norms."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Array = rows / np.maximum(norms, np.float32(1e-12))
    return unit
