"""From a user's request to a `RequestState`: opens images and videos, encodes the prompt.

Every error in a request is found here, in its caller's thread, before the scheduler sees it. Knows
the processing of a package and its sizes, and runs no engine.

Legend: T tokens, n tiles, S tile side in pixels, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from perception_rt.errors import InputError, PackageError, describe
from perception_rt.limits import Limits
from perception_rt.package import contract
from perception_rt.package.reader import Package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSource
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from perception_rt.processing.llm_tokenizer import Tokenizer, TokenizerSpec, open_tokenizer
from perception_rt.processing.prompt import (
    IMAGE_MARK,
    VIDEO_MARK,
    Prompt,
    Turn,
    encode_answer,
    encode_prompt,
    place_media,
)
from perception_rt.processing.tiles import TileSpec, load_tiles
from perception_rt.processing.video import VideoSource, load_frames
from perception_rt.records import check_integer, check_text
from perception_rt.runtime.cache.feature_cache import feature_key
from perception_rt.runtime.generation.constraint import ConstraintCompiler
from perception_rt.runtime.generation.detokenizer import TextStream
from perception_rt.runtime.generation.prompt_lookup import PromptLookup
from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.generation.sampling import Sampler
from perception_rt.runtime.request import (
    Exchange,
    Request,
    check_ids,
    check_request,
)

Array = np.ndarray[Any, Any]

_MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
_LITERAL = "with literal=True, marks are text"


class RequestPreprocessor:
    """Prepares requests for the model of a package. Thread-safe.

    Attributes:
        tiles: how images and videos become tiles.
        tokenizer: None for a package without one, which takes and gives token ids only.
    """

    def __init__(
        self,
        package: Package,
        config: PlmConfig,
        *,
        limits: Limits,
        images: ImageOptions = DEFAULT_IMAGE_OPTIONS,
        cached: bool,
        clock: Callable[[], float],
    ) -> None:
        """Opens the processing of a package.

        Args:
            package: has the tokenizer's files.
            config: the architecture.
            limits: bounds on requests and their images, videos and texts.
            images: further formats, and the colour behind transparent pixels.
            cached: whether tiles get cache keys.
            clock: returns seconds; the scheduler's clock.

        Raises:
            PackageError: the tokenizer or the tiles do not fit the architecture.
        """
        content = package.manifest.content
        try:
            self.tiles = TileSpec.from_dict(content.image)
            if self.tiles.tile_size != config.vision.image_size:
                raise InputError(
                    f"tiles have {self.tiles.tile_size} pixels a side; the vision tower takes "
                    f"{config.vision.image_size}"
                )
            self.tokenizer = _tokenizer(package, config, limits)
        except InputError as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        tokenizer = self.tokenizer
        self._constraints = None if tokenizer is None else ConstraintCompiler(tokenizer)
        self._name = content.name
        self._package_id = package.manifest.id
        self._config = config
        self._limits = limits
        self._images = images
        self._cached = cached
        self._clock = clock
        self._allowed = np.ones(config.decoder.vocab_size, np.bool_)
        self._allowed[config.image_token_id] = False

    def check(self, request: Request) -> None:
        """InputError unless every field of a request is usable, as far as no file is opened."""
        check_request(
            request,
            vocab_size=self._config.decoder.vocab_size,
            max_length=self._config.decoder.max_seqlen,
            max_tiles=self.tiles.max_tiles,
            max_frames=self.tiles.max_frames,
            limits=self._limits,
        )
        if self.tokenizer is None:
            raise InputError(f"{self._name} has no tokenizer; use generate_tokens()")
        for index, exchange in enumerate(request.history):
            _check_marks(exchange, f"history {index}: ")
        _check_marks(request, "")

    def prepare(self, request: Request) -> RequestState:
        """Opens the images and videos of a request that passed `check`, and encodes its prompt.

        Raises:
            InputError: an image, a video, a text or a constraint is unusable, or all together are
                too long.
            BackendError: the library that a video or a constraint needs is not installed.
        """
        called_at = self._clock()
        tokenizer = self._required_tokenizer()
        assert self._constraints is not None
        constraint = self._constraints.compile(request)
        prompt, tiles = self._prompt(tokenizer, request)
        self._check_length(len(prompt.ids), request.max_new_tokens)
        is_image = prompt.ids == self._config.image_token_id
        deadline = None if request.deadline_s is None else called_at + request.deadline_s
        lookup = None
        if request.lookup:
            expected = request.lookup_tokens
            lookup = PromptLookup(
                np.where(is_image, -1, prompt.ids),
                request.max_new_tokens,
                expected=None if expected is None else np.asarray(expected, np.int64),
            )
        return RequestState(
            ids=prompt.ids,
            image_positions=np.flatnonzero(is_image),
            tiles=tiles,
            tile_keys=self._tile_keys(tiles, contract.VISION),
            max_new_tokens=request.max_new_tokens,
            sampler=Sampler(
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=request.seed,
                allowed=self._allowed,
                repetition_penalty=request.repetition_penalty,
                seen=None if request.repetition_penalty == 1 else self._seen(prompt.ids),
                constraint=constraint,
            ),
            end_ids=frozenset() if request.ignore_eos else tokenizer.end_ids,
            spell=tokenizer.decode_bytes,
            stream=TextStream(request.stop, prefix=tokenizer.prefix),
            lookup=lookup,
            deadline=deadline,
            on_progress=request.on_progress,
            called_at=called_at,
            preprocess_s=self._clock() - called_at,
        )

    def prepare_score(self, request: Request, answer: str) -> RequestState:
        """Same as `prepare`, but to score an answer instead of generating one.

        Args:
            request: passed `check`; only its prompt, images, videos, history and budgets matter.
            answer: the answer to score.

        Raises:
            InputError: as `prepare`, or the answer is not a string or has no token.
            BackendError: as `prepare`.
        """
        called_at = self._clock()
        check_text("answer", answer, self._limits.text_bytes)
        tokenizer = self._required_tokenizer()
        targets = np.asarray(encode_answer(tokenizer, answer), np.int64)
        if len(targets) == 0:
            raise InputError("answer must have at least one token")
        prompt, tiles = self._prompt(tokenizer, request)
        self._check_length(len(prompt.ids), len(targets), "answer has {} tokens")
        return RequestState(
            # The last token is predicted and never runs.
            ids=np.concatenate([prompt.ids, targets[:-1]]),
            image_positions=np.flatnonzero(prompt.ids == self._config.image_token_id),
            tiles=tiles,
            tile_keys=self._tile_keys(tiles, contract.VISION),
            max_new_tokens=0,
            sampler=Sampler(),
            targets=targets,
            called_at=called_at,
            preprocess_s=self._clock() - called_at,
        )

    def prepare_tokens(self, ids: Any, pixels: Array | None, max_new_tokens: int) -> RequestState:
        """Prepares a greedy continuation of token ids; with 0 new tokens, only its logits.

        Args:
            ids: integers (T,), with the image token id at each image token.
            pixels: float32 (n, 3, S, S), normalised, or None.
            max_new_tokens: most tokens of the answer.

        Raises:
            InputError: an argument is unusable, image tokens and tiles differ in number, or all
                together are too long.
        """
        called_at = self._clock()
        decoder = self._config.decoder
        ids = check_ids("ids", ids, decoder.vocab_size, decoder.max_seqlen)
        self._check_pixels(pixels)
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens, 0)
        self._check_length(len(ids), max_new_tokens)
        positions = np.flatnonzero(ids == self._config.image_token_id)
        tiles, per_tile = 0 if pixels is None else len(pixels), self._config.tokens_per_tile
        if len(positions) != tiles * per_tile:
            raise InputError(
                f"ids have {len(positions)} image tokens; {tiles} tiles of {per_tile} tokens "
                f"need {tiles * per_tile}"
            )
        # After the count, which bounds the work.
        if pixels is not None and not np.isfinite(pixels).all():
            raise InputError("pixels must be finite")
        return RequestState(
            ids=ids,
            image_positions=positions,
            tiles=pixels,
            tile_keys=self._tile_keys(pixels, contract.PIXELS),
            max_new_tokens=max_new_tokens,
            sampler=Sampler(allowed=self._allowed),
            end_ids=frozenset() if self.tokenizer is None else self.tokenizer.end_ids,
            called_at=called_at,
            preprocess_s=self._clock() - called_at,
        )

    def _seen(self, ids: Array) -> Array:
        """Which tokens of the vocabulary are among `ids`, bool (V,)."""
        seen = np.zeros(self._config.decoder.vocab_size, np.bool_)
        seen[ids] = True
        return seen

    def _required_tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None, "the request was not checked"
        return self.tokenizer

    def _prompt(self, tokenizer: Tokenizer, request: Request) -> tuple[Prompt, Array | None]:
        """The prompt's ids, and the tiles, uint8 (n, S, S, 3)."""
        turns, tiles = self._conversation(request)
        return encode_prompt(tokenizer, turns, self._config.tokens_per_tile), tiles

    def _conversation(self, request: Request) -> tuple[list[Turn], Array | None]:
        """The turns, with places for tiles, and the tiles, uint8 (n, S, S, 3)."""
        parts: list[Exchange | Request] = [*request.history, request]
        items = sum(len(part.images) + len(part.videos) for part in parts)
        self._check_tiles(items)
        system = request.system
        turns = [] if system is None else [Turn("system", (system,))]
        tiles: list[Array] = []
        for index, part in enumerate(parts):
            where = "" if part is request else f"history {index}: "
            counts = []
            for kind, number, source in _in_order(part):
                try:
                    loaded = self._load(kind, source, request)
                except InputError as error:
                    name = kind.strip("<>")
                    raise InputError(f"{where}{name} {number}: {error}") from None
                tiles.append(loaded)
                counts.append(len(loaded))
                self._check_tiles(sum(map(len, tiles)))
            try:
                content = place_media(part.prompt, counts, literal=part.literal)
            except InputError as error:
                raise InputError(f"{where}{error}; {_LITERAL}") from None
            turns.append(Turn("user", content))
            if not isinstance(part, Request):
                turns.append(Turn("assistant", (part.answer,)))
        return turns, np.concatenate(tiles) if tiles else None

    def _load(self, kind: str, source: ImageSource | VideoSource, request: Request) -> Array:
        if kind == VIDEO_MARK:
            frames: VideoSource = source  # type: ignore[assignment]
            return load_frames(
                frames, self.tiles, num_frames=request.num_frames, limits=self._limits
            )
        return load_tiles(
            source,
            self.tiles,
            max_tiles=request.max_tiles,
            limits=self._limits,
            options=self._images,
        )

    def _tile_keys(self, tiles: Array | None, graph: str) -> list[str]:
        if tiles is None or not self._cached:
            return []
        return [
            feature_key(self._package_id, graph, tiles[index : index + 1])
            for index in range(len(tiles))
        ]

    def _check_tiles(self, tiles: int) -> None:
        """InputError if the tiles alone are too many, before more are made."""
        tokens, most = tiles * self._config.tokens_per_tile, self._config.decoder.max_seqlen
        if tokens > most:
            raise InputError(
                f"images and videos of {tiles} tiles or more have {tokens} tokens or more; the "
                f"context has {most}. Lower max_tiles or num_frames"
            )

    def _check_length(
        self, prompt_tokens: int, more: int, shown: str = "max_new_tokens is {}"
    ) -> None:
        most = self._config.decoder.max_seqlen
        if prompt_tokens + more > most:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens and {shown.format(more)}; "
                f"the context has {most}"
            )

    def _check_pixels(self, pixels: object) -> None:
        if pixels is None:
            return
        side = self._config.vision.image_size
        if not isinstance(pixels, np.ndarray):
            raise InputError(f"pixels must be an array, not {describe(pixels)}")
        fits = pixels.dtype == np.float32 and pixels.ndim == 4 and len(pixels) > 0
        if not fits or pixels.shape[1:] != (3, side, side):
            raise InputError(
                f"pixels must be float32 (tiles, 3, {side}, {side}), "
                f"not {pixels.dtype} {pixels.shape}"
            )


