"""Weight files of the native decoder: which tensors there are, and how each is stored.

A graph file names the place of every tensor; sizes follow from the architecture, so the file cannot
contradict it. A matrix (O, C) is stored in panels of 16 rows, in the order in which the kernels
read it (`src/kernels.h`), and is used in place. Gains of norms and rotary tables are plain float32.

Legend: O rows, C columns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from perception_rt.errors import PackageError
from perception_rt.plm_config import DecoderConfig

KIND = "native-decoder"  # of graph files
ROWS = 16  # of a panel
BLOCK = 32  # columns that share a scale
ALIGNMENT = 64  # bytes; columns are padded to a multiple of the same number
FORMATS = {"float32": 0, "int8": 1, "int4": 2}  # numbers in the library
TABLE = "tok_embeddings"  # the embedding
HEAD = "head"

_SCHEMA = 1
_BLOCK_BYTES = {"float32": 4 * BLOCK, "int8": 2 + BLOCK, "int4": 2 + BLOCK // 2}
_KEYS = {"file", "offset", "format"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Place of a tensor.

    Attributes:
        file: data file in the package.
        offset: first byte, a multiple of 64.
        format: key of `FORMATS`.
    """

    file: str
    offset: int
    format: str


def padded(columns: int) -> int:
    """Columns of a matrix as it is stored."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def matrix_bytes(format_: str, rows: int, columns: int) -> int:
    """Bytes of a stored matrix."""
    panels = -(-rows // ROWS)
    return panels * ROWS * padded(columns) // BLOCK * _BLOCK_BYTES[format_]


def decoder_matrices(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Shapes (O, C) of a decoder's matrices; queries, keys and values are one, as gate and up."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {}
    for index in range(config.n_layers):
        layer = f"layers.{index}."
        shapes[f"{layer}attention.qkv"] = (q_dim + 2 * kv_dim, config.dim)
        shapes[f"{layer}attention.wo"] = (config.dim, q_dim)
        shapes[f"{layer}feed_forward.gate_up"] = (2 * config.ffn_dim, config.dim)
        shapes[f"{layer}feed_forward.w2"] = (config.dim, config.ffn_dim)
    return {**shapes, HEAD: (config.vocab_size, config.dim)}


def decoder_vectors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder's gains and rotary tables."""
    norms = ("attention_norm", "ffn_norm")
    table = (config.max_seqlen, config.head_dim // 2)
    return {
        **{f"layers.{i}.{norm}": (config.dim,) for i in range(config.n_layers) for norm in norms},
        "norm": (config.dim,),
        "rope_cos": table,
        "rope_sin": table,
    }


def table_matrices(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Shape (V, C) of the embedding."""
    return {TABLE: (config.vocab_size, config.dim)}


def dump(places: Mapping[str, Place]) -> bytes:
    """The bytes of a graph file."""
    tensors = {
        name: {"file": place.file, "offset": place.offset, "format": place.format}
        for name, place in places.items()
    }
    return json.dumps({"schema": _SCHEMA, "tensors": tensors}, indent=1, sort_keys=True).encode()


def parse(
    data: bytes,
    matrices: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, tuple[int, ...]],
    files: Mapping[str, int],
) -> dict[str, Place]:
    """The places in a graph file.

    Args:
        data: bytes of the file.
        matrices: matrices that it must have, by name.
        vectors: vectors and tables that it must have, by name.
        files: sizes in bytes of the graph's data files.

    Raises:
        PackageError: the file is damaged, or a tensor is missing, unknown, or beyond its file.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise PackageError("a native graph file is not JSON") from None
    if not isinstance(values, dict) or set(values) != {"schema", "tensors"}:
        raise PackageError("a native graph file must have exactly the keys schema and tensors")
    if values["schema"] != _SCHEMA or not isinstance(values["tensors"], dict):
        raise PackageError(
            f"a native graph file of schema {values['schema']!a:.20}; this version reads {_SCHEMA}"
        )
    tensors = values["tensors"]
    for name in sorted(tensors.keys() ^ (matrices.keys() | vectors.keys())):
        state = "an unknown" if name in tensors else "no"
        raise PackageError(f"a native graph file has {state} tensor {name!a:.80}")
    return {name: _place(name, tensors[name], matrices, vectors, files) for name in tensors}


def _place(
    name: str,
    data: Any,
    matrices: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, tuple[int, ...]],
    files: Mapping[str, int],
) -> Place:
    if not isinstance(data, dict) or set(data) != _KEYS:
        raise PackageError(f"tensor {name!a:.80} must have exactly the keys file, format, offset")
    file, offset, format_ = data["file"], data["offset"], data["format"]
    known = FORMATS if name in matrices else {"float32"}
    if not isinstance(format_, str) or format_ not in known:
        raise PackageError(f"tensor {name!a:.80} has the format {format_!a:.40}")
    if not isinstance(file, str) or file not in files:
        raise PackageError(f"tensor {name!a:.80} is in {file!a:.80}, no data file of its graph")
    if name in matrices:
        size = matrix_bytes(format_, *matrices[name])
    else:
        size = 4 * prod(vectors[name])
    if type(offset) is not int or offset < 0 or offset % ALIGNMENT or offset + size > files[file]:
        raise PackageError(
            f"tensor {name!a:.80} of {size} bytes from {offset!a:.40} on does not fit {file!a:.80}"
        )
    return Place(file=file, offset=offset, format=format_)
