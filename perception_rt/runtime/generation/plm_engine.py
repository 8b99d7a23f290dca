"""The engine calls of a Perception Language Model package: embed, encode tiles, decode.

Owns the graphs of a package and the order in which they are called. It knows neither prompts nor
requests: which rows of a cache block belong to whom is its caller's affair.

Legend: N sequences, T tokens, C channels of the decoder, L logit positions, V vocabulary;
n tiles, S tile side in pixels, t image tokens per tile.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from perception_rt.errors import InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.plm_graphs import CacheShape, check_graphs
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
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]
OnTile = Callable[[int, int], None]


class Decoder:
    """The graphs of a Perception Language Model package, each opened when it is first needed.

    All methods may be called from several threads, `forward` with different rows.

    Attributes:
        config: the architecture.
        cache_shape: what `forward` keeps of one token.
        max_length: the longest sequence, in tokens.
        vocab_size: V.
        smallest_row: slots that a row of a cache has at least: all, where their number is fixed or
            memory is spent on them at once, as on a GPU.
        picks_tokens: whether `pick` works.
        tile_batch: tiles that are best encoded in one call.
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
        decoder_graphs = [contract.decoder_part(index) for index in range(len(self._parts))]
        target = get_target(shared_backend(package.manifest.content, decoder_graphs, backend))
        self._make_block = block_maker(target.name, device)
        is_whole = layout.fixed_slots or self._make_block is not None
        self.smallest_row = (
            decoder.max_seqlen if is_whole else min(SMALLEST_ROW, decoder.max_seqlen)
        )
        self.picks_tokens = target.picks_tokens and layout.picks_tokens
        vision = get_target(choose_backend(package.manifest.content, contract.VISION, backend))
        self.tile_batch = vision.tile_batch
        self.vocab_size = decoder.vocab_size
        self._sessions = Sessions(
            package, backend=backend, device=device, threads=threads, cache_dir=cache_dir
        )

    def new_cache(self, rows: int, slots: int) -> CacheBlock:
        """Keys and values for `forward`; CapacityError if there is no memory for them."""
        return (self._make_block or CacheBlock)(self.cache_shape, rows, slots)

    def embed(self, tokens: Array) -> Array:
        """Embeddings, float32 (T, C), of int64 ids (T,), T at least 1.

        Raises:
            InputError: an id is not in the vocabulary, or of another dtype.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise InputError(f"a token id is not in 0 to {self.vocab_size - 1}")
        inputs = {contract.TOKENS: tokens[None]}
        (hidden,) = self._sessions[contract.EMBED].run(inputs, [contract.HIDDEN])
        rows: Array = hidden[0]
        return rows

    def encode_tiles(self, tiles: Array, *, on_tile: OnTile | None = None) -> Array:
        """Image features, float32 (n, t, C), of uint8 tiles (n, S, S, 3).

        Args:
            tiles: RGB. One call of the engine takes `tile_batch`; of one, on a CPU, so that no
                tile depends on another.
            on_tile: called with the numbers of tiles done and in all; what it raises ends this.
        """
        return self._encode(contract.VISION, contract.IMAGES_U8, tiles, on_tile)

    def encode_pixels(self, pixels: Array, *, on_tile: OnTile | None = None) -> Array:
        """What `encode_tiles` returns, of already normalised float32 pixels (n, 3, S, S)."""
        return self._encode(contract.PIXELS, contract.PIXELS_F32, pixels, on_tile)

    def forward(
        self, hidden: Array, past: Array, cache: CacheBlock, rows: slice, positions: Array
    ) -> Array:
        """Appends tokens to sequences; returns logits, float32 (N, L, V).

        Args:
            hidden: float32 (N, T, C), from `embed` and `encode_tiles`.
            past: int32 (N,), tokens that are in the cache already. With any there, T is 1 or N is.
            cache: what was appended before, and afterwards the new tokens too.
            rows: the N rows of `cache`; no others are read or written.
            positions: int64 (N, L), which of the T tokens to predict the next token from.

        Raises:
            BackendError: the engine failed; the rows are undefined then.
        """
        (logits,) = self._append(hidden, past, cache, rows, positions, [contract.LOGITS])
        return logits

    def pick(
        self, hidden: Array, past: Array, cache: CacheBlock, rows: slice, positions: Array
    ) -> Array:
        """As `forward`, but the likeliest tokens, int64 (N, L): never the one for images.

        Their logits stay on the device, where the engine finds the largest of them.
        """
        assert self.picks_tokens
        names = [contract.TOP_ID, contract.TOP_LOGIT]  # the latter is seen to be finite
        tokens, _ = self._append(hidden, past, cache, rows, positions, names)
        return tokens

    def _append(
        self,
        hidden: Array,
        past: Array,
        cache: CacheBlock,
        rows: slice,
        positions: Array,
        outputs: list[str],
    ) -> list[Array]:
        """The last part's outputs after all parts have appended the tokens to their caches."""
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

    def close(self) -> None:
        """Frees every engine and closes the package; a second call does nothing."""
        self._sessions.close()

    def _encode(self, graph: str, name: str, images: Array, on_tile: OnTile | None) -> Array:
        shape = (len(images), self.config.tokens_per_tile, self.config.decoder.dim)
        features = np.empty(shape, np.float32)
        for start in range(0, len(images), self.tile_batch):
            stop = min(start + self.tile_batch, len(images))
            inputs = {name: images[start:stop]}
            (features[start:stop],) = self._sessions[graph].run(inputs, [contract.IMAGE_FEATURES])
            if on_tile is not None:
                on_tile(stop, len(images))
        return features
