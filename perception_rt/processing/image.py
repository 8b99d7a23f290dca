"""Decodes images, resizes them to uint8 RGB arrays and normalises them to float pixels.

Checks untrusted input before spending memory on it: the encoded size before reading, width and
height before decoding. Pillow's error messages never reach the user.

Legend: H height, W width.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.containers import exif_orientation, read_container
from perception_rt.processing.files import open_regular_file, path_name
from perception_rt.records import Record, check_choice, check_integer, check_value

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
Resize: TypeAlias = Literal["squash", "center_crop"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]

_MAX_TARGET_SIDE = 8192
# A centre crop resizes the whole image first, so the cost grows with the aspect ratio.
_MAX_CROP_ASPECT = 64

# Called directly, since Image.open() applies process-wide limits and warns about them.
_DECODERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
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
            ratio, scales the image until it covers the result, and crops the rest.
        interpolation: name of Pillow's antialiased filter.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides the difference.
    """

    height: int
    width: int
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    record_name: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_integer("image.height", self.height, 1, _MAX_TARGET_SIDE)
        check_integer("image.width", self.width, 1, _MAX_TARGET_SIDE)
        check_choice("image.resize", self.resize, get_args(Resize))
        check_choice("image.interpolation", self.interpolation, get_args(Interpolation))
        for name in ("mean", "std"):
            field = f"image.{name}"
            values = check_value(field, getattr(self, name), tuple[float, float, float])
            if min(values) < 0 or (name == "std" and 0 in values):
                raise InputError(f"{field} must be positive, not {list(values)}")
            object.__setattr__(self, name, values)


def load_image(
    source: ImageSource, spec: ImageSpec, *, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Decodes and resizes one image to uint8 (height, width, 3); errors as `decode_image`."""
    return resize_image(decode_image(source, limits=limits), spec)


def decode_image(source: ImageSource, *, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes one image to RGB and applies its EXIF orientation.

    Alpha is dropped, not composited, as in the reference. 16-bit samples lose their low byte. An
    animation gives its first frame, a Pillow image its current one.

    Args:
        source: path of a JPEG, PNG or WebP file, the bytes of one, a Pillow image, or a uint8
            (H, W, 3) RGB array with any strides.
        limits: bounds on encoded bytes, sides and pixels.

    Returns:
        An upright Pillow image of mode RGB.

    Raises:
        InputError: the source is missing, too large, damaged, or of another kind.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        return _from_pillow(source, limits)
    if isinstance(source, bytes):
        return _from_bytes(source, f"image of {len(source)} bytes", limits)
    if isinstance(source, str | os.PathLike):
        name, data = _read_file(source, limits)
        return _from_bytes(data, name, limits)
    raise InputError(
        f"an image must be a path, bytes, a Pillow image or an array, not {type(source).__name__}"
    )


def resize_image(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resizes an RGB image to uint8 (height, width, 3).

    Raises:
        InputError: the image is not RGB, or its aspect ratio is too large for a centre crop.
    """
    if image.mode != "RGB":
        raise InputError(f"image must have mode RGB, not {image.mode}")
    resample = _FILTERS[spec.interpolation]
    if spec.resize == "squash":
        return np.array(image.resize((spec.width, spec.height), resample))
    width, height = _cover(image.width, image.height, spec)
    left = round((width - spec.width) / 2)
    top = round((height - spec.height) / 2)
    scaled = image.resize((width, height), resample)
    return np.array(scaled.crop((left, top, left + spec.width, top + spec.height)))


def _cover(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """The smallest size of the image's aspect ratio that covers the target."""
    if spec.width * height >= spec.height * width:
        covering = spec.width, spec.width * height // width
    else:
        covering = spec.height * width // height, spec.height
    if covering[0] * covering[1] > _MAX_CROP_ASPECT * spec.width * spec.height:
        raise InputError(
            f"image of {width}x{height} is more than {_MAX_CROP_ASPECT} times too long for a "
            f"centre crop to {spec.width}x{spec.height}"
        )
    return covering


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


def _from_pillow(image: Image.Image, limits: Limits) -> Image.Image:
    name = "Pillow image"
    _check_size(image.width, image.height, name, limits)
    try:
        copy = image.copy()  # decodes an image that is only opened
    except Exception:
        raise InputError(f"{name} cannot be decoded") from None
    exif = copy.info.get("exif")
    orientation = exif_orientation(exif) if isinstance(exif, bytes) else 1
    return _upright(_to_rgb(copy, name), orientation)


def _from_bytes(data: bytes, name: str, limits: Limits) -> Image.Image:
    if len(data) > limits.image_bytes:
        raise InputError(f"{name} has {len(data)} bytes; the limit is {limits.image_bytes} bytes")
    try:
        encoded = read_container(data)
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
    return _upright(_to_rgb(image, name), encoded.orientation)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts to 8-bit RGB. May change `image.info`, so `image` must be our own copy."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255. Of 16-bit colour it keeps the high byte too.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in _CONVERTIBLE:
        raise InputError(f"{name} has mode {image.mode}; convert it to RGB first")
    image.info.pop("transparency", None)  # Pillow would warn about a palette's transparency
    return image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
