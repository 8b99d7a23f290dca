"""The published weights, from the Hugging Face hub into its standard cache.

The only code of the library that opens a network connection, and only when it is called.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from perception_rt.archs import get_config
from perception_rt.errors import CheckpointError

PE_LICENSE = "Apache-2.0"
_ANSWER_SECONDS = 10.0
_ELSEWHERE = "pass --weights PATH to use a file you have"


def download(model_name: str, cache_dir: Path | str | None = None) -> Path:
    """The checkpoint file of a published model, downloaded unless it is in the cache.

    Args:
        model_name: a name of `archs.PE_MODELS`, with or without `facebook/`.
        cache_dir: a cache of huggingface_hub; its own default if None.

    Returns:
        The path of the `.pt` file, licensed `PE_LICENSE`.

    Raises:
        InputError: the name is not of a published model.
        CheckpointError: the file is neither in the cache nor within reach.
    """
    get_config(model_name)
    name = model_name.removeprefix("facebook/")
    repo = f"facebook/{name}"
    try:
        hub = import_module("huggingface_hub")
        errors = import_module("huggingface_hub.errors")
    except ImportError as error:
        raise CheckpointError(
            f"huggingface_hub, which downloads {repo}, is not installed: install "
            f"perception_rt[export], or {_ELSEWHERE}"
        ) from error
    try:
        return _fetch(hub, errors, repo, f"{name}.pt", cache_dir)
    # The hub's client raises its transport's classes beside its own, and they change with it.
    except Exception as error:
        raise CheckpointError(f"{_reason(errors, error, repo)}, or {_ELSEWHERE}") from error


def _fetch(hub: Any, errors: Any, repo: str, file: str, cache_dir: Path | str | None) -> Path:
    """The cache first: published weights do not change, and a cached model needs no network."""
    try:
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        # The download below retries for more than a minute; this says at once what is wrong.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=_ANSWER_SECONDS)
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir))


def _reason(errors: Any, error: Exception, repo: str) -> str:
    """What went wrong and what to do; the classes are ordered from special to general."""
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} needs its licence accepted: accept it on https://huggingface.co/{repo} and "
            "log in with 'hf auth login'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not on the hub, or not visible to you: log in with 'hf auth login'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE"
    return (
        f"{repo} is not in the cache and could not be downloaded ({type(error).__name__}): check "
        "the network and the free disk space"
    )
