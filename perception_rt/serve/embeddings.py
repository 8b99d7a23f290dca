"""`/v1/embeddings`: of texts as OpenAI defines it, and of images and videos as data URLs.

Images and videos come as infinity's clients send them (`input` and `modality`) or as vLLM's do
(`messages` with one part).
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from perception_rt.errors import InputError
from perception_rt.records import check_integer
from perception_rt.runtime.generation.messages import parse_messages
from perception_rt.serve.failures import ApiError, as_api_error
from perception_rt.serve.fields import Fields
from perception_rt.serve.json_response import AsciiJson
from perception_rt.serve.models import EmbeddingModel
from perception_rt.serve.service import Service

MOST_INPUTS = 2048
_MODALITIES = ("text", "image", "video")
_FORMATS = ("float", "base64")
_NUM_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """Inputs of one embedding request, all of one modality.

    Attributes:
        modality: "text", "image" or "video".
        values: texts or encoded files.
    """

    modality: str
    values: list[Any]


async def embed(service: Service, body: dict[str, Any], _: HttpRequest) -> Response:
    """Answers the body of a request.

    Raises:
        ApiError: a field is unusable.
        PerceptionError: as the methods of `Embedder`.
    """
    fields = Fields(body)
    model = service.models.embedding(fields.take("model"))
    encoding = fields.take("encoding_format")
    if encoding is None:
        encoding = "float"
    elif encoding not in _FORMATS:
        raise ApiError(400, "encoding_format must be float or base64", param="encoding_format")
    dimensions = fields.take("dimensions")
    if dimensions not in (None, model.engine.dim):
        text = f"{model.name} has {model.engine.dim} dimensions, and no other number"
        raise ApiError(400, text, param="dimensions")
    frames = fields.take("num_frames")
    frames = check_integer("num_frames", _NUM_FRAMES if frames is None else frames, 1, 1024)
    given, modality, messages = (fields.take(n) for n in ("input", "modality", "messages"))
    fields.ignore("user")
    fields.finish()
    if (given is None) == (messages is None):
        raise ApiError(400, "give either input or messages", param="input")
    if given is None:
        items = await service.in_thread(_of_messages, service, messages)
    else:
        items = await service.in_thread(
            _of_input, service, given, "text" if modality is None else modality
        )
    rows, tokens = await _rows(service, model, items, frames)
    return await service.in_thread(_response, model.name, rows, encoding, tokens)


async def _rows(
    service: Service, model: EmbeddingModel, items: _Items, frames: int
) -> tuple[NDArray[np.float32], int]:
    """Rows and the number of text tokens."""
    if items.modality == "text":
        tokens = await service.in_thread(model.count_tokens, items.values)
        with service.health.watch(model.name):
            return await model.texts.embed(items.values), tokens
    if items.modality == "image":
        with service.health.watch(model.name):
            return await model.images.embed(items.values), 0
    # A failure may be a missing library for videos, so it says nothing of the engine.
    return await model.videos.embed([(video, frames) for video in items.values]), 0


def _of_input(service: Service, given: Any, modality: object) -> _Items:
    if modality not in _MODALITIES:
        raise ApiError(400, f"modality must be one of {', '.join(_MODALITIES)}", param="modality")
    values = given if isinstance(given, list) else [given]
    if len(values) > MOST_INPUTS:
        text = f"input has {len(values)} items; the limit is {MOST_INPUTS}"
        raise ApiError(400, text, param="input")
    if values and all(isinstance(value, int | list) for value in values):
        raise ApiError(400, "input must be texts; token ids are not accepted", param="input")
    if not values or not all(isinstance(value, str) for value in values):
        raise ApiError(400, "input must be a string or a list of strings", param="input")
    if modality != "text":
        read = []
        for index, value in enumerate(values):
            try:
                read.append(service.media.read_url(str(modality), value))
            except InputError as error:
                code = as_api_error(error).code
                raise ApiError(400, f"input {index}: {error}", param="input", code=code) from None
        values = read
    return _Items(modality=str(modality), values=values)


def _of_messages(service: Service, messages: Any) -> _Items:
    found = parse_messages(messages, service.media)
    kinds: dict[str, list[Any]] = {"text": [found.prompt] if found.prompt else []}
    kinds |= {"image": [*found.images], "video": [*found.videos]}
    filled = [(kind, values) for kind, values in kinds.items() if values]
    if found.history or found.system is not None or len(filled) != 1 or len(filled[0][1]) != 1:
        raise ApiError(
            400,
            "messages must be one user message with one text, one image or one video",
            param="messages",
        )
    kind, values = filled[0]
    return _Items(modality=kind, values=values)


def _response(name: str, rows: NDArray[np.float32], encoding: str, tokens: int) -> Response:
    vectors: list[Any]
    if encoding == "base64":
        vectors = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
    else:
        vectors = rows.tolist()
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return AsciiJson({"object": "list", "data": data, "model": name, "usage": usage})
