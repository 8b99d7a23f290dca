"""Options of an export, with checks of their types, and their text forms on a command line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from perception_rt.errors import InputError, describe

_TEXTS = ("model", "towers", "precision", "backend", "blocks", "route", "calibrator")
_PATHS = ("out", "checkpoint", "config", "weights", "adapter", "tokenizer", "calibration")
_FLAGS = ("ema", "center_crop", "detection", "ignore_exif", "allow_unfused", "refittable", "force")

PathName = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of one export; `perception-export` has an option for each field.

    Exactly one of `model` and `checkpoint` must be given. Messages spell options as the command
    does: `--image-size` for `image_size`.

    Attributes:
        out: package directory to make; missing parents are made too.
        model: released model such as "PE-Core-L14-336" or "PLM-1B", or "PE-Demo" or "PLM-Demo".
        checkpoint: file or folder with weights of any Perception Encoder or Language Model.
        config: JSON file with the architecture of `checkpoint`; None reads `params.json`,
            `config.json`, `open_clip_config.json` or `model.json` beside it.
        weights: weights of `model`: "hf" (the Hugging Face hub), "random", or a path. None takes a
            released model from the hub, and a demo from this library.
        ema: take the averaged copy (EMA) of the weights that the checkpoint must hold.
        adapter: folder of a LoRA adapter of PEFT to merge into the weights; None for none.
        towers: an encoder's towers to export: "all", or "vision" for the vision tower alone, also
            of a checkpoint that has no text tower; None for "all".
        seed: RNG seed of random weights.
        precision: "fp32", "fp16", "int8", "int4" or "fp8"; None for the backend's default.
        backend: "onnxruntime" or "tensorrt"; None for the first that has the precision.
        target: compute capabilities to build TensorRT engines for, such as ("sm89", "sm120"), or
            "here" for this machine's GPU; () builds graphs only; None builds for "here" if the
            backend has engines.
        image_size: an encoder's (height, width) or side in pixels, or a list of several (height,
            width), the default first; None for the model's own.
        center_crop: crop an encoder's images to its aspect ratio instead of squashing them.
        ignore_exif: leave images as they are stored, as the reference does, instead of turning them
            upright by their EXIF orientation.
        taps: blocks that an encoder's `features` returns, negative from the end; None for all.
        detection: export an encoder's vision tower as a detection backbone (ViTDet), which returns
            a feature pyramid; a checkpoint may be that of a detector.
        window: side of a detection backbone's attention windows, in patches of 16 pixels; None for
            the tower's own grid.
        global_blocks: indices of a detection backbone's blocks that attend to the whole image; None
            for four, evenly spread, or the reference's choice.
        tokenizer: a language model's tokenizer file; None takes the one beside the weights.
        blocks: format of an int4 language model's decoder blocks: "int8" is faster at prompts,
            "int4" halves the memory; None for "int8".
        max_length: a language model's longest sequence in tokens; None for the model's own.
        allow_unfused: accept TensorRT engines whose attention is not fused.
        refittable: build TensorRT engines without weights, so that a refit keeps them.
        route: "onnx", or "torch-tensorrt" to build an fp16 encoder's engines with Torch-TensorRT.
        calibration: folder of images, and optionally `prompts.txt`, for fp8's activation ranges;
            None for synthetic ones.
        calibrator: fp8's activation ranges: "max" for the largest magnitude, or "modelopt".
        force: replace an existing package.

    Raises:
        InputError: a value has the wrong type, or options contradict each other.
    """

    out: PathName
    model: str | None = None
    checkpoint: PathName | None = None
    config: PathName | None = None
    weights: PathName | None = None
    ema: bool = False
    adapter: PathName | None = None
    towers: str | None = None
    seed: int = 0
    precision: str | None = None
    backend: str | None = None
    target: Sequence[str] | None = None
    image_size: int | tuple[int, int] | Sequence[tuple[int, int]] | None = None
    center_crop: bool = False
    ignore_exif: bool = False
    taps: Sequence[int] | None = None
    detection: bool = False
    window: int | None = None
    global_blocks: Sequence[int] | None = None
    tokenizer: PathName | None = None
    blocks: str | None = None
    max_length: int | None = None
    allow_unfused: bool = False
    refittable: bool = False
    route: str = "onnx"
    calibration: PathName | None = None
    calibrator: str = "max"
    force: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        # A single name is meant as such, not as its characters.
        names = (self.target,) if isinstance(self.target, str) else self.target
        object.__setattr__(self, "target", _items("target", names, str))
        object.__setattr__(self, "taps", _items("taps", self.taps, int))
        blocks = _items("global_blocks", self.global_blocks, int)
        object.__setattr__(self, "global_blocks", blocks)
        if (self.model is None) == (self.checkpoint is None):
            raise InputError("give either a model or a checkpoint")
        if self.checkpoint is not None and self.weights is not None:
            raise InputError("--weights is for --model; --checkpoint itself has the weights")
        if self.ema and self.weights == "random":
            raise InputError("--ema is for a checkpoint; random weights have no averaged copy")
        for name in ("window", "global_blocks"):
            if getattr(self, name) is not None and not self.detection:
                raise InputError(f"--{name.replace('_', '-')} needs --detection")
        if self.model is not None and self.config is not None:
            raise InputError("--config is for --checkpoint; --model has its own architecture")

    def _check_types(self) -> None:
        """InputError unless every field has a type that it may have."""
        required = ("out", "route", "calibrator")
        for names, kinds, wanted in (
            (_TEXTS, (str,), "text"),
            (_PATHS, (str, os.PathLike), "a path"),
            (_FLAGS, (bool,), "True or False"),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kinds) and (value is not None or name in required):
                    raise InputError(f"{name} must be {wanted}, not {describe(value)}")
        for name in ("seed", "max_length", "window"):
            value = getattr(self, name)
            if type(value) is not int and (value is not None or name == "seed"):
                raise InputError(f"{name} must be an integer, not {describe(value)}")
        size = self.image_size
        several = isinstance(size, list | tuple) and bool(size) and all(map(_is_pair, size))
        if not (size is None or type(size) is int or _is_pair(size) or several):
            raise InputError(
                "image_size must be a side or (height, width) in pixels, or a list of such pairs, "
                f"not {describe(size)}"
            )

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Every (height, width) of `image_size`, in its order; () for the model's own."""
        size = self.image_size
        if size is None:
            return ()
        if isinstance(size, int):
            return ((size, size),)
        first, *rest = size
        if isinstance(first, int):
            (second,) = rest
            assert isinstance(second, int)
            return ((first, second),)
        return tuple(pair for pair in size if isinstance(pair, tuple))


