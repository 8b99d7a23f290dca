"""The native decoder for CPUs: embedding and decoder in C++, from weights that are used in place.

A token's result does not depend on the tokens and sequences that are computed beside it, nor on the
processor (`perception_rt/native/src/kernels.h`).

Legend: N sequences, T tokens, C decoder width, L logit positions, V vocabulary, S cache slots.
"""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.cores import physical_cores
from perception_rt.errors import BackendError, CapacityError, InputError, PackageError
from perception_rt.native import layout
from perception_rt.native.library import (
    Call,
    Layer,
    Matrix,
    Model,
    Shape,
    best_instruction_set,
    load_library,
)
from perception_rt.package import contract
from perception_rt.package.reader import Package
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.runtime.session import State

Array = np.ndarray[Any, Any]


def check_device(device: str) -> None:
    """BackendError unless the library is compiled; InputError for anything but "cpu"."""
    if device != "cpu":
        raise InputError(f"unknown device {device!r:.40}; the native decoder runs on cpu")
    load_library()


def open_session(
    package: Package,
    graph: str,
    *,
    device: str,
    threads: int | None,
    cache_dir: Path | None = None,
) -> "EmbeddingEngine | DecoderEngine":
    """Opens the embedding or the decoder of a language model.

    Args:
        package: an open package.
        graph: name of the graph.
        device: "cpu".
        threads: threads of one call; None for one per physical core.
        cache_dir: ignored.

    Raises:
        PackageError: the graph file or a data file is damaged, or does not fit the architecture.
        BackendError: the library is not compiled.
    """
    config = PlmConfig.from_dict(package.manifest.content.architecture).decoder
    if graph == contract.EMBED:
        tensors = _read(package, graph, layout.table_matrices(config), {})
        return EmbeddingEngine(tensors, config)
    matrices, vectors = layout.decoder_matrices(config), layout.decoder_vectors(config)
    tensors = _read(package, graph, matrices, vectors)
    caches = [spec for spec in package.graph(graph).inputs if contract.is_cache(spec.name)]
    if len(caches) != 2 * config.n_layers:
        raise PackageError(f"graph {graph!r} must have all layers of the decoder")
    half = caches[0].dtype == "float16"
    return DecoderEngine(tensors, config, threads or physical_cores(), half)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Tensors of a graph: their addresses, and the mappings that keep them valid."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, int]
    mappings: Sequence[Array]


def _read(
    package: Package,
    graph: str,
    matrices: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, tuple[int, ...]],
) -> _Tensors:
    spec, files = package.graph(graph), package.manifest.content.files
    sizes = {name: files[name].size_bytes for name in spec.data}
    try:
        places = layout.parse(package.read(spec.file), matrices, vectors, sizes)
    except PackageError as error:
        raise PackageError(f"package {package.name!r}, {spec.file}: {error}") from None
    # Zero-copy: the kernels read the mapped files.
    maps = {name: np.frombuffer(package.map(name), np.uint8) for name in spec.data}
    addresses = {n: maps[p.file].ctypes.data + p.offset for n, p in places.items()}
    return _Tensors(
        matrices={
            name: Matrix(addresses[name], layout.FORMATS[places[name].format], *shape)
            for name, shape in matrices.items()
        },
        vectors={name: addresses[name] for name in vectors},
        mappings=list(maps.values()),
    )


