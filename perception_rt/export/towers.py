"""The two towers as an export sees them: eager reference, traced graph, graphs to make of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import TextConfig
from perception_rt.export import calibration
from perception_rt.export.graphs import TextGraph, VisionGraph
from perception_rt.export.lowering import Entry, Weight, as_is, uint8_images
from perception_rt.export.parameters import text_parameters, vision_parameters
from perception_rt.export.plan import ExportPlan
from perception_rt.export.quantize import layer_errors
from perception_rt.export.trace import Traced, trace
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.processing.image import normalize

Array = np.ndarray[Any, Any]

_GATE_IMAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one graph of a package is cut from a traced tower.

    Attributes:
        source: the graph's input.
        entry: turns it into the traced graph's input.
        outputs: the graph's output for each traced output that it has.
        attentions: how many attentions the graph computes.
    """

    source: TensorSpec
    entry: Entry
    outputs: Mapping[str, TensorSpec]
    attentions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What eager float32 says.

    Attributes:
        inputs: the input array of each graph.
        outputs: by graph and output name, what it should return for that input.
        errors: relative int8 error by linear weight, in our names; empty if not asked for.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Mapping[str, Array]]
    errors: Mapping[str, float] = field(default_factory=dict)


class Tower(Protocol):
    """One tower of a plan."""

    name: str

    def reference(self, *, int8: bool) -> Reference:
        """Runs the tower in eager on calibration inputs."""

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The traced graph and a weight for each of its parameters."""

    def recipes(self) -> dict[str, Recipe]:
        """The graphs to make, by name."""


class VisionExport:
    """The vision tower: `vision` and `pixels` give the embedding, `features` the taps."""

    name = "vision"

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        self.plan = plan
        self.config = plan.config.vision
        self.source = source

    def reference(self, *, int8: bool) -> Reference:
        """Two synthetic images through the eager tower."""
        spec = self.plan.image
        images = calibration.images(_GATE_IMAGES, spec.height, spec.width)
        pixels = normalize(images, spec)
        tower = _load(VisionTower, self.config, self.source, "visual.")
        errors = {}
        batch = torch.from_numpy(pixels)
        if int8:
            errors = layer_errors(tower, lambda: tower(batch))
        taps = self.plan.tapped
        with torch.inference_mode():
            last = self.config.layers - 1
            *tapped, tokens = tower.forward_taps(batch, [*taps, last])
            embedding = tower.head(tokens).numpy()
        # The first and the last tap bracket the others, which the same graph computes on the way.
        kept = {taps[0]: tapped[0], taps[-1]: tapped[-1]} if taps else {}
        return Reference(
            inputs={
                contract.VISION: images,
                contract.PIXELS: pixels,
                contract.FEATURES: images,
            },
            outputs={
                contract.VISION: {contract.EMBEDDING: embedding},
                contract.PIXELS: {contract.EMBEDDING: embedding},
                contract.FEATURES: {contract.tap_name(i): t.numpy() for i, t in kept.items()},
            },
            errors={f"visual.{name}": error for name, error in errors.items()},
        )

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower on the plan's grid, with its embedding and taps as outputs."""
        grid, spec = self.plan.grid, self.plan.image
        graph = VisionGraph(self.config, grid, self.plan.tapped)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        names = [contract.EMBEDDING, *(contract.tap_name(i) for i in self.plan.tapped)]
        traced = trace(graph, example, input_name=contract.PIXELS_F32, output_names=names)
        return traced, vision_parameters(self.source, graph, self.config, grid)

    def recipes(self) -> dict[str, Recipe]:
        """`vision` from uint8, `pixels` from float, and `features` where blocks are tapped."""
        spec, config = self.plan.image, self.config
        images = TensorSpec(
            name=contract.IMAGES_U8,
            dtype="uint8",
            shape=(contract.BATCH, spec.height, spec.width, 3),
        )
        pixels = TensorSpec(
            name=contract.PIXELS_F32,
            dtype="float32",
            shape=(contract.BATCH, 3, spec.height, spec.width),
        )
        tokens = self.plan.grid[0] * self.plan.grid[1] + int(config.use_cls_token)
        middle = (tokens,) if config.pool_type == "none" else ()
        embedding = _float(contract.EMBEDDING, *middle, config.embed_dim)
        taps = {
            name: _float(name, tokens, config.width)
            for name in map(contract.tap_name, self.plan.tapped)
        }
        normalise = uint8_images(spec.mean, spec.std)
        whole = {contract.EMBEDDING: embedding}
        attentions = config.layers + (config.pool_type == "attn")
        recipes = {
            contract.VISION: Recipe(
                source=images, entry=normalise, outputs=whole, attentions=attentions
            ),
            contract.PIXELS: Recipe(
                source=pixels, entry=as_is, outputs=whole, attentions=attentions
            ),
        }
        if taps:
            deepest = max(self.plan.tapped) + 1
            recipes[contract.FEATURES] = Recipe(
                source=images, entry=normalise, outputs=taps, attentions=deepest
            )
        return recipes


class TextExport:
    """The text tower: token ids to features."""

    name = "text"

    def __init__(self, config: TextConfig, source: WeightSource) -> None:
        self.config = config
        self.source = source

    def reference(self, *, int8: bool) -> Reference:
        """A few captions through the eager tower."""
        ids = calibration.tokens(self.config)
        tower = _load(TextTower, self.config, self.source, "text.")
        batch = torch.from_numpy(ids)
        errors = layer_errors(tower, lambda: tower(batch)) if int8 else {}
        with torch.inference_mode():
            features = tower(batch).numpy()
        return Reference(
            inputs={contract.TEXT: ids},
            outputs={contract.TEXT: {contract.TEXT_EMBEDDING: features}},
            errors={f"text.{name}": error for name, error in errors.items()},
        )

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower at its full context length."""
        graph = TextGraph(self.config)
        shape = (2, self.config.context_length)
        example = torch.zeros(shape, dtype=torch.int64, device="meta")
        names = [contract.TEXT_EMBEDDING]
        traced = trace(graph, example, input_name=contract.TOKENS, output_names=names)
        return traced, text_parameters(self.source, graph)

    def recipes(self) -> dict[str, Recipe]:
        """The one graph, `text`."""
        tokens = TensorSpec(
            name=contract.TOKENS,
            dtype="int64",
            shape=(contract.BATCH, self.config.context_length),
        )
        features = _float(contract.TEXT_EMBEDDING, self.config.output_dim)
        recipe = Recipe(
            source=tokens,
            entry=as_is,
            outputs={contract.TEXT_EMBEDDING: features},
            attentions=self.config.layers,
        )
        return {contract.TEXT: recipe}


def towers(plan: ExportPlan, source: WeightSource) -> list[Tower]:
    """The towers that a plan has."""
    result: list[Tower] = [VisionExport(plan, source)]
    if plan.config.text is not None:
        result.append(TextExport(plan.config.text, source))
    return result


def _float(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(contract.BATCH, *shape))


def _load(kind: Any, config: Any, source: WeightSource, prefix: str) -> Any:
    """A tower in float32 on the CPU, its tensors assigned and not copied."""
    with torch.device("meta"):
        tower: nn.Module = kind(config)
    tensors: dict[str, Tensor] = {
        name: source.load(prefix + name).to(torch.float32) for name in tower.state_dict()
    }
    tower.load_state_dict(tensors, assign=True)
    return tower.eval().requires_grad_(False)