def _items(name: str, values: object, kind: type) -> tuple[object, ...] | None:
    """The values as a tuple; InputError unless they are a sequence of this type, or None."""
    if values is None:
        return None
    if not isinstance(values, Sequence) or any(type(value) is not kind for value in values):
        raise InputError(f"{name} must be a sequence of {kind.__name__}, not {describe(values)}")
    return tuple(values)


def _is_pair(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(type(side) is int for side in size)


def parse_image_size(text: str) -> tuple[int, int]:
    """Parses "HxW" or "S", in pixels, to (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and 0 < len(p) < 6 for p in parts):
        raise InputError(f"image size must be HxW or S in pixels, not {text!r:.40}")
    return int(parts[0]), int(parts[-1])


def parse_image_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Parses image sizes separated by commas; see `parse_image_size`."""
    return tuple(map(parse_image_size, text.split(",")))


def parse_taps(text: str) -> tuple[int, ...] | None:
    """Parses "all", "none" or block indices such as "5,11,-1" to `ExportOptions.taps`."""
    if text in ("all", "none"):
        return None if text == "all" else ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--taps must be all, none or integers, not {text!r:.60}") from None


def parse_global_blocks(text: str) -> tuple[int, ...]:
    """Parses block indices such as "12,24,36,49" to `ExportOptions.global_blocks`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--global-blocks must be integers, not {text!r:.60}") from None


def parse_target(text: str) -> tuple[str, ...]:
    """Parses "none" or compute capabilities such as "sm89,sm120" to `ExportOptions.target`."""
    return () if text == "none" else tuple(text.lower().split(","))
