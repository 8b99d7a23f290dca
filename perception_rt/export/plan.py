"""From options to a plan: the settings, and what an export makes of the model.

Everything is decided and checked here before any work starts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.export.architecture import model_name
from perception_rt.export.options import ExportOptions
from perception_rt.export.quantization.formats import Scheme
from perception_rt.families import Config
from perception_rt.native.library import is_compiled
from perception_rt.package import contract
from perception_rt.package.contract import DECODER, EMBED, PIXELS, VISION, GraphSignature
from perception_rt.package.pe_graphs import Segments, cut_taps, vision_signatures
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.targets import (
    TARGETS,
    Target,
    check_precision,
    default_backend,
    get_target,
)

HERE = "here"  # stands for the compute capability of this machine's GPU
ROUTES = ("onnx", "torch-tensorrt")
CALIBRATORS = ("max", "modelopt")
_CAPABILITY = re.compile(r"sm[0-9]{2,3}")
_SCHEMES: Mapping[str, Scheme] = {"int8": "int8", "int4": "int8", "fp8": "fp8"}
_HEAD_MULTIPLE = 16  # channels: GroupQueryAttention and fused kernels need such heads
_ADDRESS_MULTIPLE = 256  # bytes: TensorRT needs such addresses
_BLOCK = 32  # channels of a quantised block of the embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """The part of a plan that depends on no architecture and no checkpoint.

    Attributes:
        name: name of the model in its package.
        backend: name of a record in `targets.TARGETS`.
        precision: one of `targets.PRECISIONS`.
        engines: compute capabilities to build engines for, such as "sm89"; HERE for this machine's.
        allow_unfused: whether engines may have attention that is not fused.
        refittable: whether engines hold no weights and take the graphs' when they are loaded.
        route: one of ROUTES, which builds the engines.
        calibration: folder of images for activation ranges; None for synthetic images.
        calibrator: one of CALIBRATORS, which finds activation ranges.

    Raises:
        InputError: a value is unknown, or two values do not fit together.
    """

    name: str
    backend: str
    precision: str
    engines: tuple[str, ...] = ()
    allow_unfused: bool = False
    refittable: bool = False
    route: str = "onnx"
    calibration: Path | None = None
    calibrator: str = "max"

    def __post_init__(self) -> None:
        check_precision(self.target, self.precision)
        _check_engines(self.target, self.engines)
        if self.refittable and not self.engines:
            raise InputError("--refittable is for engines, and none are asked for")
        if self.route not in ROUTES:
            raise InputError(f"unknown route {self.route!r:.40}; known are {', '.join(ROUTES)}")
        if self.route != "onnx":
            self._check_route()
        if self.calibration is not None and not self.calibrated:
            raise InputError("--calibration is for fp8; other precisions scale at run time")
        if self.calibrator not in CALIBRATORS:
            known = ", ".join(CALIBRATORS)
            raise InputError(f"unknown calibrator {self.calibrator!r:.40}; known are {known}")
        if self.calibrator != "max" and not self.calibrated:
            raise InputError("--calibrator is for fp8; other precisions scale at run time")
        if not 1 <= len(self.name) <= 128 or not self.name.isprintable():
            raise InputError(
                f"the model's name {self.name!a:.60} must have 1 to 128 characters, all printable"
            )

    def _check_route(self) -> None:
        """InputError for what Torch-TensorRT is not used for."""
        if self.engines != (HERE,):
            raise InputError(
                f"--route {self.route} builds for this machine's GPU only: --target here"
            )
        if self.precision != "fp16" or self.refittable or self.allow_unfused:
            raise InputError(f"--route {self.route} is for fp16, and has no other options")

    @property
    def target(self) -> Target:
        """Record of the backend."""
        return get_target(self.backend)

    @property
    def calibrated(self) -> bool:
        """Whether activation ranges are measured on calibration inputs."""
        return self.precision in self.target.calibrated

    @property
    def float_dtype(self) -> str:
        """NumPy dtype name of activations, and of weights that are not quantised."""
        return "float16" if self.precision in ("fp16", "fp8") else "float32"

    @property
    def scheme(self) -> Scheme | None:
        """Quantisation that linear layers are measured under; None for floats."""
        return _SCHEMES.get(self.precision)

    def shared(self) -> dict[str, Any]:
        """The settings as keyword arguments of a plan."""
        return {field.name: getattr(self, field.name) for field in fields(BuildSettings)}


def build_settings(options: ExportOptions, *, decodes: bool = False) -> BuildSettings:
    """The settings that the options ask for; InputError if they do not fit together.

    Args:
        options: what the user asked for.
        decodes: whether the model is a language model.
    """
    name = model_name(options)
    # `blocks` and `target` choose among the formats of other backends.
    free = decodes and options.blocks is None and options.target is None
    preferred = preferred_backend(options.precision) if free else None
    backend = options.backend or preferred or default_backend(options.precision)
    target = get_target(backend)
    default_engines = (HERE,) if target.has_engines else ()
    return BuildSettings(
        name=name,
        backend=target.name,
        precision=options.precision or target.default_precision,
        engines=default_engines if options.target is None else tuple(options.target),
        allow_unfused=options.allow_unfused,
        refittable=options.refittable,
        route=options.route,
        calibration=None if options.calibration is None else Path(options.calibration),
        calibrator=options.calibrator,
    )


def preferred_backend(precision: str | None) -> str | None:
    """The backend that a language model of a precision is exported for, if it can run here."""
    # A backend that is preferred runs natively.
    fitting = (target.name for target in TARGETS.values() if precision in target.preferred)
    return next(fitting, None) if is_compiled() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(BuildSettings):
    """Plan of one export; each family adds its own fields.

    Attributes:
        config: the architecture.
    """

    config: Config

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens whose keys and values a cache holds; 1 without a cache."""
        return 1

    def gate(self, output: str) -> str:
        """Key in `fidelity.MIN_COSINE` of the limit for an output, "graph.output"."""
        return self.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan(Plan):
    """The plan of an encoder.

    Attributes:
        image: how images become pixels; height and width decide the patch grid.
        more_sizes: further image sizes (height, width), ascending.
        taps: indices of the blocks that `features` returns; None for all.
    """

    config: PeConfig
    image: ImageSpec
    more_sizes: tuple[tuple[int, int], ...] = ()
    taps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # A dataclass with slots is a new class, which `super()` without arguments does not find.
        Plan.__post_init__(self)
        if self.target.tower_backend:
            raise InputError(
                f"backend {self.backend} runs decoders; an encoder's is {self.target.tower_backend}"
            )
        if self.precision == "int4":
            raise InputError("int4 is for language models; an encoder can be int8")
        sizes = [(spec.height, spec.width) for spec in self.images]
        for size in sizes:
            self.config.vision.grid_of(*size)
            if sizes.count(size) > 1:
                raise InputError(f"image size {size[0]}x{size[1]} occurs twice")
        for tap in self.taps or ():
            if self.config.vision.block_index(tap) != tap:
                raise InputError(f"tap {tap} must be counted from the front")

    @property
    def images(self) -> tuple[ImageSpec, ...]:
        """How images become pixels at each size, `image` first."""
        more = (replace(self.image, height=h, width=w) for h, w in self.more_sizes)
        return (self.image, *more)

    @property
    def segments(self) -> Segments:
        """The tapped blocks of each graph in the chain that returns them."""
        return cut_taps(self.tapped)

    def image_graphs(self, spec: ImageSpec) -> dict[str, GraphSignature]:
        """Signatures of the graphs for one of `images`, by name; a chain's graphs in its order."""
        size = (spec.height, spec.width)
        signatures = vision_signatures(self.config, *size, self.segments)
        if spec is self.image:
            return signatures
        return {contract.sized(name, size): graph for name, graph in signatures.items()}

    @property
    def tapped(self) -> tuple[int, ...]:
        """Indices of the tapped blocks, in order."""
        layers = self.config.vision.layers
        if self.config.detection is not None:
            return ()
        return tuple(range(layers)) if self.taps is None else tuple(sorted(set(self.taps)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlmPlan(Plan):
    """The plan of a language model.

    Attributes:
        tiles: how images and videos become tiles.
        blocks: weight format of an int4 model's decoder blocks: "int8" keeps prompts fast, "int4"
            halves the memory. Embedding, head and vision tower are the same in both.
        tokenizer: the tokenizer and the bytes of its file; None for a package that takes token
            ids only.
        remarks: lines to report before the export.
    """

    config: PlmConfig
    tiles: TileSpec
    blocks: str = "int8"
    tokenizer: tuple[TokenizerSpec, bytes | None] | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Plan.__post_init__(self)
        check_decoder(self, self.config, self.blocks)
        if self.tiles.tile_size != self.config.vision.image_size:
            raise InputError(
                f"tiles of {self.tiles.tile_size} pixels are not for a tower of "
                f"{self.config.vision.image_size}"
            )

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens."""
        return self.config.decoder.max_seqlen

    def gate(self, output: str) -> str:
        """Key in `fidelity.MIN_COSINE` of the limit for an output, "graph.output"."""
        graph = output.partition(".")[0]
        if self.precision == "fp8" and graph.startswith(DECODER):
            return "fp8 decoder"
        if self.precision != "int4":
            return self.precision
        if graph in (VISION, PIXELS):
            return "int8"
        return "int4 blocks" if graph != EMBED and self.blocks == "int4" else "int4"

    @property
    def quantized(self) -> bool:
        """Whether linear weights are integers."""
        return self.precision in ("int8", "int4")

    @property
    def cache_dtype(self) -> str:
        """NumPy dtype name of keys and values."""
        return "float16" if self.precision in self.target.half_caches else self.float_dtype


def check_decoder(settings: BuildSettings, config: PlmConfig, blocks: str) -> None:
    """InputError if a language model cannot be built under these settings."""
    decoder = config.decoder
    if settings.route != "onnx":
        raise InputError(f"--route {settings.route} is for encoders; a decoder's caches need onnx")
    if decoder.head_dim % _HEAD_MULTIPLE:
        raise InputError(
            f"the decoder's heads have {decoder.head_dim} channels; backend {settings.backend} "
            f"needs a multiple of {_HEAD_MULTIPLE}"
        )
    if settings.precision in ("int8", "int4") and decoder.dim % _BLOCK:
        raise InputError(
            f"precision {settings.precision} needs a decoder width that is a multiple of {_BLOCK}, "
            f"not {decoder.dim}"
        )
    if settings.precision in ("int8", "int4") and decoder.n_heads * decoder.head_dim % _BLOCK:
        raise InputError(
            f"precision {settings.precision} needs decoder heads whose channels together are a "
            f"multiple of {_BLOCK}, not {decoder.n_heads * decoder.head_dim}"
        )
    multiple = settings.target.channel_multiple
    for width in (decoder.dim, decoder.ffn_dim):
        if width % multiple:
            raise InputError(
                f"backend {settings.backend} needs decoder widths that are a multiple of "
                f"{multiple}, not {width}"
            )
    row = 2 * decoder.kv_heads * decoder.max_seqlen * decoder.head_dim
    if settings.target.fixed_slots and row % _ADDRESS_MULTIPLE:
        raise InputError(
            f"a cache of {decoder.max_seqlen} tokens has {row} bytes in a layer; backend "
            f"{settings.backend} needs a multiple of {_ADDRESS_MULTIPLE}"
        )
    if blocks not in ("int8", "int4"):
        raise InputError(f"blocks must be int8 or int4, not {blocks!r:.40}")
    if blocks == "int4" and settings.precision != "int4":
        raise InputError("blocks can be int4 in precision int4 only")


def _check_engines(target: Target, engines: tuple[str, ...]) -> None:
    if engines and not target.has_engines:
        raise InputError(f"backend {target.name} has no engines to build for {engines[0]!r:.40}")
    for name in engines:
        if name != HERE and not _CAPABILITY.fullmatch(name):
            raise InputError(f"a compute capability is like sm89, not {name!r:.40}")
    if len(set(engines)) != len(engines):
        raise InputError(f"a compute capability occurs twice in {','.join(engines):.80}")
