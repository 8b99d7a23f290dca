"""Loads the weights that a language model starts from: a whole checkpoint, or tower and decoder.

Weights are read one at a time by parameter name. The tower may come from a Perception Encoder that
is deeper or has another patch grid, and the decoder from a Llama.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.names import detect_layout, layout_starts, stored_tensors
from perception_rt.checkpoint.plm_names import current_hf_keys, hf_entry, original_entry
from perception_rt.checkpoint.readers import Reader, open_reader
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.wrappers import plain_names, without_wrappers
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.vision import resize_positions
from perception_rt.plm_config import PlmConfig
from training.recipe.schema import InitConfig

_TOWER = "vision_model."
_PROJECTOR = "vision_projector."
_VISUAL = "visual."  # the tower's prefix in a Perception Encoder
_POSITIONS = "visual.positional_embedding"
_GAIN = ".gamma"
# Hugging Face's prefixes for the decoder of a multimodal model, and for a Llama.
_HF_DECODER = "model.language_model."
_HF_LLAMA = "model."

Load = Callable[[str], Tensor]


class PretrainedWeights:
    """The checkpoints of a recipe's section `init`.

    Args:
        init: the recipe's section `init`.
        model: architecture to train.

    Raises:
        CheckpointError: a file is unreadable or lacks a tensor of the architecture.
    """

    def __init__(self, init: InitConfig, model: PlmConfig) -> None:
        shapes: dict[str, Shape] = {n: tuple(s) for n, s in expected_tensors(model).items()}
        tower = {name: shape for name, shape in shapes.items() if name.startswith(_TOWER)}
        ends = (_TOWER, _PROJECTOR)
        decoder = {name: shape for name, shape in shapes.items() if not name.startswith(ends)}
        self._loads: dict[str, Load] = {}
        if init.checkpoint is not None:
            self._loads = _whole(init.checkpoint, model, shapes)
        if init.vision is not None:
            self._loads |= _vision(init.vision, model, tower)
        if init.decoder is not None:
            self._loads |= _decoder(init.decoder, model, decoder)

    def load(self, name: str) -> Tensor | None:
        """Loads a weight as float32; None if it starts at random."""
        load = self._loads.get(name)
        return None if load is None else load(name).float()


def _whole(path: str, model: PlmConfig, shapes: Mapping[str, Shape]) -> dict[str, Load]:
    """All weights, except layer scales that this model has and the checkpoint has not.

    The released models gain layer scale between stage 1 and stage 2.
    """
    stored = find_config(path)
    if isinstance(stored, PlmConfig) and stored.vision.ls_init_value is None:
        model = replace(model, vision=replace(model.vision, ls_init_value=None))
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(_GAIN)}
    return dict.fromkeys(shapes, open_checkpoint(path, model).load)


def _vision(path: str, model: PlmConfig, shapes: Mapping[str, Shape]) -> dict[str, Load]:
    """The tower of a Perception Encoder in any layout, with its position table resized."""
    reader = open_reader(Path(path))
    config = model.vision
    encoder = PeConfig(vision=config)
    try:
        keys = plain_names(reader.headers, layout_starts(encoder), ema=False).keys
        layout = detect_layout(keys, encoder)
    except CheckpointError as error:
        raise CheckpointError(f"{reader.label}: {error}") from None
    if layout == "reference" and any(key.startswith(_VISUAL) for key in keys):
        keys = {k.removeprefix(_VISUAL): f for k, f in keys.items() if k.startswith(_VISUAL)}
    wanted = {_VISUAL + name.removeprefix(_TOWER): shape for name, shape in shapes.items()}
    prefix, native = int(config.use_cls_token), config.grid
    for entry in stored_tensors(layout, wanted):
        if entry.name == _POSITIONS and entry.keys[0] in keys:
            rows = reader.headers[keys[entry.keys[0]]].shape[-2]
            native = math.isqrt(max(0, rows - prefix))
            wanted[_POSITIONS] = (prefix + native**2, config.width)
    part = _Part(reader, keys, stored_tensors(layout, wanted))

    def load(name: str) -> Tensor:
        name = _VISUAL + name.removeprefix(_TOWER)
        tensor = part.load(name)
        if name != _POSITIONS:
            return tensor
        return resize_positions(tensor, native, (config.grid, config.grid), prefix)

    return dict.fromkeys(shapes, load)


def _decoder(path: str, model: PlmConfig, shapes: Mapping[str, Shape]) -> dict[str, Load]:
    """The decoder of a Llama or Perception Language Model, in Meta's or transformers' layout."""
    reader = open_reader(Path(path))
    keys = current_hf_keys(without_wrappers(reader.headers))
    head_dim = model.decoder.head_dim
    if any(key.startswith(_HF_LLAMA) for key in keys):
        entries = [hf_entry(name, shape, head_dim) for name, shape in shapes.items()]
        if not any(key.startswith(_HF_DECODER) for key in keys):
            entries = [
                replace(entry, keys=(entry.keys[0].replace(_HF_DECODER, _HF_LLAMA),))
                for entry in entries
            ]
    else:
        entries = [original_entry(name, shape) for name, shape in shapes.items()]
    return dict.fromkeys(shapes, _Part(reader, keys, entries).load)


class _Part:
    """Selected tensors of a checkpoint; all others are ignored."""

    def __init__(self, reader: Reader, keys: Mapping[str, str], entries: Sequence[Stored]) -> None:
        self._reader = reader
        self._keys = keys
        self._entries = {entry.name: entry for entry in entries}
        for entry in entries:
            for key, shape in zip(entry.keys, entry.shapes, strict=True):
                problem = self._problem(key, shape)
                if problem is not None:
                    raise CheckpointError(f"{reader.label}: {key} {problem}")

    def load(self, name: str) -> Tensor:
        """Loads a parameter's tensor; CheckpointError if it is unreadable or not finite."""
        entry = self._entries[name]
        tensor = entry.unpack([self._reader.read(self._keys[key]) for key in entry.keys])
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self._reader.label}: {name} has elements that are not finite")
        return tensor

    def _problem(self, key: str, shape: Shape) -> str | None:
        if key not in self._keys:
            return "is missing; is it a checkpoint of another architecture?"
        header = self._reader.headers[self._keys[key]]
        if header.unusable is not None:
            return f"is {header.unusable}"
        return None if header.shape == shape else f"is {header.shape}, not {shape}"
