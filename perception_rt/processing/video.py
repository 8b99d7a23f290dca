"""Selects frames of a video by index, over the whole video or a clip, as uint8 RGB arrays.

PyAV decodes files; it is imported when the first file is opened. The length, rate and number of
frames that a container declares are not trusted: packets and frames are counted, and the rate is
computed from the packets' times.

Legend: T frames, H height, W width, n selected frames, S tile side in pixels.
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
from perception_rt.records import check_integer

VideoSource: TypeAlias = str | os.PathLike[str] | NDArray[np.uint8]

# No playlists: they would make the decoder open the files that they name.
_CONTAINERS = "mov,matroska,avi,mpegts"
_MAX_FPS = 240  # bounds the number of packets, together with `Limits.video_seconds`
MAX_RESULT_PIXELS = 2**30  # of all selected frames together, 3 bytes each
_EDGES = 2**16  # pixels of a small coded frame beyond the visible ones
_READ_BYTES = 256 * 1024
_MAX_SECONDS = 2**31  # of a time argument; also bounds frames per second


def select_frames(total: int, num_frames: int) -> list[int]:
    """Returns evenly spaced frame indices, including the first and the last frame.

    Args:
        total: frames of the video.
        num_frames: number of indices. A single one is the middle frame; frames repeat if there are
            too few.

    Raises:
        InputError: a number is not an integer of at least 1.
    """
    check_integer("total", total, 1)
    check_integer("num_frames", num_frames, 1)
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
    """Returns the frame indices that the reference's language models use.

    Takes one frame per second, starting with the clip's first. If these are more than `max_frames`,
    takes `max_frames` of them, evenly spaced. If they are fewer, spaces `max_frames` over all
    frames of the clip, or takes all frames if there are fewer. Time and memory depend only on the
    number of indices.

    Deviates from the reference in three cases in which the reference fails: a rate below 0.5 takes
    every frame, indices stay below `total`, and `end_s` before `start_s` is an error.

    Args:
        total: frames of the video.
        fps: frames per second; None if unknown, which spaces indices over all frames.
        max_frames: most indices to return.
        start_s: start of the clip in seconds; None for the first frame.
        end_s: end of the clip in seconds; None, or a time past the end, for the last frame.

    Returns:
        At least one index, in ascending order.

    Raises:
        InputError: a number is out of range, or the clip starts after the last frame.
    """
    check_integer("total", total, 1)
    check_integer("max_frames", max_frames, 1)
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
    """First and last frame of a clip; the shortest clip has two frames, as in the reference."""
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
    """Decodes the frames that `select_frames` selects.

    Applies the file's rotation if it is a multiple of 90 degrees. A truncated MP4 file is an error;
    a truncated file of another container may pass for a shorter video. Reads a file twice and
    decodes it once, or reads it three times and decodes it twice if its packets are not its frames.

    Args:
        source: path of an MP4/MOV, Matroska/WebM, AVI or MPEG-TS file, or uint8 (T, H, W, 3) RGB
            frames.
        num_frames: number of frames to return.
        limits: bounds on file size, duration, frame size and `num_frames`.

    Returns:
        uint8 (num_frames, H, W, 3).

    Raises:
        InputError: the source is missing, too large, damaged, or has no video.
        BackendError: PyAV is not installed.
    """
    check_integer("num_frames", num_frames, 1, limits.video_frames)
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
    """Decodes the frames that `select_plm_frames` selects, each squashed to one tile.

    Pillow resizes frames like still images. The reference resizes video frames as tensors, with
    the same filter but without Pillow's intermediate rounding: about one value in six differs by
    1 of 255, and a few next to the sharpest edges differ by more.

    Args:
        source: as for `load_video`. Frames of an array have no times and count alike; an array
            with few enough frames is taken whole.
        spec: tile size and preprocessing of the model.
        num_frames: most frames to take; None for `spec.max_frames`.
        start_s: start of the clip, in seconds from the first frame.
        end_s: end of the clip, in seconds from the first frame.
        boxes: frame number, from 0 at the start of the file, to a box that `draw_box` draws into
            that frame before it is resized.
        limits: bounds on file size, duration, frame size and `num_frames`.

    Returns:
        uint8 (n, S, S, 3), 1 <= n <= num_frames; `normalize` takes it with `spec.tile`.

    Raises:
        InputError: an argument is out of range, or as `load_video`.
        BackendError: PyAV is not installed.
    """
    most = min(spec.max_frames, limits.video_frames)
    number = most if num_frames is None else num_frames
    check_integer("num_frames", number, 1, most)
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
    """Selection of frames, and the processing of each one.

    Attributes:
        select: maps the number of frames and the rate (None if unknown) to indices.
        finish: maps a frame's index and its upright pixels, uint8 (H, W, 3), to the result.
        held: number of full-size frames in memory at once.
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
            return VideoReader(av, file, name, limits).read(plan)
        except InputError:
            raise
        except Exception:
            # FFmpeg's errors name its internals, and damage can cause any of them.
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
    if width * height * num_frames > MAX_RESULT_PIXELS:
        raise InputError(
            f"{name}: {num_frames} frames of {width}x{height} are more than "
            f"{MAX_RESULT_PIXELS} pixels; ask for fewer frames"
        )


