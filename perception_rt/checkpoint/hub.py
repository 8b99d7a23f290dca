"""The published weights, from the Hugging Face hub into its standard cache.

The only code of the library that opens a network connection, and only when it is called.
"""

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from perception_rt.archs import get_config
from perception_rt.checkpoint.locate import (
    CONFIG_NAME,
    INDEX_NAME,
    ORIGINAL_FOLDER,
    TOKENIZER_NAME,
    find_tokenizer,
    weight_files,
)
from perception_rt.errors import CheckpointError
from perception_rt.plm_config import PlmConfig

PE_LICENSE = "Apache-2.0"
PLM_LICENSE = "FAIR Noncommercial Research License"
_ANSWER_SECONDS = 10.0
_ELSEWHERE = "pass --weights PATH to use a file you have"
_PLM_CONFIG = f"{ORIGINAL_FOLDER}/{CONFIG_NAME}"
# The shards are those of transformers; `consolidated.pth` beside the others would come twice.
_PLM_FILES = ("*.safetensors", INDEX_NAME, _PLM_CONFIG, f"{ORIGINAL_FOLDER}/{TOKENIZER_NAME}")


def download(model_name: str, cache_dir: Path | str | None = None) -> Path:
    """The checkpoint of a published model, downloaded unless it is in the cache.

    Args:
        model_name: a name of `archs.PE_MODELS` or `archs.PLM_MODELS`, with or without `facebook/`.
        cache_dir: a cache of huggingface_hub; its own default if None.

    Returns:
        Of an encoder, the path of the `.pt` file, licensed `PE_LICENSE`. Of a language model, the
        directory of the weights and, in `original/`, of configuration and tokenizer; licensed
        `PLM_LICENSE`.

    Raises:
        InputError: the name is not of a published model.
        CheckpointError: the files are neither in the cache nor within reach. The language models
            are within reach of those alone whom their owner has granted access.
    """
    plm = isinstance(get_config(model_name), PlmConfig)
    name = model_name.removeprefix("facebook/").replace("PLM-", "Perception-LM-")
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
        if plm:
            return _fetch_folder(hub, errors, repo, cache_dir)
        return _fetch(hub, errors, repo, f"{name}.pt", cache_dir)
    # The hub's client raises its transport's classes beside its own, and they change with it.
    except Exception as error:
        raise CheckpointError(f"{_reason(errors, error, repo, plm)}, or {_ELSEWHERE}") from error


def _fetch(hub: Any, errors: Any, repo: str, file: str, cache_dir: Path | str | None) -> Path:
    """The cache first: published weights do not change, and a cached model needs no network."""
    try:
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        _ask(hub, repo, file)
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir))


def _fetch_folder(hub: Any, errors: Any, repo: str, cache_dir: Path | str | None) -> Path:
    """As `_fetch`; an interrupted download leaves a part, which is not taken for the whole."""
    options = {"allow_patterns": list(_PLM_FILES), "cache_dir": cache_dir}
    with suppress(errors.LocalEntryNotFoundError, CheckpointError):
        return _whole(Path(hub.snapshot_download(repo, local_files_only=True, **options)))
    _ask(hub, repo, _PLM_CONFIG)
    return _whole(Path(hub.snapshot_download(repo, **options)))


def _ask(hub: Any, repo: str, file: str) -> None:
    """Says at once what is wrong; a download retries for more than a minute."""
    hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=_ANSWER_SECONDS)


def _whole(folder: Path) -> Path:
    """The folder itself; CheckpointError if it lacks weights or the tokenizer."""
    weight_files(folder)
    if find_tokenizer(folder) is None:
        raise CheckpointError(f"it has no {TOKENIZER_NAME}")
    return folder


def _reason(errors: Any, error: Exception, repo: str, plm: bool) -> str:
    """What went wrong and what to do; the classes are ordered from special to general."""
    if isinstance(error, errors.GatedRepoError):
        which, wait = (f", the {PLM_LICENSE},", ", once access is granted,") if plm else ("", "")
        return (
            f"{repo} needs its licence{which} accepted: accept it on "
            f"https://huggingface.co/{repo} and{wait} log in with 'hf auth login'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not on the hub, or not visible to you: log in with 'hf auth login'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE"
    if isinstance(error, CheckpointError):
        return f"{repo} was not downloaded whole: try again"
    return (
        f"{repo} is not in the cache and could not be downloaded ({type(error).__name__}): check "
        "the network and the free disk space"
    )
