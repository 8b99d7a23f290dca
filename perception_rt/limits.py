"""Bounds on untrusted input, in one record that is passed as an argument.

Each limit is checked in the outermost layer, from a header or a length, before memory is spent.
"""

from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds; a value equal to a bound is accepted.

    Attributes:
        image_bytes: encoded size of one image.
        image_pixels: width x height of one image, read from its header.
        image_side_px: width or height of one image.
        text_bytes: UTF-8 size of one text.
        video_bytes: encoded size of one video.
        video_pixels: width x height of one video frame.
        video_frames: frames selected from one video.
        video_seconds: duration of one video.
        conversation_bytes: UTF-8 size of a question and its history.
        history_turns: questions and answers before a question.
        stop_strings: strings that end one answer.
        stop_chars: characters of one stop string.
        queued_requests: requests that wait for memory.
        manifest_bytes: size of a package's manifest.
        manifest_depth: nesting depth of a package's manifest.
        package_files: files in one package.
    """

    image_bytes: int = 64 * _MIB
    image_pixels: int = 128 * _MIB
    image_side_px: int = 32_768
    text_bytes: int = 64 * 1024
    video_bytes: int = 4096 * _MIB
    video_pixels: int = 8192 * 4352
    video_frames: int = 1024
    video_seconds: float = 6 * 3600.0
    conversation_bytes: int = 256 * 1024
    history_turns: int = 256
    stop_strings: int = 16
    stop_chars: int = 256
    queued_requests: int = 128
    manifest_bytes: int = _MIB
    manifest_depth: int = 16
    package_files: int = 256


DEFAULT_LIMITS = Limits()
