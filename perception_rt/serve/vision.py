"""`/v1/classify` and `/v1/features`: zero-shot probabilities, and dense features as a picture."""

import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from perception_rt.errors import InputError
from perception_rt.processing.pca import principal_colors
from perception_rt.records import check_integer
from perception_rt.serve.failures import ApiError, as_api_error
from perception_rt.serve.fields import Fields
from perception_rt.serve.json_response import AsciiJson
from perception_rt.serve.models import EmbeddingModel
from perception_rt.serve.service import Service

MOST_IMAGES = 64
MOST_LABELS = 4096
MOST_TEMPLATES = 128
_SIDE_PX = 448
_T = TypeVar("_T")


async def classify(service: Service, body: dict[str, Any], _: HttpRequest) -> Response:
    """Answers `model`, `images` (data URLs), `labels` and perhaps `templates`.

    Raises:
        ApiError: a field is unusable.
        PerceptionError: as `Embedder.classify`.
    """
    fields = Fields(body)
    model = service.models.embedding(fields.take("model"))
    urls = fields.texts("images", MOST_IMAGES)
    labels = fields.texts("labels", MOST_LABELS)
    templates = fields.take("templates")
    if templates is not None:
        templates = Fields({"templates": templates}).texts("templates", MOST_TEMPLATES)
    fields.finish()
    images = await service.in_thread(_images, service, urls)
    rows = await _in_engine_thread(
        service, model, lambda: model.engine.classify(images, labels, templates)
    )
    data = [
        {"object": "classification", "index": index, "probabilities": row}
        for index, row in enumerate(rows.tolist())
    ]
    return AsciiJson({"object": "list", "data": data, "labels": labels, "model": model.name})


async def features(service: Service, body: dict[str, Any], _: HttpRequest) -> Response:
    """Answers `model`, `image` (a data URL) and perhaps `layer` with a picture of the features.

    Raises:
        ApiError: a field is unusable.
        PerceptionError: as `Embedder.features`.
    """
    fields = Fields(body)
    model = service.models.embedding(fields.take("model"))
    urls = fields.texts("image", 1)
    layer = fields.take("layer")
    layer = check_integer("layer", -1 if layer is None else layer, -1024)
    fields.finish()
    images = await service.in_thread(_images, service, urls)
    (dense,) = await _in_engine_thread(service, model, lambda: model.engine.features(images, layer))
    picture = await service.in_thread(_picture, dense)
    return AsciiJson(
        {
            "object": "features",
            "model": model.name,
            "layer": layer,
            "shape": list(dense.shape),
            "picture": f"data:image/png;base64,{picture}",
        }
    )


async def _in_engine_thread(service: Service, model: EmbeddingModel, work: Callable[[], _T]) -> _T:
    with service.health.watch(model.name):
        return await asyncio.get_running_loop().run_in_executor(model.thread, work)


def _images(service: Service, urls: list[str]) -> list[bytes]:
    images = []
    for index, url in enumerate(urls):
        try:
            images.append(service.media.read_url("image", url))
        except InputError as error:
            code = as_api_error(error).code
            raise ApiError(400, f"image {index}: {error}", param="images", code=code) from None
    return images


def _picture(dense: Any) -> str:
    """The first three principal components as colours, a PNG in base64."""
    colors = Image.fromarray(principal_colors(dense[None])[0])
    factor = max(1, _SIDE_PX // max(colors.size))
    size = (colors.width * factor, colors.height * factor)
    file = io.BytesIO()
    colors.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
