"""Decodes and resizes a series of images, ahead of their use, in worker threads.

Pillow releases Python's interpreter lock while it decodes and resizes, so threads share the work.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.cores import available_cores
from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.image import ImageSource, ImageSpec, open_image, resize_image
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions

_MAX_DEFAULT_WORKERS = 8  # each holds a decoded image
THREAD_NAME = "perception-rt-decode"

Pixels: TypeAlias = NDArray[np.uint8]
Loaded: TypeAlias = Pixels | InputError
OnError: TypeAlias = Callable[[int, InputError], None]
_T = TypeVar("_T")


def default_workers() -> int:
    """One thread per CPU core that this process may use, at most 8."""
    return min(available_cores(), _MAX_DEFAULT_WORKERS)


def load_images(
    images: Iterable[ImageSource],
    spec: ImageSpec,
    *,
    workers: int,
    ahead: int,
    limits: Limits = DEFAULT_LIMITS,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> Generator[Loaded, None, None]:
    """Yields the pixels of each image, or the error that makes it unusable, in order.

    The calling thread takes the images from the iterable. If the iterable raises, that exception is
    raised after the images before it. Closing the iterator ends its threads.

    Args:
        images: as `open_image` takes them.
        spec: size and preprocessing of the results.
        workers: threads that decode; with 1, the calling thread decodes each image when the
            iterator comes to it.
        ahead: how many images the threads take in advance, at most.
        limits: bounds on each image.
        options: further formats, and the colour behind transparent pixels.

    Yields:
        uint8 (height, width, 3), or an InputError.
    """
    owned = isinstance(images, list | tuple | np.ndarray)
    if owned:
        images = list(images)  # callbacks between two images may change the list
        workers = min(workers, len(images))
    loader = _Loader(spec, limits, options)
    if workers > 1:
        yield from _load_ahead(loader, images, workers=workers, ahead=ahead, owned=owned)
    else:
        yield from map(loader.load, images)


def next_batch(
    images: Iterator[Loaded], size: int, start: int, on_error: OnError | None
) -> list[Pixels | None]:
    """Takes the next images of `load_images`.

    Args:
        images: its iterator.
        size: how many to take; fewer at the end.
        start: index of the first of them, for errors.
        on_error: called with the index and the error of each unusable image; None raises it.

    Returns:
        Pixels, and None for unusable images.
    """
    batch: list[Pixels | None] = []
    for index, image in enumerate(islice(images, size), start):
        if isinstance(image, InputError):
            if on_error is None:
                raise InputError(f"image {index}: {image}")
            on_error(index, image)
            batch.append(None)
        else:
            batch.append(image)
    return batch


class _Loader:
    """Loads single images, in any thread; errors are results."""

    def __init__(self, spec: ImageSpec, limits: Limits, options: ImageOptions) -> None:
        self._spec = spec
        self._limits = limits
        self._options = options
        self._pillow = threading.Lock()  # Pillow images may share a file, or be the same object

    def load(self, image: ImageSource) -> Loaded:
        return self.resize(self.decode(image))

    def decode(self, image: ImageSource) -> Image.Image | InputError:
        with self._pillow if isinstance(image, Image.Image) else nullcontext():
            try:
                return open_image(
                    image,
                    limits=self._limits,
                    options=self._options,
                    upright=self._spec.exif_orientation,
                )
            except InputError as error:
                return error.with_traceback(None)  # its frames would keep the source in memory

    def resize(self, image: Image.Image | InputError) -> Loaded:
        if isinstance(image, InputError):
            return image
        try:
            return resize_image(image, self._spec)
        except InputError as error:
            return error.with_traceback(None)


def _load_ahead(
    loader: _Loader, images: Iterable[ImageSource], *, workers: int, ahead: int, owned: bool
) -> Iterator[Loaded]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREAD_NAME)

    def start(image: ImageSource) -> Future[Loaded]:
        if owned or isinstance(image, bytes | str | os.PathLike):
            return _submit(pool, loader.load, image)
        # An iterator may go on to reuse its buffer, its Pillow image (ImageSequence.Iterator does),
        # or the file of a Pillow image that is not decoded yet.
        return _submit(pool, loader.resize, loader.decode(image))

    source: Iterator[ImageSource] | None = iter(images)
    failure: Exception | None = None
    pending: deque[Future[Loaded]] = deque()
    try:
        while True:
            while source is not None and len(pending) <= ahead:
                try:
                    pending.append(start(next(source)))
                except StopIteration:
                    source = None
                except Exception as error:
                    source, failure = None, error
            if not pending:
                break
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


def _submit(pool: ThreadPoolExecutor, work: Callable[[_T], Loaded], item: _T) -> Future[Loaded]:
    """Runs `work(item)` in a thread of the pool; here, if the interpreter is ending.

    A daemon thread may come here then, and should not print that it gets no thread.
    """
    try:
        return pool.submit(work, item)
    except RuntimeError:
        future: Future[Loaded] = Future()
        future.set_result(work(item))
        return future
