"""Libraries to compare with, as protocols, and how one of them is opened.

Legend: N images or texts, H W pixels, D embedding channels, T tokens, P patches, C width; n tiles,
S tile side in pixels, V vocabulary, K key and value heads, E channels per head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from perception_rt.errors import BackendError, InputError, PerceptionError
from perception_rt.families import PE, PLM, Family, import_named
from perception_rt.package.manifest import Content

Array = np.ndarray[Any, Any]


class EncoderLibrary(Protocol):
    """An encoder that a library runs in float32 on the CPU."""

    @property
    def logit_scale(self) -> float | None:
        """Factor on cosines; None without a text tower."""

    def pixels(self, picture: Image.Image) -> Array:
        """The library's own preprocessing, float32 (3, H, W)."""

    def outputs(self, pixels: Array) -> Array:
        """Pooled outputs of pixels (N, 3, H, W), float32 (N, D), not normalised."""

    def tokens(self, pixels: Array) -> Array:
        """Outputs of all tokens, float32 (N, T, C)."""

    def blocks(self, pixels: Array) -> Sequence[Array]:
        """Output of each block without class token and final norm, float32 (N, P, C)."""

    def tokenize(self, texts: Sequence[str]) -> Array:
        """Token ids, int64 (N, context)."""

    def texts(self, ids: Array) -> Array:
        """Outputs of token ids, float32 (N, D), not normalised."""


class LanguageLibrary(Protocol):
    """A language model that a library runs in float32 on the CPU."""

    def tiles(self, picture: Image.Image) -> Array:
        """Normalised tiles of a picture, float32 (n, 3, S, S)."""

    def prompt(self, question: str, picture: Image.Image | None) -> Array | None:
        """Token ids of a question, int64 (T,); None if the weights have no chat template."""

    def logits(self, ids: Array, pixels: Array | None) -> Array:
        """Logits after a prompt of ids (T,) and tiles (n, 3, S, S), float32 (V,)."""

    def greedy(self, ids: Array, pixels: Array | None, count: int) -> Array:
        """At most `count` likeliest next tokens, int64, without the end token."""

    def image_features(self, pixels: Array) -> Array:
        """Image tokens of tiles (n, 3, S, S), float32 (n, tokens per tile, C)."""

    def values(self, ids: Array, pixels: Array | None) -> Sequence[Array]:
        """Values in the cache of each decoder layer after a prompt, float32 (K, T, E)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryEntry:
    """A library to compare with.

    Attributes:
        name: value of `--against`.
        family: family of its models.
        opener: "module:function" called with the content of a package's manifest and the weights
            or None, which returns the library and the name of the weights.
        modules: modules that must be installed.
        distribution: distribution with the library's version.
        install: command that installs it.
    """

    name: str
    family: Family
    opener: str
    modules: tuple[str, ...]
    distribution: str
    install: str

    def require(self) -> None:
        """BackendError with the command to install the library, unless it is installed."""
        missing = [name for name in self.modules if find_spec(name) is None]
        if missing:
            raise BackendError(
                f"{self.name} needs {' and '.join(missing)}, which this Python lacks: "
                f"{self.install}"
            )

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name} {version(self.distribution)}"


_HERE = "perception_rt.evaluation.conformance"
LIBRARIES = {
    entry.name: entry
    for entry in (
        LibraryEntry(
            name="timm",
            family=PE,
            opener=f"{_HERE}.encoder_libraries:open_timm",
            modules=("torch", "torchvision", "timm"),
            distribution="timm",
            install="pip install timm torchvision",
        ),
        LibraryEntry(
            name="open_clip",
            family=PE,
            opener=f"{_HERE}.encoder_libraries:open_open_clip",
            modules=("torch", "torchvision", "timm", "open_clip"),
            distribution="open_clip_torch",
            install="pip install open_clip_torch",
        ),
        LibraryEntry(
            name="transformers",
            family=PLM,
            opener=f"{_HERE}.transformers_plm:open_transformers",
            modules=("torch", "torchvision", "timm", "transformers"),
            distribution="transformers",
            install="pip install transformers timm torchvision",
        ),
    )
}


def get_library(name: str) -> LibraryEntry:
    """The record of a library; InputError names the known ones."""
    try:
        return LIBRARIES[name]
    except KeyError:
        raise InputError(
            f"unknown library {name!r:.40}; known are {', '.join(LIBRARIES)}"
        ) from None


def open_library(entry: LibraryEntry, content: Content, weights: str | None) -> tuple[Any, str]:
    """Opens a library's model.

    Args:
        entry: the library.
        content: content of the package's manifest, for the name of the model.
        weights: what the library reads; None for the released weights of that name.

    Returns:
        An `EncoderLibrary` or `LanguageLibrary`, and the name of its weights.

    Raises:
        BackendError: the library is missing, or cannot load the weights.
        InputError: there are no released weights of this name, or no such path.
    """
    entry.require()
    try:
        found: tuple[Any, str] = import_named(entry.opener)(content, weights)
    except PerceptionError:
        raise
    # Libraries raise errors of many kinds for weights that are missing, closed or of another model.
    except Exception as error:
        raise BackendError(
            f"{entry.label} cannot load {weights or content.name}: {_first_line(error)}"
        ) from error
    return found


@contextmanager
def library_errors(entry: LibraryEntry) -> Iterator[None]:
    """Turns any error of a library that runs into a BackendError."""
    try:
        yield
    except PerceptionError:
        raise
    except Exception as error:
        raise BackendError(f"{entry.label} failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


def released_name(content: Content, names: dict[str, str], library: str) -> str:
    """The library's name of a package's model.

    Raises:
        InputError: the package has another model than the released ones.
    """
    name = content.name.removeprefix("facebook/")
    if name not in names:
        raise InputError(
            f"{library} has no model of the name {content.name}: pass --weights with what the "
            "package was exported from"
        )
    return names[name]


def is_hub_name(weights: str) -> bool:
    """Whether weights are named "org/name" instead of a path that exists.

    Raises:
        InputError: they are neither.
    """
    if Path(weights).exists():
        return False
    if weights.count("/") == 1 and not weights.startswith((".", "/", "~")):
        return True
    raise InputError(f"--weights {weights!r:.200} does not exist")
