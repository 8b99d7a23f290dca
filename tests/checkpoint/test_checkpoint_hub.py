import sys
import types
from fnmatch import fnmatch

import pytest

from perception_rt.checkpoint.hub import download
from perception_rt.checkpoint.locate import INDEX_NAME, find_tokenizer
from perception_rt.errors import CheckpointError, InputError


class FakeHub(types.ModuleType):
    """A fake huggingface_hub with a cache; its network raises `problem`, if given."""

    def __init__(self, *, cached=(), problem=None, folder=None, published=()):
        super().__init__("huggingface_hub")
        self.cached, self.problem, self.asked = cached, problem, []
        self.folder, self.published = folder, published

    def hf_hub_url(self, repo, file):
        return f"https://hub/{repo}/{file}"

    def get_hf_file_metadata(self, url, *, timeout):
        self.asked.append((url, timeout))
        if self.problem is not None:
            raise self.problem

    def hf_hub_download(self, repo, file, *, cache_dir, local_files_only=False):
        if local_files_only and file not in self.cached:
            raise FakeErrors.LocalEntryNotFoundError("absent")
        return f"{cache_dir}/{repo}/{file}"

    def snapshot_download(self, repo, *, allow_patterns, cache_dir, local_files_only=False):
        """Returns the cached part of a snapshot, or with a network all its files."""
        if not local_files_only:
            for name, text in dict(self.published).items():
                if any(fnmatch(name, pattern) for pattern in allow_patterns):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).write_text(text)
        elif not self.folder.is_dir():
            raise FakeErrors.LocalEntryNotFoundError("absent")
        return str(self.folder)


class FakeErrors(types.ModuleType):
    class LocalEntryNotFoundError(FileNotFoundError):
        pass

    class RepositoryNotFoundError(OSError):
        pass

    class GatedRepoError(RepositoryNotFoundError):
        pass

    class OfflineModeIsEnabled(ConnectionError):  # noqa: N818 - its real name
        pass


def install(monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", FakeErrors("errors"))
    return hub


def test_downloads_once_and_then_needs_no_network(monkeypatch, tmp_path):
    hub = install(monkeypatch, FakeHub())
    path = download("PE-Core-T16-384", tmp_path)
    assert path == tmp_path / "facebook" / "PE-Core-T16-384" / "PE-Core-T16-384.pt"
    assert hub.asked == [("https://hub/facebook/PE-Core-T16-384/PE-Core-T16-384.pt", 10.0)]
    hub = install(monkeypatch, FakeHub(cached=["PE-Core-T16-384.pt"], problem=OSError()))
    assert download("facebook/PE-Core-T16-384", tmp_path) == path
    assert hub.asked == []


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        (FakeErrors.GatedRepoError(), "accept it on https://huggingface.co/facebook/PE-Lang-L14"),
        (FakeErrors.RepositoryNotFoundError(), "is not on the hub, or not visible to you"),
        (FakeErrors.OfflineModeIsEnabled(), "unset HF_HUB_OFFLINE"),
        (TimeoutError("secret http://10.0.0.1"), r"\(TimeoutError\): check the network"),
    ],
)
def test_what_to_do_when_it_fails(monkeypatch, tmp_path, problem, advice):
    install(monkeypatch, FakeHub(problem=problem))
    with pytest.raises(CheckpointError, match=advice) as caught:
        download("PE-Lang-L14-448", tmp_path)
    assert str(caught.value).endswith("or pass --weights PATH to use your own file")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


INDEX = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
PLM_REPOSITORY = {
    "config.json": "{}",
    INDEX_NAME: INDEX,
    "1.safetensors": "",
    "2.safetensors": "",
    "original/consolidated.pth": "",
    "original/params.json": "{}",
    "original/tokenizer.model": "",
}


@pytest.mark.parametrize("name", ["PLM-3B", "Perception-LM-3B", "facebook/Perception-LM-3B"])
def test_a_language_model_comes_with_its_tokenizer_and_needs_no_network_then(
    monkeypatch, tmp_path, name
):
    hub = install(monkeypatch, FakeHub(folder=tmp_path / "snapshot", published=PLM_REPOSITORY))
    path = download(name, tmp_path)
    assert hub.asked == [("https://hub/facebook/Perception-LM-3B/original/params.json", 10.0)]
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert found == PLM_REPOSITORY.keys() - {"config.json", "original/consolidated.pth"}
    assert find_tokenizer(path) == path / "original" / "tokenizer.model"
    hub = install(monkeypatch, FakeHub(folder=tmp_path / "snapshot", problem=OSError()))
    assert download(name, tmp_path) == path
    assert hub.asked == []


@pytest.mark.parametrize("lost", ["2.safetensors", INDEX_NAME, "original/tokenizer.model"])
def test_a_part_of_a_snapshot_is_not_taken_for_the_whole(monkeypatch, tmp_path, lost):
    folder = tmp_path / "snapshot"
    install(monkeypatch, FakeHub(folder=folder, published=PLM_REPOSITORY))
    download("PLM-1B", tmp_path)
    (folder / lost).unlink()
    assert download("PLM-1B", tmp_path) == folder
    assert (folder / lost).is_file()
    (folder / lost).unlink()
    install(monkeypatch, FakeHub(folder=folder))
    with pytest.raises(CheckpointError, match=r"download of .*LM-1B is incomplete: try again"):
        download("PLM-1B", tmp_path)


def test_the_licence_of_a_language_model(monkeypatch, tmp_path):
    install(monkeypatch, FakeHub(folder=tmp_path / "none", problem=FakeErrors.GatedRepoError()))
    with pytest.raises(CheckpointError) as caught:
        download("PLM-8B", tmp_path)
    assert str(caught.value) == (
        "facebook/Perception-LM-8B needs its licence, the FAIR Noncommercial Research License, "
        "accepted: accept it on https://huggingface.co/facebook/Perception-LM-8B and, once access "
        "is granted, log in with 'hf auth login', or pass --weights PATH to use your own file"
    )


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"install perception_rt\[export\], or pass"):
        download("PE-Lang-L14-448")


def test_unknown_models_are_refused_before_anything_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="unknown model"):
        download("../../secrets")


@pytest.mark.parametrize("model", ["PE-Core-T16-384", "PLM-1B"])
def test_the_real_client_offline(monkeypatch, tmp_path, model):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode is on"):
        download(model, tmp_path)


@pytest.mark.parametrize("model", ["PE-Core-T16-384", "PLM-1B"])
def test_the_real_client_without_a_network(monkeypatch, tmp_path, model):
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = "http://127.0.0.1:9/none"  # the discard port: refused at once
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_: url)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        download(model, tmp_path)


def test_the_real_client_with_a_cached_snapshot(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "models--facebook--Perception-LM-1B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    for name in ("model.safetensors", "original/tokenizer.model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    assert download("PLM-1B", tmp_path) == folder
    (folder / "original" / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="offline mode is on"):
        download("PLM-1B", tmp_path)
