"""Packages on a hub: pushed, pulled and loaded through huggingface_hub and a small local server."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import TOKEN, Hub, Repo, serve
from huggingface_hub import constants
from PIL import Image

import perception_rt as prt
from perception_rt.cli import main
from perception_rt.demo import DEMO_PE, DEMO_PLM, package_paths, pictures_path
from perception_rt.hub import locate, parse_name, pull, push
from perception_rt.package.manifest import MANIFEST_FILE, Content, Manifest
from perception_rt.package.reader import read_manifest, verify_package

ROOT = Path(__file__).parents[1]
PLM = package_paths()[DEMO_PLM]
PLM_ID = read_manifest(PLM).id
PLM_FILES = {path.name: path.read_bytes() for path in PLM.iterdir()}
OTHER = "sha256:" + "0" * 64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx.*")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, which the client in this process uses, with caches of its own."""
    vars(server).update(vars(Hub(url=server.url)))
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hf"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server


@pytest.fixture
def cache(hub: Hub, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "perception_rt" / "hub"


@pytest.fixture
def published(hub: Hub) -> str:
    """The commit of PLM-Demo in org/plm."""
    hub.repos["org/plm"] = Repo()
    return hub.repos["org/plm"].commit(PLM_FILES | {"README.md": b"ours", "notes.txt": b"more"})


def with_engines() -> dict[str, bytes]:
    """Files of a package for a backend that has engines."""
    manifest = verify_package(PLM)
    data = manifest.content.to_dict()
    data["target"] = data["target"] | {"backend": "tensorrt"}
    changed = Manifest.create(Content.from_dict(data), record=manifest.record)
    return PLM_FILES | {MANIFEST_FILE: changed.to_bytes()}


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf:org/name", "org/name", None),
        ("org/name", "org/name", None),
        ("hf:Org-1/na_me.v2@v1.0", "Org-1/na_me.v2", "v1.0"),
        ("hf:org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_names(text: str, repo: str, revision: str | None) -> None:
    parsed = parse_name(text)
    assert (parsed.repo, parsed.revision) == (repo, revision)
    assert str(parsed) == "hf:" + text.removeprefix("hf:")


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../x", "hf:a/b@x y",
     "hf:a/b\n", "hf:a/b--c", "hf:a/b.", f"hf:a/{'b' * 95}", "hf:a/b@-x", "https://a/b"],
)  # fmt: skip
def test_malformed_names_are_refused_without_a_request(hub: Hub, text: str) -> None:
    with pytest.raises(prt.InputError, match="write hf:org/name or hf:org/name@revision"):
        pull(text)
    assert hub.requests == []


def test_push_then_load_gives_the_same_answers(hub: Hub, cache: Path) -> None:
    pushed = push(DEMO_PLM, "hf:org/plm")
    assert pushed.id == PLM_ID
    files = hub.repos["org/plm"].commits[str(pushed.name.revision)]
    assert files.keys() == PLM_FILES.keys() | {".gitattributes", "README.md"}
    assert all(files[name] == data for name, data in PLM_FILES.items())
    card = files["README.md"].decode()
    assert f'prt.load("hf:org/plm", expect="{PLM_ID}")' in card and "UCI" in card
    row = Image.open(pictures_path() / "read.png")
    with prt.load("hf:org/plm") as fetched, prt.load(DEMO_PLM) as shipped:
        assert isinstance(fetched, prt.Generator) and isinstance(shipped, prt.Generator)
        first, second = (
            m.generate("Read the digits.", images=[row], max_new_tokens=4)
            for m in (fetched, shipped)
        )
        assert first.tokens == second.tokens and len(first.tokens) > 1
    (folder,) = [p for p in cache.iterdir() if not p.name.startswith(".")]
    assert folder.name == PLM_ID.removeprefix("sha256:")
    assert {p.name for p in folder.iterdir()} == PLM_FILES.keys()
    assert all(not p.is_symlink() and p.stat().st_nlink == 1 for p in folder.iterdir())
    assert not any(".get-" in p.name for p in cache.iterdir())


def test_an_encoder_on_a_branch(hub: Hub) -> None:
    push(DEMO_PE, "org/pe@fp16", private=True, message="Add it")
    repo = hub.repos["org/pe"]
    assert repo.private and MANIFEST_FILE not in repo.commits[repo.branches["main"]]
    with prt.load("hf:org/pe@fp16") as pe, prt.load(DEMO_PE) as shipped:
        assert isinstance(pe, prt.Embedder) and isinstance(shipped, prt.Embedder)
        assert np.array_equal(pe.embed_texts(["a three"]), shipped.embed_texts(["a three"]))
    with prt.Embedder.load("hf:org/pe@fp16") as pe:
        assert pe.manifest.content.name == "PE-Demo"
    with pytest.raises(prt.PackageError, match=r"the repository has no manifest\.json"):
        prt.load("hf:org/pe")


