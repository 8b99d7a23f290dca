"""On a local cluster of two workers, in processes of their own: the bulk job, Data and Serve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_process import run_on_cluster
from PIL import Image

import perception_rt as prt
from perception_rt.bulk.run import BulkOptions, embed_sources
from perception_rt.bulk.sources import Sources

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

BROKEN = (3, 170)


def write_photos(folder: Path, count: int, broken: tuple[int, ...] = ()) -> None:
    folder.mkdir()
    for i in range(count):
        path = folder / f"{i:04}.png"
        Image.new("RGB", (40, 48), (i % 256, i // 256 * 50, 99)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:40])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KILL = """
import os, signal, sys
import psutil
from perception_rt.bulk.run import BulkOptions
from perception_rt.bulk.sources import Sources
from perception_rt.errors import InputError, PerceptionError
from perception_rt.ray import embed_sources

killed, seen = [], []

def on_progress(done, total, errors):
    seen.append((done, total, errors))
    if len(killed) < 2:
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::_make_shar") and process.pid not in killed:
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)
                break

photos = Sources(paths=("photos",))
options = BulkOptions(skip_errors=True, shard_items=32)
totals = embed_sources("demo:pe", photos, "cluster", options, on_progress=on_progress)
assert len(killed) == 2, killed
assert (totals.items, totals.rows, totals.errors) == (1000, 998, 2), totals
assert seen[-1] == (1000, 1000, 2) and len(seen) == 32, seen
try:
    embed_sources("demo:pe", photos, "strict", BulkOptions(shard_items=32))
except InputError as error:
    assert "skip_errors leaves it out" in str(error), error
    assert "item 3," in str(error) or "item 170," in str(error), error
else:
    raise AssertionError("no error")
again = BulkOptions(shard_items=32, skip_errors=True, resume=os.path.exists("strict"))
embed_sources("demo:pe", photos, "strict", again)
try:
    embed_sources("nowhere", photos, "none")
except PerceptionError as error:
    assert "nowhere" in str(error), error
else:
    raise AssertionError("no error")
assert not os.path.exists("none")
print("done")
"""


def test_killed_workers_lose_nothing_and_rows_equal_the_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", 1000, BROKEN)
    assert "done" in run_on_cluster(KILL, tmp_path)
    monkeypatch.chdir(tmp_path)
    with prt.load("demo:pe", threads=1) as engine:
        options = BulkOptions(skip_errors=True, shard_items=32)
        embed_sources(engine, Sources(paths=("photos",)), "local", options)
    local = contents(tmp_path / "local")
    assert len(local) == 34
    assert contents(tmp_path / "cluster") == local
    assert contents(tmp_path / "strict") == local


def test_command_on_a_new_local_cluster(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 40)
    command = [
        sys.executable,
        "-m",
        "perception_rt",
        "embed",
        "demo:pe",
        "photos",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    lines = []
    for more in (["--out", "cluster.npy", "--ray", "local"], ["--out", "local.npy"]):
        ended = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        lines.append(ended.stdout.replace(more[1], "OUT"))
    assert lines[0] == lines[1] == "OUT: 40 rows of 64 float32\n"
    assert (tmp_path / "cluster.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()


DATA = """
import numpy as np
import ray
import perception_rt as prt
from perception_rt.ray import Answer, Embed

ray.data.DataContext.get_current().enable_progress_bars = False
photos = ray.data.read_binary_files("photos", include_paths=True)
rows = photos.map_batches(
    Embed, fn_constructor_args=("demo:pe", "bytes"), batch_size=8,
    compute=ray.data.ActorPoolStrategy(size=2),
).select_columns(["path", "embedding"]).sort("path").take_all()
with prt.load("demo:pe", threads=1) as engine:
    expected = engine.embed_images([row["path"] for row in rows])
assert len(rows) == 40
assert np.array_equal(np.stack([row["embedding"] for row in rows]), expected)

prompts = [f"Say {word}" for word in ("one", "two", "three", "four")]
answers = ray.data.from_items([{"prompt": prompt} for prompt in prompts]).map_batches(
    Answer, fn_constructor_args=("demo:plm",),
    fn_constructor_kwargs={"request": {"max_new_tokens": 4}}, batch_size=2,
    compute=ray.data.ActorPoolStrategy(size=1),
).take_all()
with prt.load("demo:plm", threads=1) as engine:
    for row in answers:
        assert row["answer"] == engine.generate(row["prompt"], max_new_tokens=4).text, row
assert sorted(row["prompt"] for row in answers) == sorted(prompts)
print("done")
"""


def test_map_batches_embeds_and_answers(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 40)
    assert "done" in run_on_cluster(DATA, tmp_path, cpus=4)


SERVE = """
import json
import socket
import httpx
import numpy as np
from ray import serve
import perception_rt as prt
from perception_rt.ray import build_app

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
open("keys", "w").write("secret-of-the-test")
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(
    build_app({
        "packages": ["demo:pe", "demo:plm"], "api_key_file": "keys", "max_body_mb": 1,
        "replicas": 1,
    })
)
client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
assert client.get("/health").json() == {"status": "ok"}
assert client.get("/v1/models").status_code == 401
client.headers["Authorization"] = "Bearer secret-of-the-test"
models = [model["id"] for model in client.get("/v1/models").json()["data"]]
assert len(models) == 2, models
pe, plm = models
answer = client.post("/v1/embeddings", json={"model": pe, "input": ["a dog", "a cat"]})
rows = np.array([item["embedding"] for item in answer.json()["data"]], np.float32)
with prt.load("demo:pe", threads=1) as engine:
    assert np.allclose(rows, engine.embed_texts(["a dog", "a cat"]), atol=1e-6)
question = {"model": plm, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
whole = client.post("/v1/chat/completions", json=question).json()
text = whole["choices"][0]["message"]["content"]
with client.stream("POST", "/v1/chat/completions", json={**question, "stream": True}) as answer:
    lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
assert lines[-1] == "[DONE]"
pieces = [json.loads(line)["choices"] for line in lines[:-1]]
assert "".join(c[0]["delta"].get("content") or "" for c in pieces if c) == text
assert client.post("/v1/embeddings", json={"model": pe}).status_code == 400
large = {"model": pe, "input": "x" * 2_000_000}
assert client.post("/v1/embeddings", json=large).status_code == 413
assert "perception_rt" in client.get("/metrics").text
serve.shutdown()
print("done")
"""


def test_serve_has_the_routes_of_the_server(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    assert "done" in run_on_cluster(SERVE, tmp_path)
