"""Refused requests: the status, OpenAI's class of error, and the message."""

import asyncio
import json
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from server_process import metric, picture_url, question, until

from perception_rt.errors import InputError
from perception_rt.runtime.generation.constraint import Constraint
from perception_rt.runtime.generator import Generator
from perception_rt.serve.app import make_app
from perception_rt.serve.options import ServeOptions
from perception_rt.serve.service import Service

CHAT = {"model": "PLM-Demo", "messages": question("Is there a 4?")}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}
TEXT = {"model": "PE-Demo", "input": "a red three"}


def test_classes_of_errors_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there are PE-Demo"):
        client.embeddings.create(model="gpt", input="a")
    with pytest.raises(openai.BadRequestError, match="PLM-Demo is a language model: use /v1/chat"):
        client.embeddings.create(model="PLM-Demo", input="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, temperature=-1)
    assert caught.value.body == {
        "message": "temperature must be a finite number of at least 0, not -1",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_value",
    }


def test_a_strange_host_is_permission_denied(client: openai.OpenAI) -> None:
    named = client.with_options(default_headers={"Host": "evil.example"})
    with pytest.raises(openai.PermissionDeniedError, match="must name this machine"):
        named.models.list()


def test_a_client_that_gives_up_is_cancelled(client: openai.OpenAI, base: str) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(
            **CHAT, max_tokens=900, extra_body={"ignore_eos": True}
        )
    until(lambda: metric(base, "perception_rt_running_requests") == 0)


def test_failures_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a missing library, a mistake of ours, and a failure during a stream."""
    service = Service(ServeOptions(packages=("demo:plm",), load={"threads": 1}))
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)

    async def check() -> None:
        http = httpx.AsyncClient(transport=transport)
        client = openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http
        )
        ask = client.chat.completions.create
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "llguidance", None)
            with pytest.raises(openai.InternalServerError, match="choices needs llguidance") as no:
                await ask(**CHAT, extra_body={"choices": ["a"]})
            assert no.value.status_code == 503
        with monkeypatch.context() as patch:
            patch.setattr(Generator, "submit", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="internal error") as mistake:
                await ask(**CHAT)
            assert mistake.value.status_code == 500
        with monkeypatch.context() as patch:
            patch.setattr(Constraint, "accept", _fail)
            with pytest.raises(openai.APIError, match="too complex") as cut:
                async for _ in await ask(**CHAT, stream=True, extra_body={"choices": ["a", "b"]}):
                    pass
            assert cut.value.code == "invalid_value"

    try:
        asyncio.run(check())
    finally:
        service.close()


def _fail(*_: Any) -> None:
    raise InputError("too complex")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": question("a", "read")[0]["content"]}, "role must be one of"),
        ({"model": None}, "model must be a string"),
        ({"model": "PE-Demo"}, "PE-Demo is an encoder: use /v1/embeddings"),
        ({"n": 2}, "this value of n is not supported"),
        ({"logprobs": True}, "this value of logprobs is not supported"),
        ({"tools": [{}]}, "this value of tools is not supported"),
        ({"unknown": 1}, "unknown field unknown"),
        ({"stream": 1}, "stream must be true or false"),
        ({"stream_options": {}}, "stream_options is an object for stream=true only"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens and max_tokens"),
        ({"max_tokens": 0}, "max_new_tokens must be"),
        ({"max_tokens": 5000}, "the context has 1024"),
        ({"top_p": 2}, "top_p must be a finite number from 0 to 1, not 2"),
        ({"seed": -1}, "seed must be"),
        ({"stop": [""]}, "stop must hold strings"),
        ({"lookup": "yes"}, "lookup must be True or False, not a str"),
        ({"lookup": True, "temperature": 1}, "lookup is for temperature 0 only"),
        ({"max_tiles": 99}, "max_tiles must be"),
        ({"response_format": "json"}, "with text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, 'must have "json_schema"'),
        ({"response_format": SCHEMA, "stream": True}, "json_schema cannot be followed: no token"),
        ({"regex": "("}, "regex cannot be used: unclosed group"),
        ({"choices": []}, "choices must be a list of at least one text"),
    ],
)
def test_bad_questions_are_400(base: str, more: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{base}/v1/chat/completions", json=CHAT | more)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"input": None}, "give either input or messages"),
        ({"input": []}, "input must be a string or a list of strings"),
        ({"input": [1, 2]}, "token ids are not accepted"),
        ({"input": [[1, 2]]}, "token ids are not accepted"),
        ({"input": ["a", 1]}, "input must be a string or a list of strings"),
        ({"input": ["a"] * 2049}, "input has 2049 items; the limit is 2048"),
        ({"encoding_format": "hex"}, "encoding_format must be float or base64"),
        ({"dimensions": 8}, "PE-Demo has 64 dimensions"),
        ({"modality": "audio"}, "modality must be one of text, image, video"),
        ({"modality": "image"}, "input 0: the image URL 'a red three' is refused"),
        ({"modality": "image", "input": "/etc/passwd"}, "the image URL '/etc/passwd' is refused"),
        ({"modality": "image", "input": "data:image/png;base64,AAAA"}, "image 0"),
        ({"modality": "image", "input": "http://127.0.0.1/"}, "is refused: send the image itself"),
        ({"input": None, "messages": question("a", "read")}, "one text, one image or one video"),
    ],
)
def test_bad_inputs_are_400(base: str, more: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{base}/v1/embeddings", json=TEXT | more)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_classify_and_features_name_bad_fields(base: str) -> None:
    def message(route: str, **body: Any) -> str:
        answer = httpx.post(f"{base}/v1/{route}", json={"model": "PE-Demo", **body})
        assert answer.status_code == 400
        return str(answer.json()["error"]["message"])

    url = picture_url("digit_3")
    assert message("classify", labels=["a"]) == "images must be a list of at least one string"
    assert message("classify", images=[url]) == "labels must be a list of at least one string"
    assert "templates" in message("classify", images=[url], labels=["a"], templates=["no"])
    assert "layer" in message("features", image=url, layer=99)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not valid JSON at character 1"),
        (b"", "the body is not valid JSON at character 0"),
        (b'{"a": 1} {', "the body is not valid JSON at character 9"),
        (b"{'a': 1}", "the body is not valid JSON at character 1"),
        (b'{"a": "\n"}', "the body is not valid JSON at character 7"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"a":' * 100_000, "the body is nested too deeply"),
        (b'{"model": NaN}', "a number is not finite"),
        (b'{"model": -Infinity}', "a number is not finite"),
        (b'{"seed": 1e999}', "a number is not finite"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
        (b'{"input": "a", "input": "b"}', "an object has the same name twice"),
        (b'{"a": {"b": 1, "\\u0062": 1}}', "an object has the same name twice"),
        (b"\xff\xfe", "the body is not UTF-8 at byte 0"),
        (b'{"a": "\xe9"}', "the body is not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "the body is not UTF-8 at byte 7"),
        (json.dumps(TEXT).encode("utf-16"), "the body is not UTF-8 at byte 0"),
        (json.dumps(TEXT).encode("utf-32-le"), "the body is not valid JSON at character 1"),
        (json.dumps(TEXT).encode("utf-8-sig"), "the body is not valid JSON at character 0"),
        (b'{"input": "\\ud800"}', "half of a surrogate pair"),
        (b'{"input": "\\uDE00\\uD83D"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"[1]", "the body must be a JSON object"),
        (b'"a"', "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
    ],
)
def test_malformed_json(base: str, body: bytes, said: str) -> None:
    before = metric(base, "perception_rt_errors_total", code="invalid_json")
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{base}/v1/embeddings", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert said in answer.json()["error"]["message"]
    assert metric(base, "perception_rt_errors_total", code="invalid_json") == before + 1


def test_odd_but_valid_json_is_read(base: str) -> None:
    headers = {"Content-Type": "application/json"}
    for value in (rb"\ud83d\ude00", rb"\\ud800", "\u00e9".encode()):
        body = b'{"model": "PE-Demo", "input": "' + value + b'"}'
        answer = httpx.post(f"{base}/v1/embeddings", content=body, headers=headers)
        assert answer.status_code == 200


def test_other_content_types_paths_methods_and_hosts(base: str) -> None:
    data = json.dumps(TEXT)
    answer = httpx.post(
        f"{base}/v1/embeddings", content=data, headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 415
    error = httpx.get(f"{base}/v1/other").json()["error"]
    assert (error["code"], error["message"]) == ("not_found", "Not Found: GET /v1/other")
    assert httpx.get(f"{base}/v1/embeddings").json()["error"]["code"] == "method_not_allowed"
    answer = httpx.get(f"{base}/v1/models", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_large_bodies_are_413_and_counted(client: openai.OpenAI, base: str) -> None:
    before = metric(base, "perception_rt_errors_total", code="request_too_large")
    with pytest.raises(openai.APIStatusError, match="more than 1048576 bytes") as caught:
        client.embeddings.create(model="PE-Demo", input="a" * 2_000_000)
    assert caught.value.status_code == 413
    assert metric(base, "perception_rt_errors_total", code="request_too_large") == before + 1


def test_garbage_and_half_requests_do_no_harm(base: str) -> None:
    address = urlsplit(base)
    assert address.hostname is not None
    for sent in (
        b"\x00\x01garbage\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    ):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(sent)
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}


ODD: list[Any] = [
    0, -1, 10**30, 1e308, True, "", "\ud800", "<image>", [], [[]], [None], {}, {"a": 1}, {"": {}},
    [{"role": "user", "content": "\ud800"}], "data:image/png;base64,", ["data:,"],
]  # fmt: skip
IMAGE = [picture_url("digit_3")]
ROUTES: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", CHAT, "messages stream stream_options stop seed top_k max_tokens tools n"),
    ("chat/completions", CHAT, "temperature top_p lookup max_tiles response_format \ud800"),
    ("embeddings", TEXT, "model input messages modality dimensions encoding_format num_frames"),
    ("classify", {"model": "PE-Demo", "images": IMAGE, "labels": ["a"]}, "images labels templates"),
    ("features", {"model": "PE-Demo", "image": IMAGE[0]}, "model image layer"),
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[2].split()[0])
def test_odd_values_are_never_a_mistake_of_the_server(
    base: str, route: tuple[str, dict[str, Any], str]
) -> None:
    path, body, names = route
    with httpx.Client(base_url=f"{base}/v1/", timeout=60) as http:
        for name in names.split():
            for value in ODD:
                data = json.dumps(body | {name: value}).encode()
                answer = http.post(path, content=data, headers={"Content-Type": "application/json"})
                assert answer.status_code in (200, 400, 404), (name, value, answer.text)
