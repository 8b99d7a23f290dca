"""Decodes selected frames of a video, over the whole video or a clip, as uint8 RGB arrays.

PyAV reads files; it is imported when the first file is opened. The length, rate and number of
frames that a container declares are not trusted: packets and frames are counted, and the rate is
computed from the packets' times.

Legend: T frames, H height, W width, n selected frames, S tile side in pixels.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.boxes import PixelBox, draw_box
from perception_rt.processing.display_matrix import (
    IDENTITY,
    Turn,
    is_mirrored,
    read_matrix,
    turn,
)
from perception_rt.processing.files import open_regular_file, path_name
from perception_rt.processing.frame_selection import (
    check_times,
    frame_rate,
    select_frames,
    select_plm_frames,
)
from perception_rt.processing.image import ImageSpec, resize_image
from perception_rt.processing.tiles import TileSpec
from perception_rt.records import check_integer

Frame: TypeAlias = NDArray[np.uint8]
_File: TypeAlias = io.FileIO | io.BytesIO
VideoSource: TypeAlias = str | os.PathLike[str] | bytes | Frame


class FrameDecoder(Protocol):
    """Decodes frames of a file that was checked: another decoder than PyAV."""

    def __call__(
        self, file: io.FileIO, *, stream: int, total: int, indices: Sequence[int]
    ) -> Sequence[Frame]:
        """Returns frames turned by the file's rotation, uint8 (H, W, 3).

        Any exception makes PyAV decode the file, as do frames of another size than PyAV's.

        Args:
            file: the open file.
            stream: index of the video stream among all streams.
            total: frames of the stream; to raise if the decoder finds another number.
            indices: frames to decode, in ascending order.
        """


# No playlists: they would make the decoder open the files that they name.
_CONTAINERS = "mov,matroska,avi,mpegts"
_READABLE = "MP4, MOV, Matroska, WebM, AVI and MPEG-TS files"
_LOSSY = "mpegts"  # a broadcast: a lost packet is part of it, and no sign of a truncated file
_TIMED = ("mov", "matroska")  # packets say when they are shown; AVI has them in decoding order
_MAX_FPS = 240  # bounds the number of packets, together with `Limits.video_seconds`
MAX_RESULT_PIXELS = 2**30  # of all selected frames together, 3 bytes each
_EDGES = 2**16  # pixels of a small coded frame beyond the visible ones
_READ_BYTES = 256 * 1024


def load_video(
    source: VideoSource,
    *,
    num_frames: int,
    limits: Limits = DEFAULT_LIMITS,
    decoder: FrameDecoder | None = None,
) -> Frame:
    """Decodes the frames that `select_frames` selects; as `decode_frames`, but of one size.

    Frames of another size than the first are resized to it.

    Returns:
        uint8 (num_frames, H, W, 3).
    """
    frames = decode_frames(source, num_frames=num_frames, limits=limits, decoder=decoder)
    height, width, _ = frames[0].shape
    return np.stack([_resized(frame, width, height) for frame in frames])


def decode_frames(
    source: VideoSource,
    *,
    num_frames: int,
    limits: Limits = DEFAULT_LIMITS,
    decoder: FrameDecoder | None = None,
) -> list[Frame]:
    """Decodes the frames that `select_frames` selects, each at its own size.

    Turns and mirrors frames as the file says, in quarter turns. A truncated MP4 file is an error; a
    truncated file of another container may pass for a shorter video, and a lost packet of an
    MPEG-TS file costs the frames that need it (if none is left, they are returned as the decoder
    conceals the damage). Reads a file twice and decodes it once, or reads it
    three times and decodes it twice if its packets are not its frames.

    Args:
        source: path or bytes of an MP4/MOV, Matroska/WebM, AVI or MPEG-TS file, or uint8
            (T, H, W, 3) RGB frames.
        num_frames: number of frames to return.
        limits: bounds on file size, duration, frame size and `num_frames`.
        decoder: decodes the selected frames instead of PyAV where it can.

    Returns:
        `num_frames` arrays, uint8 (H, W, 3).

    Raises:
        InputError: the source is missing, too large, damaged, or has no video.
        BackendError: PyAV is not installed.
    """
    check_integer("num_frames", num_frames, 1, limits.video_frames)
    plan = _Plan(
        select=lambda total, *_: select_frames(total, num_frames),
        finish=lambda _, pixels: pixels,
        held=num_frames,
        decoder=decoder,
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
    decoder: FrameDecoder | None = None,
) -> Frame:
    """Decodes the frames that `select_plm_frames` selects, each squashed to one tile.

    Pillow resizes frames like still images. The reference resizes video frames as tensors, with
    the same filter but without Pillow's intermediate rounding: about one value in six differs by
    1 of 255, and a few next to the sharpest edges differ by more.

    Args:
        source: as for `decode_frames`. Frames of an array have no times and count alike; an array
            with few enough frames is taken whole.
        spec: tile size and preprocessing of the model.
        num_frames: most frames to take; None for `spec.max_frames`.
        start_s: start of the clip, in seconds from the first frame.
        end_s: end of the clip, in seconds from the first frame.
        boxes: frame number, from 0 at the start of the file, to a box that `draw_box` draws into
            that frame before it is resized.
        limits: bounds on file size, duration, frame size and `num_frames`.
        decoder: decodes the selected frames instead of PyAV where it can.

    Returns:
        uint8 (n, S, S, 3), 1 <= n <= num_frames; `normalize` takes it with `spec.tile`.

    Raises:
        InputError: an argument is out of range, or as `decode_frames`.
        BackendError: PyAV is not installed.
    """
    most = min(spec.max_frames, limits.video_frames)
    number = most if num_frames is None else num_frames
    check_integer("num_frames", number, 1, most)
    check_times(start_s, end_s)
    tile = spec.tile

    def finish(index: int, pixels: Frame) -> Frame:
        if boxes and index in boxes:
            pixels = draw_box(pixels, boxes[index])
        return resize_image(Image.fromarray(np.ascontiguousarray(pixels)), tile)

    plan = _Plan(
        select=lambda total, fps, times: select_plm_frames(
            total, fps, number, start_s, end_s, times
        ),
        finish=finish,
        held=1,
        decoder=decoder,
    )
    return np.stack(_load(source, plan, limits))


def load_all_frames(
    source: VideoSource, spec: ImageSpec, *, limits: Limits = DEFAULT_LIMITS
) -> Frame:
    """Decodes all frames of a video, each resized as an image, uint8 (T, height, width, 3).

    Raises:
        InputError: the video has more than `limits.video_frames` frames, or as `decode_frames`.
        BackendError: PyAV is not installed.
    """

    def select(total: int, *_: object) -> list[int]:
        if total > limits.video_frames:
            raise InputError(f"the video has {total} frames; the limit is {limits.video_frames}")
        return list(range(total))

    def finish(_: int, pixels: Frame) -> Frame:
        return resize_image(Image.fromarray(np.ascontiguousarray(pixels)), spec)

    return np.stack(_load(source, _Plan(select=select, finish=finish, held=1), limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Selection of frames, and the processing of each one.

    Attributes:
        select: maps the number of frames, the rate and the frames' times (None if unknown) to
            indices.
        finish: maps a frame's index and its upright pixels, uint8 (H, W, 3), to the result.
        held: number of full-size frames in memory at once.
        decoder: another decoder than PyAV; None for PyAV.
    """

    select: Callable[[int, float | None, Sequence[float] | None], list[int]]
    finish: Callable[[int, Frame], Frame]
    held: int
    decoder: FrameDecoder | None = None