class EmbeddingEngine:
    """Looks rows of the embedding up."""

    def __init__(self, tensors: _Tensors, config: DecoderConfig) -> None:
        self._library = load_library()
        self._tensors = tensors
        self._width = config.dim
        self._rows = config.vocab_size

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Returns [float32 (N, T, C)] of int64 token ids (N, T)."""
        ids = np.ascontiguousarray(inputs[contract.TOKENS])
        if not 0 <= ids.min() <= ids.max() < self._rows:
            raise InputError(f"a token id is not in 0 to {self._rows - 1}")
        hidden = np.empty((*ids.shape, self._width), np.float32)
        table = self._tensors.matrices[layout.TABLE]
        failed = self._library.prt_rows(
            ctypes.byref(table), ids.ctypes.data, ids.size, hidden.ctypes.data
        )
        if failed:
            raise CapacityError("there is no memory for a row of the embedding")
        return [hidden]

    def close(self) -> None:
        """Does nothing: the mappings end with the last reference."""


class DecoderEngine:
    """All layers of a decoder, its norm and its head. Calls from several threads take turns."""

    def __init__(
        self, tensors: _Tensors, config: DecoderConfig, threads: int, half_cache: bool
    ) -> None:
        self._library = load_library()
        self._lock = threading.Lock()
        self._config = config
        matrices, vectors = tensors.matrices, tensors.vectors
        # All that the library points to: it copies the structures, not the memory.
        self._tensors = tensors
        layers = [
            Layer(
                vectors[f"layers.{index}.attention_norm"],
                matrices[f"layers.{index}.attention.qkv"],
                matrices[f"layers.{index}.attention.wo"],
                vectors[f"layers.{index}.ffn_norm"],
                matrices[f"layers.{index}.feed_forward.gate_up"],
                matrices[f"layers.{index}.feed_forward.w2"],
            )
            for index in range(config.n_layers)
        ]
        shape = Shape(
            dim=config.dim,
            layers=config.n_layers,
            heads=config.n_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            ffn_dim=config.ffn_dim,
            vocab_size=config.vocab_size,
            max_length=config.max_seqlen,
            norm_eps=config.norm_eps,
            half_cache=half_cache,
        )
        model = Model(
            shape=shape,
            layers=(Layer * len(layers))(*layers),
            norm=vectors["norm"],
            head=matrices[layout.HEAD],
            cos=vectors["rope_cos"],
            sin=vectors["rope_sin"],
        )
        name = best_instruction_set()
        self._decoder: int | None = self._library.prt_open(
            ctypes.byref(model), name.encode(), threads
        )
        if not self._decoder:
            raise CapacityError("there is no memory for the native decoder")

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Returns [logits, float32 (N, L, V)] and appends keys and values to the caches."""
        hidden, past, positions = (
            np.ascontiguousarray(inputs[name])
            for name in (contract.HIDDEN, contract.PAST_LENGTHS, contract.LOGIT_POSITIONS)
        )
        count, length, _ = hidden.shape
        layers = range(self._config.n_layers)
        keys = [state[contract.key_cache(layer)] for layer in layers]
        values = [state[contract.value_cache(layer)] for layer in layers]
        slots = keys[0].shape[2]
        self._check(count, length, past, positions, [*keys, *values], slots)
        logits = np.empty((count, positions.shape[1], self._config.vocab_size), np.float32)
        call = Call(
            hidden=hidden.ctypes.data,
            past=past.ctypes.data,
            keys=_addresses(keys),
            values=_addresses(values),
            positions=positions.ctypes.data,
            logits=logits.ctypes.data,
            sequences=count,
            tokens=length,
            slots=slots,
            count=positions.shape[1],
        )
        with self._lock:  # `close` waits for it
            if self._decoder is None:
                raise BackendError("the native decoder is closed")
            failed = self._library.prt_forward(self._decoder, ctypes.byref(call))
        if failed:
            raise CapacityError(f"there is no memory to decode {count * length} tokens at once")
        return [logits]

    def _check(
        self,
        count: int,
        length: int,
        past: Array,
        positions: Array,
        caches: Sequence[State],
        slots: int,
    ) -> None:
        """InputError unless the library may use the arrays; shapes alone were checked before."""
        if past.shape != (count,) or len(positions) != count:
            raise InputError(f"{len(past)} lengths and {len(positions)} positions for {count} rows")
        if not all(cache.shape[0] == count and cache.shape[2] == slots for cache in caches):
            raise InputError(f"all caches must have {count} rows of {slots} slots")
        limit = min(slots, self._config.max_seqlen)
        if past.min() < 0 or past.max() + length > limit:
            raise InputError(f"{past.max()} tokens and {length} more do not fit {limit} slots")
        if not 0 <= positions.min() <= positions.max() < length:
            raise InputError(f"a position is not in 0 to {length - 1}")

    def close(self) -> None:
        """Frees the decoder, after a run in progress."""
        with self._lock:
            decoder, self._decoder = self._decoder, None
            if decoder is not None:
                self._library.prt_close(decoder)


def _addresses(arrays: Sequence[State]) -> "ctypes.Array[ctypes.c_void_p]":
    found = [a.ctypes.data if isinstance(a, np.ndarray) else a.address for a in arrays]
    return (ctypes.c_void_p * len(found))(*found)
