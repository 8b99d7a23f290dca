"""From options to a plan: the model that they name, the settings, and what an export makes of it.

Everything is decided and checked here before any work starts.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from perception_rt.archs import PE_DEMO, PLM_DEMO, get_config
from perception_rt.checkpoint.encoder_config import (
    check_agreement,
    find_encoder,
    is_encoder_file,
    read_encoder,
)
from perception_rt.checkpoint.hf_config import find_hub_config
from perception_rt.checkpoint.hub import download
from perception_rt.checkpoint.locate import (
    CONFIG_NAME,
    check_config,
    find_config,
    parse_architecture,
    refuse_adapter,
    weight_files,
)
from perception_rt.config import PeConfig
from perception_rt.demo import LICENSE_NOTE, config_path, language_model_path, weights_path
from perception_rt.errors import CheckpointError, InputError
from perception_rt.export.options import ExportOptions
from perception_rt.export.quantization.formats import Scheme
from perception_rt.families import FAMILIES, Config, Family, family_of
from perception_rt.package import contract
from perception_rt.package.contract import DECODER, EMBED, PIXELS, VISION, GraphSignature
from perception_rt.package.pe_graphs import Segments, cut_taps, vision_signatures
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.records import check_choice
from perception_rt.targets import Target, check_precision, default_backend, get_target

HERE = "here"  # stands for the compute capability of this machine's GPU
ROUTES = ("onnx", "torch-tensorrt")
CALIBRATORS = ("max", "modelopt")
_TOWERS = ("all", "vision")
_CAPABILITY = re.compile(r"sm[0-9]{2,3}")
_SCHEMES: Mapping[str, Scheme] = {"int8": "int8", "int4": "int8", "fp8": "fp8"}
_HEAD_MULTIPLE = 16  # channels: GroupQueryAttention and fused kernels need such heads
_ADDRESS_MULTIPLE = 256  # bytes: TensorRT needs such addresses
_BLOCK = 32  # channels of a quantised block of the embedding
_MAX_CONFIG_BYTES = 64 * 1024
# Starts of file names that tell nothing about the model.
_COMMON_NAMES = ("consolidated.", "model.", "open_clip_", "pytorch_model.")

Report = Callable[[str], None]


def find_architecture(options: ExportOptions) -> Config:
    """The architecture of the model that the options name; reads no weights.

    A configuration beside the weights must agree with an architecture from elsewhere.

    Raises:
        InputError: the model is unknown, there is no usable configuration, or two disagree.
        CheckpointError: the configuration beside the checkpoint is not JSON.
    """
    if options.towers is not None:
        check_choice("--towers", options.towers, _TOWERS)
    vision_only = options.towers == "vision"
    given, source = _given_architecture(options)
    path = _weights_path(options)
    if path is not None:
        given = _described(given, source, path, with_text=not vision_only)
    assert given is not None
    if vision_only and isinstance(given, PeConfig):
        given = replace(given, text=None)
    return given


def _described(given: Config | None, source: str, path: Path, *, with_text: bool) -> Config:
    """The architecture, compared with the configuration beside the weights or read from it."""
    found = find_encoder(path, with_text=with_text)
    if given is not None:
        check_config(given, source, path)
        if found is not None and isinstance(given, PeConfig):
            check_agreement(given, found.config, source)
        return given
    refuse_adapter(path)
    config = find_config(path) if found is None else found.config
    if config is None:
        weight_files(path)  # says so if there is nothing at the path, or more than one model
        hub = find_hub_config(path)
        beside = "no params.json, config.json, open_clip_config.json or model.json is beside it"
        if hub is not None:
            beside = f"{hub.file.name} beside it describes {hub.label}, which is no PE or PLM"
        raise InputError(f"--checkpoint needs --config, the architecture as JSON: {beside}")
    return config


def find_images(options: ExportOptions) -> ImageSpec | None:
    """Image preprocessing in the file of --config or the one beside the weights; else None."""
    if options.config is not None and _is_encoder(Path(options.config)):
        return read_encoder(Path(options.config), with_text=False).image
    path = _weights_path(options)
    found = None if path is None else find_encoder(path, with_text=False)
    return None if found is None else found.image


def _weights_path(options: ExportOptions) -> Path | None:
    """The checkpoint that the options name by a path; None if it has to be found or made."""
    if options.checkpoint is not None:
        return Path(options.checkpoint)
    weights = options.weights
    return None if weights is None or weights in ("hf", "random") else Path(weights)


def _given_architecture(options: ExportOptions) -> tuple[Config | None, str]:
    """The architecture that options give without the checkpoint, and the option that gives it."""
    if options.checkpoint is None:
        assert options.model is not None
        if options.model in _DEMOS:
            config = _read_config(_DEMOS[options.model][0])
        else:
            config = get_config(options.model, others=tuple(_DEMOS))
        return config, f"--model {options.model}"
    if options.config is None:
        return None, ""
    path = Path(options.config)
    if _is_encoder(path):
        return read_encoder(path, with_text=options.towers != "vision").config, path.name
    return _read_config(path), path.name


def _is_encoder(config: Path) -> bool:
    """Whether the file of --config is one of timm or open_clip."""
    try:
        return is_encoder_file(config)
    except CheckpointError:  # `_read_config` says what is wrong with it
        return False


def demo_configs() -> dict[str, Config]:
    """Architectures of the demo models by name."""
    return {name: _read_config(config) for name, (config, _) in _DEMOS.items()}


# Architecture and weights of each demo model.
_DEMOS: Mapping[str, tuple[Path, Path]] = {
    PE_DEMO: (config_path(), weights_path()),
    PLM_DEMO: (language_model_path() / CONFIG_NAME, language_model_path()),
}


def _read_config(path: Path) -> Config:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from None
    if len(data) > _MAX_CONFIG_BYTES:
        raise InputError(f"config {path} has {len(data)} bytes; at most {_MAX_CONFIG_BYTES}")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError(f"config {path} is not JSON") from None
    return parse_architecture(values, path)


def refuse_foreign(options: ExportOptions, family: Family) -> None:
    """InputError for an option that is set and belongs to another family than the model's."""
    for other in FAMILIES.values():
        for name in other.export_options if other is not family else ():
            value = getattr(options, name)
            if value is not None and value is not False:
                raise InputError(f"--{name.replace('_', '-')} is for {other.label}")


