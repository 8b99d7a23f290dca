"""Embeds images, texts and videos with an encoder package.

Decodes, batches, runs the engine and normalises. Independent of the backend, and of any model
property that the manifest does not state.

Legend: N items, D embedding channels, L labels, h w grid, C width.
"""

import os
from collections.abc import Iterable, Sized
from contextlib import closing
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.families import PE
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.reader import Package
from perception_rt.processing.clip_bpe import ClipTokenizer, TextSpec
from perception_rt.processing.image import ImageSource, ImageSpec
from perception_rt.processing.image_loader import OnError
from perception_rt.processing.image_options import Background
from perception_rt.processing.video import VideoSource, decode_frames
from perception_rt.records import check_integer
from perception_rt.runtime.embedding.dense import DenseOutputs
from perception_rt.runtime.embedding.image_graphs import (
    MAX_WORKERS,
    TEXT,
    ImageRunner,
    Progress,
    image_chains,
    run_chain,
)
from perception_rt.runtime.embedding.items import (
    Array,
    Float32,
    check_items,
    in_batches,
    listed,
    nonempty_array,
    run_ahead,
    stacked,
    unit,
    usable_tokens,
)
from perception_rt.runtime.embedding.package_parts import check_agreement, text_tokenizer
from perception_rt.runtime.load_options import LoadOptions, open_model
from perception_rt.runtime.native_calls import check_process
from perception_rt.runtime.session import AUTO, Sessions, is_batch_dependent

_VIDEO_NDIM = 4  # dimensions of an array that is one video


