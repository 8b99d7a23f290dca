"""Small JPEG pictures of images."""

import io

from PIL import Image

from perception_rt.processing.image import ImageSource, decode_image
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions


def thumbnail(
    source: ImageSource, side: int, options: ImageOptions = DEFAULT_IMAGE_OPTIONS
) -> tuple[bytes, int, int]:
    """Makes a picture with sides of at most `side` pixels; a smaller image keeps its size.

    Args:
        source: as for `decode_image`.
        side: longest side in pixels.
        options: further formats, and the colour behind transparent pixels.

    Returns:
        A JPEG file without metadata, its width and its height.

    Raises:
        InputError: the image is unusable.
    """
    picture = decode_image(source, options=options)
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    picture.info.clear()  # Pillow would write a comment of the file
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), picture.width, picture.height