@dataclass(frozen=True, slots=True)
class WeightsPlace:
    """Location of weights.

    Attributes:
        path: file or folder; None for random weights.
        license_note: licence of the weights; None if it is unknown.
    """

    path: Path | None
    license_note: str | None = None


def locate_weights(options: ExportOptions, report: Report) -> WeightsPlace:
    """Locates the weights; downloads those of a released model unless they are in the cache.

    Raises:
        CheckpointError: the download failed.
    """
    if options.weights == "random":
        return WeightsPlace(None)
    path = _weights_path(options)
    if path is not None:
        return WeightsPlace(path)
    assert options.model is not None
    if options.model in _DEMOS:
        return WeightsPlace(_DEMOS[options.model][1], LICENSE_NOTE)
    report(f"looking for {options.model} in the hub cache, or downloading it")
    license_note = family_of(get_config(options.model)).license
    return WeightsPlace(download(options.model), license_note)


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


def build_settings(options: ExportOptions) -> BuildSettings:
    """The settings that the options ask for; InputError if they do not fit together."""
    name = _model_name(options)
    target = get_target(options.backend or default_backend(options.precision))
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


def _model_name(options: ExportOptions) -> str:
    """Name of the model in its package."""
    if options.model is not None:
        name = options.model
    else:
        assert options.checkpoint is not None
        path = Path(options.checkpoint).absolute()
        # Files of these names are told apart by their folders only.
        common = path.name.startswith(_COMMON_NAMES) and not path.is_dir()
        name = path.parent.name if common else path.stem
    return name.removeprefix("facebook/").replace("Perception-LM-", "PLM-")


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
