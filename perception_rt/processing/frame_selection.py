"""Selects frames of a video by index or, for a variable frame rate, by time."""

from bisect import bisect_right
from collections.abc import Sequence

from perception_rt.errors import InputError
from perception_rt.records import check_integer, plain_number

_MAX_SECONDS = 2**31  # of a time argument; also bounds frames per second
_TIME_ERROR = 1e-6  # seconds by which sums of times are off


def select_frames(total: int, num_frames: int) -> list[int]:
    """Returns evenly spaced frame indices, including the first and the last frame.

    Args:
        total: frames of the video.
        num_frames: number of indices. A single one is the middle frame; frames repeat if there are
            too few.

    Raises:
        InputError: a number is not an integer of at least 1.
    """
    total = check_integer("total", total, 1)
    num_frames = check_integer("num_frames", num_frames, 1)
    if num_frames == 1:
        return [total // 2]
    return [i * (total - 1) // (num_frames - 1) for i in range(num_frames)]


def select_plm_frames(
    total: int,
    fps: float | None,
    max_frames: int,
    start_s: float | None = None,
    end_s: float | None = None,
    times: Sequence[float] | None = None,
) -> list[int]:
    """Returns the frame indices that the reference's language models use.

    Takes one frame per second, starting with the clip's first. If these are more than `max_frames`,
    takes `max_frames` of them, evenly spaced. If they are fewer, spaces `max_frames` over all
    frames of the clip, or takes all frames if there are fewer. Time and memory depend only on the
    number of indices.

    The reference takes a frame's time for its index divided by the rate. So does this, but for a
    clip of a video whose `times` are not uniform: its frames are those shown at evenly spaced
    times, starting with the one shown at `start_s`.

    Also deviates from the reference in three cases in which the reference fails: a rate below 0.5
    takes every frame, indices stay below `total`, and `end_s` before `start_s` is an error.

    Args:
        total: frames of the video.
        fps: frames per second; None if unknown, which spaces indices over all frames.
        max_frames: most indices to return.
        start_s: start of the clip in seconds; None for the first frame.
        end_s: end of the clip in seconds; None, or a time past the end, for the last frame.
        times: seconds from the first frame of each frame, in ascending order; None if unknown.

    Returns:
        At least one index, in ascending order.

    Raises:
        InputError: a number is out of range, or the clip starts after the last frame.
    """
    total, max_frames = check_integer("total", total, 1), check_integer("max_frames", max_frames, 1)
    check_times(start_s, end_s)
    fps = plain_number(fps)
    if fps is not None and not (type(fps) in (int, float) and 0 < fps <= _MAX_SECONDS):
        raise InputError(f"fps must be a number above 0 and at most {_MAX_SECONDS}")
    first, last = _clip(total, fps, start_s, end_s)
    clipped = start_s is not None or end_s is not None
    if clipped and times is not None and not is_uniform(times):
        return _by_time(times, max_frames, start_s, end_s)
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


def check_times(start_s: float | None, end_s: float | None) -> None:
    """InputError unless start and end of a clip, in seconds, are usable."""
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        if value is None:
            continue
        number = plain_number(value)
        if type(number) not in (int, float) or not 0 <= number <= _MAX_SECONDS:
            raise InputError(f"{name} must be a number of seconds from 0 to {_MAX_SECONDS}")
    if start_s is not None and end_s is not None and end_s < start_s:
        raise InputError(f"end_s {end_s:g} is before start_s {start_s:g}")


def frame_rate(frames: int, seconds: float) -> float | None:
    """Frames per second; None if the duration is unknown (0 seconds)."""
    fps = frames / seconds if seconds > 0 else 0.0
    fps = round(fps, 6)  # 9.999999999999998 would put second 1 at frame 9
    return fps if 0 < fps <= _MAX_SECONDS else None


def is_uniform(times: Sequence[float]) -> bool:
    """Whether no frame is further than one frame off the clock of a constant rate.

    Args:
        times: seconds of the frames, in ascending order; the first is 0.
    """
    if len(times) < 3:
        return True
    step = times[-1] / (len(times) - 1)
    return all(abs(time - index * step) <= step for index, time in enumerate(times))


def _by_time(
    times: Sequence[float], max_frames: int, start_s: float | None, end_s: float | None
) -> list[int]:
    """Indices of a clip's frames that are shown at evenly spaced times; see `select_plm_frames`."""
    start = start_s or 0.0
    end = max(start, times[-1] if end_s is None else min(end_s, times[-1]))

    def shown(time: float) -> int:
        return max(0, bisect_right(times, time + _TIME_ERROR) - 1)

    first, last = shown(start), shown(end)
    seconds = int(end - start + _TIME_ERROR) + 1
    if seconds >= max_frames:
        step, number = 1.0, seconds
    elif last - first < max_frames:
        return list(range(first, last + 1))
    else:
        step, number = (end - start) / (max_frames - 1), max_frames
    stride = (number - 1) / (max_frames - 1) if max_frames > 1 else 0.0
    picked = [shown(start + step * round(i * stride)) for i in range(max_frames)]
    return sorted(set(picked))
