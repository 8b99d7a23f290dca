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
import os, re, signal, threading
from contextlib import suppress
from pathlib import Path
import psutil
from perception_rt.bulk.run import BulkOptions
from perception_rt.bulk.sources import Sources
from perception_rt.errors import BackendError, InputError, PerceptionError
from perception_rt.limits import Limits
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
for package, load, message in (
    ("nowhere", {}, "worker on .*: nowhere: no engine package"),
    ("demo:plm", {}, "PLM-Demo is a language model"),
    ("demo:pe", {"expect": "sha256:" + "0" * 64}, "worker on .*expected 'sha256:0"),
    ("demo:pe", {"background": "blurple"}, "background must be .* not 'blurple'"),
    ("demo:pe", {"threads": 3}, "needs 3 CPUs, .* more than 2: use fewer threads"),
    ("demo:pe", {"device": "cuda"}, "needs 1 GPUs, .*add a machine"),
    ("demo:pe", {"formats": (name for name in ("gif",))}, "load cannot be sent to workers"),
    ("demo:pe", {"limits": Limits(image_pixels=10)}, "the limit is 10"),
):
    try:
        embed_sources(package, photos, "none", load=load)
    except PerceptionError as error:
        assert re.search(message, str(error)), (message, error)
    else:
        raise AssertionError(message)
    assert not os.path.exists("none"), message
embed_sources("demo:pe", photos, "given", options, load={
    "cache_dir": Path.cwd(), "background": (1, 2, 3), "limits": Limits(),
})

# One worker after another is killed, until Ray gives up; resume completes the result.
ended = threading.Event()

def kill_all():
    while not ended.wait(0.01):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.name().startswith("ray::_make_shar"):
                    process.kill()

killer = threading.Thread(target=kill_all)
killer.start()
try:
    embed_sources("demo:pe", photos, "again", options)
except BackendError as error:
    assert "resume" in str(error), error
else:
    raise AssertionError("no error")
finally:
    ended.set()
    killer.join()
options = BulkOptions(skip_errors=True, shard_items=32, resume=os.path.exists("again"))
embed_sources("demo:pe", photos, "again", options)
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
    for name in ("strict", "given", "again"):
        assert contents(tmp_path / name) == local, name


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
    for address, message in (("localhost:1", "Connection refused"), ("a b", "Invalid address")):
        ended = subprocess.run(
            [*command, "--out", "none", "--ray", address], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert ended.returncode == 2 and f"no Ray cluster at '{address}'" in ended.stderr
        assert message in ended.stderr, ended.stderr
        assert not (tmp_path / "none").exists()
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
import threading
from contextlib import suppress
import numpy as np
import psutil
import ray
import perception_rt as prt
from perception_rt.ray import Answer, Embed

ray.data.DataContext.get_current().enable_progress_bars = False
def embedded(photos, **more):
    return photos.map_batches(
        Embed, fn_constructor_args=("demo:pe", "bytes"), fn_constructor_kwargs=more, batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=2),
    )

killed = []

def kill_both():  # each while it embeds a batch
    while len(killed) < 2 and not ended.wait(0.01):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                name = process.name()
                if name.startswith("ray::MapWorker") and process.pid not in killed:
                    if ".submit" in process.cmdline()[0]:
                        killed.append(process.pid)
                        process.kill()

ended = threading.Event()
killer = threading.Thread(target=kill_both)
killer.start()
photos = ray.data.read_binary_files("photos", include_paths=True, override_num_blocks=20)
rows = embedded(photos).select_columns(["path", "embedding"]).take_all()
ended.set()
killer.join()
assert len(killed) == 2, killed
rows.sort(key=lambda row: row["path"])
assert len({row["path"] for row in rows}) == len(rows) == 1000
with prt.load("demo:pe", threads=1) as engine:
    expected = engine.embed_images([row["path"] for row in rows])
assert np.stack([row["embedding"] for row in rows]).tobytes() == expected.tobytes()

empty = photos.filter(lambda row: False)
assert embedded(empty, skip_errors=True).take_all() == []
bad = ray.data.from_items([{"bytes": b"no image"}, {"bytes": open(rows[0]["path"], "rb").read()}])
found = embedded(bad, skip_errors=True).take_all()
assert sorted(bool(row["error"]) for row in found) == [False, True]
try:
    embedded(bad).take_all()
except Exception as error:
    assert "column 'bytes': image" in str(error) and "skip_errors" in str(error), error
else:
    raise AssertionError("no error")

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


def test_map_batches_embeds_and_answers_though_workers_are_killed(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 1000)
    assert "done" in run_on_cluster(DATA, tmp_path, cpus=4)


SERVE = """
import base64
import socket
from pathlib import Path
import httpx
import numpy as np
import openai
from openai import OpenAI
from ray import serve
import perception_rt as prt
from perception_rt.ray import build_app

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
for wrong, message in (
    ({"colour": 1}, "build_app has no 'colour'; known are api_key_file"),
    ({"load": {"thread": 1}}, "load has no 'thread'"),
    ({"packages": "demo:pe"}, "packages must be a list, not a str"),
    ({"batch_window_ms": "x"}, "batch_window_ms must be float, not str"),
    ({"replicas": 0}, "replicas must be an integer of at least 1, not 0"),
    ({"max_ongoing_requests": -1}, "deployment: "),
    ({"load": {"cache_dir": Path("x")}}, "must be plain values"),
):
    try:
        build_app({"packages": ["demo:pe"], **wrong})
    except prt.InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
open("keys", "w").write("secret-of-the-test")
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(
    build_app({
        "packages": ["demo:pe", "demo:plm"], "api_key_file": "keys", "max_body_mb": 1,
        "replicas": 1,
    })
)
url = f"http://127.0.0.1:{port}"
web = httpx.Client(base_url=url, timeout=60)
assert web.get("/health").json() == {"status": "ok"}
try:
    OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
except openai.AuthenticationError:
    pass
else:
    raise AssertionError("no error")
client = OpenAI(base_url=f"{url}/v1", api_key="secret-of-the-test", max_retries=0)
pe, plm = [model.id for model in client.models.list()]
texts = ["a dog", "a cat"]
rows = [item.embedding for item in client.embeddings.create(model=pe, input=texts).data]
with prt.load("demo:pe", threads=1) as engine:
    assert np.allclose(np.array(rows, np.float32), engine.embed_texts(texts), atol=1e-6)
question = {
    "model": plm, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4,
}
text = client.chat.completions.create(**question).choices[0].message.content
with prt.load("demo:plm", threads=1) as engine:
    assert text == engine.generate("Hello", max_new_tokens=4).text
pieces = [part.choices for part in client.chat.completions.create(**question, stream=True)]
assert "".join(c[0].delta.content or "" for c in pieces if c) == text
image = "data:image/png;base64," + base64.b64encode(open("photos/0000.png", "rb").read()).decode()
web.headers["Authorization"] = "Bearer secret-of-the-test"
for route, body in (
    ("/v1/classify", {"model": pe, "images": [image], "labels": ["one", "two"]}),
    ("/v1/features", {"model": pe, "image": image}),
):
    answer = web.post(route, json=body)
    assert answer.status_code == 200, (route, answer.text)
for wrong, status in (({"model": pe}, 400), ({"model": pe, "input": "x" * 2_000_000}, 413)):
    assert web.post("/v1/embeddings", json=wrong).status_code == status
assert "perception_rt" in web.get("/metrics").text
serve.shutdown()
print("done")
"""


def test_serve_has_the_routes_of_the_server(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    write_photos(tmp_path / "photos", 1)
    assert "done" in run_on_cluster(SERVE, tmp_path)
