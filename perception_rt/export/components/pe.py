"""The towers of a PE as an export sees them: eager reference, trace, graphs to make of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import TextConfig
from perception_rt.export.components.parameters import text_parameters, vision_parameters
from perception_rt.export.components.traced_modules import TextGraph, VisionGraph
from perception_rt.export.fidelity import MIN_COSINE
from perception_rt.export.graph.lazy_weights import Weight
from perception_rt.export.graph.lowering import Entry, as_is, uint8_images
from perception_rt.export.graph.trace import Traced, trace
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format, Scheme
from perception_rt.export.quantization.modelopt import ModelOptRanges
from perception_rt.export.quantization.sensitivity import (
    Measured,
    Ranges,
    measure_layers,
    refuse_layers,
)
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.processing.clip_bpe import MIN_CONTEXT, VOCAB_SIZE, TextSpec
from perception_rt.processing.image import ImageSpec, normalize

Array = np.ndarray[Any, Any]

_GATE_IMAGES = 2
# What a tower's cosine is better than the gate's limit in a simulation, where all else is float32.
_MARGIN = 0.0008


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one graph of a package is cut from a traced tower.

    Attributes:
        sources: for each traced input, the graph's input and what turns it into the traced one.
        outputs: the graph's output for each traced output that it has.
        attentions: how many attentions the graph computes.
        cached_attentions: how many attentions over a key-value cache.
    """

    sources: Sequence[tuple[TensorSpec, Entry]]
    outputs: Mapping[str, TensorSpec]
    attentions: int = 0
    cached_attentions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What eager float32 says.

    Attributes:
        inputs: the input arrays of each graph, by name.
        outputs: by graph and output name, what it should return for that input.
        measured: the linear layers, by the names of their weights; empty if not asked for.
    """

    inputs: Mapping[str, Mapping[str, Array]]
    outputs: Mapping[str, Mapping[str, Array]]
    measured: Measured = field(default_factory=Measured)


class Tower(Protocol):
    """One tower of a plan."""

    name: str

    def reference(self, scheme: Scheme | None) -> Reference:
        """Runs the tower in eager on calibration inputs; measures layers under a scheme."""

    def formats(self, measured: Measured) -> dict[str, Format]:
        """How linear weights are quantised, given what was measured."""

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The traced graph and a weight for each of its parameters."""

    def recipes(self) -> dict[str, Recipe]:
        """The graphs to make, by name."""


class ModelExport(Protocol):
    """What the package of one model is made of."""

    family: str
    source: WeightSource

    def towers(self) -> Iterator[Tower]:
        """The parts, each done before the next is asked for."""

    def files(self) -> dict[str, bytes]:
        """Files besides graphs and their weights."""

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`."""

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`."""

    def options(self, layers: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`, given what became of layers that W8A8 would hurt."""


