"""Engine calls of a Perception Language Model package: embed, encode tiles, decode.

Opens the graphs of a package and calls them in order. Knows neither prompts nor requests: the
caller decides which cache row belongs to which sequence.

Legend: N sequences, T tokens, C decoder width, L logit positions, V vocabulary, n tiles,
S tile side in pixels, t image tokens per tile.
"""

import os
from typing import Any

import numpy as np

from perception_rt.errors import InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.plm_graphs import CacheShape, check_graphs, check_positions
from perception_rt.package.reader import Package
from perception_rt.plm_config import PlmConfig
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.kv_pool import SMALLEST_ROW
from perception_rt.runtime.session import (
    Sessions,
    block_maker,
    choose_backend,
    shared_backend,
)
from perception_rt.targets import ONNX, get_target

Array = np.ndarray[Any, Any]


class PlmEngine:
    """The graphs of a Perception Language Model package, each opened on first use.

    All methods are thread-safe, `forward` and `pick` as long as their rows differ.

    Attributes:
        config: the architecture.
        cache_shape: keys and values of one token.
        max_length: longest sequence, in tokens.
        vocab_size: V.
        smallest_row: fewest slots of a cache row; `max_length` if the number of slots is fixed, or
            if memory is spent on all slots at once, as on a GPU.
        picks_tokens: whether `pick` works.
        tile_batch: tiles per vision call.
        max_positions: most positions per sequence that one call predicts from.
    """

    def __init__(
        self,
        package: Package,
        *,
        backend: str,
        device: str,
        threads: int | None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        content = package.manifest.content
        try:
            self.config = PlmConfig.from_dict(content.architecture)
            layout = check_graphs(content.graphs, self.config)
            parts = [contract.decoder_part(index) for index in range(len(layout.parts))]
            for spec in map(content.graphs.__getitem__, parts):
                if spec.kind == ONNX:
                    check_positions(package.read(spec.file), self.config.decoder)
        except (InputError, PackageError) as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        decoder = self.config.decoder
        self.max_length = decoder.max_seqlen
        self._parts = layout.parts
        self.cache_shape = CacheShape(
            layers=decoder.n_layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            dtype=layout.cache_dtype,
        )
        target = get_target(shared_backend(content, parts, backend))
        self._make_block = block_maker(target.name, device)
        is_whole = layout.fixed_slots or self._make_block is not None
        self.smallest_row = (
            decoder.max_seqlen if is_whole else min(SMALLEST_ROW, decoder.max_seqlen)
        )
        self.picks_tokens = target.picks_tokens and layout.picks_tokens
        vision = get_target(choose_backend(content, contract.VISION, backend))
        self.tile_batch = vision.tile_batch
        self.max_positions = (
            contract.ENGINE_POSITIONS if target.has_engines else contract.CHUNK_TOKENS
        )
        self.vocab_size = decoder.vocab_size
        self._sessions = Sessions(
            package, backend=backend, device=device, threads=threads, cache_dir=cache_dir
        )

    def new_cache(self, rows: int, slots: int) -> CacheBlock:
        """Allocates keys and values for `forward`; CapacityError if there is no memory."""
        return (self._make_block or CacheBlock)(self.cache_shape, rows, slots)

    def embed(self, tokens: Array) -> Array:
        """Returns embeddings, float32 (T, C).

        Args:
            tokens: int64 (T,) token ids, T at least 1.

        Raises:
            InputError: an id is not in the vocabulary, or the dtype is another.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise InputError(f"a token id is not in 0 to {self.vocab_size - 1}")
        inputs = {contract.TOKENS: tokens[None]}  # (T,) -> (1, T)
        (hidden,) = self._sessions[contract.EMBED].run(inputs, [contract.HIDDEN])
        rows: Array = hidden[0]  # (1, T, C) -> (T, C)
        return rows

    def encode_tiles(self, tiles: Array) -> Array:
        """Returns image features, float32 (n, t, C).

        Args:
            tiles: uint8 RGB (n, S, S, 3). They run in batches of `tile_batch`, which is 1 on a
                CPU, so that no tile depends on another.
        """
        return self._encode(contract.VISION, contract.IMAGES_U8, tiles)

    def encode_pixels(self, pixels: Array) -> Array:
        """Returns the same as `encode_tiles` from normalised float32 pixels (n, 3, S, S)."""
        return self._encode(contract.PIXELS, contract.PIXELS_F32, pixels)

    def forward(
        self, hidden: Array, past: Array, cache: CacheBlock, rows: slice, positions: Array
    ) -> Array:
        """Appends tokens to sequences; returns logits, float32 (N, L, V).

        Args:
            hidden: float32 (N, T, C), from `embed` and `encode_tiles`.
            past: int32 (N,), tokens already in the cache. Unless all are 0, T or N must be 1.
            cache: keys and values, updated in place.
            rows: the N rows of `cache` to use; no other row is read or written.
            positions: int64 (N, L), indices of the T tokens to predict from.

        Raises:
            BackendError: the engine failed; the rows are undefined then.
        """
        (logits,) = self._append(hidden, past, cache, rows, positions, [contract.LOGITS])
        return logits

    def pick(
        self, hidden: Array, past: Array, cache: CacheBlock, rows: slice, positions: Array
    ) -> Array:
        """Same as `forward`, but returns the likeliest tokens, int64 (N, L), never the image's.

        The logits stay on the device, where the engine finds the largest.
        """
        assert self.picks_tokens
        names = [contract.TOP_ID, contract.TOP_LOGIT]  # the session checks that logits are finite
        tokens, _ = self._append(hidden, past, cache, rows, positions, names)
        return tokens

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sessions.closed

    def close(self) -> None:
        """Frees every engine and closes the package; a second call does nothing."""
        self._sessions.close()

    def _append(
        self,
        hidden: Array,
        past: Array,
        cache: CacheBlock,
        rows: slice,
        positions: Array,
        outputs: list[str],
    ) -> list[Array]:
        """Runs all decoder parts; returns outputs of the last one."""
        count, length, _ = hidden.shape
        assert length == 1 or count == 1 or not past.any()
        assert past.shape == (count,) and past.min() >= 0
        assert past.max() + length <= min(cache.slots, self.max_length)
        assert cache.shape == self.cache_shape and rows.stop - rows.start == count
        assert 0 <= rows.start < rows.stop <= cache.rows
        assert len(positions) == count and 0 <= positions.min() <= positions.max() < length
        last = len(self._parts) - 1
        for index, layers in enumerate(self._parts):
            inputs = {contract.HIDDEN: hidden, contract.PAST_LENGTHS: past}
            if index == last:
                inputs[contract.LOGIT_POSITIONS] = positions
            state = cache.states(layers, rows)
            names = outputs if index == last else [contract.HIDDEN_OUT]
            results = self._sessions[contract.decoder_part(index)].run(inputs, names, state)
            hidden = results[0]
        return results

    def _encode(self, graph: str, name: str, images: Array) -> Array:
        shape = (len(images), self.config.tokens_per_tile, self.config.decoder.dim)
        features = np.empty(shape, np.float32)
        for start in range(0, len(images), self.tile_batch):
            stop = min(start + self.tile_batch, len(images))
            inputs = {name: images[start:stop]}
            (features[start:stop],) = self._sessions[graph].run(inputs, [contract.IMAGE_FEATURES])
        return features
