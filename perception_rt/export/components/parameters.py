"""Weights for the parameters of the traced modules: checkpoint tensors, gains and tables.

Layer scale is folded into the linear layer before it, which is exact. Position and rotary tables
are computed by the model's own functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import VisionConfig
from perception_rt.export.components.traced_modules import (
    DecoderGraph,
    EmbedGraph,
    PyramidGraph,
    TextGraph,
    TileGraph,
    VisionGraph,
)
from perception_rt.export.graph.lazy_weights import Array, Weight
from perception_rt.models.decoder import rope_1d
from perception_rt.models.layers import Rope, rope_2d
from perception_rt.models.vision import probe_keys, token_table
from perception_rt.plm_config import DecoderConfig, PlmConfig

_FLOAT32 = np.dtype(np.float32)
_GRID_TABLES = ("table", "rope_cos", "rope_sin")
_GAINS = {"attn.out_proj": "ls_1.gamma", "mlp.c_proj": "ls_2.gamma"}


def vision_parameters(
    source: WeightSource,
    graph: VisionGraph,
    config: VisionConfig,
    grid: tuple[int, int],
    *,
    is_further: bool = False,
) -> dict[str, Weight]:
    """Weights of a vision graph, by parameter name.

    Args:
        source: weights of the model.
        graph: the traced module.
        config: the tower, with the checkpoint's layer scale.
        grid: patch rows and columns.
        is_further: whether the package has other grids; tables have the grid in their names then.
    """
    weights = _tower_parameters(source, graph, config, grid, "visual.")
    for name in _GRID_TABLES if is_further else ():
        if name in weights:
            label = f"visual.{name}_{grid[0]}x{grid[1]}"
            weights[name] = replace(weights[name], name=label, origin=label)
    return weights


def tile_parameters(source: WeightSource, graph: TileGraph, config: PlmConfig) -> dict[str, Weight]:
    """Weights of a tile graph, by parameter name."""
    grid = (config.vision.grid, config.vision.grid)
    return _tower_parameters(source, graph, config.vision, grid, "vision_model.")


def embed_parameters(source: WeightSource, graph: EmbedGraph) -> dict[str, Weight]:
    """Weights of an embedding graph, by parameter name."""
    return {name: _matrix(source, name, p) for name, p in graph.named_parameters()}


def decoder_parameters(
    source: WeightSource, graph: DecoderGraph, config: DecoderConfig, excluded: int
) -> dict[str, Weight]:
    """Weights of a decoder graph, by parameter name; token `excluded` is never its top token."""
    head = "tok_embeddings.weight" if config.weight_tying else "output.weight"
    tables = _rope(lambda: rope_1d(config, config.max_seqlen))
    weights = {}
    for name, parameter in graph.named_parameters():
        if name in tables:
            shape = tuple(parameter.shape)
            weights[name] = Weight(f"decoder.{name}", _FLOAT32, shape, tables[name])
        elif name == "exclusion":
            load = partial(_exclusion, config.vocab_size, excluded)
            weights[name] = Weight("decoder.exclusion", _FLOAT32, (config.vocab_size,), load)
        else:
            weights[name] = _matrix(source, head if name == "head" else name, parameter)
    return weights


def _exclusion(vocab_size: int, excluded: int) -> Array:
    """Additions (V,) to logits (..., V) that keep a token from being the largest."""
    array = np.zeros(vocab_size, np.float32)
    array[excluded] = np.finfo(np.float16).min
    return array


def _tower_parameters(
    source: WeightSource,
    graph: VisionGraph | TileGraph,
    config: VisionConfig,
    grid: tuple[int, int],
    prefix: str,
) -> dict[str, Weight]:
    """Weights of a graph with a vision tower, whose checkpoint names start with `prefix`."""
    computed = _tables(source, config, grid, prefix)
    weights = {}
    for name, parameter in graph.named_parameters():
        leaf = name.removeprefix("tower.")
        own = leaf == name and name not in computed
        key = name if own else prefix + leaf
        load = computed.get(name) or (
            _loader(source, key) if own else _tower_load(source, config, prefix, leaf)
        )
        weights[name] = Weight(key, _FLOAT32, tuple(parameter.shape), load, origin=key)
    return weights


def backbone_parameters(
    source: WeightSource,
    graph: PyramidGraph,
    config: VisionConfig,
    tables: Mapping[str, tuple[str, Callable[[], Tensor]]],
) -> dict[str, Weight]:
    """Weights of a detection backbone, by parameter name.

    Args:
        source: weights of the backbone.
        graph: the traced module.
        config: the tower, with the checkpoint's layer scale.
        tables: name in the package, and value, of each table by parameter name.
    """

    def computed(table: Callable[[], Tensor]) -> Callable[[], Array]:
        return lambda: _float32(table())

    weights = {}
    for name, parameter in graph.named_parameters():
        leaf = name.removeprefix("tower.")
        if name in tables:
            key, table = tables[name]
            load = computed(table)
        elif leaf == name:
            key, load = name, _loader(source, name)
        else:
            key, load = f"visual.{leaf}", _tower_load(source, config, "visual.", leaf)
        weights[name] = Weight(key, _FLOAT32, tuple(parameter.shape), load, origin=key)
    return weights


def text_parameters(source: WeightSource, graph: TextGraph) -> dict[str, Weight]:
    """Weights of a text graph, by parameter name."""
    weights = {}
    for name, parameter in graph.named_parameters():
        key = f"text.{name.removeprefix('tower.')}"
        load = _loader(source, key)
        weights[name] = Weight(key, _FLOAT32, tuple(parameter.shape), load, origin=key)
    return weights


def _loader(source: WeightSource, key: str) -> Callable[[], Array]:
    return lambda: _float32(source.load(key))


def _matrix(source: WeightSource, key: str, parameter: Tensor) -> Weight:
    """A weight from a checkpoint tensor that can be read row by row."""

    def rows(start: int, stop: int) -> Array:
        return _float32(source.load_rows(key, start, stop))

    shape = tuple(parameter.shape)
    return Weight(key, _FLOAT32, shape, _loader(source, key), origin=key, rows=rows)


def _float32(tensor: Tensor) -> Array:
    array: Array = tensor.to(torch.float32).numpy()
    return array


def _tower_load(
    source: WeightSource, config: VisionConfig, prefix: str, name: str
) -> Callable[[], Array]:
    """Reads a tensor of a tower; folds in the layer scale that follows it."""
    block, _, rest = name.partition(".resblocks.")
    index, _, leaf = rest.partition(".")
    gain = _GAINS.get(leaf.rpartition(".")[0])
    if config.ls_init_value is None or gain is None:
        return _loader(source, prefix + name)
    gain_key = f"{prefix}{block}.resblocks.{index}.{gain}"

    def load() -> Array:
        tensor, gains = source.load(prefix + name).float(), source.load(gain_key).float()
        return _float32(tensor * (gains[:, None] if tensor.ndim == 2 else gains))

    return load


def _tables(
    source: WeightSource, config: VisionConfig, grid: tuple[int, int], prefix: str
) -> dict[str, Callable[[], Array]]:
    def table() -> Array:
        positions = class_embedding = None
        if config.use_abs_posemb:
            positions = source.load(f"{prefix}positional_embedding").float()
        if config.use_cls_token:
            class_embedding = source.load(f"{prefix}class_embedding").float()
        result = token_table(positions, class_embedding, config, grid)
        assert result is not None
        return _float32(result)

    def rope() -> Rope:
        with_class, native = config.use_cls_token, config.timm_grid
        return rope_2d(grid, config.head_dim, class_token=with_class, native=native)

    def keys() -> Array:
        pool = f"{prefix}attn_pool."
        names = ("probe", "attn.in_proj_weight", "attn.in_proj_bias")
        probe, weight, bias = (source.load(pool + name).float() for name in names)
        return _float32(probe_keys(probe, weight, bias, config.attn_pooler_heads))

    return {"table": table, "probe_keys": keys, **_rope(rope)}


def _rope(tables: Callable[[], Rope]) -> Mapping[str, Callable[[], Array]]:
    return {"rope_cos": lambda: _float32(tables().cos), "rope_sin": lambda: _float32(tables().sin)}
