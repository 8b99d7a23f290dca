"""Embeds the items of a task."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.contents import Contents
from perception_rt.bulk.listing import Item
from perception_rt.errors import InputError
from perception_rt.evaluation.tasks import OnProgress
from perception_rt.runtime.embedder import Embedder

Float32 = NDArray[np.float32]

FRAMES = 8  # of a video, unless an option says otherwise


def embed_items(
    engine: Embedder, items: Sequence[Item], num_frames: int | None, on_progress: OnProgress
) -> Float32:
    """Unit embeddings of images or of videos, float32 (N, D).

    Args:
        engine: a loaded encoder.
        items: images or videos, all of one kind.
        num_frames: frames per video; None for 8.
        on_progress: called after each batch.

    Raises:
        InputError: an item is unusable; names it.
    """
    more: dict[str, Any] = {}
    embed, noun = engine.embed_images, "images"
    if items[0].kind == "video":
        embed, noun = engine.embed_videos, "videos"  # type: ignore[assignment]
        more["num_frames"] = FRAMES if num_frames is None else num_frames
    elif num_frames is not None:
        raise InputError("--num-frames is for videos, and the data have images")

    def fail(index: int, error: InputError) -> None:
        raise InputError(f"{items[index].source!r:.200}: {error}")

    with Contents() as contents:
        return embed(
            _contents(contents, items),
            on_error=fail,
            on_progress=lambda done, _: on_progress(noun, done, len(items)),
            **more,
        )


def _contents(contents: Contents, items: Sequence[Item]) -> Iterator[str | bytes]:
    for item in items:
        yield contents.video(item) if item.kind == "video" else contents.image(item)
