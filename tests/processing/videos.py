"""Makes small videos whose frames show their index."""

import numpy as np
import pytest

from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.processing.video import VideoReader, load_video

av = pytest.importorskip("av")

LEVELS = 12  # grey of frame i is 12 * i, so that a decoded frame tells its index


def write_video(
    path, *, frames=20, size=(64, 48), codec="mpeg4", rotation=None, matrix=None, rate=10, **options
):
    width, height = size
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for i in range(frames):
            pixels = np.full((height, width, 3), i * LEVELS % 256, np.uint8)
            pixels[:12, :12] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        samples = np.zeros((1, 16_000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def indices_of(frames):
    """Indices of frames of `write_video`, read from their centres."""
    grey = frames[:, frames.shape[1] // 2, frames.shape[2] // 2, 1].astype(int)
    return [round(value / LEVELS) for value in grey]


def message_of(source, num_frames=4, **limits):
    with pytest.raises(InputError) as caught:
        load_video(source, num_frames=num_frames, limits=Limits(**limits))
    assert caught.value.__cause__ is None
    return str(caught.value)


def double_packets(monkeypatch):
    """Makes every frame count as two packets."""
    count = VideoReader.count_packets

    def doubled(reader, held):
        packets, seconds = count(reader, held)
        return packets * 2, seconds

    monkeypatch.setattr(VideoReader, "count_packets", doubled)
