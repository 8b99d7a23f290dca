"""What an export will make, decided and checked before any work starts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.export.quantization.formats import Scheme
from perception_rt.package.contract import DECODER, EMBED, PIXELS, VISION
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.targets import Target, check_precision, get_target

HERE = "here"
ROUTES = ("onnx", "torch-tensorrt")
CALIBRATORS = ("max", "modelopt")
_CAPABILITY = re.compile(r"sm[0-9]{2,3}")
_SCHEMES: Mapping[str, Scheme] = {"int8": "int8", "int4": "int8", "fp8": "fp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What plans of encoders and of language models have in common.

    Attributes:
        name: the model's name, as the package will state it.
        backend: a name in `targets.TARGETS`.
        precision: one of `targets.PRECISIONS`.
        engines: compute capabilities, as in "sm89", to build engines for; HERE for the GPU that is
            here.
        allow_unfused: whether an engine may take attention apart.
        refittable: whether engines hold no weights, and take them from the graphs' when loaded.
        route: one of ROUTES, by which engines are made.
        calibration: a folder of images that fp8 finds the ranges of activations on; None for
            synthetic ones.
        calibrator: one of CALIBRATORS, what finds the ranges of activations in fp8.
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
        if self.calibration is not None and self.precision != "fp8":
            raise InputError("--calibration is for fp8; other scales are found when engines run")
        if self.calibrator not in CALIBRATORS:
            known = ", ".join(CALIBRATORS)
            raise InputError(f"unknown calibrator {self.calibrator!r:.40}; known are {known}")
        if self.calibrator != "max" and self.precision != "fp8":
            raise InputError("--calibrator is for fp8; other scales are found when engines run")
        _check_name(self.name)

    @property
    def target(self) -> Target:
        """The backend's record."""
        return get_target(self.backend)

    def _check_route(self) -> None:
        """InputError for what Torch-TensorRT is not used for."""
        if self.engines != (HERE,):
            raise InputError(f"--route {self.route} builds for the GPU that is here: --target here")
        if self.precision != "fp16" or self.refittable or self.allow_unfused:
            raise InputError(f"--route {self.route} is for fp16, and has no other options")

    @property
    def float_dtype(self) -> str:
        """Numpy's name of the type of activations and of weights that are not quantised."""
        return "float16" if self.precision in ("fp16", "fp8") else "float32"

    @property
    def scheme(self) -> Scheme | None:
        """What linear layers are measured for."""
        return _SCHEMES.get(self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan(Plan):
    """The plan of an encoder.

    Attributes:
        config: the architecture.
        image: how images become pixels; its height and width fix the grid.
        taps: blocks whose output `features` can return, counted from the front; None for all.
    """

    config: PeConfig
    image: ImageSpec
    taps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        Plan.__post_init__(self)  # a class with slots is made anew, and `super` knows the old one
        if self.precision == "int4":
            raise InputError("int4 is for language models; an encoder can be int8")
        _ = self.grid
        for tap in self.taps or ():
            if self.config.vision.block_index(tap) != tap:
                raise InputError(f"tap {tap} must be counted from the front")

    def gate(self, output: str) -> str:
        """Which limit of the export gate holds for an output, "graph.output"."""
        return self.precision

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns; InputError unless the patch size divides the image size."""
        return self.config.vision.grid_of(self.image.height, self.image.width)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The tapped blocks, in order."""
        layers = self.config.vision.layers
        return tuple(range(layers)) if self.taps is None else tuple(sorted(set(self.taps)))


Blocks = Literal["int8", "int4"]

_HEAD_MULTIPLE = 16  # of GroupQueryAttention, and of the fused kernels of others
_ALIGNMENT = 256  # bytes, of an address that TensorRT is given
_BLOCK = 32  # channels of a quantised block of the embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class PlmPlan(Plan):
    """The plan of a language model.

    Attributes:
        config: the architecture.
        tiles: how images and videos become tiles.
        blocks: what int4 means for the decoder's blocks: "int8" keeps prompts fast, "int4" halves
            the memory. The embedding, the head and the tower are the same in both.
        tokenizer: a tokenizer's specification and the bytes of its file, None for a package that
            takes token ids only.
    """

    config: PlmConfig
    tiles: TileSpec
    blocks: Blocks = "int8"
    tokenizer: tuple[TokenizerSpec, bytes | None] | None = None

    def __post_init__(self) -> None:
        Plan.__post_init__(self)
        if self.route != "onnx":
            raise InputError(f"--route {self.route} is for encoders; a decoder's caches need onnx")
        if self.tiles.tile_size != self.config.vision.image_size:
            raise InputError(
                f"tiles of {self.tiles.tile_size} pixels are not for a tower of "
                f"{self.config.vision.image_size}"
            )
        decoder = self.config.decoder
        if decoder.head_dim % _HEAD_MULTIPLE:
            raise InputError(
                f"the decoder's heads have {decoder.head_dim} channels; backend {self.backend} "
                f"needs a multiple of {_HEAD_MULTIPLE}"
            )
        if self.quantized and decoder.dim % _BLOCK:
            raise InputError(
                f"precision {self.precision} needs a decoder width that is a multiple of {_BLOCK}, "
                f"not {decoder.dim}"
            )
        row = 2 * decoder.kv_heads * decoder.max_seqlen * decoder.head_dim
        if self.target.fixed_slots and row % _ALIGNMENT:
            raise InputError(
                f"a cache of {decoder.max_seqlen} tokens has {row} bytes in a layer; backend "
                f"{self.backend} needs a multiple of {_ALIGNMENT}"
            )
        if self.blocks not in ("int8", "int4"):
            raise InputError(f"blocks must be int8 or int4, not {self.blocks!r:.40}")
        if self.blocks == "int4" and self.precision != "int4":
            raise InputError("blocks can be int4 in precision int4 only")

    def gate(self, output: str) -> str:
        """Which limit of the export gate holds for an output, "graph.output"."""
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


def _check_engines(target: Target, engines: tuple[str, ...]) -> None:
    if engines and not target.has_engines:
        raise InputError(f"backend {target.name} has no engines to build for {engines[0]!r:.40}")
    for name in engines:
        if name != HERE and not _CAPABILITY.fullmatch(name):
            raise InputError(f"a compute capability is like sm89, not {name!r:.40}")
    if len(set(engines)) != len(engines):
        raise InputError(f"a compute capability occurs twice in {','.join(engines):.80}")


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise InputError(f"the model's name {name!a:.60} is not 1 to 128 characters")


def parse_image_size(text: str) -> tuple[int, int]:
    """`HxW` or `S` in pixels -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and 0 < len(p) < 6 for p in parts):
        raise InputError(f"image size must be HxW or S in pixels, not {text!r:.40}")
    return int(parts[0]), int(parts[-1])