class VisionExport:
    """The vision tower: `vision` and `pixels` give the embedding, `features` the taps."""

    name = "vision"

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        self.plan = plan
        self.config = plan.config.vision
        self.source = source

    def reference(self, scheme: Scheme | None) -> Reference:
        """Two images through the eager tower; synthetic ones, unless there are others."""
        spec = self.plan.image
        pictures = gate_images(self.plan, spec, _GATE_IMAGES)
        images = pictures[:_GATE_IMAGES]
        pixels = normalize(images, spec)
        tower = _load(VisionTower, self.config, self.source, "visual.")
        measured = Measured()
        batch = torch.from_numpy(pixels)
        if scheme is not None:
            batches = calibration_batches(pictures, spec, _GATE_IMAGES)
            found = measure_faithful(tower, tower, batches, scheme, ranges_of(self.plan))
            measured.add(found, "visual.")
        taps = self.plan.tapped
        with torch.inference_mode():
            last = self.config.layers - 1
            *tapped, tokens = tower.forward_taps(batch, [*taps, last])
            embedding = tower.head(tokens).numpy()
        # The first and the last tap bracket the others, which the same graph computes on the way.
        kept = {taps[0]: tapped[0], taps[-1]: tapped[-1]} if taps else {}
        return Reference(
            inputs={
                contract.VISION: {contract.IMAGES_U8: images},
                contract.PIXELS: {contract.PIXELS_F32: pixels},
                contract.FEATURES: {contract.IMAGES_U8: images},
            },
            outputs={
                contract.VISION: {contract.EMBEDDING: embedding},
                contract.PIXELS: {contract.EMBEDDING: embedding},
                contract.FEATURES: {contract.tap_name(i): t.numpy() for i, t in kept.items()},
            },
            measured=measured,
        )

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower on the plan's grid, with its embedding and taps as outputs."""
        grid, spec = self.plan.grid, self.plan.image
        graph = VisionGraph(self.config, grid, self.plan.tapped)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        names = [contract.EMBEDDING, *(contract.tap_name(i) for i in self.plan.tapped)]
        traced = trace_batch(graph, contract.PIXELS_F32, example, names)
        return traced, vision_parameters(self.source, graph, self.config, grid)

    def recipes(self) -> dict[str, Recipe]:
        """`vision` from uint8, `pixels` from float, and `features` where blocks are tapped."""
        spec, config = self.plan.image, self.config
        images, pixels = image_sources(spec)
        tokens = self.plan.grid[0] * self.plan.grid[1] + int(config.use_cls_token)
        middle = (tokens,) if config.pool_type == "none" else ()
        embedding = _float(contract.EMBEDDING, *middle, config.embed_dim)
        taps = {
            name: _float(name, tokens, config.width)
            for name in map(contract.tap_name, self.plan.tapped)
        }
        whole = {contract.EMBEDDING: embedding}
        attentions = config.layers + (config.pool_type == "attn")
        recipes = {
            contract.VISION: Recipe(sources=[images], outputs=whole, attentions=attentions),
            contract.PIXELS: Recipe(sources=[pixels], outputs=whole, attentions=attentions),
        }
        if taps:
            deepest = max(self.plan.tapped) + 1
            recipes[contract.FEATURES] = Recipe(sources=[images], outputs=taps, attentions=deepest)
        return recipes

    def formats(self, measured: Measured) -> dict[str, Format]:
        """8 bits where that does little harm."""
        return tensor_formats(measured, self.plan.scheme)


class TextExport:
    """The text tower: token ids to features."""

    name = "text"

    def __init__(self, plan: ExportPlan, config: TextConfig, source: WeightSource) -> None:
        self.plan = plan
        self.config = config
        self.source = source

    def reference(self, scheme: Scheme | None) -> Reference:
        """A few captions through the eager tower."""
        ids = calibration.tokens(self.config)
        tower = _load(TextTower, self.config, self.source, "text.")
        batch = torch.from_numpy(ids)
        measured = Measured()
        if scheme is not None:
            found = measure_faithful(tower, tower, [batch], scheme, ranges_of(self.plan))
            measured.add(found, "text.")
        with torch.inference_mode():
            features = tower(batch).numpy()
        return Reference(
            inputs={contract.TEXT: {contract.TOKENS: ids}},
            outputs={contract.TEXT: {contract.TEXT_EMBEDDING: features}},
            measured=measured,
        )

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower at its full context length."""
        graph = TextGraph(self.config)
        shape = (2, self.config.context_length)
        example = torch.zeros(shape, dtype=torch.int64, device="meta")
        names = [contract.TEXT_EMBEDDING]
        traced = trace_batch(graph, contract.TOKENS, example, names)
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
            sources=[(tokens, as_is)],
            outputs={contract.TEXT_EMBEDDING: features},
            attentions=self.config.layers,
        )
        return {contract.TEXT: recipe}

    def formats(self, measured: Measured) -> dict[str, Format]:
        """8 bits where that does little harm."""
        return tensor_formats(measured, self.plan.scheme)


class PeExport:
    """What a PE package is made of."""

    family = "pe"

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        self.plan = plan
        self.source = source

    def towers(self) -> Iterator[Tower]:
        """The towers that the plan has."""
        yield VisionExport(self.plan, self.source)
        if self.plan.config.text is not None:
            yield TextExport(self.plan, self.plan.config.text, self.source)

    def files(self) -> dict[str, bytes]:
        """None but the graphs and their weights."""
        return {}

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`."""
        return self.plan.image.to_dict()

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`."""
        text = self.plan.config.text
        if text is None:
            return None
        known = text.vocab_size == VOCAB_SIZE and text.context_length >= MIN_CONTEXT
        spec = TextSpec(
            tokenizer="clip_bpe" if known else None,
            context_length=text.context_length,
            logit_scale=float(self.source.load("logit_scale").float().exp().item()),
        )
        return spec.to_dict()

    def options(self, layers: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`."""
        return {"taps": list(self.plan.tapped), "float_layers": list(layers)}


def trace_batch(
    graph: nn.Module, name: str, example: Tensor, output_names: Sequence[str]
) -> Traced:
    """Traces a graph of one input whose first size is dynamic."""
    dynamic = {name: {0: contract.BATCH}}
    return trace(graph, {name: example}, dynamic=dynamic, output_names=output_names)


def image_sources(spec: ImageSpec) -> tuple[tuple[TensorSpec, Entry], tuple[TensorSpec, Entry]]:
    """uint8 images, and pixels that are normalised already."""
    height, width = spec.height, spec.width
    images = TensorSpec(
        name=contract.IMAGES_U8, dtype="uint8", shape=(contract.BATCH, height, width, 3)
    )
    pixels = TensorSpec(
        name=contract.PIXELS_F32, dtype="float32", shape=(contract.BATCH, 3, height, width)
    )
    return (images, uint8_images(spec.mean, spec.std)), (pixels, as_is)


def gate_images(plan: ExportPlan | PlmPlan, spec: ImageSpec, count: int) -> Array:
    """Images to compare an engine on, uint8; in fp8 more follow, to find activations' ranges."""
    if plan.scheme == "fp8":
        return calibration.pictures(plan.calibration, spec)
    return calibration.images(count, spec.height, spec.width)


