"""`/v1/chat/completions`: answers of language models, whole or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generation.messages import parse_messages, parse_response_format
from perception_rt.runtime.request import Request, Result
from perception_rt.serve.events import EventStream
from perception_rt.serve.failures import ApiError, as_api_error
from perception_rt.serve.fields import Fields
from perception_rt.serve.json_response import AsciiJson
from perception_rt.serve.models import ChatModel
from perception_rt.serve.service import Service

# Fields that are a request's own, by the same name.
_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "max_tiles",
    "num_frames",
    "lookup",
    "repetition_penalty",
    "ignore_eos",
    "choices",
    "regex",
)
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields of OpenAI's API that are accepted with a value that changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
_REASONS = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A request of the route, before its images are opened."""

    model: ChatModel
    messages: Any
    options: dict[str, Any]
    stream: bool
    with_usage: bool


async def complete(service: Service, body: dict[str, Any], _: HttpRequest) -> Response:
    """Answers the body of a request.

    Raises:
        ApiError: a field is unusable.
        PerceptionError: as `Generator.submit` and `Handle.result`.
    """
    call = _parse(service, body)
    engine = call.model.engine
    request: Request = await service.in_thread(_request, service, call)
    handle = await service.in_thread(engine.submit, request)
    answer = _Answer(service, call.model, handle)
    if call.stream:
        return EventStream(answer.events(with_usage=call.with_usage))
    return AsciiJson(await answer.whole())


def _parse(service: Service, body: dict[str, Any]) -> _Call:
    fields = Fields(body)
    model = service.models.chat(fields.take("model"))
    messages = fields.take("messages")
    stream = fields.flag("stream")
    with_usage = False
    stream_options = fields.take("stream_options")
    if stream_options is not None:
        if not stream or not isinstance(stream_options, dict):
            raise ApiError(400, "stream_options is an object for stream=true only")
        inner = Fields(stream_options)
        with_usage = inner.flag("include_usage")
        inner.flag("include_obfuscation")
        inner.finish("stream_options.")
    options = {name: value for name in _OPTIONS if (value := fields.take(name)) is not None}
    most = fields.one_of("max_completion_tokens", "max_tokens")
    if most is not None:
        options["max_new_tokens"] = most
    stop = fields.take("stop")
    if stop is not None:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    response_format = fields.take("response_format")
    if response_format is not None:
        options["json_schema"] = parse_response_format(response_format)
    fields.ignore(*_IGNORED)
    for name, values in _NEUTRAL.items():
        fields.only(name, values)
    fields.finish()
    return _Call(
        model=model, messages=messages, options=options, stream=stream, with_usage=with_usage
    )


def _request(service: Service, call: _Call) -> Request:
    return parse_messages(call.messages, service.media).request(**call.options)


class _Answer:
    """One answer, in the two forms of the route."""

    def __init__(self, service: Service, model: ChatModel, handle: Handle) -> None:
        self._service = service
        self._model = model
        self._handle = handle
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }
        service.metrics.load(model.name, model.engine.stats)

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        result = None
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                result = piece
        assert isinstance(result, Result)
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _REASONS[result.finish_reason],
            "logprobs": None,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(result),
        }

    async def events(self, *, with_usage: bool) -> AsyncGenerator[str]:
        """The answer as the data of server-sent events."""
        more: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return self._chunk([choice], more)

        yield chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield chunk({"content": piece})
                        continue
                    yield chunk({}, _REASONS[piece.finish_reason])
                    if with_usage:
                        yield self._chunk([], {"usage": _usage(piece)})
        except Exception as error:  # the status is sent already
            failure = as_api_error(error)
            self._service.metrics.failed(failure.code)
            yield json.dumps(failure.body())
            return
        yield "[DONE]"

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        head = {**self._head, "object": "chat.completion.chunk"}
        return json.dumps({**head, "choices": choices, **more})

    async def _pieces(self) -> AsyncGenerator[str | Result]:
        metrics, name, engine = self._service.metrics, self._model.name, self._model.engine
        try:
            with self._service.health.watch(name):
                async with aclosing(self._service.pieces(self._handle)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Result):
                            metrics.answered(name, piece)
                        yield piece
        finally:
            metrics.load(name, engine.stats)


def _usage(result: Result) -> dict[str, Any]:
    prompt, new = result.timings.prompt_tokens, len(result.tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": result.timings.cached_tokens},
    }
