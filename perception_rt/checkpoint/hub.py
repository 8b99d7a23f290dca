"""Downloads published weights from the Hugging Face hub into its standard cache.

No other code of the library opens a network connection.
"""

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from perception_rt.archs import get_config
from perception_rt.checkpoint.json_files import ORIGINAL_FOLDER
from perception_rt.checkpoint.locate import (
    CONFIG_NAME,
    INDEX_NAME,
    TOKENIZER_NAME,
    find_tokenizer,
    weight_files,
)
from perception_rt.errors import CheckpointError
from perception_rt.families import Family, family_of

_ANSWER_SECONDS = 10.0
_ELSEWHERE = "pass --weights PATH to use your own file"
_PLM_CONFIG = f"{ORIGINAL_FOLDER}/{CONFIG_NAME}"
# The shards of transformers' port; `consolidated.pth` would be a second copy of the weights.
_PLM_FILES = ("*.safetensors", INDEX_NAME, _PLM_CONFIG, f"{ORIGINAL_FOLDER}/{TOKENIZER_NAME}")


def download(model_name: str, cache_dir: Path | str | None = None) -> Path:
    """Returns the checkpoint of a published model; downloads it unless it is in the cache.

    Args:
        model_name: a name in `archs.PE_MODELS` or `archs.PLM_MODELS`, with or without `facebook/`.
        cache_dir: a cache of huggingface_hub; None for its default.

    Returns:
        For an encoder, the path of the `.pt` file. For a language model, the directory of the
        weights, with configuration and tokenizer in `original/`.

    Raises:
        InputError: no published model has this name.
        CheckpointError: the files are not in the cache and cannot be downloaded. The language
            models need access granted by their owner.
    """
    family = family_of(get_config(model_name))
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
        if family.generates:
            return _fetch_folder(hub, errors, repo, cache_dir)
        return _fetch(hub, errors, repo, f"{name}.pt", cache_dir)
    # Besides its own errors, the hub's client raises those of its transport, which may change.
    except Exception as error:
        raise CheckpointError(f"{_reason(errors, error, repo, family)}, or {_ELSEWHERE}") from error


def _fetch(hub: Any, errors: Any, repo: str, file: str, cache_dir: Path | str | None) -> Path:
    """Looks into the cache first: weights never change, and a cached model needs no network."""
    try:
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        _ask(hub, repo, file)
        return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir))


def _fetch_folder(hub: Any, errors: Any, repo: str, cache_dir: Path | str | None) -> Path:
    """As `_fetch`; completes a folder of which an interrupted download left a part."""
    options = {"allow_patterns": list(_PLM_FILES), "cache_dir": cache_dir}
    with suppress(errors.LocalEntryNotFoundError, CheckpointError):
        return _whole(Path(hub.snapshot_download(repo, local_files_only=True, **options)))
    _ask(hub, repo, _PLM_CONFIG)
    return _whole(Path(hub.snapshot_download(repo, **options)))


def _ask(hub: Any, repo: str, file: str) -> None:
    """Fails at once if the file is out of reach; a download retries for over a minute."""
    hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=_ANSWER_SECONDS)


def _whole(folder: Path) -> Path:
    """Returns the folder; CheckpointError if it lacks weights or the tokenizer."""
    weight_files(folder)
    if find_tokenizer(folder) is None:
        raise CheckpointError(f"it has no {TOKENIZER_NAME}")
    return folder


def _reason(errors: Any, error: Exception, repo: str, family: Family) -> str:
    """Describes an error and its remedy. Classes go from special to general."""
    if isinstance(error, errors.GatedRepoError):
        which = wait = ""
        if family.generates:
            which, wait = f", the {family.license},", ", once access is granted,"
        return (
            f"{repo} needs its licence{which} accepted: accept it on "
            f"https://huggingface.co/{repo} and{wait} log in with 'hf auth login'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not on the hub, or not visible to you: log in with 'hf auth login'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE"
    if isinstance(error, CheckpointError):
        return f"the download of {repo} is incomplete: try again"
    return (
        f"{repo} is not in the cache and could not be downloaded ({type(error).__name__}): check "
        "the network and the free disk space"
    )
