"""The parts of a PLM as an export sees them: tiles, embedding, and runs of decoder layers.

Eager runs layer by layer, each read when it is its turn, so that the peak is a layer and not the
model. What leaves one part is what the next one starts from.

Legend: T tokens, C decoder width, V vocabulary, L logit positions.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.export.components.parameters import tile_parameters
from perception_rt.export.components.pe import (
    Recipe,
    Reference,
    Tower,
    calibration_batches,
    gate_images,
    image_sources,
    load_module,
    measure_faithful,
    ranges_of,
    run_measured,
    tensor_formats,
    trace_batch,
)
from perception_rt.export.components.plm_decoder import DecoderExport, EmbedExport, decoder_parts
from perception_rt.export.components.traced_modules import TileGraph
from perception_rt.export.graph.lazy_weights import Weight
from perception_rt.export.graph.trace import Traced
from perception_rt.export.plan import PlmPlan
from perception_rt.export.quantization.formats import Format, Scheme
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.models.plm import VisionProjector
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.processing.image import normalize

_TOWER, _PROJECTOR = "vision_model.", "vision_projector."


class PlmExport:
    """What a PLM package is made of."""

    family = "plm"

    def __init__(self, plan: PlmPlan, source: WeightSource) -> None:
        self.plan = plan
        self.source = source

    def towers(self) -> Iterator[Tower]:
        """Tiles, embedding, then the decoder's parts; to be taken in order."""
        tiles = TileExport(self.plan, self.source)
        yield tiles
        embed = EmbedExport(self.plan, self.source, tiles)
        yield embed
        hidden = embed.prompt
        for index, layers in enumerate(decoder_parts(self.plan)):
            part = DecoderExport(self.plan, self.source, index, layers, hidden)
            yield part
            hidden = part.hidden

    def files(self) -> dict[str, bytes]:
        """The tokenizer's file, by its name in the package."""
        if self.plan.tokenizer is None:
            return {}
        spec, data = self.plan.tokenizer
        return {} if data is None or spec.file is None else {spec.file: data}

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`."""
        return self.plan.tiles.to_dict()

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`; None for a package that takes token ids only."""
        return None if self.plan.tokenizer is None else self.plan.tokenizer[0].to_dict()

    def options(self, layers: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`."""
        own = {"blocks": self.plan.blocks} if self.plan.precision == "int4" else {}
        return {
            **own,
            "float_layers": [name for name, format_ in layers.items() if format_ is None],
            "block_layers": [name for name, format_ in layers.items() if format_ is not None],
        }


class TileExport:
    """Tower and projector: `vision` from uint8 tiles, `pixels` from normalised ones."""

    name = "vision"

    def __init__(self, plan: PlmPlan, source: WeightSource) -> None:
        self.plan = plan
        self.source = source
        self.features: Tensor | None = None

    def reference(self, scheme: Scheme | None) -> Reference:
        """One tile through the eager tower; its image tokens stay in `features`."""
        spec = self.plan.tiles.tile
        pictures = gate_images(self.plan, spec, 1)
        images = pictures[:1]
        pixels = normalize(images, spec)
        batches = calibration_batches(pictures, spec, 1)
        self.features, measured = (
            self._whole(batches, scheme) if scheme == "fp8" else self._streamed(batches[0], scheme)
        )
        outputs = {contract.IMAGE_FEATURES: self.features.numpy()}
        return Reference(
            inputs={
                contract.VISION: {contract.IMAGES_U8: images},
                contract.PIXELS: {contract.PIXELS_F32: pixels},
            },
            outputs={contract.VISION: outputs, contract.PIXELS: outputs},
            measured=measured,
        )

    def _whole(self, batches: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Measured]:
        """Image tokens, and the linear layers of a tower that is run several times over."""
        config = self.plan.config
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        eye = nn.ModuleDict({_TOWER[:-1]: tower, _PROJECTOR[:-1]: projector})

        def call(pixels: Tensor) -> Tensor:
            tokens = tower.forward_features(pixels, norm=True, strip_class_token=True)
            features: Tensor = projector(tokens)
            return features

        measured = measure_faithful(eye, call, batches, scheme, ranges_of(self.plan))
        with torch.inference_mode():
            return call(batches[0]), measured

    def _streamed(self, pixels: Tensor, scheme: Scheme | None) -> tuple[Tensor, Measured]:
        """Image tokens, and the linear layers; one block of the tower is in memory at a time."""
        config = self.plan.config
        measured = Measured()
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        blocks, tower.transformer.resblocks = tower.transformer.resblocks, nn.ModuleList()
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        grid = (config.vision.grid, config.vision.grid)
        rope = tower.rope_table(grid)
        embed = partial(tower.embed, pixels, tower.token_table(grid))
        x = run_measured(tower, embed, scheme, measured, _TOWER)
        for index, block in enumerate(blocks):
            prefix = f"{_TOWER}transformer.resblocks.{index}."
            # A copy, so that the block goes when its turn is over.
            layer = load_module(copy.deepcopy(block), self.source, prefix)
            x = run_measured(layer, partial(layer, x, rope=rope), scheme, measured, prefix)
        tokens = tower.ln_post(x)[:, tower.num_prefix :]
        features = run_measured(projector, partial(projector, tokens), scheme, measured, _PROJECTOR)
        return features, measured

    def formats(self, measured: Measured) -> dict[str, Format]:
        """8 bits where that does little harm."""
        return tensor_formats(measured, self.plan.scheme)

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower on the tile's grid, and the projector."""
        config, spec = self.plan.config, self.plan.tiles.tile
        graph = TileGraph(config)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        names = [contract.IMAGE_FEATURES]
        traced = trace_batch(graph, contract.PIXELS_F32, example, names)
        return traced, tile_parameters(self.source, graph, config)

    def recipes(self) -> dict[str, Recipe]:
        """`vision` and `pixels`."""
        config = self.plan.config
        shape = (contract.BATCH, config.tokens_per_tile, config.decoder.dim)
        features = TensorSpec(name=contract.IMAGE_FEATURES, dtype="float32", shape=shape)
        outputs = {contract.IMAGE_FEATURES: features}
        images, pixels = image_sources(self.plan.tiles.tile)
        layers = config.vision.layers
        return {
            contract.VISION: Recipe(sources=[images], outputs=outputs, attentions=layers),
            contract.PIXELS: Recipe(sources=[pixels], outputs=outputs, attentions=layers),
        }
