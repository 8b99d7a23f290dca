"""The Starlette application: routes, errors, and what happens at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from perception_rt.errors import PerceptionError
from perception_rt.serve.body import read_json, unless_gone
from perception_rt.serve.chat import complete
from perception_rt.serve.embeddings import embed
from perception_rt.serve.failures import ApiError, ClientGone, answer_error, as_api_error
from perception_rt.serve.guard import Guard
from perception_rt.serve.json_response import AsciiJson
from perception_rt.serve.metrics import CONTENT_TYPE
from perception_rt.serve.models import ChatModel
from perception_rt.serve.page import page_routes
from perception_rt.serve.service import Service
from perception_rt.serve.vision import classify, features

Answer = Callable[[Service, dict[str, Any], Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """Builds the application, which closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        try:
            yield {"metrics": service.metrics}  # connections count what they refuse
        finally:
            service.close()

    async def failed(request: Request, error: Exception) -> Response:
        if not isinstance(error, ClientGone | HTTPException):
            service.metrics.failed(as_api_error(error).code)
        return await answer_error(request, error)

    async def alive(_: Request) -> Response:
        return AsciiJson({"status": "ok"})

    async def ready(_: Request) -> Response:
        failed = service.health.failed
        if failed:
            return AsciiJson({"status": "failed", "models": failed}, 503)
        return AsciiJson({"status": "ok"})

    async def metrics(_: Request) -> Response:
        for model in service.models:
            if isinstance(model, ChatModel):
                # A cancelled request gives its row back after its response has ended.
                service.metrics.load(model.name, model.engine.stats)
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(_: Request) -> Response:
        data = [service.models.describe(model) for model in service.models]
        return AsciiJson({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        found = service.models.get(request.path_params["name"])
        return AsciiJson(service.models.describe(found))

    def posted(path: str, answer: Answer) -> Route:
        async def endpoint(request: Request) -> Response:
            with service.budget.reserve() as reserved:
                body = await read_json(request, service.max_body_bytes, reserved)
                return await unless_gone(request, _started(answer(service, body, request)))

        return Route(path, endpoint, methods=["POST"])

    errors = (ApiError, ClientGone, PerceptionError, HTTPException, Exception)
    return Starlette(
        routes=[
            *page_routes(),
            Route("/health", alive),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            posted("/v1/embeddings", embed),
            posted("/v1/chat/completions", complete),
            posted("/v1/classify", classify),
            posted("/v1/features", features),
        ],
        middleware=[Middleware(Guard, service=service)],
        exception_handlers=dict.fromkeys(errors, failed),
        lifespan=lifespan,
    )


async def _started(answer: Awaitable[Response]) -> Response:
    return await answer