def calibration_batches(pictures: Array, spec: ImageSpec, size: int) -> list[Tensor]:
    """Normalised batches of at most `size` images."""
    return [
        torch.from_numpy(normalize(pictures[start : start + size], spec))
        for start in range(0, len(pictures), size)
    ]


def ranges_of(plan: ExportPlan | PlmPlan) -> Ranges | None:
    """What finds the ranges of one module's inputs, by the plan; None for what measuring does."""
    return ModelOptRanges() if plan.calibrator == "modelopt" else None


def measure_faithful(
    tower: nn.Module,
    call: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    scheme: Scheme,
    ranges: Ranges | None = None,
) -> Measured:
    """The linear layers of a tower; in fp8, fewer and fewer take it until the tower is faithful.

    Args:
        tower: in float32, each parameter in a storage of its own.
        call: runs it on a batch.
        batches: calibration inputs; the first is what faithful is judged by.
        scheme: what layers would become.
        ranges: for fp8, what may find other ranges than the largest magnitudes.
    """
    exact, measured = measure_layers(tower, lambda: [call(x) for x in batches], scheme, ranges)
    if scheme == "fp8":
        least = MIN_COSINE[scheme] + _MARGIN
        refuse_layers(tower, partial(call, batches[0]), exact[0], measured, least)
    return measured


def run_measured(
    module: nn.Module,
    run: Callable[[], Tensor],
    scheme: Scheme | None,
    measured: Measured,
    prefix: str,
    ranges: Ranges | None = None,
) -> Tensor:
    """What `run` returns; the module's layers, if a scheme is asked about, into `measured`."""
    if scheme is None:
        with torch.inference_mode():
            return run()
    result, found = measure_layers(module, run, scheme, ranges)
    measured.add(found, prefix)
    return result


def tensor_formats(measured: Measured, scheme: Scheme | None) -> dict[str, Format]:
    """A scheme with one activation scale per tensor, for the layers that it does little harm."""
    if scheme is None:
        return {}
    return dict.fromkeys(measured.errors.keys() - measured.harmed(), scheme)


def _float(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(contract.BATCH, *shape))


def _load(kind: Any, config: Any, source: WeightSource, prefix: str) -> Any:
    """A tower in float32 on the CPU."""
    with torch.device("meta"):
        tower: nn.Module = kind(config)
    return load_module(tower, source, prefix)


def load_module(module: nn.Module, source: WeightSource, prefix: str) -> Any:
    """A module made on the meta device, now in float32, its tensors assigned and not copied."""
    tensors = {name: _own(source.load(prefix + name)) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _own(tensor: Tensor) -> Tensor:
    """In float32, and in a storage of its own: `measure_layers` tells weights apart by that."""
    tensor = tensor.to(torch.float32)
    shared = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if shared else tensor
