"""Images are decoded ahead in threads: order, errors, laziness, and no leftover threads."""

import io
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.processing.image import ImageSpec, load_image
from perception_rt.processing.image_loader import THREAD_NAME, default_workers, load_images

SPEC = ImageSpec(height=24, width=20)
WORKERS = [1, 2, 3, 8]
AHEAD = 5


def picture(seed: int, height: int = 60, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def decoding_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert decoding_threads() == []


@pytest.mark.parametrize("workers", WORKERS)
def test_images_of_every_kind_come_in_order(workers: int, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(encoded(picture(3), "JPEG"))
    large = encoded(picture(0, 900, 900))  # takes longer than those after it
    images = [
        large,
        picture(1),
        Image.fromarray(picture(2)),
        tmp_path / "image.jpg",
        str(tmp_path / "image.jpg"),
        *(encoded(picture(seed)) for seed in range(20)),
    ]
    expected = [load_image(image, SPEC) for image in images]
    for source in (images, tuple(images), iter(images)):
        found = list(load_images(source, SPEC, workers=workers, ahead=AHEAD))
        np.testing.assert_array_equal(found, expected)
    assert list(load_images([], SPEC, workers=workers, ahead=AHEAD)) == []
    stacked = np.stack([picture(seed) for seed in range(9)])
    found = list(load_images(stacked, SPEC, workers=workers, ahead=AHEAD))
    np.testing.assert_array_equal(found, [load_image(image, SPEC) for image in stacked])


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterator_may_reuse_what_it_yields(workers: int) -> None:
    """Its buffer, or the Pillow image of an animation."""
    arrays = [picture(seed) for seed in range(12)]
    expected = [load_image(array, SPEC) for array in arrays]

    def frames() -> Iterator[np.ndarray]:
        buffer = np.empty_like(arrays[0])
        for array in arrays:
            buffer[...] = array
            yield buffer

    found = list(load_images(frames(), SPEC, workers=workers, ahead=AHEAD))
    np.testing.assert_array_equal(found, expected)

    file = io.BytesIO()
    first, *others = map(Image.fromarray, arrays)
    first.save(file, "PNG", save_all=True, append_images=others)
    with Image.open(file) as animation:
        shown = ImageSequence.Iterator(animation)
        found = list(load_images(shown, SPEC, workers=workers, ahead=AHEAD))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("as_list", [True, False])
def test_pillow_images_may_share_a_file(as_list: bool, tmp_path: Path) -> None:
    """Pillow images of a tar file that are not decoded yet, each twice."""
    arrays = [picture(seed, 300, 300) for seed in range(12)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for index, array in enumerate(arrays):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(encoded(array))
            tar.addfile(member, io.BytesIO(encoded(array)))
    expected = [load_image(array, SPEC) for array in arrays for _ in range(2)]
    with tarfile.open(tmp_path / "images.tar") as tar:
        opened = (Image.open(tar.extractfile(member)) for member in tar)
        twice = (image for image in opened for _ in range(2))
        source = list(twice) if as_list else twice
        found = list(load_images(source, SPEC, workers=8, ahead=AHEAD))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterator_is_read_only_so_far(workers: int) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield image

    image = encoded(picture(0))
    with closing(load_images(endless(), SPEC, workers=workers, ahead=AHEAD)) as loaded:
        assert taken == 0
        for used in range(1, 40):
            next(loaded)
            assert taken == (used if workers == 1 else used + AHEAD)


@pytest.mark.parametrize("workers", WORKERS)
def test_errors_take_their_place(workers: int) -> None:
    """Even if earlier images take longer to decode."""
    large = encoded(picture(0, 900, 900))
    thin = np.zeros((2, 1000, 3), np.uint8)
    images = [large, b"no image", thin, large, 5, Image.new("F", (8, 8)), "absent.png", large]
    spec = ImageSpec(height=24, width=20, resize="center_crop")
    found = list(load_images(images, spec, workers=workers, ahead=AHEAD))
    errors = {i: str(e) for i, e in enumerate(found) if isinstance(e, InputError)}
    assert list(errors) == [1, 2, 4, 5, 6]
    for index, message in errors.items():
        with pytest.raises(InputError) as error:
            load_image(images[index], spec)
        assert str(error.value) == message
    limited = load_images([large], SPEC, workers=workers, ahead=1, limits=Limits(image_pixels=9))
    assert all(isinstance(image, InputError) for image in limited)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterators_exception_comes_after_its_images(workers: int) -> None:
    def failing() -> Iterator[bytes]:
        yield encoded(picture(0, 900, 900))
        yield b"no image"
        raise ConnectionError("gone")

    loaded = load_images(failing(), SPEC, workers=workers, ahead=AHEAD)
    assert isinstance(next(loaded), np.ndarray)
    assert isinstance(next(loaded), InputError)
    with pytest.raises(ConnectionError, match="gone"):
        next(loaded)
    with pytest.raises(StopIteration):
        next(loaded)


def test_an_interrupt_of_the_iterator_comes_at_once() -> None:
    def interrupted() -> Iterator[bytes]:
        yield encoded(picture(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(load_images(interrupted(), SPEC, workers=2, ahead=AHEAD))


def test_an_interrupt_while_waiting_ends_the_threads() -> None:
    images = [encoded(picture(0, 900, 900))] * 10_000
    with closing(load_images(images, SPEC, workers=2, ahead=AHEAD)) as loaded:
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in loaded:
                pass
    timer.join()


def test_closing_drops_the_work_that_has_not_begun() -> None:
    large = encoded(picture(0, 900, 900))
    start = time.perf_counter()
    load_image(large, SPEC)
    once = time.perf_counter() - start
    loaded = load_images([large] * 1000, SPEC, workers=2, ahead=500)
    next(loaded)
    assert len(decoding_threads()) == 2
    start = time.perf_counter()
    loaded.close()
    assert time.perf_counter() - start < 100 * once
    assert decoding_threads() == []


def test_a_list_may_change_meanwhile() -> None:
    images = [picture(seed) for seed in range(20)]
    expected = [load_image(image, SPEC) for image in images]
    found = []
    for image in load_images(images, SPEC, workers=2, ahead=AHEAD):
        images.clear()
        found.append(image)
    np.testing.assert_array_equal(found, expected)


def test_one_image_needs_no_thread() -> None:
    loaded = load_images([picture(0)], SPEC, workers=8, ahead=AHEAD)
    next(loaded)
    assert decoding_threads() == []


def test_the_default_is_a_thread_per_core() -> None:
    assert 1 <= default_workers() <= 8