class Embedder(DenseOutputs):
    """A loaded Perception Encoder package. Make one with `Embedder.load` or `perception_rt.load`.

    Each graph opens on first use. Several threads may call methods; a forked child may not.

    Attributes:
        image_spec: default image size, and preprocessing.
        batch_size: default number of items per engine call. It is 1 where the results of one call
            depend on each other, as with int8 on ONNX Runtime.
    """

    def __init__(self, package: Package, options: LoadOptions) -> None:
        super().__init__(package.manifest, backend=options.backend, device=options.device)
        content = package.manifest.content
        self._limits = options.effective_limits
        try:
            self._config = PeConfig.from_dict(content.architecture)
            self.image_spec = ImageSpec.from_dict(content.image)
            self._text = None if content.text is None else TextSpec.from_dict(content.text, "text")
            check_agreement(package, self._config, self.image_spec, self._text)
            self._tokenizer = text_tokenizer(self._text, self._limits)
        except (InputError, PackageError) as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        self.batch_size = 1 if is_batch_dependent(content) else 8
        self._sessions = Sessions(
            package,
            backend=options.backend,
            device=options.device,
            threads=options.threads,
            cache_dir=options.cache_dir,
        )
        self._chains = image_chains(content.graphs, self._config, self.image_spec)
        self._images = ImageRunner(self._sessions, content.graphs, self._limits, options.images)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = AUTO,
        device: str = "cpu",
        threads: int | None = None,
        expect: str | None = None,
        limits: Limits | None = DEFAULT_LIMITS,
        cache_dir: str | os.PathLike[str] | None = None,
        formats: Iterable[str] = (),
        background: Background | None = None,
    ) -> Self:
        """Loads an encoder package; arguments and errors as `perception_rt.load`.

        Raises:
            InputError: also if the package holds a model of another family.
        """
        options = LoadOptions(
            backend=backend,
            device=device,
            threads=threads,
            expect=expect,
            limits=limits,
            cache_dir=cache_dir,
            formats=formats,
            background=background,
        )
        with open_model(path, options, PE) as package:
            return cls(package, options)

    def embed_images(
        self,
        images: Iterable[ImageSource],
        *,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Embeds images as unit vectors.

        Worker threads decode and resize the next images while the engine runs. They are at most
        one batch and `workers` images ahead, and an iterator is read no further than that. Rows,
        errors and callbacks are the same for every number of workers.

        Args:
            images: paths or bytes of JPEG, PNG or WebP files (or of the `formats` that were given
                to `load`), Pillow images, or uint8 (H, W, 3) RGB arrays. Arrays and Pillow images
                of an iterator are copied when they are taken from it; a file must stay as it is
                until its image is embedded.
            size: one of `self.image_sizes`, (height, width) in pixels; None for the default.
            batch_size: images per engine call, 1 to 256; None for `self.batch_size`.
            workers: threads that decode, 1 to 64; 1 decodes in the calling thread, one image at a
                time. None for one per CPU core, at most 8.
            on_progress: called after each batch with the number of images done and the total. For
                an iterator without a length, the total is the number done so far.
            on_error: called with the index and the error of each unusable image, in order. Its row
                is zero, and the other rows do not change. None raises the error instead.

        Returns:
            float32 (N, D), rows of length 1.

        Raises:
            InputError: an image or an argument is unusable, or the model has no pooled embedding.
            BackendError: the engine failed, or the embedder is closed.
        """
        check_process(self._process)
        self._require_pooled()
        chains = self._at(size)
        rows = self._images.rows(
            images,
            chains.embedding,
            chains.spec,
            batch_size=self._batch_size(batch_size),
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )
        return unit(rows)

    def embed_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Embeds texts as unit vectors.

        Args:
            texts: truncated to the context length, as the reference does.
            batch_size: texts per engine call, 1 to 256; None for `self.batch_size`.
            on_progress: called after each batch with the number of texts done and the total.
            on_error: as for `embed_images`.

        Returns:
            float32 (N, D), rows of length 1.

        Raises:
            InputError: a text is unusable, or the model has no text tower or no known tokenizer.
            BackendError: the engine failed, or the embedder is closed.
        """
        check_process(self._process)
        texts = listed(texts, "texts")
        tokenizer = self._require_tokenizer()

        def embed(part: list[tuple[int, str]]) -> Float32:
            usable, tokens = usable_tokens(
                tokenizer, [text for _, text in part], part[0][0], on_error
            )
            rows = np.zeros((len(part), self.dim), np.float32)
            if usable:
                rows[usable] = self._tokens(tokens)
            return rows

        size = self._batch_size(batch_size)
        parts = in_batches(list(enumerate(texts)), size, on_progress, embed)
        return unit(stacked(parts, (self.dim,)))

    def embed_videos(
        self,
        videos: Iterable[VideoSource],
        *,
        num_frames: int = 8,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        workers: int = 1,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Embeds videos as unit vectors: the normalised mean of unit frame embeddings.

        Args:
            videos: paths or bytes of files, or uint8 (T, H, W, 3) RGB frames. An iterator is read
                `workers` videos ahead.
            num_frames: frames per video, at equal distances, including the first and the last.
            size: as for `embed_images`.
            batch_size: frames per engine call, 1 to 256; None for `self.batch_size`.
            workers: threads that decode, each the frames of a video ahead of its use, 1 to 64; 1
                decodes in the calling thread.
            on_progress: called after each video with the number of videos done and the total, as
                for `embed_images`.
            on_error: as for `embed_images`.

        Returns:
            float32 (N, D), rows of length 1.

        Raises:
            InputError: a video is unusable, or the model has no pooled embedding.
            BackendError: the engine failed, the embedder is closed, or PyAV is not installed.
        """
        check_process(self._process)
        self._require_pooled()
        check_items(videos, "videos", _VIDEO_NDIM)
        if isinstance(videos, Sized):
            videos = list(videos)  # callbacks may change the list
        check_integer("num_frames", num_frames, 1, self._limits.video_frames)
        workers = check_integer("workers", workers, 1, MAX_WORKERS)
        decode = partial(decode_frames, num_frames=num_frames, limits=self._limits)
        rows: list[Float32] = []
        with closing(run_ahead(decode, videos, workers=workers)) as decoded:
            for index, frames in enumerate(decoded):
                if not isinstance(frames, InputError):
                    # No engine call waits for the resizing of the frames.
                    vectors = self.embed_images(frames, size=size, batch_size=batch_size, workers=1)
                    rows.append(vectors.mean(axis=0, keepdims=True))
                elif on_error is None:
                    raise InputError(f"video {index}: {frames}")
                else:
                    on_error(index, frames)
                    rows.append(np.zeros((1, self.dim), np.float32))
                if on_progress is not None:
                    on_progress(index + 1, len(videos) if isinstance(videos, Sized) else index + 1)
        return unit(stacked(rows, (self.dim,)))

    def classify(
        self,
        images: Iterable[ImageSource],
        labels: Iterable[str],
        templates: Iterable[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
        workers: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Zero-shot probabilities of labels.

        Args:
            images: as for `embed_images`.
            labels: at least one.
            templates: sentences with `{}` for the label; a label's vector is the mean over them.
                None uses the labels alone.
            size: as for `embed_images`.
            workers: as for `embed_images`.
            on_progress: called with the number done and the total, first of texts, then of images.
            on_error: as for `embed_images`; the row of an unusable image is zero.

        Returns:
            float32 (N, L), rows that sum to 1.

        Raises:
            InputError: as `embed_images` and `embed_texts`, `labels` or `templates` are unusable,
                or a template pushes a label past the context length.
            BackendError: the engine failed, or the embedder is closed.
        """
        weights = self.embed_labels(labels, templates, on_progress=on_progress)
        embeddings = self.embed_images(
            images, size=size, workers=workers, on_progress=on_progress, on_error=on_error
        )
        logits = self.logit_scale * (embeddings @ weights.T)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        probabilities: Float32 = odds / odds.sum(axis=1, keepdims=True)
        probabilities[~embeddings.any(axis=1)] = 0  # rows of unusable images
        return probabilities

    def embed_labels(
        self,
        labels: Iterable[str],
        templates: Iterable[str] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> Float32:
        """Embeds labels as unit vectors for zero-shot use, float32 (L, D); see `classify`."""
        check_process(self._process)
        labels = listed(labels, "labels")
        templates = ["{}"] if templates is None else listed(templates, "templates")
        tokens = self._require_tokenizer().encode_labels(labels, templates)
        rows = in_batches(tokens, self.batch_size, on_progress, self._tokens)
        vectors = unit(stacked(rows, (self.dim,)))
        return unit(vectors.reshape(len(labels), len(templates), -1).mean(axis=1))

    def encode_pixels(self, pixels: Float32, *, batch_size: int | None = None) -> Float32:
        """Returns the output of the reference's vision `forward`, float32 (N, D) or (N, T, C).

        Args:
            pixels: float32 (N, 3, H, W), already normalised, at an image size of the package.
            batch_size: rows per engine call, 1 to 256; None for `self.batch_size`.
        """
        check_process(self._process)
        self._require_encoder()
        pixels = nonempty_array(pixels)
        chains = self._chains.get(pixels.shape[-2:]) or self._at(None)
        run = partial(run_chain, self._sessions, chains.pixels)
        return np.concatenate(list(in_batches(pixels, self._batch_size(batch_size), None, run)))

    def encode_tokens(self, tokens: NDArray[np.int64], *, batch_size: int | None = None) -> Float32:
        """Returns the output of the reference's `encode_text(normalize=False)`, float32 (N, D).

        Args:
            tokens: int64 (N, context) ids below the vocabulary size.
            batch_size: rows per engine call, 1 to 256; None for `self.batch_size`.
        """
        check_process(self._process)
        rows, size = nonempty_array(tokens), self._batch_size(batch_size)
        return np.concatenate(list(in_batches(rows, size, None, self._tokens)))

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return self._config.vision.embed_dim

    @property
    def logit_scale(self) -> float:
        """Learned factor on cosines before the softmax."""
        if self._text is None:
            raise InputError("this model has no text tower")
        return self._text.logit_scale

    def close(self) -> None:
        """Frees the engines and closes the package; see `LoadedModel.close`."""
        self._sessions.close()

    def _tokens(self, tokens: Array) -> Array:
        text = self._config.text
        if text is None:
            raise InputError("this model has no text tower")
        if tokens.dtype != np.int64:
            raise InputError(f"token ids must be int64, not {tokens.dtype}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < text.vocab_size:
            raise InputError(f"a token id is not in 0 to {text.vocab_size - 1}")
        return run_chain(self._sessions, TEXT, tokens)

    def _require_pooled(self) -> None:
        self._require_encoder()
        if self._config.vision.pool_type == "none":
            name = self.manifest.content.name
            raise InputError(f"{name} has no pooled embedding; use features()")

    def _require_tokenizer(self) -> ClipTokenizer:
        name, text = self.manifest.content.name, self._config.text
        if text is None:
            raise InputError(f"{name} has no text tower")
        if self._tokenizer is None:
            raise InputError(
                f"no tokenizer here fits {name}'s vocabulary of {text.vocab_size}; "
                "use encode_tokens()"
            )
        return self._tokenizer
