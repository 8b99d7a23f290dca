"""Images, texts and videos to vectors, with an engine package.

Owns the order of things: decode, batch, run, normalise. It does not know which backend computes,
nor anything about a model that the manifest does not say.

Legend: N items, D embedding channels, L labels, h w grid, C width.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package import contract
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import Package
from perception_rt.processing.clip_bpe import ClipTokenizer, TextSpec
from perception_rt.processing.image import ImageSource, ImageSpec, load_image
from perception_rt.processing.video import VideoSource, load_video
from perception_rt.runtime.session import Sessions, is_batch_dependent

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]
OnError = Callable[[int, InputError], None]

MAX_BATCH = 256
# Dimensions of the arrays that are one item.
_IMAGE_NDIM, _VIDEO_NDIM = 3, 4


class Embedder:
    """A loaded Perception Encoder package; `perception_rt.load` makes it.

    Each graph is opened when it is first needed. All methods may be called from several threads.

    Attributes:
        manifest: what the package says of itself.
        image_spec: how images are prepared.
        batch_size: how many items one call of the engine takes, unless a method is told otherwise.
            1 where results depend on the rest of a batch, as with int8 on ONNX Runtime.
    """

    def __init__(
        self,
        package: Package,
        *,
        backend: str,
        device: str,
        threads: int | None,
        cache_dir: str | os.PathLike[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.manifest: Manifest = package.manifest
        content = package.manifest.content
        try:
            self._config = PeConfig.from_dict(content.architecture)
            self.image_spec = ImageSpec.from_dict(content.image)
            self._text = None if content.text is None else TextSpec.from_dict(content.text, "text")
            _check_agreement(package, self._config, self.image_spec, self._text)
        except InputError as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        self.batch_size = 1 if is_batch_dependent(content) else 8
        self._package = package
        self._sessions = Sessions(
            package, backend=backend, device=device, threads=threads, cache_dir=cache_dir
        )
        self._limits = limits
        self._tokenizer: ClipTokenizer | None = None
        if self._text is not None and self._text.tokenizer is not None:
            context = self._text.context_length
            self._tokenizer = ClipTokenizer(context_length=context, limits=limits)

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
        images = _listed(images, "images", _IMAGE_NDIM)

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
        texts = _listed(texts, "texts")
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
        videos = _listed(videos, "videos", _VIDEO_NDIM)
        rows = []
        for index, video in enumerate(videos):
            try:
                frames = load_video(video, num_frames=num_frames, limits=self._limits)
            except InputError as error:
                raise InputError(f"video {index}: {error}") from None
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
            on_progress: called with the numbers done and in all, of label texts, then of images.
        """
        weights = self.embed_labels(labels, templates, on_progress=on_progress)
        embeddings = self.embed_images(images, on_progress=on_progress)
        logits = self.logit_scale * (embeddings @ weights.T)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        probabilities: Array = odds / odds.sum(axis=1, keepdims=True)
        return probabilities

    def embed_labels(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> Array:
        """Unit label embeddings for zero-shot use, float32 (L, D); see `classify`."""
        labels = _listed(labels, "labels")
        templates = ["{}"] if templates is None else _listed(templates, "templates")
        if not labels or not all(isinstance(label, str) for label in labels):
            raise InputError("labels must be at least one string")
        if not templates or not all(isinstance(t, str) and "{}" in t for t in templates):
            raise InputError("templates must be strings that contain {}")
        texts = [t.replace("{}", label) for label in labels for t in templates]
        vectors = self.embed_texts(texts, on_progress=on_progress).reshape(
            len(labels), len(templates), -1
        )
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
        images = _listed(images, "images", _IMAGE_NDIM)
        name = contract.tap_name(vision.block_index(layer))
        graph = self.manifest.content.graphs.get(contract.FEATURES)
        if graph is None or name not in [t.name for t in graph.outputs]:
            raise InputError(f"this package was exported without the output of layer {layer}")

        def run(part: Sequence[ImageSource], start: int) -> Array:
            return self._images(part, start, contract.FEATURES, name, None)

        grid = vision.grid_of(self.image_spec.height, self.image_spec.width)
        rows = self._batches(images, batch_size, on_progress, run)
        tokens = self._collect(rows, grid[0] * grid[1] + int(vision.use_cls_token), vision.width)
        return tokens[:, int(vision.use_cls_token) :].reshape(-1, *grid, vision.width)

    def encode_pixels(self, pixels: Array, *, batch_size: int | None = None) -> Array:
        """What the reference's vision `forward` returns, float32 (N, D) or (N, T, C).

        Args:
            pixels: float32 (N, 3, H, W), already normalised, of the package's image size.
            batch_size: rows per call of the engine, 1 to 256.
        """

        def run(part: Array, start: int) -> Array:
            return self._run(contract.PIXELS, contract.PIXELS_F32, part, contract.EMBEDDING)

        return np.concatenate(list(self._batches(_array(pixels), batch_size, None, run)))

    def encode_tokens(self, tokens: Array, *, batch_size: int | None = None) -> Array:
        """What the reference's `encode_text(normalize=False)` returns, float32 (N, D).

        Args:
            tokens: int64 (N, context) ids below the vocabulary size.
            batch_size: rows per call of the engine, 1 to 256.
        """

        def run(part: Array, start: int) -> Array:
            return self._tokens(part)

        return np.concatenate(list(self._batches(_array(tokens), batch_size, None, run)))

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return self._config.vision.embed_dim

    @property
    def logit_scale(self) -> float:
        """The learned factor on cosines before the softmax."""
        if self._text is None:
            raise InputError("this model has no text tower")
        return self._text.logit_scale

    def close(self) -> None:
        """Frees every engine and closes the package; a second call does nothing."""
        self._sessions.close()

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, graph: str, source: str, array: Array, output: str) -> Array:
        (result,) = self._sessions[graph].run({source: array}, [output])
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
        if tokens.dtype != np.int64:
            raise InputError(f"token ids must be int64, not {tokens.dtype}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < text.vocab_size:
            raise InputError(f"a token id is not in 0 to {text.vocab_size - 1}")
        return self._run(contract.TEXT, contract.TOKENS, tokens, contract.TEXT_EMBEDDING)

    def _batches(
        self,
        items: Sequence[Any] | Array,
        batch_size: int | None,
        on_progress: Progress | None,
        run: Callable[[Any, int], Array],
    ) -> Iterator[Array]:
        """Results of `run` on parts of at most `batch_size` items."""
        size = self.batch_size if batch_size is None else batch_size
        if type(size) is not int or not 1 <= size <= MAX_BATCH:
            raise InputError(f"batch_size must be an integer, 1 to {MAX_BATCH}, not {size!r:.40}")
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


def _listed(items: Any, what: str, item_ndim: int = 0) -> list[Any]:
    """The items as a list; InputError for one item where a list of them is meant."""
    one = isinstance(items, str | bytes | os.PathLike)
    one |= isinstance(items, np.ndarray) and items.ndim <= item_ndim
    if one or not isinstance(items, Iterable):
        raise InputError(f"{what} must be a list, not one {type(items).__name__}")
    return list(items)


def _array(values: Any) -> Array:
    """Rows as an array; InputError for what is none, such as a ragged list."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0)
    if array.ndim == 0 or array.dtype == object or len(array) == 0:
        raise InputError("expected an array of at least one row")
    return array


def _check_agreement(
    package: Package, config: PeConfig, image: ImageSpec, text: TextSpec | None
) -> None:
    """InputError unless a manifest's parts say the same of images and texts."""
    config.vision.grid_of(image.height, image.width)
    (source,) = package.graph(contract.VISION).inputs
    if source.shape[1:] != (image.height, image.width, 3):
        raise InputError("the vision graph takes another image size than the package states")
    if (config.text is None) != (text is None):
        raise InputError("the architecture and the processing differ in whether there is text")
    contexts = {part.context_length for part in (config.text, text) if part is not None}
    if len(contexts) > 1:
        raise InputError("the architecture and the processing differ in context length")


def _unit(rows: Array) -> Array:
    """Rows divided by their norms."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Array = rows / np.maximum(norms, np.float32(1e-12))
    return unit
