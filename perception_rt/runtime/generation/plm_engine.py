"""The engine calls of a Perception Language Model package: embed, encode tiles, decode.

Owns the graphs of a package and the order in which they are called. It knows neither prompts nor
requests: which rows of a cache block belong to whom is its caller's affair.

Legend: N sequences, T tokens, C channels of the decoder, L logit positions, V vocabulary;
n tiles, S tile side in pixels, t image tokens per tile.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from perception_rt.errors import InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.package.reader import Package
from perception_rt.plm_config import PlmConfig
from perception_rt.runtime.cache.kv_block import CacheBlock, CacheShape
from perception_rt.runtime.cache.kv_pool import SMALLEST_ROW
from perception_rt.runtime.session import Sessions, block_maker
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]
OnTile = Callable[[int, int], None]

_CACHE_DTYPES = ("float32", "float16")


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
        try:
            self.config = PlmConfig.from_dict(package.manifest.content.architecture)
        except InputError as error:
            raise PackageError(f"package {package.name!r}: {error}") from None
        decoder = self.config.decoder
        self.max_length = decoder.max_seqlen
        self._parts = _decoder_parts(package, decoder.n_layers)
        self.cache_shape = CacheShape(
            layers=decoder.n_layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            dtype=_cache_dtype(package),
        )
        slots = _fixed_slots(package)
        _check_graphs(package, self.config, self._parts, self.cache_shape, slots)
        self._make_block = block_maker(backend, device)
        is_whole = slots is not None or self._make_block is not None
        self.smallest_row = (
            decoder.max_seqlen if is_whole else min(SMALLEST_ROW, decoder.max_seqlen)
        )
        target = get_target(backend)
        last = package.graph(contract.decoder_part(len(self._parts) - 1))
        has_picks = any(spec.name == contract.TOP_ID for spec in last.outputs)
        self.picks_tokens = target.picks_tokens and has_picks
        self.tile_batch = target.tile_batch
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


def _decoder_parts(package: Package, n_layers: int) -> list[range]:
    """The layers of each decoder part; PackageError unless they are all layers, in order."""
    parts: list[range] = []
    start = 0
    while start < n_layers:
        graph = contract.decoder_part(len(parts))
        names = {spec.name for spec in package.graph(graph).inputs}
        stop = start
        while contract.key_cache(stop) in names:
            stop += 1
        if stop == start or stop > n_layers:
            raise PackageError(
                f"package {package.name!r}: graph {graph!r} must start with layer {start} and "
                f"end with layer {n_layers - 1} or before"
            )
        parts.append(range(start, stop))
        start = stop
    if contract.decoder_part(len(parts)) in package.manifest.content.graphs:
        raise PackageError(f"package {package.name!r} has decoder parts beyond its last layer")
    return parts


def _first_cache(package: Package) -> TensorSpec:
    (spec,) = [
        spec
        for spec in package.graph(contract.decoder_part(0)).inputs
        if spec.name == contract.key_cache(0)
    ]
    return spec


def _fixed_slots(package: Package) -> int | None:
    """S, if the engines are built for one."""
    shape = _first_cache(package).shape
    slots = shape[2] if len(shape) == 4 else None
    return slots if isinstance(slots, int) else None


def _cache_dtype(package: Package) -> str:
    dtype = _first_cache(package).dtype
    if dtype not in _CACHE_DTYPES:
        raise PackageError(
            f"package {package.name!r}: a cache is of {' or '.join(_CACHE_DTYPES)}, not {dtype}"
        )
    return dtype


def _check_graphs(
    package: Package, config: PlmConfig, parts: list[range], cache: CacheShape, slots: int | None
) -> None:
    """PackageError unless every graph takes and gives what the architecture implies."""
    if slots is not None and slots != config.decoder.max_seqlen:
        raise PackageError(
            f"package {package.name!r}: a cache of {slots} slots is not for sequences of "
            f"{config.decoder.max_seqlen} tokens"
        )
    dim, side = config.decoder.dim, config.vision.image_size
    tokens = _float32("", config.tokens_per_tile, dim).shape
    features = [TensorSpec(name=contract.IMAGE_FEATURES, dtype="float32", shape=tokens)]
    length = contract.LENGTH
    hidden = _float32(contract.HIDDEN, length, dim)
    ids = TensorSpec(name=contract.TOKENS, dtype="int64", shape=(contract.BATCH, length))
    tiles = TensorSpec(
        name=contract.IMAGES_U8, dtype="uint8", shape=(contract.BATCH, side, side, 3)
    )
    _check_graph(package, contract.EMBED, [ids], [hidden])
    _check_graph(package, contract.VISION, [tiles], features)
    _check_graph(package, contract.PIXELS, [_float32(contract.PIXELS_F32, 3, side, side)], features)
    past = TensorSpec(name=contract.PAST_LENGTHS, dtype="int32", shape=(contract.BATCH,))
    for index, layers in enumerate(parts):
        graph = contract.decoder_part(index)
        caches = [
            TensorSpec(
                name=name,
                dtype=cache.dtype,
                shape=(contract.BATCH, cache.kv_heads, slots or contract.SLOTS, cache.head_dim),
            )
            for layer in layers
            for name in (contract.key_cache(layer), contract.value_cache(layer))
        ]
        inputs = [hidden, past, *caches]
        outputs = [
            TensorSpec(name=contract.updated(spec.name), dtype=spec.dtype, shape=spec.shape)
            for spec in caches
        ]
        if index < len(parts) - 1:
            outputs.append(_float32(contract.HIDDEN_OUT, length, dim))
        else:
            where = (contract.BATCH, contract.POSITIONS)
            inputs.append(TensorSpec(name=contract.LOGIT_POSITIONS, dtype="int64", shape=where))
            logits = _float32(contract.LOGITS, contract.POSITIONS, config.decoder.vocab_size)
            outputs.append(logits)
            if any(spec.name == contract.TOP_ID for spec in package.graph(graph).outputs):
                outputs.append(_float32(contract.TOP_LOGIT, contract.POSITIONS))
                outputs.append(TensorSpec(name=contract.TOP_ID, dtype="int64", shape=where))
        _check_graph(package, graph, inputs, outputs)


def _float32(name: str, *sizes: int | str) -> TensorSpec:
    """A float32 tensor with a batch dimension in front."""
    return TensorSpec(name=name, dtype="float32", shape=(contract.BATCH, *sizes))


def _check_graph(
    package: Package, graph: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> None:
    """PackageError unless a graph has these tensors, in any order; all dynamic sizes are equal."""
    spec = package.graph(graph)
    for what, found, wanted in (
        ("input", spec.inputs, inputs),
        ("output", spec.outputs, outputs),
    ):
        have = {tensor.name: tensor for tensor in found}
        want = {tensor.name: tensor for tensor in wanted}
        for name in sorted(set(have) ^ set(want)):
            state = "an unknown" if name in have else "no"
            raise PackageError(
                f"package {package.name!r}: graph {graph!r} has {state} {what} {name!a:.80}"
            )
        for name, tensor in want.items():
            if have[name].dtype != tensor.dtype or _sizes(have[name]) != _sizes(tensor):
                raise PackageError(
                    f"package {package.name!r}: {what} {name!r} of graph {graph!r} must be "
                    f"{tensor.dtype} {tensor.shape}, not {have[name].dtype} {have[name].shape}"
                )


def _sizes(spec: TensorSpec) -> list[int]:
    """The shape, with 0 for what is dynamic."""
    return [size if isinstance(size, int) else 0 for size in spec.shape]
