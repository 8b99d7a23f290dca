"""`python benchmarks/serve.py`: the server with both demos, by number of clients.

Starts `perception-rt serve demo:pe demo:plm` as a process. Clients are threads of this process that
share the machine with the server; each keeps one connection and sends its next request when the
previous answer is complete. Every request has another image or text, so that no cache has it.
"""

import argparse
import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

try:
    from benchmarks.command import check_number, check_out, run_command
    from benchmarks.machine import environment
    from benchmarks.rounds import progress
    from benchmarks.tables import table
    from benchmarks.timing import percentile
    from perception_rt.demo import DEMO_PE, DEMO_PLM, pictures_path
    from perception_rt.errors import BackendError
    from training.arguments import Parser
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

KINDS = ("chat", "image", "text")

_SCHEMA = 1
_CLIENTS = (1, 8, 32)
_MOST = {"requests": 100_000, "tokens": 128, "threads": 256}
_TITLES = {
    "chat": "streaming chat about an image",
    "image": "embedding of an image",
    "text": "embedding of a text",
}
_COLUMNS = ("requests", "clients", "p50, ms", "p99, ms", "per second", "errors")
_MOST_CLIENTS = 64  # more in progress get status 429
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Result of one request.

    Attributes:
        ms: milliseconds to the first text of a chat, or to the complete answer.
        units: tokens of a chat, or embeddings.
        error: why there is no answer; empty if there is one.
    """

    ms: float = 0.0
    units: int = 0
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what checked options ask for; BackendError if the server does not start."""
    machine = environment()
    rows = []
    with running_server(options.threads) as (host, port):
        used = 0
        for kind in KINDS:
            warm_up = max(options.clients)
            progress(f"{kind}: warm-up")
            send_all(host, port, kind, bodies(kind, used, warm_up, options.tokens), warm_up)
            used += warm_up
            for clients in options.clients:
                progress(f"{kind}: {options.requests} requests, clients={clients}")
                requests = bodies(kind, used, options.requests, options.tokens)
                used += options.requests
                start = time.perf_counter()
                answers = send_all(host, port, kind, requests, clients)
                seconds = time.perf_counter() - start
                rows.append({"kind": kind, "clients": clients, **summarize(answers, seconds)})
    return {
        "schema": _SCHEMA,
        "environment": machine,
        "load_average_after": round(os.getloadavg()[0], 2),
        "requests": options.requests,
        "tokens": options.tokens,
        "threads": options.threads,
        "rows": rows,
    }


@contextmanager
def running_server(threads: int | None) -> Iterator[tuple[str, int]]:
    """Host and port of a server with both demos on a free port; killed at the end.

    Raises:
        BackendError: the server ended, or printed something else than its address.
    """
    command = [sys.executable, "-m", "perception_rt", "serve", DEMO_PE, DEMO_PLM, "--port", "0"]
    if threads is not None:
        command += ["--threads", str(threads)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.fullmatch(r"listening on http://(\S+):(\d+)\n", line)
        if found is None:
            server.kill()
            raise BackendError(f"no server: {(line + server.stderr.read()).strip()[-300:]}")
        yield found[1], int(found[2])
    finally:
        server.kill()
        server.communicate()


def bodies(kind: str, first: int, count: int, tokens: int) -> list[bytes]:
    """JSON bodies of requests `first` to `first + count - 1`, no two of them equal.

    Args:
        kind: one of KINDS.
        first: number of the first request.
        count: number of requests.
        tokens: tokens of each chat's answer.
    """
    numbers = range(first, first + count)
    if kind == "text":
        values: Iterator[Any] = (
            {"model": "PE-Demo", "input": f"a photo of the number {n}"} for n in numbers
        )
    elif kind == "image":
        values = (
            {"model": "PE-Demo", "modality": "image", "input": _picture("digit_0", n)}
            for n in numbers
        )
    else:
        values = (_chat(_picture("locate", n), tokens) for n in numbers)
    return [json.dumps(value).encode() for value in values]


def send_all(
    host: str, port: int, kind: str, requests: Sequence[bytes], clients: int
) -> list[Answer]:
    """Sends requests of one kind from a number of clients; returns their answers."""
    todo = iter(requests)  # `next` on it is atomic

    def client(_: int) -> list[Answer]:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        try:
            return [_send(connection, kind, body) for body in todo]
        finally:
            connection.close()

    with ThreadPoolExecutor(clients) as pool:
        return [answer for answers in pool.map(client, range(clients)) for answer in answers]


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The figures of one run that took `seconds`; p50 and p99 are None without any answer."""
    samples = [round(answer.ms, 2) for answer in answers if not answer.error]
    errors = [answer.error for answer in answers if answer.error]
    return {
        "seconds": seconds,
        "p50_ms": percentile(samples, 50) if samples else None,
        "p99_ms": percentile(samples, 99) if samples else None,
        "per_s": sum(answer.units for answer in answers) / seconds,
        "errors": len(errors),
        "reasons": sorted(set(errors)),
        "ms": samples,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table."""
    machine = result["environment"]
    cells = (
        [
            _TITLES[row["kind"]],
            str(row["clients"]),
            *("-" if row[name] is None else f"{row[name]:,.1f}" for name in ("p50_ms", "p99_ms")),
            f"{row['per_s']:,.0f} {'tokens' if row['kind'] == 'chat' else 'embeddings'}",
            str(row["errors"]),
        ]
        for row in result["rows"]
    )
    reasons = sorted({reason for row in result["rows"] for reason in row["reasons"]})
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores; perception_rt "
            f"{machine['perception_rt']}, onnxruntime {machine['onnxruntime']}; load average: "
            f"{machine['load_average']} before, {result['load_average_after']} after  ",
            f"{result['requests']} requests per row; threads per engine call: "
            f"{result['threads'] or 'default'}; answers of {result['tokens']} tokens; p50 and p99 "
            "of a chat: to its first text",
            "",
            *table(_COLUMNS, cells, {}),
            *(f"\nerror: {reason}" for reason in reasons),
        ]
    )