def test_what_was_fetched_is_not_fetched_again(hub: Hub, published: str, monkeypatch: Any) -> None:
    prt.load("hf:org/plm").close()
    assert sorted(hub.downloads()) == sorted(PLM_FILES)  # and no file that is not the package's
    prt.load("hf:org/plm").close()  # a branch may have moved: one question, no download
    assert hub.requests == ["GET /api/models/org/plm"]
    hub.requests.clear()
    prt.load(f"hf:org/plm@{published}").close()
    prt.load("hf:another/name", expect=PLM_ID).close()  # the id says which bytes
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    prt.load("hf:org/plm").close()
    with pytest.raises(prt.PackageError, match=r"hf:org/x is not in the cache, .*offline mode"):
        prt.load("hf:org/x")


def test_a_branch_that_moved_is_followed(hub: Hub, published: str) -> None:
    assert locate("hf:org/plm")[0].name == PLM_ID.removeprefix("sha256:")
    pe = {path.name: path.read_bytes() for path in package_paths()[DEMO_PE].iterdir()}
    hub.repos["org/plm"].commit(pe)
    with prt.load("hf:org/plm") as model:
        assert model.manifest.content.name == "PE-Demo"
    with prt.load(f"hf:org/plm@{published}") as model:
        assert model.manifest.content.name == "PLM-Demo"


def test_another_id_is_refused_before_anything_is_fetched(
    hub: Hub, published: str, cache: Path
) -> None:
    for _ in range(2):
        with pytest.raises(prt.PackageError, match=f"package id is {PLM_ID}, expected {OTHER}"):
            prt.load("hf:org/plm", expect=OTHER)
        assert set(hub.downloads()) <= {MANIFEST_FILE}
        prt.load("hf:org/plm").close()  # in the cache, the second time
        hub.requests.clear()
    with pytest.raises(prt.InputError, match="expect must be 'sha256:' and 64"):
        prt.load("hf:org/plm", expect="sha256:../../x")
    prt.load("hf:org/plm", expect=PLM_ID).close()


def test_engines_need_the_id(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/trt"] = Repo()
    commit = hub.repos["org/trt"].commit(with_engines())
    asks = r"engines, which are code for a GPU: if you trust it, pass expect='sha256:"
    for name in ("hf:org/trt", f"hf:org/trt@{commit}"):
        with pytest.raises(prt.PackageError, match=asks) as caught:
            prt.load(name)
        with pytest.raises(prt.PackageError, match=asks):
            pull(name, tmp_path / "out")
        assert set(hub.downloads()) == {MANIFEST_FILE}
    package_id = str(caught.value).rpartition(" ")[2]
    assert locate("hf:org/trt", package_id)[1] == package_id
    for name in ("hf:org/trt", f"hf:org/trt@{commit}"):  # also when it is in the cache
        with pytest.raises(prt.PackageError, match=asks):
            prt.load(name)
    assert read_manifest(pull("org/trt", tmp_path / "out", package_id)).id == package_id


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name, data: data[:-1] + b"?", r"vision\.data is damaged: its SHA-256"),
        (lambda name, data: data[:-5], r"vision\.data has 914043 bytes instead of 914048"),
    ],
)
def test_damage_leaves_no_package(
    hub: Hub, published: str, cache: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    hub.damage = lambda name, data: damage(name, data) if name == "vision.data" else data
    for out in (None, tmp_path / "out"):
        with pytest.raises(prt.PackageError, match=message) as caught:
            pull("hf:org/plm", out)
        assert str(caught.value).startswith("hf:org/plm") and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [p for p in cache.iterdir() if not p.name.startswith(".")] == []
    hub.damage = lambda name, data: data
    assert verify_package(pull("hf:org/plm", tmp_path / "out")).id == PLM_ID
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]
    prt.load("hf:org/plm").close()


def test_an_interrupted_fetch_is_continued(hub: Hub, published: str, monkeypatch: Any) -> None:
    real, fetched = huggingface_hub.hf_hub_download, []

    def stops(repo: str, file: str, **options: Any) -> str:
        if file == "vision.data":
            raise KeyboardInterrupt
        fetched.append(file)
        return str(real(repo, file, **options))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", stops)
        with pytest.raises(KeyboardInterrupt):
            prt.load("hf:org/plm")
    assert len(fetched) > 5
    hub.requests.clear()
    prt.load("hf:org/plm").close()
    again = set(hub.downloads()) - {MANIFEST_FILE}
    assert "vision.data" in again and not again & set(fetched[1:])


def test_a_damaged_copy_is_repaired(hub: Hub, published: str, cache: Path) -> None:
    folder = pull("org/plm")
    (folder / "embed.data").unlink()
    prt.load("hf:org/plm").close()
    data = folder / "embed.data"
    data.chmod(0o644)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(prt.PackageError, match=r"embed\.data is damaged"):
        prt.load("hf:org/plm")
    assert verify_package(pull("org/plm")).id == PLM_ID


@pytest.mark.parametrize("lost", ["vision.data", "longer"])
def test_an_incomplete_repository_is_named(hub: Hub, published: str, lost: str) -> None:
    files = hub.repos["org/plm"].commits[published]
    if lost == "longer":
        files["vision.data"] += b"?"
    else:
        del files[lost]
    with pytest.raises(prt.PackageError, match=r"lacks vision\.data|vision\.data has 914049 bytes"):
        prt.load("hf:org/plm")
    assert set(hub.downloads()) == {MANIFEST_FILE}


