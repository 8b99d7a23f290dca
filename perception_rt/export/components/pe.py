"""Export components of a Perception Encoder: its vision tower and its text tower."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import PeConfig, TextConfig
from perception_rt.export.architecture import find_images
from perception_rt.export.components.component import (
    JUDGED_IMAGES,
    Array,
    Component,
    Locate,
    ModelExport,
    Reference,
    TracedComponent,
    calibration_batches,
    gate_images,
    judged_images,
    load_module,
    measure_faithful,
    ranges_of,
    trace_batch,
)
from perception_rt.export.components.detection import PyramidComponent, backbone_plan
from perception_rt.export.components.parameters import text_parameters, vision_parameters
from perception_rt.export.components.traced_modules import (
    HalfAttention,
    HalfBlocks,
    HalfTower,
    Pixels,
    TextGraph,
    VisionGraph,
)
from perception_rt.export.graph.lowering import Recipe, as_is, uint8_images
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import BuildSettings, ExportPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.pe_graphs import further_sizes, text_signature
from perception_rt.package.reader import Package
from perception_rt.processing.clip_bpe import MIN_CONTEXT, VOCAB_SIZE, TextSpec
from perception_rt.processing.image import ImageSpec, Resize, normalize

_GATE_IMAGES = 2


class VisionComponent(Component[ExportPlan]):
    """The vision tower: `vision` and `pixels` for the embedding, a chain of graphs for the taps."""

    name = "vision"

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        super().__init__(plan, source)
        self.config = plan.config.vision

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs the eager tower on two calibration images; see `Component.reference`."""
        spec, scheme = self.plan.image, self.plan.scheme
        inputs = gate_images(self.plan, spec, _GATE_IMAGES)
        tower = _load(VisionTower, self.config, self.source, "visual.")
        measured = Measured()
        if scheme is not None:
            batches = calibration_batches(inputs, spec, _GATE_IMAGES)
            judged = judged_images(JUDGED_IMAGES, spec) if scheme == "int8" else None
            found = measure_faithful(tower, tower, batches, scheme, ranges_of(self.plan), judged)
            measured.add(found, "visual.")
        feeds: dict[str, dict[str, Array]] = {}
        outputs: dict[str, dict[str, Array]] = {}
        for spec in self.plan.images:
            images = gate_images(self.plan, spec, _GATE_IMAGES)[:_GATE_IMAGES]
            pixels = normalize(images, spec)
            for name, graph in self.plan.image_graphs(spec).items():
                # A later graph of the chain takes an output of the one before it.
                given = {contract.PIXELS_F32: pixels, contract.IMAGES_U8: images}
                if (source := graph.inputs[0].name) in given:
                    # The blocks may be many, so they are compared on one image.
                    rows = 1 if contract.graph_kind(name) == contract.FEATURES else _GATE_IMAGES
                    feeds[name] = {source: given[source][:rows]}
            results = self._eager(tower, torch.from_numpy(pixels))
            for name, graph in self.plan.image_graphs(spec).items():
                outputs[name] = {output.name: results[output.name] for output in graph.outputs}
        return Reference(inputs=feeds, outputs=outputs, measured=measured)

    def _eager(self, tower: VisionTower, pixels: Tensor) -> dict[str, Array]:
        """Results by output name: all rows of the embedding, the first of the others."""
        taps = self.plan.tapped
        with torch.inference_mode():
            *tapped, tokens = tower.forward_taps(pixels, [*taps, self.config.layers - 1])
            results = {contract.EMBEDDING: tower.head(tokens).numpy()}
            for tap, block in zip(taps, tapped, strict=True):
                results[contract.tap_name(tap)] = block[:1].numpy()
            if self.config.pool_type == "attn":
                results[contract.ATTENTION_MAPS] = tower.attention_maps(tokens[:1]).numpy()
        return results

    def traced(self) -> Sequence[TracedComponent]:
        """Traces the tower on the patch grid of each image size.

        The graphs are `vision` on uint8 images, `pixels` on floats, the chain of the taps, and
        `attention` at its end.
        """
        return [self._traced(spec) for spec in self.plan.images]

    def _traced(self, spec: ImageSpec) -> TracedComponent:
        grid = self.config.grid_of(spec.height, spec.width)
        graph = VisionGraph(self.config, grid, self.plan.tapped)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        is_further = spec is not self.plan.image
        return TracedComponent(
            recipes=self._recipes(spec),
            traced=trace_batch(graph, contract.PIXELS_F32, example, graph.output_names),
            parameters=vision_parameters(
                self.source, graph, self.config, grid, is_further=is_further
            ),
        )

    def _recipes(self, spec: ImageSpec) -> dict[str, Recipe]:
        whole = self.config.layers + (self.config.pool_type == "attn")
        ends = [-1, *(taps[-1] for taps in self.plan.segments)]
        depths = iter([end - start for start, end in pairwise(ends)])
        recipes = {}
        for name, signature in self.plan.image_graphs(spec).items():
            match contract.graph_kind(name):
                case contract.FEATURES:
                    attentions = next(depths)
                case contract.ATTENTION:
                    attentions = 0
                case _:
                    attentions = whole
            is_bytes = signature.inputs[0].name == contract.IMAGES_U8
            entry = uint8_images(spec.mean, spec.std) if is_bytes else as_is
            recipes[name] = Recipe.of_signature(signature, entry, attentions=attentions)
        return recipes


