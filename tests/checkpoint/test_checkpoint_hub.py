import sys
import types

import pytest

from perception_rt.checkpoint.hub import download
from perception_rt.errors import CheckpointError, InputError


class FakeHub(types.ModuleType):
    """huggingface_hub with a cache, and a network that answers with `problem` if there is one."""

    def __init__(self, *, cached=(), problem=None):
        super().__init__("huggingface_hub")
        self.cached, self.problem, self.asked = cached, problem, []

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
    assert str(caught.value).endswith("or pass --weights PATH to use a file you have")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"install perception_rt\[export\], or pass"):
        download("PE-Lang-L14-448")


def test_unknown_models_are_refused_before_anything_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="unknown model"):
        download("../../secrets")


def test_the_real_client_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode is on"):
        download("PE-Core-T16-384", tmp_path)


def test_the_real_client_without_a_network(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = "http://127.0.0.1:9/none"  # the discard port: refused at once
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_: url)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        download("PE-Core-T16-384", tmp_path)
