"""Where weights come from, one tensor at a time, under our own names.

Our names are the parameter names of `models.pe.PerceptionEncoder`. A file is checked against the
architecture when it is opened, every name and every shape; a tensor is read, and checked for
numbers that are not finite, when it is asked for.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from perception_rt.checkpoint.names import (
    IGNORED_KEYS,
    Layout,
    Shape,
    Stored,
    detect_layout,
    stored_tensors,
    without_module_prefix,
    zero_tensors,
)
from perception_rt.checkpoint.readers import Header, Reader, open_reader
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import PerceptionEncoder

LICENSE_UNKNOWN = "not stated"
_LISTED = 5


class WeightSource(Protocol):
    """A strict view of a checkpoint: exactly the architecture's tensors, read on demand."""

    @property
    def provenance(self) -> Mapping[str, str | int]:
        """What the manifest says about these weights."""

    def load(self, name: str) -> Tensor:
        """The tensor of a parameter, in its stored dtype; CheckpointError if it is unreadable."""


def state_dict(source: WeightSource, names: Collection[str]) -> dict[str, Tensor]:
    """All tensors for `load_state_dict`, float32."""
    return {name: source.load(name).to(torch.float32) for name in names}


def expected_tensors(config: PeConfig) -> dict[str, torch.Size]:
    """Names and shapes of an architecture's parameters, without memory for their values."""
    with torch.device("meta"):
        model = PerceptionEncoder(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def open_checkpoint(
    path: Path | str, config: PeConfig, *, license_note: str = LICENSE_UNKNOWN
) -> "FileWeights":
    """Opens weights in any known format and layout, and checks all names and shapes.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, an index of shards, or a directory
            with an index or a single safetensors file.
        config: the architecture that the weights must fit exactly. Without a text tower, a
            reference checkpoint of a whole CLIP is accepted, and its text tower dropped.
        license_note: the weights' licence, as far as the caller knows it.

    Raises:
        CheckpointError: the file is unreadable or unsafe, or a tensor is missing, unexpected,
            misshapen or not a dense float.
    """
    return FileWeights(open_reader(Path(path)), config, license_note)


class FileWeights:
    """The weights of an architecture in a file: a `WeightSource`."""

    def __init__(self, reader: Reader, config: PeConfig, license_note: str) -> None:
        self._reader = reader
        self._license_note = license_note
        try:
            plan = _plan(reader.headers, config)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.label}: {error}") from None
        self._layout = plan.layout
        self._dropped = plan.dropped
        self._file_keys = plan.file_keys
        self._stored = {entry.name: entry for entry in plan.stored}
        for key in plan.zeros:
            if self._read(key).count_nonzero():
                raise CheckpointError(
                    f"{reader.label}: {key} must be all zeros, as the reference has no such bias"
                )

    @property
    def provenance(self) -> dict[str, str | int]:
        """Origin, layout, digest and licence; the first access reads the whole file."""
        facts: dict[str, str | int] = {
            "source": "file",
            "format": self._reader.format,
            "layout": self._layout,
            "file": self._reader.label,
            "sha256": self._reader.files.sha256(),
            "bytes": self._reader.files.size_bytes,
            "license": self._license_note,
        }
        if self._dropped:
            facts["note"] = f"dropped {self._dropped} non-visual tensors"
        return facts

    def load(self, name: str) -> Tensor:
        """The tensor of a parameter in our shape, contiguous, in its stored dtype.

        Raises:
            CheckpointError: the architecture has no such parameter, or the tensor is unreadable
                or has an element that is not finite.
        """
        if name not in self._stored:
            raise CheckpointError(f"the architecture has no parameter {name!a:.80}")
        entry = self._stored[name]
        return entry.unpack([self._read(key) for key in entry.keys])

    def _read(self, key: str) -> Tensor:
        tensor = self._reader.read(self._file_keys[key])
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self._reader.label}: {key} has elements that are not finite")
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How to read a checkpoint: its layout, its table, and where its keys are in the file."""

    layout: Layout
    stored: tuple[Stored, ...]
    zeros: Mapping[str, Shape]
    file_keys: Mapping[str, str]
    dropped: int


def _plan(headers: Mapping[str, Header], config: PeConfig) -> _Plan:
    """Recognises a layout and checks it; CheckpointError says what does not fit."""
    file_keys = without_module_prefix(headers)
    layout = detect_layout(file_keys, config)
    total = len(file_keys)
    if layout == "reference" and config.text is None:
        file_keys = _visual_only(file_keys)
    dropped = total - len(file_keys)
    shapes: dict[str, Shape] = {n: tuple(s) for n, s in expected_tensors(config).items()}
    stored, zeros = stored_tensors(layout, shapes), zero_tensors(layout, shapes)
    ignored = IGNORED_KEYS[layout]
    found = {k: headers[f] for k, f in file_keys.items() if k not in ignored}
    _check(found, stored, zeros)
    return _Plan(layout=layout, stored=stored, zeros=zeros, file_keys=file_keys, dropped=dropped)


def _visual_only(file_keys: Mapping[str, str]) -> dict[str, str]:
    """The vision tower of a whole CLIP, under the keys of a vision tower alone."""
    visual = {k.removeprefix("visual."): f for k, f in file_keys.items() if k.startswith("visual.")}
    return visual or dict(file_keys)


def _check(
    found: Mapping[str, Header], stored: Sequence[Stored], zeros: Mapping[str, Shape]
) -> None:
    wanted = dict(zeros)
    for entry in stored:
        wanted |= zip(entry.keys, entry.shapes, strict=True)
    common = [key for key in wanted if key in found]
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [f"{key!a:.100}" for key in sorted(found) if key not in wanted],
        "misshapen": [
            f"{key} is {found[key].shape}, not {wanted[key]}"
            for key in common
            if not _same_shape(found[key].shape, wanted[key])
        ],
        "unusable": [f"{k} is {found[k].unusable}" for k in common if found[k].unusable],
    }
    sentences = [_listing(kind, entries) for kind, entries in problems.items() if entries]
    if sentences:
        hint = _width_hint(found, stored)
        raise CheckpointError("does not fit the architecture: " + "; ".join(sentences) + hint)


def _same_shape(found: Shape, wanted: Shape) -> bool:
    """Equal, or a scalar that was saved as a vector of one, as some logit scales are."""
    return found == wanted or (wanted == () and found == (1,))


def _listing(kind: str, entries: list[str]) -> str:
    shown = ", ".join(entries[:_LISTED])
    more = "" if len(entries) <= _LISTED else ", ..."
    return f"{len(entries)} {kind} ({shown}{more})"


def _width_hint(found: Mapping[str, Header], stored: Sequence[Stored]) -> str:
    """Widths that differ mean that the whole file is of another model."""
    (patches,) = (entry for entry in stored if entry.name == "visual.conv1.weight")
    header = found.get(patches.keys[0])
    if header is None or not header.shape or header.shape[0] == patches.shape[0]:
        return ""
    return (
        f". Other architecture? Its vision tower is {header.shape[0]} wide, not {patches.shape[0]}"
    )
