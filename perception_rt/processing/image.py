"""Decodes images, resizes them to uint8 RGB arrays and normalises them to float pixels.

Checks untrusted input before spending memory on it: the encoded size before reading, width and
height before decoding. Pillow's error messages never reach the user.

Legend: H height, W width.
"""

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from perception_rt.errors import InputError, PerceptionError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.containers import exif_orientation, read_container
from perception_rt.processing.files import open_regular_file, path_name
from perception_rt.processing.formats import open_requested, requested_format
from perception_rt.processing.image_modes import (
    check_mode,
    over_background,
    resize_in_mode,
    to_rgb,
)
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from perception_rt.records import Record, check_choice, check_integer, check_value

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
Resize: TypeAlias = Literal["squash", "center_crop", "letterbox", "pad"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
Filter: TypeAlias = Literal["bilinear", "bicubic", "box", "hamming", "lanczos"]
RgbConversion: TypeAlias = Literal["before_resize", "after_resize"]

_MAX_TARGET_SIDE = 8192
# A centre crop resizes the whole image first, so the cost grows with the aspect ratio.
_MAX_CROP_ASPECT = 64

# Called directly, since Image.open() applies process-wide limits and warns about them.
_DECODERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
_FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Filter)}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec(Record):
    """Image size and preprocessing of a model. The released encoders use the defaults.

    Attributes:
        height: height of the result in pixels.
        width: width of the result in pixels.
        resize: "squash" scales height and width independently; "center_crop" keeps the aspect
            ratio, scales the image until it covers the result, and crops the rest; "letterbox"
            keeps the aspect ratio, scales the image until it fits, and fills the rest; "pad" does
            so with the image at the top left, as detectors do.
        interpolation: name of Pillow's antialiased filter.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides the difference.
        exif_orientation: whether images are turned upright by their EXIF orientation, which the
            reference ignores.
        rgb_conversion: "after_resize" resizes an image in its own mode first, as the reference
            does; "before_resize" is what packages without this field were exported with.
        crop_pct: above 0 and at most 1; the image is scaled for a result that is larger by
            1 / crop_pct, and its centre is cropped.
        fill: RGB from 0 to 255, colour around the image in "letterbox" and "pad".
    """

    height: int
    width: int
    resize: Resize = "squash"
    interpolation: Filter = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    exif_orientation: bool = True
    rgb_conversion: RgbConversion = "before_resize"
    crop_pct: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)

    record_name: ClassVar[str] = "image"
    later_fields: ClassVar[frozenset[str]] = frozenset({"crop_pct", "fill"})

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = check_integer(f"image.{name}", getattr(self, name), 1, _MAX_TARGET_SIDE)
            object.__setattr__(self, name, side)
        check_choice("image.resize", self.resize, get_args(Resize))
        check_choice("image.interpolation", self.interpolation, get_args(Filter))
        check_choice("image.rgb_conversion", self.rgb_conversion, get_args(RgbConversion))
        check_choice("image.exif_orientation", self.exif_orientation, (True, False))
        for name in ("mean", "std"):
            field = f"image.{name}"
            values = check_value(field, getattr(self, name), tuple[float, float, float])
            if min(values) < 0 or (name == "std" and 0 in values):
                raise InputError(f"{field} must be positive, not {list(values)}")
            object.__setattr__(self, name, values)
        least = max(self.height, self.width) / _MAX_TARGET_SIDE
        crop_pct = check_value("image.crop_pct", self.crop_pct, float)
        if not least <= crop_pct <= 1:
            raise InputError(f"image.crop_pct must be from {least:.3g} to 1, not {crop_pct}")
        object.__setattr__(self, "crop_pct", crop_pct)
        object.__setattr__(self, "fill", check_value("image.fill", self.fill, tuple[int, int, int]))
        for value in self.fill:
            check_integer("image.fill", value, 0, 255)