def _send(connection: http.client.HTTPConnection, kind: str, body: bytes) -> Answer:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/embeddings"
    start = time.perf_counter()
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}: {response.read(200).decode()}")
        if kind == "chat":
            return _read_stream(response, start)
        found = json.loads(response.read())
        return Answer(ms=(time.perf_counter() - start) * 1e3, units=len(found["data"]))
    except (OSError, http.client.HTTPException, ValueError) as error:
        connection.close()  # the next request opens it again
        return Answer(error=str(error) or type(error).__name__)


def _read_stream(response: http.client.HTTPResponse, start: float) -> Answer:
    """Reads the events of an answer that was asked for at `start`; ValueError if it is cut off."""
    ms, tokens, data = 0.0, 0, ""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].decode().strip()
        if data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"]["message"])
        choices = event["choices"]
        if not ms and choices and choices[0]["delta"].get("content"):
            ms = (time.perf_counter() - start) * 1e3
        if event["usage"]:
            tokens = event["usage"]["completion_tokens"]
    if data != "[DONE]" or not ms:
        raise ValueError("the stream ended early")
    return Answer(ms=ms, units=tokens)


def _chat(image: str, tokens: int) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "Where is the 5?"},
    ]
    return {
        "model": "PLM-Demo",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _picture(name: str, number: int) -> str:
    """Data URL of a demo picture whose first pixel's colour is a number, so that no two agree."""
    with Image.open(pictures_path() / f"{name}.png") as opened:
        image = opened.convert("RGB")
    image.putpixel((0, 0), (number >> 16 & 255, number >> 8 & 255, number & 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options and checks them before any work."""
    parser = Parser(prog="serve.py", description="Ask a server from many clients, timed.")
    add = parser.add_argument
    add("--requests", type=int, default=320, help="requests per row (default: 320)")
    add("--clients", action="append", type=int, help="repeatable; default: 1, 8 and 32")
    add("--tokens", type=int, default=32, help="tokens of each chat's answer (default: 32)")
    add("--threads", type=int, help="threads per engine call (default: the server's)")
    add("--out", type=Path, metavar="FILE.json", help="figures and milliseconds of each request")
    options = parser.parse_args(arguments)
    options.clients = sorted(set(options.clients or _CLIENTS))
    for name, most in _MOST.items():
        if getattr(options, name) is not None:
            check_number(name, getattr(options, name), 1, most)
    for clients in options.clients:
        check_number("clients", clients, 1, _MOST_CLIENTS)
    check_out(options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
