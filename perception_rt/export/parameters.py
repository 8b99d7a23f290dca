"""What the traced modules' parameters are made of: checkpoint tensors, gains and tables.

Layer scale is folded into the linear layer before it, exactly; position and rotary tables are
computed for the grid by the model's own functions.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import VisionConfig
from perception_rt.export.graphs import TextGraph, VisionGraph
from perception_rt.export.lowering import Array, Weight
from perception_rt.models.layers import rope_2d
from perception_rt.models.vision import token_table

_FLOAT32 = np.dtype(np.float32)
_GAINS = {"attn.out_proj": "ls_1.gamma", "mlp.c_proj": "ls_2.gamma"}


def vision_parameters(
    source: WeightSource, graph: VisionGraph, config: VisionConfig, grid: tuple[int, int]
) -> dict[str, Weight]:
    """A weight for each parameter of a vision graph; `config` still has its layer scale."""
    computed = _tables(source, config, grid)
    weights = {}
    for name, parameter in graph.named_parameters():
        shape = tuple(parameter.shape)
        load = computed.get(name) or _tower_load(source, config, name.removeprefix("tower."))
        key = f"visual.{name.removeprefix('tower.')}"
        weights[name] = Weight(key, _FLOAT32, shape, load, origin=key)
    return weights


def text_parameters(source: WeightSource, graph: TextGraph) -> dict[str, Weight]:
    """A weight for each parameter of a text graph."""
    weights = {}
    for name, parameter in graph.named_parameters():
        key = f"text.{name.removeprefix('tower.')}"
        load = _loader(source, key)
        weights[name] = Weight(key, _FLOAT32, tuple(parameter.shape), load, origin=key)
    return weights


def _loader(source: WeightSource, key: str) -> Callable[[], Array]:
    return lambda: _float32(source.load(key))


def _float32(tensor: Tensor) -> Array:
    array: Array = tensor.to(torch.float32).numpy()
    return array


def _tower_load(source: WeightSource, config: VisionConfig, name: str) -> Callable[[], Array]:
    """Reads `visual.<name>`, with the layer scale that follows it folded in."""
    key = f"visual.{name}"
    block, _, rest = name.partition(".resblocks.")
    index, _, leaf = rest.partition(".")
    gain = _GAINS.get(leaf.rpartition(".")[0])
    if config.ls_init_value is None or gain is None:
        return _loader(source, key)
    gain_key = f"visual.{block}.resblocks.{index}.{gain}"

    def load() -> Array:
        tensor, gains = source.load(key).float(), source.load(gain_key).float()
        return _float32(tensor * (gains[:, None] if tensor.ndim == 2 else gains))

    return load


def _tables(
    source: WeightSource, config: VisionConfig, grid: tuple[int, int]
) -> dict[str, Callable[[], Array]]:
    def table() -> Array:
        positions = class_embedding = None
        if config.use_abs_posemb:
            positions = source.load("visual.positional_embedding").float()
        if config.use_cls_token:
            class_embedding = source.load("visual.class_embedding").float()
        result = token_table(positions, class_embedding, config.grid, grid)
        assert result is not None
        return _float32(result)

    def rope(part: int) -> Array:
        tables = rope_2d(grid, config.head_dim, class_token=config.use_cls_token)
        return _float32(tables[part])

    return {"table": table, "rope_cos": lambda: rope(0), "rope_sin": lambda: rope(1)}