def test_a_manifest_that_is_too_long_is_not_fetched(hub: Hub, published: str) -> None:
    files = hub.repos["org/plm"].commits[published]
    files[MANIFEST_FILE] = b" " * (2**20 + 1)
    with pytest.raises(prt.PackageError, match="1048577 bytes are more than the limit"):
        prt.load("hf:org/plm")
    files[MANIFEST_FILE] = b"{}"
    with pytest.raises(prt.PackageError, match="hf:org/plm: manifest: "):
        prt.load("hf:org/plm")


def test_each_refusal_says_what_to_do(hub: Hub, published: str, monkeypatch: Any) -> None:
    with pytest.raises(prt.PackageError, match=r"not on the hub, or not visible.*'hf auth login'"):
        prt.load("hf:org/none")
    with pytest.raises(prt.PackageError, match="org/plm has no such revision"):
        prt.load("hf:org/plm@v9")
    with pytest.raises(prt.InputError, match="names a commit: push to a branch"):
        push(DEMO_PLM, f"org/plm@{published}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(prt.PackageError, match=r"hf:org/plm .*'hf auth login'"):
        push(DEMO_PLM, "org/plm")
    hub.repos["org/plm"].gated = True
    with pytest.raises(prt.PackageError, match="needs its terms accepted"):
        prt.load("hf:org/plm")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses at once
    with pytest.raises(prt.PackageError, match=r"cannot be fetched \(\w+\): check the network"):
        prt.load("hf:org/plm")


def test_push_refuses_a_damaged_package_and_notices_a_lost_file(hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "package"
    shutil.copytree(PLM, copy)
    (copy / "embed.data").write_bytes(bytes((copy / "embed.data").stat().st_size))
    with pytest.raises(prt.PackageError, match=r"embed\.data is damaged"):
        push(copy, "org/new")
    assert hub.requests == [] and hub.repos == {}
    hub.ignored = ("tokenizer.model",)
    with pytest.raises(prt.PackageError, match=r"the repository lacks tokenizer\.model"):
        push(PLM, "org/new")


def test_push_keeps_what_is_not_the_packages(hub: Hub, published: str) -> None:
    pushed = push(DEMO_PLM, "org/plm")
    files = hub.repos["org/plm"].commits[str(pushed.name.revision)]
    assert files["README.md"] == b"ours" and files["notes.txt"] == b"more"


def test_pull_makes_a_folder_or_nothing(hub: Hub, published: str, tmp_path: Path) -> None:
    with pytest.raises(prt.InputError, match="exists: name a folder that does not"):
        pull("org/plm", tmp_path)
    with pytest.raises(prt.InputError, match="its folder is missing"):
        pull("org/plm", tmp_path / "no" / "out")
    assert hub.requests == []


def test_a_full_disk_is_named(hub: Hub, published: str, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(prt.PackageError, match="cannot be fetched: No space left on device"):
        pull("org/plm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_may_have_such_a_name(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PLM, tmp_path / "hf:org" / "plm")
    for path in ("hf:org/plm", Path("hf:org/plm")):
        prt.load(path).close()
    assert hub.requests == []


def test_without_huggingface_hub(hub: Hub, published: str, monkeypatch: Any) -> None:
    prt.load("hf:org/plm").close()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    prt.load("hf:org/plm", expect=PLM_ID).close()  # from the cache
    for action in (lambda: prt.load("hf:org/x"), lambda: push(DEMO_PE, "org/x")):
        with pytest.raises(prt.PackageError, match=r'pip install "perception_rt\[hub\]"'):
            action()


def test_commands(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    assert main(["push", DEMO_PLM, "org/plm", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == PLM_ID and shown["name"].startswith("hf:org/plm@")
    out = tmp_path / "plm"
    assert main(["pull", shown["name"], "--out", str(out), "--expect", PLM_ID]) == 0
    assert capsys.readouterr().out == f"{out} {PLM_ID}\n"
    assert main(["inspect", "hf:org/plm"]) == 0
    assert capsys.readouterr().out.startswith(f"PLM-Demo  {PLM_ID}")
    assert main(["verify", "hf:org/plm", "--expect", PLM_ID]) == 0
    assert main(["doctor", "hf:org/plm"]) == 0
    capsys.readouterr()
    assert main(["pull", "org/none"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "hf:org/none is not on the hub" in captured.err


def test_processes_at_the_same_time(hub: Hub, published: str, cache: Path) -> None:
    code = "from perception_rt.hub import locate; print(locate('hf:org/plm')[0].name)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT,
                         env=environment)
        for _ in range(2)
    ]  # fmt: skip
    found = {child.communicate()[0].decode().strip() for child in children}
    assert found == {PLM_ID.removeprefix("sha256:")}
    assert hub.downloads().count("vision.data") == 1
    assert verify_package(cache / found.pop()).id == PLM_ID
