"""The benchmark of the server, with a few requests."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serve

for library in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(library)


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    numbers = "--requests 4 --clients 2 --clients 1 --tokens 5 --threads 1"
    assert serve.main([*numbers.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    result = json.loads(out.read_text())
    found = [(row["kind"], row["clients"]) for row in result["rows"]]
    assert found == [(kind, clients) for kind in serve.KINDS for clients in (1, 2)]
    for row in result["rows"]:
        assert (row["errors"], row["reasons"], len(row["ms"])) == (0, [], 4)
        assert 0 < min(row["ms"]) <= row["p50_ms"] <= row["p99_ms"] <= max(row["ms"])
        units = 4 * (5 if row["kind"] == "chat" else 1)
        assert row["per_s"] * row["seconds"] == pytest.approx(units)
    assert printed.out.count("\n| ") == 7


def test_no_two_requests_are_equal() -> None:
    for kind in serve.KINDS:
        both = [*serve.bodies(kind, 0, 2, 5), *serve.bodies(kind, 254, 4, 5)]
        assert len(set(both)) == 6


@pytest.fixture
def careless() -> Iterator[tuple[str, int]]:
    """A server that refuses embeddings and cuts streams off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            chat = self.path.endswith("/completions")
            self.send_response(200 if chat else 429)
            self.end_headers()
            event = {"choices": [{"delta": {"content": "a"}}], "usage": None}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode() if chat else b"full")

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield "127.0.0.1", server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("kind", "reason"), [("chat", "the stream ended early"), ("text", "status 429: full")]
)
def test_refused_and_cut_off_answers_are_errors(
    careless: tuple[str, int], kind: str, reason: str
) -> None:
    answers = serve.send_all(*careless, kind, serve.bodies(kind, 0, 5, 5), 2)
    row = serve.summarize(answers, 1.0)
    assert (row["errors"], row["reasons"], row["per_s"]) == (5, [reason], 0)
    assert (row["p50_ms"], row["ms"]) == (None, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--requests 0", "--requests must be 1 to 100000, not 0"),
        ("--clients 65", "--clients must be 1 to 64, not 65"),
        ("--out x.csv", "--out must be a .json file"),
    ],
)
def test_wrong_options_are_errors(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
