"""The public class that answers questions about images and videos with a language model package.

Legend: T tokens, n tiles, S tile side in pixels, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, ParamSpec, Self, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.families import PLM
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.reader import Package
from perception_rt.processing.image import ImageSource
from perception_rt.processing.image_loader import OnError
from perception_rt.processing.image_options import Background
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import VideoSource
from perception_rt.records import check_integer
from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generation.messages import Message, chat_request
from perception_rt.runtime.generation.pipeline import open_pipeline
from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.load_options import (
    FEATURE_CACHE_BYTES,
    PREFIX_CACHE_BYTES,
    LoadOptions,
    open_model,
)
from perception_rt.runtime.request import (
    Exchange,
    GeneratorStats,
    Request,
    RequestOptions,
    Result,
    Score,
    check_list,
)
from perception_rt.runtime.session import AUTO, LoadedModel

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _takes_request(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Gives a method that takes `RequestOptions` the signature of `Request`, for `help`."""
    this, prompt, _ = signature(method).parameters.values()
    options = list(signature(Request).parameters.values())[1:]
    keywords = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]
    shown = signature(method).replace(parameters=[this, prompt, *keywords])
    method.__signature__ = shown  # type: ignore[attr-defined]
    return method


class Generator(LoadedModel):
    """A loaded Perception Language Model package; `perception_rt.load` creates it.

    All methods are thread-safe, and requests of several threads are decoded together. A forked
    child process cannot use its parent's generator: it gets a BackendError.

    Attributes:
        manifest: the package's manifest.
        backend: name of the backend that runs it.
        device: name of the device that the backend runs on.
        tile_spec: how images and videos become tiles.
        max_length: most tokens of prompt and answer together.
    """

    def __init__(self, package: Package, options: LoadOptions) -> None:
        super().__init__(package.manifest, backend=options.backend, device=options.device)
        self._pipeline = open_pipeline(package, options)
        self._preprocessor = self._pipeline.preprocessor
        self._thread = self._pipeline.thread
        self.tile_spec: TileSpec = self._preprocessor.tiles
        self.max_length = self._pipeline.engine.max_length

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
        kv_bytes: int | None = None,
        max_batch: int = 8,
        cache: bool = True,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        cache_dir: str | os.PathLike[str] | None = None,
        formats: Iterable[str] = (),
        background: Background | None = None,
    ) -> Self:
        """Loads a language model package; arguments and errors as `perception_rt.load`.

        Raises:
            InputError: also if the package holds a model of another family.
        """
        options = LoadOptions(
            backend=backend,
            device=device,
            threads=threads,
            expect=expect,
            limits=limits,
            kv_bytes=kv_bytes,
            max_batch=max_batch,
            cache=cache,
            feature_cache_bytes=feature_cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            cache_dir=cache_dir,
            formats=formats,
            background=background,
        )
        with open_model(path, options, PLM) as package:
            return cls(package, options)

    @_takes_request
    def generate(self, prompt: str, **options: Unpack[RequestOptions]) -> Result:
        """Answers one question.

        Args:
            prompt: the question; see `Request`.
            **options: the other fields of `Request`.

        Returns:
            Text and tokens of the answer, and timings.

        Raises:
            InputError: an argument, an image, a video or a text is unusable, or all together are
                too long.
            CapacityError: the queue is full, or the request does not fit into `kv_bytes`.
            BackendError: the engine failed, or the generator was closed.
        """
        handle = self.submit(Request(prompt, **options))
        try:
            return handle.result()
        finally:
            handle.cancel()  # after an interrupt; a request that ended is unaffected

    @_takes_request
    def stream(self, prompt: str, **options: Unpack[RequestOptions]) -> Iterator[str]:
        """Answers one question, piece by piece.

        The request starts at once. Closing or dropping the iterator ends it. Use `submit` to get
        the `Result` too.

        Args:
            prompt: the question; see `Request`.
            **options: the other fields of `Request`.

        Returns:
            An iterator over pieces of text, in whole characters.

        Raises:
            PerceptionError: as `generate`. Errors of the engine come from the iterator.
        """
        return _pieces(self.submit(Request(prompt, **options)))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        response_format: Mapping[str, Any] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result:
        """Answers the last message of a conversation in the form of OpenAI's chat API.

        Use `chat_request` with `submit` to get the answer piece by piece.

        Args:
            messages: dictionaries with `role` and `content`, such as `{"role": "user", "content":
                [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                {"type": "text", "text": "What is this?"}]}`. `{"type": "image", "image": ...}`
                holds anything that `Request.images` takes. System texts come first and replace the
                system text of the training; then users and assistants alternate.
            response_format: `{"type": "json_object"}` for an answer in JSON, or `{"type":
                "json_schema", "json_schema": {"schema": {...}}}` for one that follows a schema.
            **options: the fields of `Request` other than prompt, images, videos, history, system
                and literal.

        Returns:
            As `generate`.

        Raises:
            PerceptionError: as `generate`; an InputError names the message that is unusable.
        """
        handle = self.submit(chat_request(messages, response_format=response_format, **options))
        try:
            return handle.result()
        finally:
            handle.cancel()

    def submit(self, request: Request) -> Handle:
        """Starts a request and returns at once, after opening its images and videos.

        Args:
            request: the question.

        Returns:
            A handle to wait for the result, read the text as it grows, or cancel.

        Raises:
            PerceptionError: as `generate`; a full queue is reported before images are opened.
        """
        self._thread.check_queue()
        self._preprocessor.check(request)
        return self._start(self._preprocessor.prepare(request))

    @overload
    def generate_batch(self, requests: Sequence[Request]) -> list[Result]: ...

    @overload
    def generate_batch(
        self, requests: Sequence[Request], *, on_error: OnError
    ) -> list[Result | None]: ...

    def generate_batch(
        self, requests: Sequence[Request], *, on_error: OnError | None = None
    ) -> Any:
        """Answers several questions together, as many at a time as fit into memory.

        Args:
            requests: the questions; there may be more than the queue holds.
            on_error: called with the index and the error of each unusable request, in order. Its
                result is None, and the others are answered. None raises the error instead.

        Returns:
            Results in the order of the requests.

        Raises:
            InputError: a request is unusable. The message names its index; none is answered.
            CapacityError: a request does not fit into `kv_bytes`.
            BackendError: as `generate`, for the first request that failed.
        """
        requests = check_list("requests", requests)
        if on_error is None:
            for index, request in enumerate(requests):
                with _numbered(index):
                    self._preprocessor.check(request)
        self._thread.check_open()
        handles: list[Handle | None] = []
        try:
            for index, request in enumerate(requests):
                state = self._prepared(index, request, on_error)
                handles.append(None if state is None else self._start(state, wait=True))
            return [None if handle is None else handle.result() for handle in handles]
        finally:
            for handle in handles:
                if handle is not None:
                    handle.cancel()

    def _prepared(
        self, index: int, request: Request, on_error: OnError | None
    ) -> RequestState | None:
        """A request of a batch; None if it is unusable and `on_error` was told."""
        try:
            if on_error is not None:
                self._preprocessor.check(request)
            return self._preprocessor.prepare(request)
        except InputError as error:
            if on_error is None:
                raise InputError(f"request {index}: {error}") from None
            on_error(index, error)
            return None

    def score(
        self,
        prompt: str,
        answer: str,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        history: Sequence[Exchange] = (),
        max_tiles: int | None = None,
        num_frames: int | None = None,
        literal: bool = False,
    ) -> Score:
        """Returns the log-probability of each token of a given answer.

        Nothing is generated: prompt and answer run through the decoder once. Several answers to one
        prompt share its keys and values in the prefix cache.

        Args:
            prompt: the question; this and the keyword arguments are fields of `Request`.
            answer: the answer to score, at least one token; its end token is not scored.
            images: see `Request`.
            videos: see `Request`.
            history: see `Request`.
            max_tiles: see `Request`.
            num_frames: see `Request`.
            literal: see `Request`.

        Returns:
            Token ids of the answer and their natural log-probabilities, float64 (T,).

        Raises:
            PerceptionError: as `generate`.
        """
        request = Request(
            prompt,
            images=images,
            videos=videos,
            history=history,
            max_tiles=max_tiles,
            num_frames=num_frames,
            literal=literal,
        )
        self._thread.check_queue()
        self._preprocessor.check(request)
        state = self._preprocessor.prepare_score(request, answer)
        self._run(state)
        assert state.targets is not None
        return Score(
            tokens=tuple(state.targets.tolist()), logprobs=np.array(state.logprobs, np.float64)
        )

    def generate_tokens(
        self,
        ids: Sequence[int] | Int64,
        pixels: Float32 | None = None,
        *,
        max_new_tokens: int,
    ) -> list[int]:
        """Continues a prompt of token ids greedily, without a tokenizer.

        Args:
            ids: (T,) token ids, with the image token id at each image token, in tile order.
            pixels: float32 (n, 3, S, S), normalised, or None.
            max_new_tokens: most tokens to generate. An end token of the package's tokenizer, if it
                has one, ends the continuation and is not returned.

        Returns:
            The new token ids; never the image token.

        Raises:
            InputError: an argument is unusable, or image tokens and tiles differ in number.
            CapacityError: as `generate`.
            BackendError: as `generate`.
        """
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens, 1)
        state = self._preprocessor.prepare_tokens(ids, pixels, max_new_tokens)
        return list(self._run(state).tokens)

    def prefill_logits(self, ids: Sequence[int] | Int64, pixels: Float32 | None = None) -> Float32:
        """Returns the logits after a prompt, float32 (V,); arguments as `generate_tokens`."""
        state = self._preprocessor.prepare_tokens(ids, pixels, 0)
        self._run(state)
        assert state.logits is not None
        return state.logits

    @property
    def stats(self) -> GeneratorStats:
        """Current load and memory, for monitoring."""
        pipeline = self._pipeline
        features, prefixes = pipeline.features, pipeline.prefixes
        return GeneratorStats(
            queued=pipeline.scheduler.queued,
            running=pipeline.pool.used_rows,
            kv_bytes=pipeline.pool.accounted_bytes,
            kv_bytes_limit=pipeline.pool.max_bytes,
            feature_cache_bytes=0 if features is None else features.nbytes,
            prefix_cache_bytes=0 if prefixes is None else prefixes.nbytes,
        )

    def close(self) -> None:
        """Fails unfinished requests, frees the engines and closes the package.

        A second call does nothing.
        """
        self._pipeline.close()

    def _run(self, state: RequestState) -> Result:
        handle = self._start(state)
        try:
            return handle.result()
        finally:
            handle.cancel()

    def _start(self, state: RequestState, *, wait: bool = False) -> Handle:
        handle = Handle(self._thread, state)  # first: an interrupt in between drops and cancels it
        self._thread.submit(state, wait=wait)
        return handle


@contextmanager
def _numbered(index: int) -> Iterator[None]:
    """Names the request in an InputError by its index."""
    try:
        yield
    except InputError as error:
        raise InputError(f"request {index}: {error}") from None


def _pieces(handle: Handle) -> Iterator[str]:
    try:
        yield from handle
    finally:
        handle.cancel()
