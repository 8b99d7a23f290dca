"""torchcodec as the decoder of training videos, where it is installed.

It seeks to the frames that are needed, where PyAV decodes a video from its start. PyAV still reads
and checks each file, and decodes those that torchcodec cannot.
"""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

from perception_rt.errors import InputError
from perception_rt.processing.video import Frame, FrameDecoder


@cache
def frame_decoder() -> FrameDecoder | None:
    """Returns a decoder for `load_video` and `load_frames`; None if torchcodec cannot be used."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError):  # it raises one of these without FFmpeg, too
        return None
    return TorchcodecDecoder(VideoDecoder)


class TorchcodecDecoder:
    """A `FrameDecoder` that calls torchcodec.

    Args:
        video_decoder: the class `torchcodec.decoders.VideoDecoder`.
    """

    def __init__(self, video_decoder: Any) -> None:
        self._video_decoder = video_decoder

    def __call__(
        self, file: io.FileIO, *, stream: int, total: int, indices: Sequence[int]
    ) -> Sequence[Frame]:
        """See `FrameDecoder`."""
        # One thread: workers of the loader decode several videos at a time.
        decoder = self._video_decoder(
            file,
            stream_index=stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
        if len(decoder) != total:
            raise InputError(f"torchcodec finds {len(decoder)} frames, not {total}")
        frames: Sequence[Frame] = decoder.get_frames_at(list(indices)).data.numpy()
        return frames