def _load(source: VideoSource, plan: _Plan, limits: Limits) -> list[Frame]:
    if isinstance(source, np.ndarray):
        return _from_array(source, plan, limits)
    if not isinstance(source, str | os.PathLike | bytes):
        raise InputError(f"a video must be a path, bytes or an array, not {type(source).__name__}")
    if isinstance(source, bytes):
        name, size = "video", len(source)
        opened: AbstractContextManager[_File] = nullcontext(io.BytesIO(source))
    else:
        path, name = path_name(source, "video")
        opened = open_regular_file(path, name)
    av = _import_av()
    with opened as file:
        if isinstance(file, io.FileIO):
            size = os.fstat(file.fileno()).st_size
        if size > limits.video_bytes:
            raise InputError(f"{name} has {size} bytes; the limit is {limits.video_bytes} bytes")
        try:
            return VideoReader(av, file, name, limits).read(plan)
        except InputError:
            raise
        except Exception:
            # FFmpeg's errors name its internals, and damage can cause any of them.
            raise InputError(
                f"{name} is damaged or is not a video: {_READABLE} can be read"
            ) from None


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise BackendError(
            'decoding a video file needs PyAV: pip install "perception_rt[video]"'
        ) from None
    return av


def _from_array(array: NDArray[Any], plan: _Plan, limits: Limits) -> list[Frame]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise InputError(
            f"a video array must be uint8 (T, H, W, 3), not {array.dtype} {array.shape}"
        )
    frames, height, width, _ = array.shape
    _check_size(width, height, plan.held, "video array", limits)
    return [plan.finish(i, array[i]) for i in plan.select(frames, None, None)]