class TextComponent(Component[ExportPlan]):
    """The text tower: graph `text`, token ids to features."""

    name = "text"

    def __init__(self, plan: ExportPlan, config: TextConfig, source: WeightSource) -> None:
        super().__init__(plan, source)
        self.config = config

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs the eager tower on a few captions; see `Component.reference`."""
        ids, scheme = calibration.caption_ids(self.config), self.plan.scheme
        tower = _load(TextTower, self.config, self.source, "text.")
        batch = torch.from_numpy(ids)
        measured = Measured()
        if scheme is not None:
            more = calibration.caption_ids(self.config, calibration.JUDGED_TEXTS)
            judged = torch.from_numpy(more) if scheme == "int8" else None
            found = measure_faithful(tower, tower, [batch], scheme, ranges_of(self.plan), judged)
            measured.add(found, "text.")
        with torch.inference_mode():
            features = tower(batch).numpy()
        return Reference(
            inputs={contract.TEXT: {contract.TOKENS: ids}},
            outputs={contract.TEXT: {contract.TEXT_EMBEDDING: features}},
            measured=measured,
        )

    def traced(self) -> Sequence[TracedComponent]:
        """Traces the tower at its full context length; the graph is `text`."""
        length = self.config.context_length
        recipe = Recipe.of_signature(text_signature(self.config), attentions=self.config.layers)
        graph = TextGraph(self.config)
        example = torch.zeros((2, length), dtype=torch.int64, device="meta")
        return [
            TracedComponent(
                recipes={contract.TEXT: recipe},
                traced=trace_batch(graph, contract.TOKENS, example, [contract.TEXT_EMBEDDING]),
                parameters=text_parameters(self.source, graph),
            )
        ]


class PeExport(ModelExport[PeConfig, ExportPlan]):
    """Contents of a Perception Encoder package."""

    @classmethod
    def make_plan(
        cls, options: ExportOptions, config: PeConfig, settings: BuildSettings, locate: Locate
    ) -> ExportPlan:
        """The plan of an export, with the preprocessing that lies beside the weights, if any."""
        if options.detection or config.detection is not None:
            return backbone_plan(options, config, settings)
        side = config.vision.image_size
        image = find_images(options) or ImageSpec(
            height=side, width=side, rgb_conversion="after_resize"
        )
        (height, width), *more = options.image_sizes or [(image.height, image.width)]
        resize: Resize = "center_crop" if options.center_crop else image.resize
        taps = options.taps
        return ExportPlan(
            **settings.shared(),
            config=config,
            image=replace(
                image,
                height=height,
                width=width,
                resize=resize,
                exif_orientation=not options.ignore_exif,
            ),
            more_sizes=tuple(sorted(more)),
            taps=None if taps is None else tuple(map(config.vision.block_index, taps)),
        )

    @classmethod
    def plan_of(cls, package: Package, settings: BuildSettings) -> ExportPlan:
        """The plan that a package was exported by; see `ModelExport.plan_of`."""
        content = package.manifest.content
        return ExportPlan(
            **settings.shared(),
            config=PeConfig.from_dict(content.architecture),
            image=ImageSpec.from_dict(content.image),
            more_sizes=tuple(further_sizes(content.graphs)),
            taps=tuple(content.target.options["taps"]),
        )

    def components(self) -> Sequence[Component[ExportPlan]]:
        """The vision tower, and the text tower if there is one; or a detection backbone."""
        if self.plan.config.detection is not None:
            return [PyramidComponent(self.plan, self.source)]
        vision = VisionComponent(self.plan, self.source)
        text = self.plan.config.text
        return [vision] if text is None else [vision, TextComponent(self.plan, text, self.source)]

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`: size, resizing and normalisation."""
        return self.plan.image.to_dict()

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`; None without a text tower."""
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

    def options(self, excluded: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`; see `ModelExport.options`."""
        return {"taps": list(self.plan.tapped), "float_layers": list(excluded)}

    def torch_module(self, graph: str) -> nn.Module:
        """The float16 module of a graph, for `--route torch-tensorrt`."""
        config = self.plan.config
        if graph == contract.TEXT:
            assert config.text is not None
            return HalfTower(_load(TextTower, config.text, self.source, "text."))
        tower = _load(VisionTower, config.vision, self.source, "visual.")
        if contract.graph_kind(graph) == contract.ATTENTION:
            return HalfAttention(tower)
        images = Pixels(self.plan.image)
        for spec in self.plan.images:
            chain = [
                name
                for name in self.plan.image_graphs(spec)
                if contract.graph_kind(name) == contract.FEATURES
            ]
            if graph in chain:
                index = chain.index(graph)
                segments = self.plan.segments
                first = segments[index - 1][-1] + 1 if index else 0
                grid = config.vision.grid_of(spec.height, spec.width)
                entry = None if index else images
                return HalfBlocks(tower, grid, segments[index], first, entry)
        return HalfTower(tower, images)


def _load(kind: Any, config: Any, source: WeightSource, prefix: str) -> Any:
    with torch.device("meta"):
        tower: nn.Module = kind(config)
    return load_module(tower, source, prefix)
