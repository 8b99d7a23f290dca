"""Export of a detection backbone: its architecture, traced module, weights and component.

Legend: N images, H W pixels, h w patch grid, C width, K channels of a level, E channels per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perception_rt.checkpoint.source import WeightSource
from perception_rt.config import DETECTION_PATCH, DetectionConfig, PeConfig
from perception_rt.errors import InputError
from perception_rt.export.components.component import (
    JUDGED_IMAGES,
    Component,
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
from perception_rt.export.components.parameters import backbone_parameters
from perception_rt.export.components.traced_modules import PyramidGraph
from perception_rt.export.graph.lowering import Recipe, uint8_images
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import BuildSettings, ExportPlan
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.models.detection import (
    backbone_ropes,
    backbone_tables,
    backbone_tokens,
    tiled_positions,
)
from perception_rt.models.layers import Rope
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.package import contract
from perception_rt.processing.image import ImageSpec, normalize

_GATE_IMAGES = 2
_GREY = 127  # mean and deviation of the reference's detectors, and the colour of the border
# The reference's choice for its towers of 50 blocks.
_GLOBAL_BLOCKS = {50: (12, 24, 36, 49)}
DEFAULT_SIDE = 1024  # pixels


def backbone_config(config: PeConfig, options: ExportOptions) -> PeConfig:
    """The architecture of an encoder's tower as a detection backbone.

    As in the reference, patches have 16 pixels, the tower's grid stays, and there is neither class
    token nor final norm.
    """
    if config.detection is not None:
        if options.window is not None or options.global_blocks is not None:
            raise InputError(
                "the architecture is a detection backbone with a window and global blocks of its "
                "own: leave --window and --global-blocks away"
            )
        return config
    vision = config.vision
    window = vision.grid if options.window is None else options.window
    blocks = options.global_blocks
    if blocks is None:
        quarters = tuple(sorted({max(0, vision.layers * i // 4 - 1) for i in range(1, 5)}))
        blocks = _GLOBAL_BLOCKS.get(vision.layers, quarters)
    tower = replace(
        vision,
        patch_size=DETECTION_PATCH,
        image_size=DETECTION_PATCH * vision.grid,
        output_dim=None,
        use_cls_token=False,
        pool_type="none",
        use_ln_post=False,
        proj_bias=False,
        timm_grid=None,
        norm_after_pool=False,
    )
    detection = DetectionConfig(window=window, global_blocks=tuple(sorted(set(blocks))))
    return PeConfig(vision=tower, detection=detection)


def backbone_plan(options: ExportOptions, config: PeConfig, settings: BuildSettings) -> ExportPlan:
    """The plan of a detection backbone, with the preprocessing of the reference's detectors.

    Raises:
        InputError: an option is not for a detection backbone, or does not fit the architecture.
    """
    if options.taps is not None:
        raise InputError("--taps is for features; --detection returns the levels of its pyramid")
    if settings.route != "onnx":
        raise InputError(f"--route {settings.route} is not for --detection")
    (height, width), *more = options.image_sizes or [(DEFAULT_SIDE, DEFAULT_SIDE)]
    grey = (_GREY / 255,) * 3
    return ExportPlan(
        **settings.shared(),
        config=backbone_config(config, options),
        image=ImageSpec(
            height=height,
            width=width,
            resize="center_crop" if options.center_crop else "pad",
            mean=grey,
            std=grey,
            fill=(_GREY,) * 3,
            exif_orientation=not options.ignore_exif,
        ),
        more_sizes=tuple(sorted(more)),
    )


class PyramidComponent(Component[ExportPlan]):
    """A detection backbone: the graph `pyramid`, once for each image size."""

    name = "backbone"

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        super().__init__(plan, source)
        assert plan.config.detection is not None
        self.config, self.detection = plan.config.vision, plan.config.detection

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs the eager backbone on two calibration images; see `Component.reference`.

        Layers of the tower are measured. The pyramid's convolutions stay in float.
        """
        spec, scheme = self.plan.image, self.plan.scheme
        with torch.device("meta"):
            model = PerceptionEncoder(self.plan.config)
        model = load_module(model, self.source, "")
        measured = Measured()
        if scheme is not None:
            tower = model.visual

            def tokens(pixels: Tensor) -> Tensor:
                tables = backbone_tables(tower, self.detection, self._grid(spec))
                return backbone_tokens(tower, pixels, tables, self.detection)

            batches = calibration_batches(
                gate_images(self.plan, spec, _GATE_IMAGES), spec, _GATE_IMAGES
            )
            judged = judged_images(JUDGED_IMAGES, spec) if scheme == "int8" else None
            found = measure_faithful(tower, tokens, batches, scheme, ranges_of(self.plan), judged)
            measured.add(found, "visual.")
        inputs, outputs = {}, {}
        for size in self.plan.images:
            images = gate_images(self.plan, size, _GATE_IMAGES)[:_GATE_IMAGES]
            (name,) = self.plan.image_graphs(size)
            with torch.inference_mode():
                levels = model.encode_pyramid(torch.from_numpy(normalize(images, size)))
            inputs[name] = {contract.IMAGES_U8: images}
            found_levels = zip(contract.LEVELS, levels, strict=True)
            outputs[name] = {level: array.numpy() for level, array in found_levels}
        return Reference(inputs=inputs, outputs=outputs, measured=measured)

    def traced(self) -> Sequence[TracedComponent]:
        """Traces the backbone on the patch grid of each image size."""
        return [self._traced(spec) for spec in self.plan.images]

    def _traced(self, spec: ImageSpec) -> TracedComponent:
        grid = self._grid(spec)
        graph = PyramidGraph(self.config, self.detection, grid)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        entry = uint8_images(spec.mean, spec.std)
        return TracedComponent(
            recipes={
                name: Recipe.of_signature(signature, entry, attentions=self.config.layers)
                for name, signature in self.plan.image_graphs(spec).items()
            },
            traced=trace_batch(graph, contract.PIXELS_F32, example, contract.LEVELS),
            parameters=backbone_parameters(self.source, graph, self.config, self._tables(grid)),
        )

    def _tables(self, grid: tuple[int, int]) -> dict[str, tuple[str, Callable[[], Tensor]]]:
        """Name in the package, and value, of each table of `PyramidGraph`."""

        def positions() -> Tensor:
            table = self.source.load("visual.positional_embedding").float()
            return tiled_positions(table, self.config.grid, grid)

        def ropes() -> tuple[Rope, Rope]:
            return backbone_ropes(self.config, self.detection.window, grid)

        label = f"{grid[0]}x{grid[1]}"
        return {
            "table": (f"backbone.table_{label}", positions),
            "rope_cos": (f"backbone.rope_cos_{label}", lambda: ropes()[0].cos),
            "rope_sin": (f"backbone.rope_sin_{label}", lambda: ropes()[0].sin),
            "window_cos": ("backbone.window_cos", lambda: ropes()[1].cos),
            "window_sin": ("backbone.window_sin", lambda: ropes()[1].sin),
        }

    def _grid(self, spec: ImageSpec) -> tuple[int, int]:
        return self.config.grid_of(spec.height, spec.width)