def _resized(frame: Frame, width: int, height: int) -> Frame:
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


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


class VideoReader:
    """An open video, a file or bytes. Each pass reads it from the start."""

    def __init__(self, av: ModuleType, file: _File, name: str, limits: Limits) -> None:
        self._av = av
        self._file = file
        self._name = name
        self._limits = limits
        self._start = 0.0  # seconds of the first frame
        self._times: list[float] = []  # of the packets, from the first one; empty if unknown
        self._lossy = False
        self._concealed = False  # whether frames are taken that the decoder knows to be damaged
        self._indexable = False  # by the order of the packets' times
        self._stream: int | None = None  # index among all streams

    def read(self, plan: _Plan) -> list[Frame]:
        """Returns the selected frames, each uint8 (H, W, 3)."""
        total, seconds = self.count_packets(plan.held)
        times = self._times if len(self._times) == total else None
        indices = plan.select(total, frame_rate(total, seconds), times)
        frames = self._decode_by(plan, total, indices)
        if frames is None:
            frames, found = self._decode(set(indices), plan)
            if not found and self._lossy:  # its only key frame is damaged
                self._concealed = True
                frames, found = self._decode(set(indices), plan)
            if len(found) != total:  # a packet may be lost, hold half a frame, or be hidden
                if not found:
                    raise InputError(f"{self._name} has no frame that can be decoded")
                times = _ascending(found, self._start)
                indices = plan.select(len(found), frame_rate(len(found), seconds), times)
                frames, _ = self._decode(set(indices), plan)
        return [frames[i] for i in indices]

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
        """The first video stream; no cover picture, and no single picture beside a video."""
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            only = ", only a cover picture" if container.streams.video else ""
            raise InputError(f"{self._name} has no video stream{only}")
        if len(streams) > 1 and self._stream is None:
            at = self._file.tell()  # `container` reads on from here
            self._stream = self._moving()
            self._file.seek(at)
        return next((s for s in streams if s.index == self._stream), streams[0])

    def _moving(self) -> int | None:
        """Index of the first stream with two packets; a picture may not be marked as one."""
        with self._open() as container:
            first, *others = container.streams.video
            packets: Counter[int] = Counter()
            for packet in container.demux(first, *others):
                packets[packet.stream.index] += packet.size > 0
                if packets[first.index] > 1:  # usually at the start of the file
                    break
        return min((index for index, count in packets.items() if count > 1), default=None)

    def count_packets(self, held: int) -> tuple[int, float]:
        """Counts the packets that are shown, and checks sizes and duration.

        Args:
            held: number of full-size frames that will be in memory at once.

        Returns:
            The number of packets, and their duration in seconds; 0 if they have no times.
        """
        limit = int(self._limits.video_seconds * _MAX_FPS)
        total = 0
        times: list[float] = []
        first, last, end = math.inf, -math.inf, -math.inf  # `end` is that of the last packet
        with self._open() as container:
            stream = self._video_stream(container)
            self._lossy = container.format.name == _LOSSY
            if stream.width or not self._lossy:  # else a later key frame may tell the size
                _check_size(stream.width, stream.height, held, self._name, self._limits)
            self._indexable = container.format.name.startswith(_TIMED)
            self._stream = stream.index
            for packet in container.demux(stream):
                if packet.is_corrupt and not self._lossy:
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
                times.append(seconds)
                first, last = min(first, seconds), max(last, seconds)
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if last - first > self._limits.video_seconds:
                    raise InputError(
                        f"{self._name} is longer than {self._limits.video_seconds:g} seconds"
                    )
        if total == 0:
            raise InputError(f"{self._name} has no frames")
        self._start, self._times = (first if times else 0.0), sorted(time - first for time in times)
        self._indexable &= all(a < b for a, b in pairwise(self._times))
        if end > last:
            return total, end - first
        if last > first:  # packets have times, but no durations
            return total, (last - first) * total / (total - 1)
        return total, 0.0

    def _decode(self, wanted: set[int], plan: _Plan) -> tuple[dict[int, Frame], list[float | None]]:
        """The finished frames by index, and the time in seconds of each frame in the file."""
        kept: dict[int, Frame] = {}
        times: list[float | None] = []
        for frame in self._frames(plan.held):
            index = len(times)
            if index in wanted:
                pixels = turn(frame.to_ndarray(format="rgb24"), _turn_of(frame))
                kept[index] = plan.finish(index, pixels)
            times.append(frame.time)
        return kept, times

    def _decode_by(self, plan: _Plan, total: int, indices: list[int]) -> dict[int, Frame] | None:
        """The finished frames by index from the plan's other decoder; None if it cannot."""
        file = self._file
        if plan.decoder is None or not self._indexable or not isinstance(file, io.FileIO):
            return None
        with closing(self._frames(plan.held)) as decoded:
            first = next(decoded, None)
        if first is None or first.format.components[0].bits > 8:  # decoders round differently
            return None
        how = _turn_of(first)
        if is_mirrored(how):
            return None
        wanted = sorted(set(indices))
        assert self._stream is not None  # since the packets were counted
        file.seek(0)
        try:
            frames = plan.decoder(file, stream=self._stream, total=total, indices=wanted)
        except Exception:
            return None
        shape = (first.width, first.height, 3) if how[0] else (first.height, first.width, 3)
        if len(frames) != len(wanted) or any(frame.shape != shape for frame in frames):
            return None
        return {i: plan.finish(i, frame) for i, frame in zip(wanted, frames, strict=True)}

    def _frames(self, held: int) -> Generator[Any, None, None]:
        """Decodes the video's frames in order, and checks their sizes."""
        with self._open() as container:
            stream = self._video_stream(container)
            stream.codec_context.thread_type = "AUTO"
            # A frame may be larger than its container declares, so the decoder gets a limit before
            # it allocates memory. It counts hidden edges too; exact sizes are checked below.
            most = 2 * self._limits.video_pixels + _EDGES
            stream.codec_context.options = {"max_pixels": str(most)}
            if self._concealed:
                stream.codec_context.flags |= self._av.codec.context.Flags.output_corrupt
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except self._av.error.InvalidDataError:
                    if not self._lossy:
                        raise
                    continue
                for frame in frames:
                    _check_size(frame.width, frame.height, held, self._name, self._limits)
                    yield frame


def _turn_of(frame: Any) -> Turn:
    """How a decoded frame is to be turned."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of other data beside it
        matrix = None
    return IDENTITY if matrix is None else read_matrix(bytes(matrix))


def _ascending(times: Sequence[float | None], start: float) -> list[float] | None:
    """Seconds since `start`; None if one is unknown, or they do not ascend."""
    known = [time - start for time in times if time is not None]
    return known if len(known) == len(times) and known == sorted(known) else None


def _refuse(*_: object) -> None:
    raise InputError("a video must not refer to other files")