def load_image(
    source: ImageSource,
    spec: ImageSpec,
    *,
    limits: Limits = DEFAULT_LIMITS,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[np.uint8]:
    """Decodes and resizes one image to uint8 (height, width, 3); errors as `open_image`."""
    image = open_image(source, limits=limits, options=options, upright=spec.exif_orientation)
    return resize_image(image, spec)


def decode_image(
    source: ImageSource,
    *,
    limits: Limits = DEFAULT_LIMITS,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    upright: bool = True,
) -> Image.Image:
    """Decodes one image to RGB; arguments and errors as `open_image`.

    Alpha is dropped, not composited, as in the reference. 16-bit samples lose their low byte.
    """
    return to_rgb(open_image(source, limits=limits, options=options, upright=upright))


def open_image(
    source: ImageSource,
    *,
    limits: Limits = DEFAULT_LIMITS,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    upright: bool = True,
) -> Image.Image:
    """Decodes one image in its own mode, which `to_rgb` and `resize_image` can convert.

    An animation gives its first frame, a Pillow image its current one.

    Args:
        source: path of a file, its bytes, a Pillow image, or a uint8 (H, W, 3) RGB array with any
            strides. A file is JPEG, PNG, WebP, or of a format in `options`.
        limits: bounds on encoded bytes, sides and pixels.
        options: further formats, and the colour behind transparent pixels.
        upright: whether the EXIF orientation is applied.

    Returns:
        A Pillow image that shares nothing with the source.

    Raises:
        InputError: the source is missing, too large, damaged, or of another kind.
        BackendError: the library that decodes a HEIC file is not installed.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        name = "Pillow image"
        image, orientation = _from_pillow(source, name, limits)
    elif isinstance(source, bytes):
        name = f"image of {len(source)} bytes"
        image, orientation = _from_bytes(source, name, limits, options)
    elif isinstance(source, str | os.PathLike):
        name, data = _read_file(source, limits)
        image, orientation = _from_bytes(data, name, limits, options)
    else:
        raise InputError(
            "an image must be a path, bytes, a Pillow image or an array, "
            f"not {type(source).__name__}"
        )
    check_mode(image, name)
    if options.background is not None:
        image = over_background(image, options.background)
    if upright and orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        image.info.pop("exif", None)  # so that opening the result does not turn it again
    return image


def resize_image(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resizes an image to uint8 RGB (height, width, 3).

    Raises:
        InputError: the image's mode cannot be converted to RGB, or its aspect ratio is too large
            for a centre crop.
    """
    check_mode(image, "image")
    if spec.rgb_conversion == "before_resize":
        image = to_rgb(image)
    scaled = resize_in_mode(image, _scaled_size(image, spec), _FILTERS[spec.interpolation])
    return np.array(to_rgb(_fitted(scaled, spec)))


def _scaled_size(image: Image.Image, spec: ImageSpec) -> tuple[int, int]:
    """Width and height of the scaled image, before it is cropped or filled up."""
    target = math.floor(spec.width / spec.crop_pct), math.floor(spec.height / spec.crop_pct)
    if spec.resize == "squash":
        return target
    if spec.resize == "center_crop":
        return _cover(image, target)
    ratio = max(image.height / target[1], image.width / target[0])
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _cover(image: Image.Image, target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the image's aspect ratio that covers the target."""
    width, height = image.size
    if target[0] * height >= target[1] * width:
        covering = target[0], target[0] * height // width
    else:
        covering = target[1] * width // height, target[1]
    if covering[0] * covering[1] > _MAX_CROP_ASPECT * target[0] * target[1]:
        raise InputError(
            f"image of {width}x{height} is more than {_MAX_CROP_ASPECT} times too long for a "
            f"centre crop to {target[0]}x{target[1]}"
        )
    return covering


def _fitted(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """The image, filled up at the borders and cropped at the centre to the size of the result."""
    wide, high = max(0, spec.width - image.width), max(0, spec.height - image.height)
    if wide or high:
        bands = len(image.getbands())
        # A single band, such as an index into a palette, and alpha are filled as in torchvision.
        fill = spec.fill if bands == 3 else (spec.fill[0],) * bands
        before = (0, 0) if spec.resize == "pad" else (wide // 2, high // 2)
        border = (*before, wide - before[0], high - before[1])
        image = ImageOps.expand(image, border, fill if bands > 1 else fill[0])
    left, top = round((image.width - spec.width) / 2), round((image.height - spec.height) / 2)
    return image.crop((left, top, left + spec.width, top + spec.height))


def normalize(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Maps uint8 (..., H, W, 3) to float32 (..., 3, H, W): (x / 255 - mean) / std per channel."""
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise InputError(f"pixels must be uint8 (..., H, W, 3), not {pixels.dtype} {pixels.shape}")
    planes = np.moveaxis(pixels, -1, -3)
    scaled = np.divide(planes, np.float32(255), dtype=np.float32, order="C")
    scaled -= np.asarray(spec.mean, np.float32)[:, None, None]
    scaled /= np.asarray(spec.std, np.float32)[:, None, None]
    return scaled


def _check_size(width: int, height: int, name: str, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width}x{height}")
    if max(width, height) > limits.image_side_px:
        raise InputError(
            f"{name} is {width}x{height}; the limit is {limits.image_side_px} pixels a side"
        )
    if width * height > limits.image_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height} pixels; "
            f"the limit is {limits.image_pixels}"
        )


def _from_array(array: NDArray[Any], limits: Limits) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"an image array must be uint8 (H, W, 3), not {array.dtype} {array.shape}")
    _check_size(array.shape[1], array.shape[0], "image array", limits)
    return Image.fromarray(np.ascontiguousarray(array))


def _from_pillow(image: Image.Image, name: str, limits: Limits) -> tuple[Image.Image, int]:
    """A decoded copy, and its EXIF orientation."""
    _check_size(image.width, image.height, name, limits)
    try:
        copy = image.copy()  # decodes an image that is only opened
    except Exception:
        raise InputError(f"{name} cannot be decoded") from None
    return copy, _orientation(copy)


def _from_bytes(
    data: bytes, name: str, limits: Limits, options: ImageOptions
) -> tuple[Image.Image, int]:
    """A decoded image, and its EXIF orientation."""
    if len(data) > limits.image_bytes:
        raise InputError(f"{name} has {len(data)} bytes; the limit is {limits.image_bytes} bytes")
    requested = requested_format(data)
    if requested is not None:
        if requested not in options.formats:
            raise InputError(
                f"{name} is a {requested.upper()} image, which is accepted on request only: "
                f"formats=[{requested!r}], or --formats {requested} on the command line"
            )
        return _from_requested(data, name, requested, limits)
    try:
        encoded = read_container(data, transparency=options.background is not None)
    except InputError as error:
        raise InputError(f"{name} {error}") from None
    _check_size(encoded.width, encoded.height, name, limits)
    try:
        image = _DECODERS[encoded.format](io.BytesIO(encoded.data))
        if image.size == (encoded.width, encoded.height):
            image.load()
    except Exception:
        # Damage can cause any exception, and decoders' messages contain memory addresses.
        raise InputError(f"{name} is a damaged {encoded.format} image") from None
    if image.size != (encoded.width, encoded.height):
        raise InputError(f"{name} declares two different sizes")
    return image, encoded.orientation


def _from_requested(
    data: bytes, name: str, requested: str, limits: Limits
) -> tuple[Image.Image, int]:
    """A decoded image of a format on request, and its EXIF orientation."""
    try:
        image = open_requested(data, requested)
        _check_size(image.width, image.height, name, limits)
        image.load()
        _check_size(image.width, image.height, name, limits)  # TIFF turns images by itself
    except PerceptionError:
        raise
    except Exception:
        raise InputError(f"{name} is a damaged {requested.upper()} image") from None
    return image, _orientation(image)


def _orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    return exif_orientation(exif) if isinstance(exif, bytes) else 1


def _read_file(source: str | os.PathLike[str], limits: Limits) -> tuple[str, bytes]:
    """A name for messages, and the file's bytes."""
    path, name = path_name(source, "image")
    with open_regular_file(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limits.image_bytes:
            raise InputError(f"{name} has {size} bytes; the limit is {limits.image_bytes} bytes")
        try:
            return name, file.read(size)
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}") from None