def _tokenizer(package: Package, config: PlmConfig, limits: Limits) -> Tokenizer | None:
    """Opens the package's tokenizer; InputError or PackageError if it is not the model's."""
    text = package.manifest.content.text
    if text is None:
        return None
    spec = TokenizerSpec.from_dict(text, "text")
    for name, value in (
        ("vocab_size", config.decoder.vocab_size),
        ("image_token_id", config.image_token_id),
    ):
        if getattr(spec, name) != value:
            raise InputError(f"the tokenizer and the architecture differ in {name}")
    data = None if spec.file is None else package.read(spec.file)
    return open_tokenizer(spec, data, limits=limits)


def _check_marks(part: Exchange | Request, where: str) -> None:
    """InputError, beginning with `where`, if a kind has more marks than images or videos.

    Without either, marks are text. A single image may have a mark for each of its tiles, whose
    number is not known yet.
    """
    if part.literal or not (part.images or part.videos):
        return
    for mark, items in ((IMAGE_MARK, part.images), (VIDEO_MARK, part.videos)):
        count = part.prompt.count(mark)
        alone = len(part.images) + len(part.videos) == len(items) == 1
        if count > len(items) and not (alone and mark == IMAGE_MARK):
            kind = mark.strip("<>")
            raise InputError(
                f"{where}the question has {count} {mark} marks for {len(items)} {kind}s; {_LITERAL}"
            )


def _in_order(part: Exchange | Request) -> list[tuple[str, int, Any]]:
    """Kind, number among its kind, and source of each item, in the order of the prompt's marks.

    Images come first unless the prompt has one mark per item.
    """
    kinds = [IMAGE_MARK] * len(part.images) + [VIDEO_MARK] * len(part.videos)
    marks = [] if part.literal else _MARK.findall(part.prompt)
    if sorted(marks) == sorted(kinds):
        kinds = marks
    sources: dict[str, Iterator[tuple[int, Any]]]
    sources = {IMAGE_MARK: enumerate(part.images), VIDEO_MARK: enumerate(part.videos)}
    return [(kind, *next(sources[kind])) for kind in kinds]
