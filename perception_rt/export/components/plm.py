"""Export components of a Perception Language Model: its tile encoder, embedding and decoder.

Eager holds at most one layer of the decoder, and one block of the tile encoder unless fp8, or int8
that is not faithful at once, runs it several times.

Legend: n tiles, S tile side in pixels, t image tokens per tile, C decoder width.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.archs import PLM_DEMO
from perception_rt.checkpoint.locate import (
    find_chat_template,
    find_end_ids,
    find_tiles,
    find_tokenizer,
)
from perception_rt.errors import InputError, PackageError
from perception_rt.export.components.component import (
    INT8_COSINE,
    JUDGED_TILES,
    Component,
    Locate,
    ModelExport,
    PiecewiseRun,
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
from perception_rt.export.components.parameters import tile_parameters
from perception_rt.export.components.plm_decoder import (
    DecoderComponent,
    EmbedComponent,
    decoder_parts,
)
from perception_rt.export.components.traced_modules import TileGraph
from perception_rt.export.graph.lowering import Recipe, as_is, uint8_images
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import BuildSettings, PlmPlan, check_decoder
from perception_rt.export.quantization.formats import Format, Scheme
from perception_rt.export.quantization.sensitivity import MOST_IN_FLOAT, Measured
from perception_rt.models.plm import VisionProjector
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.plm_graphs import tile_signatures
from perception_rt.package.reader import Package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import normalize
from perception_rt.processing.llm_tokenizer import (
    FileKind,
    TokenizerSpec,
    detect_tokenizer,
    open_tokenizer,
)
from perception_rt.processing.tiles import TileSpec

_TOWER, _PROJECTOR = "vision_model.", "vision_projector."
_DEFAULT_BLOCKS = "int8"
_MIN_BYTES_VOCABULARY = 320  # ids of the built-in byte tokenizer: bytes and control tokens


class PlmExport(ModelExport[PlmConfig, PlmPlan]):
    """Contents of a Perception Language Model package."""

    @classmethod
    def make_plan(
        cls, options: ExportOptions, config: PlmConfig, settings: BuildSettings, locate: Locate
    ) -> PlmPlan:
        """The plan of an export, with the tile settings and the tokenizer beside the weights."""
        limit = config.decoder.max_seqlen
        length = limit if options.max_length is None else options.max_length
        if not 1 <= length <= limit:
            raise InputError(f"--max-length {length} is not in 1 to the model's {limit}")
        config = replace(config, decoder=replace(config.decoder, max_seqlen=length))
        blocks = options.blocks or _DEFAULT_BLOCKS
        if settings.target.whole_decoder:
            if options.blocks is not None:
                raise InputError(f"--blocks is not for backend {settings.backend}")
            blocks = "int4" if settings.precision == "int4" else _DEFAULT_BLOCKS
        check_decoder(settings, config, blocks)
        weights, size = locate(), config.vision.image_size
        tiles = TileSpec(tile_size=size) if weights is None else find_tiles(weights, size)
        tokenizer = _find_tokenizer(options, config, weights)
        return PlmPlan(
            **settings.shared(),
            config=config,
            tiles=replace(tiles, exif_orientation=not options.ignore_exif),
            blocks=blocks,
            tokenizer=tokenizer,
            remarks=_remarks(tokenizer is not None, weights),
        )

    @classmethod
    def plan_of(cls, package: Package, settings: BuildSettings) -> PlmPlan:
        """The plan that a package was exported by; see `ModelExport.plan_of`."""
        content = package.manifest.content
        tokenizer = None
        if content.text is not None:
            spec = TokenizerSpec.from_dict(content.text, "text")
            tokenizer = spec, None if spec.file is None else package.read(spec.file)
        return PlmPlan(
            **settings.shared(),
            config=PlmConfig.from_dict(content.architecture),
            tiles=TileSpec.from_dict(content.image),
            blocks=content.target.options.get("blocks", _DEFAULT_BLOCKS),
            tokenizer=tokenizer,
        )

    def components(self) -> Sequence[Component[PlmPlan]]:
        """Tile encoder, embedding, and the decoder's parts."""
        parts = [
            DecoderComponent(self.plan, self.source, index, layers)
            for index, layers in enumerate(decoder_parts(self.plan))
        ]
        return [
            TileComponent(self.plan, self.source),
            EmbedComponent(self.plan, self.source),
            *parts,
        ]

    def files(self) -> dict[str, bytes]:
        """The tokenizer's file."""
        if self.plan.tokenizer is None:
            return {}
        spec, data = self.plan.tokenizer
        return {} if data is None or spec.file is None else {spec.file: data}

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`: how images become tiles."""
        return self.plan.tiles.to_dict()

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`; None for a package that takes token ids only."""
        return None if self.plan.tokenizer is None else self.plan.tokenizer[0].to_dict()

    def options(self, excluded: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`; see `ModelExport.options`."""
        own = {"blocks": self.plan.blocks} if self.plan.precision == "int4" else {}
        return {
            **own,
            "float_layers": [name for name, format_ in excluded.items() if format_ is None],
            "block_layers": [name for name, format_ in excluded.items() if format_ is not None],
        }

    def notes(self) -> list[str]:
        """Lines to report before the export: the plan's remarks."""
        return list(self.plan.remarks)


def _remarks(has_tokenizer: bool, weights: Path | None) -> tuple[str, ...]:
    """Says if the package has no tokenizer, or if a chat template is left out."""
    if not has_tokenizer:
        return ("no tokenizer was found: the package takes token ids only (--tokenizer FILE)",)
    template = None if weights is None else find_chat_template(weights)
    if template is None:
        return ()
    return (f"the chat template of {template} is not used: prompts have PLM's own format",)


