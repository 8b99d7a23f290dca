"""Export components of a Perception Encoder: its vision tower and its text tower."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import PeConfig, TextConfig
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
from perception_rt.export.components.parameters import text_parameters, vision_parameters
from perception_rt.export.components.traced_modules import (
    HalfBlocks,
    HalfTower,
    Pixels,
    TextGraph,
    VisionGraph,
)
from perception_rt.export.graph.lowering import Recipe, as_is, uint8_images
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import BuildSettings, ExportPlan, find_images
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.pe_graphs import cut_taps, text_signature, vision_signatures
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
        images = inputs[:_GATE_IMAGES]
        pixels = normalize(images, spec)
        tower = _load(VisionTower, self.config, self.source, "visual.")
        measured = Measured()
        batch = torch.from_numpy(pixels)
        if scheme is not None:
            batches = calibration_batches(inputs, spec, _GATE_IMAGES)
            judged = judged_images(JUDGED_IMAGES, spec) if scheme == "int8" else None
            found = measure_faithful(tower, tower, batches, scheme, ranges_of(self.plan), judged)
            measured.add(found, "visual.")
        taps = self.plan.tapped
        with torch.inference_mode():
            last = self.config.layers - 1
            *tapped, tokens = tower.forward_taps(batch, [*taps, last])
            embedding = tower.head(tokens).numpy()
        return Reference(
            inputs={
                contract.VISION: {contract.IMAGES_U8: images},
                contract.PIXELS: {contract.PIXELS_F32: pixels},
                contract.FEATURES: {contract.IMAGES_U8: images[:1]},
            },
            outputs={
                contract.VISION: {contract.EMBEDDING: embedding},
                contract.PIXELS: {contract.EMBEDDING: embedding},
                **self._expected_blocks(tapped),
            },
            measured=measured,
        )

    def _expected_blocks(self, tapped: Sequence[Tensor]) -> dict[str, dict[str, Array]]:
        """Outputs of the graphs of the taps, for the first image only, since they may be many."""
        rows = {
            contract.tap_name(i): x[:1].numpy()
            for i, x in zip(self.plan.tapped, tapped, strict=True)
        }
        return {
            contract.features_part(index): {
                name: rows[name] for name in map(contract.tap_name, taps)
            }
            for index, taps in enumerate(cut_taps(self.plan.tapped))
        }

    def traced(self) -> TracedComponent:
        """Traces the tower on the plan's patch grid.

        The graphs are `vision` on uint8 images, `pixels` on floats, and the chain of the taps.
        """
        grid, spec = self.plan.grid, self.plan.image
        graph = VisionGraph(self.config, grid, self.plan.tapped)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        names = [contract.EMBEDDING, *(contract.tap_name(i) for i in self.plan.tapped)]
        return TracedComponent(
            recipes=self._recipes(),
            traced=trace_batch(graph, contract.PIXELS_F32, example, names),
            parameters=vision_parameters(self.source, graph, self.config, grid),
        )

    def _recipes(self) -> dict[str, Recipe]:
        spec, plan = self.plan.image, self.plan
        images = uint8_images(spec.mean, spec.std)
        entries = {contract.VISION: images, contract.FEATURES: images}
        segments = cut_taps(plan.tapped)
        attentions = {}
        done = 0
        for index, segment in enumerate(segments):
            attentions[contract.features_part(index)] = segment[-1] + 1 - done
            done = segment[-1] + 1
        whole = self.config.layers + (self.config.pool_type == "attn")
        signatures = vision_signatures(plan.config, spec.height, spec.width, segments)
        return {
            name: Recipe.of_signature(
                signature, entries.get(name, as_is), attentions=attentions.get(name, whole)
            )
            for name, signature in signatures.items()
        }


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

    def traced(self) -> TracedComponent:
        """Traces the tower at its full context length; the graph is `text`."""
        length = self.config.context_length
        recipe = Recipe.of_signature(text_signature(self.config), attentions=self.config.layers)
        graph = TextGraph(self.config)
        example = torch.zeros((2, length), dtype=torch.int64, device="meta")
        return TracedComponent(
            recipes={contract.TEXT: recipe},
            traced=trace_batch(graph, contract.TOKENS, example, [contract.TEXT_EMBEDDING]),
            parameters=text_parameters(self.source, graph),
        )


class PeExport(ModelExport[PeConfig, ExportPlan]):
    """Contents of a Perception Encoder package."""

    @classmethod
    def make_plan(
        cls, options: ExportOptions, config: PeConfig, settings: BuildSettings, locate: Locate
    ) -> ExportPlan:
        """The plan of an export, with the preprocessing that lies beside the weights, if any."""
        side = config.vision.image_size
        image = find_images(options) or ImageSpec(
            height=side, width=side, rgb_conversion="after_resize"
        )
        size = (image.height, image.width) if options.image_size is None else options.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
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
            taps=tuple(content.target.options["taps"]),
        )

    def components(self) -> Sequence[Component[ExportPlan]]:
        """The vision tower, and the text tower if there is one."""
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
        images = Pixels(self.plan.image)
        first = 0
        for index, taps in enumerate(cut_taps(self.plan.tapped)):
            if graph == contract.features_part(index):
                return HalfBlocks(tower, self.plan.grid, taps, first, None if index else images)
            first = taps[-1] + 1
        return HalfTower(tower, images)


def _load(kind: Any, config: Any, source: WeightSource, prefix: str) -> Any:
    with torch.device("meta"):
        tower: nn.Module = kind(config)
    return load_module(tower, source, prefix)
