"""The server as a process: keys, SIGTERM, clients that leave, options, several workers."""

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import metric, question, running, until

from perception_rt.cli import main

LONG = {
    "model": "m",
    "messages": question("Where is the 5?", "locate"),
    "ignore_eos": True,
    "max_tokens": 900,
}


NON_ASCII = "geheimnis-\u00e0".encode()  # ends with a byte that is white space in Latin-1
HEADERS = {"Authorization": "Bearer second-secret"}


def test_keys_departures_queue_and_drain(tmp_path: Path) -> None:
    """One process for all, since each takes seconds to start."""
    keys = tmp_path / "keys"
    keys.write_bytes(b"first-secret\nsecond-secret\n" + NON_ASCII + b"\n")
    arguments = ("--api-key-file", str(keys), "--max-requests", "2", "--max-batch", "1")
    with running("--name", "m=demo:plm", *arguments) as (base, process):
        check_keys(base)
        check_departure(base)
        check_full(base)
        check_drain(base, process)


def departed(base: str) -> float:
    """Number of chat requests whose client left."""
    labels = {"route": "/v1/chat/completions", "status": "499"}
    return metric(base, "perception_rt_requests_total", HEADERS, **labels)


def check_keys(base: str) -> None:
    wrong: list[bytes] = [
        b"Bearer none", b"Bearer first-secre", b"Bearer first-secret-", b"Bearer", b"Bearer -",
        b"Basic first-secret", b"first-secret", b"Bearer first-secret second-secret",
        b"Bearer geheimnis-\xc3", b"Bearer geheimnis-\xe0", b"Bearer \xff\xfe",
    ]  # fmt: skip
    headers: list[dict[str, Any]] = [{"Authorization": value} for value in wrong]
    before = metric(base, "perception_rt_errors_total", HEADERS, code="invalid_api_key")
    for given in (*headers, {}, {"X-Api-Key": "first-secret"}):
        answer = httpx.get(f"{base}/v1/models", headers=given)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), given
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{base}/metrics").status_code == 401
    counted = metric(base, "perception_rt_errors_total", HEADERS, code="invalid_api_key")
    assert counted == before + len(wrong) + 3
    for key in (b"first-secret", b" second-secret", NON_ASCII):
        right: dict[str, Any] = {"Authorization": b"bearer " + key}
        assert httpx.get(f"{base}/v1/models", headers=right).status_code == 200
    assert httpx.get(f"{base}/health").status_code == httpx.get(f"{base}/ready").status_code == 200
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="first-secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["m"]
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        client.with_options(api_key="wrong-secret").models.list()


def check_departure(base: str) -> None:
    """Clients that leave are cancelled, whether they stream or wait."""
    url = f"{base}/v1/chat/completions"
    body = LONG | {"stream": True}
    with httpx.stream("POST", url, json=body, headers=HEADERS) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=LONG, headers=HEADERS, timeout=0.1)
    started = time.monotonic()
    httpx.post(url, json=LONG | {"max_tokens": 1}, headers=HEADERS, timeout=30)
    assert time.monotonic() - started < 10
    until(lambda: departed(base) == 1)
    until(lambda: metric(base, "perception_rt_running_requests", HEADERS) == 0)


def check_full(base: str) -> None:
    """Requests beyond `--max-requests` get 429 and may come again."""
    url = f"{base}/v1/chat/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True}, headers=HEADERS) as first:
        lines = first.iter_lines()  # closes the stream when it is dropped
        next(lines)
        with httpx.stream("POST", url, json=LONG | {"stream": True}, headers=HEADERS) as second:
            more_lines = second.iter_lines()
            next(more_lines)
            client = openai.OpenAI(base_url=f"{base}/v1", api_key="first-secret", max_retries=0)
            with pytest.raises(openai.RateLimitError, match="2 requests are in progress") as full:
                client.embeddings.create(model="m", input="a")
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
            assert full.value.type == "rate_limit_error"
            assert httpx.get(f"{base}/v1/models", headers=HEADERS).status_code == 200

    def accepted() -> bool:
        body = LONG | {"max_tokens": 1}
        return httpx.post(url, json=body, headers=HEADERS).status_code == 200

    until(accepted)


def check_drain(base: str, process: Any) -> None:
    """SIGTERM ends the process after the requests in progress, with status 0."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = LONG | {"max_tokens": 900, "user": None}
        answers.append(
            httpx.post(f"{base}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
        )

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: metric(base, "perception_rt_requests_in_progress", HEADERS) == 2)
    process.send_signal(signal.SIGTERM)
    until(lambda: not accepts(base))
    assert not answers  # the request goes on while the port is closed
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] > 0
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def accepts(base: str) -> bool:
    try:
        return httpx.get(f"{base}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to serve: name a package"),
        (["demo:pe", "--expect", "sha256:00"], "the package id is sha256:"),
        (["--name", "a=demo:pe", "--expect", "demo:pe=sha256:00"], "the package id is sha256:"),
        (["demo:pe", "demo:plm", "--expect", "sha256:00"], "--expect must be PKG=ID with a served"),
        (["demo:pe", "--expect", "demo:plm=sha256:00"], "--expect must be PKG=ID with a served"),
        (["demo:pe", "demo:pe"], "two packages have the model id 'PE-Demo'"),
        (["--name", "demo:pe"], "--name must be ID=PKG"),
        (["demo:pe", "--port", "70000"], "port must be"),
        (["demo:pe", "--api-key-file", "missing"], "API key file 'missing': No such file"),
        (["demo:pe", "--batch-window", "-1"], "batch_window must be from 0 to 1000 ms"),
        (["missing"], "missing"),
    ],
)
def test_unusable_options_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    assert main(["serve", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "demo:pe", "--port", str(port)]) == 2
    assert f"cannot listen on '127.0.0.1' port {port}: Address" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_add_up_their_metrics() -> None:
    with running("demo:pe", "--workers", "2", "--threads", "1") as (base, process):
        body = {"model": "PE-Demo", "input": "a red three"}

        def ask(_: int) -> None:
            assert httpx.post(f"{base}/v1/embeddings", json=body, timeout=60).status_code == 200

        for number in range(20):
            ask(number)
        assert metric(base, "perception_rt_requests_total", route="/v1/embeddings") == 20
        assert metric(base, "perception_rt_embedded_items_total", kind="text") == 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