def _find_tokenizer(
    options: ExportOptions, config: PlmConfig, weights: Path | None
) -> tuple[TokenizerSpec, bytes | None] | None:
    """The tokenizer that is named or lies beside the weights; plain bytes for random weights."""
    vocab_size, image = config.decoder.vocab_size, config.image_token_id
    found = options.tokenizer or (None if weights is None else find_tokenizer(weights))
    if found is not None:
        end_ids = None if weights is None else find_end_ids(weights)
        own = options.model == PLM_DEMO and options.tokenizer is None
        # So that the demo runs without the libraries of the tokenizers.
        kind: FileKind | None = "bpe" if own and options.weights in (None, "hf") else None
        return detect_tokenizer(
            found, vocab_size=vocab_size, image_token_id=image, end_ids=end_ids, kind=kind
        )
    if weights is not None or vocab_size < _MIN_BYTES_VOCABULARY:
        return None
    spec = TokenizerSpec(kind="bytes", vocab_size=vocab_size, image_token_id=image)
    try:
        open_tokenizer(spec)
    except PackageError:  # the architecture's image token is one of the bytes
        return None
    return spec, None


class TileComponent(Component[PlmPlan]):
    """Vision tower and projector: graphs `vision` on uint8 tiles, `pixels` on normalised ones."""

    name = "vision"

    @property
    def backend(self) -> str:
        """Name of the backend of the tile encoder."""
        return self.plan.target.tower_backend or self.plan.backend

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs one tile through the eager tower; hands on its image features (1, t, C)."""
        spec, scheme = self.plan.tiles.tile, self.plan.scheme
        inputs = gate_images(self.plan, spec, 1)
        images = inputs[:1]
        pixels = normalize(images, spec)
        batches = calibration_batches(inputs, spec, 1)
        features, measured = self._run_measured(batches, scheme)
        outputs = {contract.IMAGE_FEATURES: features.numpy()}
        return Reference(
            inputs={
                contract.VISION: {contract.IMAGES_U8: images},
                contract.PIXELS: {contract.PIXELS_F32: pixels},
            },
            outputs={contract.VISION: outputs, contract.PIXELS: outputs},
            measured=measured,
            carry=features,
        )

    def _run_measured(
        self, batches: Sequence[Tensor], scheme: Scheme | None
    ) -> tuple[Tensor, Measured]:
        """Features (1, t, C) of the first batch, and the layers that keep them faithful."""
        if scheme == "fp8":
            return self._run_whole(batches, scheme)
        if scheme is None:
            return self._run_blocks(batches[0], None).exact, Measured()
        judged = torch.cat([batches[0], judged_images(JUDGED_TILES, self.plan.tiles.tile)])
        run = self._run_blocks(judged, scheme)
        measured = run.measured
        measured.cosine = run.cosine
        few = len(measured.excluded()) <= MOST_IN_FLOAT * len(measured.errors)
        if run.cosine >= INT8_COSINE and few:
            return run.exact[:1], measured
        return self._run_whole(batches[:1], scheme, judged)

    def _run_whole(
        self, batches: Sequence[Tensor], scheme: Scheme, judged: Tensor | None = None
    ) -> tuple[Tensor, Measured]:
        """Features (1, t, C) of the first batch, and the layers measured on all of them.

        Excluding layers runs the tower several times, so all of it stays in memory.
        """
        config = self.plan.config
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        encoder = nn.ModuleDict({_TOWER[:-1]: tower, _PROJECTOR[:-1]: projector})

        def call(pixels: Tensor) -> Tensor:
            tokens = tower.forward_features(pixels, norm=True, strip_class_token=True)
            features: Tensor = projector(tokens)
            return features

        ranges = ranges_of(self.plan)
        measured = measure_faithful(encoder, call, batches, scheme, ranges, judged)
        with torch.inference_mode():
            return call(batches[0]), measured

    def _run_blocks(self, pixels: Tensor, scheme: Scheme | None) -> PiecewiseRun:
        """Runs pixels (n, 3, S, S) to features (n, t, C); one block in memory."""
        config = self.plan.config
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        blocks, tower.transformer.resblocks = tower.transformer.resblocks, nn.ModuleList()
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        grid = (config.vision.grid, config.vision.grid)
        rope = tower.rope_table(grid)
        run = PiecewiseRun(scheme, pixels)
        run.run(tower, partial(tower.embed, table=tower.token_table(grid)), _TOWER)
        for index, block in enumerate(blocks):
            prefix = f"{_TOWER}transformer.resblocks.{index}."
            # A copy, so that the block's weights are freed when the next one replaces it.
            layer = load_module(copy.deepcopy(block), self.source, prefix)
            run.run(layer, partial(layer, rope=rope), prefix)
        encoder = nn.ModuleDict({_TOWER[:-1]: tower, _PROJECTOR[:-1]: projector})
        run.run(encoder, lambda x: projector(tower.ln_post(x)[:, tower.num_prefix :]))
        return run

    def traced(self) -> Sequence[TracedComponent]:
        """Traces tower and projector on the tile's grid; the graphs are `vision` and `pixels`."""
        config, spec = self.plan.config, self.plan.tiles.tile
        entries = {contract.VISION: uint8_images(spec.mean, spec.std), contract.PIXELS: as_is}
        layers = config.vision.layers
        recipes = {
            name: Recipe.of_signature(signature, entries[name], attentions=layers)
            for name, signature in tile_signatures(config).items()
        }
        graph = TileGraph(config)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        return [
            TracedComponent(
                recipes=recipes,
                traced=trace_batch(graph, contract.PIXELS_F32, example, [contract.IMAGE_FEATURES]),
                parameters=tile_parameters(self.source, graph, config),
            )
        ]