def frame_rate(frames: int, seconds: float) -> float | None:
    """Frames per second; None if the duration is unknown (0 seconds)."""
    fps = frames / seconds if seconds > 0 else 0.0
    fps = round(fps, 6)  # 9.999999999999998 would put second 1 at frame 9
    return fps if 0 < fps <= _MAX_SECONDS else None


class VideoReader:
    """An open video file. Each pass reads it from the start."""

    def __init__(self, av: ModuleType, file: io.FileIO, name: str, limits: Limits) -> None:
        self._av = av
        self._file = file
        self._name = name
        self._limits = limits

    def read(self, plan: _Plan) -> NDArray[np.uint8]:
        """Returns the selected frames, uint8 (n, ...)."""
        total, seconds = self.count_packets(plan.held)
        indices = plan.select(total, frame_rate(total, seconds))
        frames, decoded = self._decode(set(indices), plan)
        if decoded != total:  # a packet may hold half a frame, or one that is not shown
            if decoded == 0:
                raise InputError(f"{self._name} has no frame that can be decoded")
            indices = plan.select(decoded, frame_rate(decoded, seconds))
            frames, _ = self._decode(set(indices), plan)
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

    def count_packets(self, held: int) -> tuple[int, float]:
        """Counts the packets that are shown, and checks sizes and duration.

        Args:
            held: number of full-size frames that will be in memory at once.

        Returns:
            The number of packets, and their duration in seconds; 0 if they have no times.
        """
        limit = int(self._limits.video_seconds * _MAX_FPS)
        total = 0
        first, last, end = math.inf, -math.inf, -math.inf  # `end` is that of the last packet
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
            return total, end - first
        if last > first:  # packets have times, but no durations
            return total, (last - first) * total / (total - 1)
        return total, 0.0

    def _decode(self, wanted: set[int], plan: _Plan) -> tuple[dict[int, NDArray[np.uint8]], int]:
        """The finished frames by index, and the number of frames in the file."""
        kept: dict[int, NDArray[np.uint8]] = {}
        size: tuple[int, int] | None = None
        count = 0
        with self._open() as container:
            stream = self._video_stream(container)
            stream.codec_context.thread_type = "AUTO"
            # A frame may be larger than its container declares, so the decoder gets a limit before
            # it allocates memory. It counts hidden edges too; exact sizes are checked below.
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
    """Turns a frame counterclockwise by `rotation` degrees, if that is a multiple of 90."""
    return np.rot90(pixels, rotation // 90) if rotation % 90 == 0 else pixels


def _refuse(*_: object) -> None:
    raise InputError("a video must not refer to other files")
