"""Frames of a video, picked by index over the whole of it or over a clip, as uint8 RGB arrays.

A file is decoded by PyAV, which is imported when the first file is opened and not before. What a
container declares about itself (length, rate, number of frames) is not believed: packets and frames
are counted, and the rate is what the times of the packets make it. Knows nothing of models but a
`TileSpec`; `image.py` resizes the frames.

Legend: T frames, H height, W width, n frames that were picked, S side of a tile in pixels.
"""

import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.boxes import PixelBox, draw_box
from perception_rt.processing.files import open_regular_file, path_name
from perception_rt.processing.image import resize_image
from perception_rt.processing.tiles import TileSpec

VideoSource: TypeAlias = str | os.PathLike[str] | NDArray[np.uint8]

# Containers only: playlists and the like would make the decoder open what they point to.
_CONTAINERS = "mov,matroska,avi,mpegts"
_MAX_FPS = 240  # together with `Limits.video_seconds`, a bound on packets
_MAX_RESULT_PIXELS = 2**30  # of all selected frames together, 3 bytes each
_EDGES = 2**16  # pixels that a small coded frame may have beyond what is shown
_READ_BYTES = 256 * 1024
_MAX_SECONDS = 2**31  # as an argument; also of frames per second


def select_frames(total: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames spread over `total`, the first and the last among them.

    A single frame is the middle one. Frames repeat where there are fewer than asked for.

    Raises:
        InputError: one of the numbers is not an integer of at least 1.
    """
    _check_counts(total=total, num_frames=num_frames)
    if num_frames == 1:
        return [total // 2]
    return [i * (total - 1) // (num_frames - 1) for i in range(num_frames)]


def select_plm_frames(
    total: int,
    fps: float | None,
    max_frames: int,
    start_s: float | None = None,
    end_s: float | None = None,
) -> list[int]:
    """Indices of the frames that the reference's language models look at.

    One frame per second from the first of the clip on, where that makes `max_frames`. Where it
    makes more, `max_frames` of these; where it makes fewer, as many of all the clip's frames, or
    all of them. Costs what it returns, whatever the numbers.

    Three cases are ours, because the reference fails in them: a rate below a half takes every
    frame, an index stays below `total`, and times in the wrong order are an error.

    Args:
        total: frames of the video.
        fps: frames per second; None where it is unknown, and then all frames count alike.
        max_frames: how many indices to return at most.
        start_s: where the clip begins, in seconds; None for the video's first frame.
        end_s: where it ends, in seconds; None or a time past the end for the last frame.

    Returns:
        At least one index, in ascending order.

    Raises:
        InputError: a number is out of range, or the clip begins after the last frame.
    """
    _check_counts(total=total, max_frames=max_frames)
    _check_times(start_s, end_s)
    if fps is not None and not (type(fps) in (int, float) and 0 < fps <= _MAX_SECONDS):
        raise InputError(f"fps must be a number above 0 and at most {_MAX_SECONDS}")
    first, last = _clip(total, fps, start_s, end_s)
    stride = 1 if fps is None else max(1, round(fps))
    count = (last - first) // stride + 1
    if count < max_frames:
        stride, count = 1, last - first + 1
    number = min(max_frames, count)
    step = (count - 1) / (number - 1) if number > 1 else 0.0
    return [first + stride * min(round(i * step), count - 1) for i in range(number)]


def _clip(
    total: int, fps: float | None, start_s: float | None, end_s: float | None
) -> tuple[int, int]:
    """First and last frame of a clip; a moment has two frames, as in the reference."""
    if fps is None:
        if start_s is not None or end_s is not None:
            raise InputError("start_s and end_s need a video whose frames have times")
        return 0, total - 1
    first = 0 if start_s is None else int(start_s * fps)
    if first >= total:
        raise InputError(
            f"start_s {start_s:g} is after the end of the video, at {total / fps:g} seconds"
        )
    last = total - 1 if end_s is None else min(int(end_s * fps), total - 1)
    return first, max(last, min(first + 1, total - 1))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or not 1 <= value < 2**63:
            raise InputError(f"{name} must be an integer from 1 to 2**63 - 1")


def _check_times(start_s: float | None, end_s: float | None) -> None:
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 <= value <= _MAX_SECONDS:
            raise InputError(f"{name} must be a number of seconds from 0 to {_MAX_SECONDS}")
    if start_s is not None and end_s is not None and end_s < start_s:
        raise InputError(f"end_s {end_s:g} is before start_s {start_s:g}")


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
    plan = _Plan(
        select=lambda total, _: select_frames(total, num_frames),
        finish=lambda _, pixels: pixels,
        held=num_frames,
    )
    return _load(source, plan, limits)


def load_frames(
    source: VideoSource,
    spec: TileSpec,
    *,
    num_frames: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    boxes: Mapping[int, PixelBox] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> NDArray[np.uint8]:
    """Decodes the frames that `select_plm_frames` picks, each squashed to one tile.

    Frames are resized by Pillow, as still images are. The reference resizes the frames of a video
    as tensors, with the same filter but without Pillow's rounding in between: about one value in
    six differs by 1 of 255, and next to the sharpest edges a few by more.

    Args:
        source: as `load_video` takes it. The frames of an array have no times: all count alike,
            and the array is taken as it is where it is short enough.
        spec: the model's.
        num_frames: how many frames to take at most; None for `spec.max_frames`.
        start_s: where to begin, in seconds from the first frame.
        end_s: where to end, in seconds from the first frame.
        boxes: by the number of a frame, from 0 at the start of the file: drawn into it as
            `draw_box` does, before it is resized.
        limits: bounds on the file's bytes, its duration, the size of a frame and `num_frames`.

    Returns:
        uint8 (n, S, S, 3), 1 <= n <= num_frames; `normalize` it with `spec.tile`.

    Raises:
        InputError: an argument is out of range, or as `load_video`.
        BackendError: PyAV is not installed.
    """
    most = min(spec.max_frames, limits.video_frames)
    number = most if num_frames is None else num_frames
    if type(number) is not int or not 1 <= number <= most:
        raise InputError(f"num_frames must be an integer from 1 to {most}")
    _check_times(start_s, end_s)
    tile = spec.tile

    def finish(index: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if boxes and index in boxes:
            pixels = draw_box(pixels, boxes[index])
        return resize_image(Image.fromarray(np.ascontiguousarray(pixels)), tile)

    plan = _Plan(
        select=lambda total, fps: select_plm_frames(total, fps, number, start_s, end_s),
        finish=finish,
        held=1,
    )
    return _load(source, plan, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Which frames are wanted and what becomes of them.

    Attributes:
        select: from the number of frames and their rate, None if unknown, to indices.
        finish: from the index of a frame and the frame, upright, uint8 (H, W, 3), to what is
            returned of it.
        held: how many frames are in memory at once in their own size.
    """

    select: Callable[[int, float | None], list[int]]
    finish: Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
    held: int


def _load(source: VideoSource, plan: _Plan, limits: Limits) -> NDArray[np.uint8]:
    if isinstance(source, np.ndarray):
        return _from_array(source, plan, limits)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a video must be a path or an array, not {type(source).__name__}")
    path, name = path_name(source, "video")
    av = _import_av()
    with open_regular_file(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limits.video_bytes:
            raise InputError(f"{name} has {size} bytes; the limit is {limits.video_bytes} bytes")
        try:
            return _Reader(av, file, name, limits).read(plan)
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


def _from_array(array: NDArray[Any], plan: _Plan, limits: Limits) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise InputError(
            f"a video array must be uint8 (T, H, W, 3), not {array.dtype} {array.shape}"
        )
    frames, height, width, _ = array.shape
    _check_size(width, height, plan.held, "video array", limits)
    return np.stack([plan.finish(i, array[i]) for i in plan.select(frames, None)])


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
        self._seconds = 0.0  # that the packets take; 0 until they are counted, or if unknown

    def read(self, plan: _Plan) -> NDArray[np.uint8]:
        """The selected frames, uint8 (n, ...)."""
        total = self._count_packets(plan.held)
        indices = plan.select(total, self._fps(total))
        frames, decoded = self._decode(set(indices), plan)
        if decoded != total:  # a packet may hold half a frame, or one that is not shown
            if decoded == 0:
                raise InputError(f"{self._name} has no frame that can be decoded")
            indices = plan.select(decoded, self._fps(decoded))
            frames, _ = self._decode(set(indices), plan)
        return np.stack([frames[i] for i in indices])

    def _fps(self, frames: int) -> float | None:
        """Frames per second, None where packets have no times."""
        fps = frames / self._seconds if self._seconds > 0 else 0.0
        fps = round(fps, 6)  # 9.999999999999998 would put second 1 at frame 9
        return fps if 0 < fps <= _MAX_SECONDS else None

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

    def _count_packets(self, held: int) -> int:
        """Packets with something to show; checks size and measures duration on the way."""
        limit = int(self._limits.video_seconds * _MAX_FPS)
        total = 0
        first, last, end = math.inf, -math.inf, -math.inf  # end of the last packet
        with self._open() as container:
            stream = self._video_stream(container)
            _check_size(stream.width, stream.height, held, self._name, self._limits)
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
                first, last = min(first, seconds), max(last, seconds)
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if last - first > self._limits.video_seconds:
                    raise InputError(
                        f"{self._name} is longer than {self._limits.video_seconds:g} seconds"
                    )
        if total == 0:
            raise InputError(f"{self._name} has no frames")
        if end > last:
            self._seconds = end - first
        elif last > first:  # no packet says how long it lasts
            self._seconds = (last - first) * total / (total - 1)
        return total

    def _decode(self, wanted: set[int], plan: _Plan) -> tuple[dict[int, NDArray[np.uint8]], int]:
        """The wanted frames by index, finished, and how many frames there are."""
        kept: dict[int, NDArray[np.uint8]] = {}
        size: tuple[int, int] | None = None
        count = 0
        with self._open() as container:
            stream = self._video_stream(container)
            stream.codec_context.thread_type = "AUTO"
            # A frame may be larger than its container says. The decoder is told before it has
            # memory for one; it counts edges too, so this is generous; sizes are compared below.
            most = 2 * self._limits.video_pixels + _EDGES
            stream.codec_context.options = {"max_pixels": str(most)}
            for frame in container.decode(stream):
                if size is None:
                    size = frame.width, frame.height
                    _check_size(*size, plan.held, self._name, self._limits)
                elif (frame.width, frame.height) != size:
                    raise InputError(f"{self._name} changes the size of its frames")
                if count in wanted:
                    pixels = _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
                    kept[count] = plan.finish(count, pixels)
                count += 1
        return kept, count


def _upright(pixels: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Turns a frame counterclockwise by `rotation` degrees if that is a number of quarter turns."""
    return np.rot90(pixels, rotation // 90) if rotation % 90 == 0 else pixels


def _refuse(*_: object) -> None:
    raise InputError("a video must not refer to other files")
