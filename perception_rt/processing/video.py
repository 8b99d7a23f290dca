"""Frames of a video, picked by index over its whole length, as uint8 RGB arrays.

A file is decoded by PyAV, which is imported when the first file is opened and not before. What a
container declares about itself (length, rate, number of frames) is not believed: packets and frames
are counted. Knows nothing of models; `image.py` resizes the frames.
"""

import io
import os
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.files import open_regular_file, path_name

VideoSource: TypeAlias = str | os.PathLike[str] | NDArray[Any]

# Containers only: playlists and the like would make the decoder open what they point to.
_CONTAINERS = "mov,matroska,avi,mpegts"
_MAX_FPS = 240  # together with `Limits.video_seconds`, a bound on packets
_MAX_RESULT_PIXELS = 2**30  # of all selected frames together, 3 bytes each
_READ_BYTES = 256 * 1024


def select_frames(total: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames spread over `total`, the first and the last among them.

    A single frame is the middle one. Frames repeat where there are fewer than asked for.

    Raises:
        InputError: one of the numbers is not an integer of at least 1.
    """
    for name, value in (("total", total), ("num_frames", num_frames)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be an integer of at least 1")
    if num_frames == 1:
        return [total // 2]
    return [i * (total - 1) // (num_frames - 1) for i in range(num_frames)]


def load_video(
    source: VideoSource, *, num_frames: int, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Decodes the frames that `select_frames` picks.

    A rotation by quarter turns that the file asks for is applied. A cut MP4 file is an error; in
    the other containers a file that was cut off may pass for a shorter one. A file is read twice
    and decoded once, or thrice and decoded twice where its packets are not its frames.

    Args:
        source: path of an MP4/MOV, Matroska/WebM, AVI or MPEG-TS file, or an array uint8
            (T, H, W, 3) in RGB order.
        num_frames: how many frames to return.
        limits: bounds on the file's bytes, its duration, the size of a frame and `num_frames`.

    Returns:
        uint8 (num_frames, H, W, 3).

    Raises:
        InputError: the source is missing, too large, damaged, or has no video.
        BackendError: PyAV is not installed.
    """
    if type(num_frames) is not int or not 1 <= num_frames <= limits.video_frames:
        raise InputError(f"num_frames must be an integer from 1 to {limits.video_frames}")
    if isinstance(source, np.ndarray):
        return _from_array(source, num_frames, limits)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a video must be a path or an array, not {type(source).__name__}")
    path, name = path_name(source, "video")
    av = _import_av()
    with open_regular_file(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limits.video_bytes:
            raise InputError(f"{name} has {size} bytes; the limit is {limits.video_bytes} bytes")
        try:
            return _Reader(av, file, name, limits).read(num_frames)
        except InputError:
            raise
        except Exception:
            # FFmpeg's errors name its own internals, and damage can surface as any of them.
            raise InputError(f"{name} is damaged or is not a video") from None


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise BackendError(
            'decoding a video file needs PyAV: pip install "perception_rt[video]"'
        ) from None
    return av


def _from_array(array: NDArray[Any], num_frames: int, limits: Limits) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise InputError(
            f"a video array must be uint8 (T, H, W, 3), not {array.dtype} {array.shape}"
        )
    frames, height, width, _ = array.shape
    indices = select_frames(frames, num_frames)
    _check_size(width, height, len(indices), "video array", limits)
    return np.ascontiguousarray(array[indices])


def _check_size(width: int, height: int, num_frames: int, name: str, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} has empty frames: {width}x{height}")
    if width * height > limits.video_pixels:
        raise InputError(
            f"{name} has frames of {width}x{height} = {width * height} pixels; "
            f"the limit is {limits.video_pixels}"
        )
    if width * height * num_frames > _MAX_RESULT_PIXELS:
        raise InputError(
            f"{name}: {num_frames} frames of {width}x{height} are more than "
            f"{_MAX_RESULT_PIXELS} pixels; ask for fewer frames"
        )


class _Reader:
    """One open file; each pass reads it from its start."""

    def __init__(self, av: ModuleType, file: io.FileIO, name: str, limits: Limits) -> None:
        self._av = av
        self._file = file
        self._name = name
        self._limits = limits

    def read(self, num_frames: int) -> NDArray[np.uint8]:
        """The selected frames, uint8 (num_frames, H, W, 3)."""
        total = self._count_packets(num_frames)
        indices = select_frames(total, num_frames)
        frames, decoded = self._decode(set(indices))
        if decoded != total:  # a packet may hold half a frame, or one that is not shown
            if decoded == 0:
                raise InputError(f"{self._name} has no frame that can be decoded")
            indices = select_frames(decoded, num_frames)
            frames, _ = self._decode(set(indices))
        return np.stack([frames[i] for i in indices])

    def _open(self) -> Any:
        self._file.seek(0)
        return self._av.open(
            self._file,
            "r",
            container_options={"format_whitelist": _CONTAINERS},
            metadata_errors="ignore",
            buffer_size=_READ_BYTES,
            io_open=_refuse,
        )

    def _video_stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise InputError(f"{self._name} has no video stream")
        return container.streams.video[0]

    def _count_packets(self, num_frames: int) -> int:
        """Packets with something to show; checks size and duration on the way."""
        limit = int(self._limits.video_seconds * _MAX_FPS)
        total = 0
        first = last = None
        with self._open() as container:
            stream = self._video_stream(container)
            _check_size(stream.width, stream.height, num_frames, self._name, self._limits)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise InputError(f"{self._name} is cut off or damaged")
                if packet.size == 0 or packet.is_discard:
                    continue
                total += 1
                if total > limit:
                    raise InputError(f"{self._name} has more than {limit} frames")
                time = packet.pts if packet.pts is not None else packet.dts
                if time is None or not packet.time_base:
                    continue
                seconds = float(time * packet.time_base)
                first = seconds if first is None else min(first, seconds)
                last = seconds if last is None else max(last, seconds)
                if last - first > self._limits.video_seconds:
                    raise InputError(
                        f"{self._name} is longer than {self._limits.video_seconds:g} seconds"
                    )
        if total == 0:
            raise InputError(f"{self._name} has no frames")
        return total

    def _decode(self, wanted: set[int]) -> tuple[dict[int, NDArray[np.uint8]], int]:
        """The wanted frames by index, and how many frames there are."""
        kept: dict[int, NDArray[np.uint8]] = {}
        size: tuple[int, int] | None = None
        count = 0
        with self._open() as container:
            stream = self._video_stream(container)
            stream.codec_context.thread_type = "AUTO"
            for frame in container.decode(stream):
                if size is None:
                    size = frame.width, frame.height
                    _check_size(*size, len(wanted), self._name, self._limits)
                elif (frame.width, frame.height) != size:
                    raise InputError(f"{self._name} changes the size of its frames")
                if count in wanted:
                    kept[count] = _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
                count += 1
        return kept, count


def _upright(pixels: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Turns a frame counterclockwise by `rotation` degrees if that is a number of quarter turns."""
    return np.rot90(pixels, rotation // 90) if rotation % 90 == 0 else pixels


def _refuse(*_: object) -> None:
    raise InputError("a video must not refer to other files")
