"""Weight sources: checkpoints under our parameter names, read one tensor at a time.

Our names are the parameter names of `models.pe.PerceptionEncoder` and `models.plm.PerceptionLM`.
Opening a file checks all names and shapes against the architecture. Loading a tensor reads it and
checks that its elements are finite.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt, prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from perception_rt.checkpoint.names import (
    IGNORED_KEYS,
    TEXT_BIAS,
    VISION_BIAS,
    VISION_ONLY,
    Layout,
    backbone_keys,
    detect_layout,
    layout_starts,
    stored_tensors,
)
from perception_rt.checkpoint.plm_names import HF_UNUSED, current_hf_keys, tied_copy
from perception_rt.checkpoint.readers import Header, Reader, open_reader
from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.wrappers import PlainNames, listed, plain_names
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.families import family_of, import_named
from perception_rt.plm_config import PlmConfig

LICENSE_UNKNOWN = "not stated"
_LISTED = 5
_HF_HEAD = "lm_head.weight"  # missing in a save of the base model
_HEAD_HINT = (
    ", which has a head of its own, since neither tie_word_embeddings in config.json nor "
    "weight_tying in params.json is true"
)
_DROPPED = {
    "reference": "non-visual tensors",
    "open_clip": "non-visual tensors",
    "hf": "tensors of the tower's pooling",
    "detectron2": "tensors of the detector's heads",
}
PIECE_ELEMENTS = 1 << 20  # checked or compared at once
# Biases of projections, and their towers in `PeConfig`.
_BIASES = {VISION_BIAS: "vision", TEXT_BIAS: "text"}
_BARE_VISION = "conv1.weight"  # of a vision tower alone in the reference layout
# Tensors whose width identifies an architecture, and the axis of the width.
_WIDTHS = {
    "visual.conv1.weight": ("vision tower", 0),
    "vision_model.conv1.weight": ("vision tower", 0),
    "tok_embeddings.weight": ("decoder", 1),
}


class WeightSource(Protocol):
    """A checkpoint with exactly the architecture's tensors, read on demand."""

    @property
    def provenance(self) -> Mapping[str, str | int]:
        """Facts about the weights for the manifest."""

    def load(self, name: str) -> Tensor:
        """Returns a parameter in its stored dtype; CheckpointError if it is unreadable."""

    def load_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns `load(name)[start:stop]`; reads only these rows if the source can."""


def state_dict(source: WeightSource, names: Collection[str]) -> dict[str, Tensor]:
    """Returns parameters in float32, for `load_state_dict`."""
    return {name: source.load(name).to(torch.float32) for name in names}


def expected_tensors(config: PeConfig | PlmConfig) -> dict[str, torch.Size]:
    """Returns names and shapes of an architecture's parameters, without allocating them."""
    return dict(_parameters(config))


@cache
def _parameters(config: PeConfig | PlmConfig) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        model: nn.Module = import_named(family_of(config).model)(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def open_checkpoint(
    path: Path | str,
    config: PeConfig | PlmConfig,
    *,
    license_note: str = LICENSE_UNKNOWN,
    ema: bool = False,
    find_biases: bool = False,
) -> "FileWeights":
    """Opens weights in any known format and layout, and checks all names and shapes.

    Args:
        path: a file of safetensors or torch, an index of shards, or a directory with an index, a
            single file, `consolidated.pth`, or all of `consolidated.00.pth`, .... The weights may
            be an entry of a training checkpoint, and their keys have prefixes of wrappers.
        config: the architecture, which the weights must fit exactly. For an architecture without a
            text tower, the text tower of a whole CLIP is dropped. A language model with a
            tied head may hold the embedding twice. A missing bias of a projection means zero.
        license_note: licence of the weights, if the caller knows it.
        ema: take the averaged copy (EMA) that the checkpoint must hold.
        find_biases: whether biases of projections that `config` does not have are used too, and
            added to the `config` of the result. Else they must be all zeros.

    Raises:
        CheckpointError: the file is unreadable or unsafe, holds several models, a tensor is
            missing, unexpected, misshapen or not a dense float, or the two embeddings of a tied
            head differ.
    """
    return FileWeights(
        open_reader(Path(path), ema=ema), config, license_note, ema=ema, find_biases=find_biases
    )


class FileWeights:
    """A `WeightSource` that reads weight files.

    Attributes:
        config: architecture of the weights.
    """

    def __init__(
        self,
        reader: Reader,
        config: PeConfig | PlmConfig,
        license_note: str,
        *,
        ema: bool = False,
        find_biases: bool = False,
    ) -> None:
        self._reader = reader
        self._license_note = license_note
        try:
            _refuse_updates(reader.headers)
            names = plain_names(
                reader.headers, layout_starts(config), ema=ema and not reader.averaged
            )
            plan = _plan(reader.headers, names, config)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.label}: {error}") from None
        self._layout = plan.layout
        self._notes = _notes(reader, names, plan)
        self._file_keys = plan.file_keys
        self._stored = {entry.name: entry for entry in plan.stored}
        self.config = self._with_biases(config, plan.biases, find_biases)
        for key, name in plan.copies.items():
            self._check_copy(key, self._stored[name])

    @property
    def provenance(self) -> dict[str, str | int]:
        """Source, layout, digest and licence; the first access reads the whole file."""
        facts: dict[str, str | int] = {
            "source": "file",
            "format": self._reader.format,
            "layout": self._layout,
            "file": self._reader.label,
            "sha256": self._reader.files.sha256(),
            "bytes": self._reader.files.size_bytes,
            "license": self._license_note,
        }
        if self._notes:
            facts["note"] = "; ".join(self._notes)
        return facts

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user: which of the file's weights were taken and which left out."""
        return self._notes

    def load(self, name: str) -> Tensor:
        """Returns a parameter in our shape, contiguous and in its stored dtype.

        Raises:
            CheckpointError: there is no such parameter, or its tensor is unreadable or has an
                element that is not finite.
        """
        entry = self._entry(name)
        if name in _BIASES and entry.keys[0] not in self._file_keys:
            return torch.zeros(entry.shape)
        return entry.unpack([self._read(key) for key in entry.keys])

    def load_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns `load(name)[start:stop]`; reads only these rows unless the layout reorders rows.

        Raises:
            CheckpointError: as `load`.
        """
        entry = self._entry(name)
        if name in _BIASES or not entry.has_our_rows:
            return self.load(name)[start:stop]
        return self._read(entry.keys[0], slice(start, stop)).contiguous()

    def _entry(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"the architecture has no parameter {name!a:.80}")
        return self._stored[name]

    def _read(self, key: str, rows: slice | None = None) -> Tensor:
        tensor = self._reader.read(self._file_keys[key], rows)
        pieces = [tensor[part] for part in _pieces(tensor.shape)] if tensor.ndim else [tensor]
        if not all(torch.isfinite(piece).all() for piece in pieces):
            raise CheckpointError(f"{self._reader.label}: {key} has elements that are not finite")
        return tensor

    def _with_biases(
        self, config: PeConfig | PlmConfig, biases: Sequence[Stored], find: bool
    ) -> PeConfig | PlmConfig:
        """The architecture with those of the file's biases that are not zero."""
        for entry in biases:
            (key,) = entry.keys
            if not isinstance(config, PeConfig) or not self._read(key).count_nonzero():
                continue
            if not find:
                raise CheckpointError(
                    f"{self._reader.label}: {key} is not zero, but the architecture has no bias "
                    f"there: set {_BIASES[entry.name]}.proj_bias, or export it anew"
                )
            self._stored[entry.name] = entry
            config = _biased(config, entry.name)
        return config

    def _check_copy(self, key: str, entry: Stored) -> None:
        """Compares in pieces, since the two matrices may have gigabytes."""
        (original,) = entry.keys
        for rows in _pieces(entry.shape):
            first, second = self._read(original, rows), self._read(key, rows)
            if first.dtype != second.dtype or not torch.equal(first, second):
                raise CheckpointError(
                    f"{self._reader.label}: {key} must equal {original}, as the head is tied"
                )


def _pieces(shape: Sequence[int]) -> Iterator[slice]:
    """Ranges of rows that cover a tensor, each of about `PIECE_ELEMENTS` elements."""
    step = max(1, PIECE_ELEMENTS // max(1, prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Instructions for reading a checkpoint.

    Attributes:
        layout: layout of the keys.
        stored: table of the tensors.
        biases: biases of projections in the file that the architecture does not have.
        copies: keys that must equal a parameter of ours, with its name.
        file_keys: keys of the layout, with the keys in the file.
        dropped: number of ignored tensors.
    """

    layout: Layout
    stored: tuple[Stored, ...]
    biases: tuple[Stored, ...]
    copies: Mapping[str, str]
    file_keys: Mapping[str, str]
    dropped: int


def _plan(headers: Mapping[str, Header], names: PlainNames, config: PeConfig | PlmConfig) -> _Plan:
    """Detects the layout and checks names and shapes; CheckpointError lists the differences."""
    file_keys = names.keys
    layout = detect_layout(file_keys, config)
    total = len(file_keys)
    if layout == "hf":
        current = current_hf_keys(file_keys)
        file_keys = {key: f for key, f in current.items() if not key.startswith(HF_UNUSED)}
    head_dim = None
    if isinstance(config, PlmConfig):
        head_dim = config.decoder.head_dim
    elif layout == "detectron2":
        file_keys = backbone_keys(file_keys)
    elif config.text is None:
        file_keys = _visual_only(file_keys, layout)
    elif layout == "reference" and _BARE_VISION in file_keys:
        raise CheckpointError(f"the checkpoint {VISION_ONLY}")
    shapes: dict[str, Shape] = {n: tuple(s) for n, s in expected_tensors(config).items()}
    possible = _possible_biases(config)
    table = stored_tensors(layout, shapes | possible, head_dim, file_keys)
    stored = tuple(entry for entry in table if entry.name in shapes)
    biases = tuple(e for e in table if e.name not in shapes and e.keys[0] in file_keys)
    copies = {k: name for k, name in tied_copy(layout, shapes).items() if k in file_keys}
    ignored = IGNORED_KEYS.get(layout, frozenset())
    found = {k: headers[f] for k, f in file_keys.items() if k not in ignored}
    required = [e for e in stored if e.name not in possible or e.keys[0] in file_keys]
    _check(found, [*required, *biases], {key: shapes[name] for key, name in copies.items()})
    return _Plan(
        layout=layout,
        stored=stored,
        biases=biases,
        copies=copies,
        file_keys=file_keys,
        dropped=total - len(file_keys),
    )


def _refuse_updates(keys: Collection[str]) -> None:
    """CheckpointError for an adapter, or a model whose LoRA updates are not merged."""
    if any(".lora_A." in key for key in keys):
        raise CheckpointError(
            "it holds LoRA matrices: pass the base model, and the adapter's folder with --adapter; "
            "or merge them with peft's merge_and_unload()"
        )


def _notes(reader: Reader, names: PlainNames, plan: _Plan) -> list[str]:
    notes = []
    left_out = reader.left_out + names.left_out
    if left_out:
        notes.append(f"left out EMA weights, which --ema selects: {listed(left_out)}")
    if reader.averaged or names.averaged:
        notes.append("averaged weights (EMA)")
    if plan.dropped:
        notes.append(f"dropped {plan.dropped} {_DROPPED[plan.layout]}")
    return notes


def _visual_only(file_keys: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """The vision tower of a whole CLIP, in the reference layout under the keys of a lone tower."""
    visual = {key: file for key, file in file_keys.items() if key.startswith("visual.")}
    if layout == "reference":
        visual = {key.removeprefix("visual."): file for key, file in visual.items()}
    return visual or dict(file_keys)


def _possible_biases(config: PeConfig | PlmConfig) -> dict[str, Shape]:
    """Names and shapes of the biases that the projections of an encoder may have."""
    if not isinstance(config, PeConfig):
        return {}
    sizes = {
        VISION_BIAS: config.vision.output_dim,
        TEXT_BIAS: None if config.text is None else config.text.output_dim,
    }
    return {name: (size,) for name, size in sizes.items() if size is not None}


def _biased(config: PeConfig, name: str) -> PeConfig:
    """The architecture with a bias, by its parameter name."""
    if name == VISION_BIAS:
        return replace(config, vision=replace(config.vision, proj_bias=True))
    assert config.text is not None
    return replace(config, text=replace(config.text, proj_bias=True))


def _check(
    found: Mapping[str, Header], stored: Sequence[Stored], extra: Mapping[str, Shape]
) -> None:
    wanted = dict(extra)
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
        which = _HEAD_HINT if _HF_HEAD in problems["missing"] else ""
        hint = _width_hint(found, stored) or _size_hint(found, stored)
        raise CheckpointError(
            f"does not fit the architecture{which}: " + "; ".join(sentences) + hint
        )


def _same_shape(found: Shape, wanted: Shape) -> bool:
    """Whether shapes are equal, or a scalar was saved as a vector of one, like some scales."""
    return found == wanted or (wanted == () and found == (1,))


def _listing(kind: str, entries: list[str]) -> str:
    shown = ", ".join(entries[:_LISTED])
    more = "" if len(entries) <= _LISTED else ", ..."
    return f"{len(entries)} {kind} ({shown}{more})"


def _width_hint(found: Mapping[str, Header], stored: Sequence[Stored]) -> str:
    """Names another width of a tower, which means that the file holds another model."""
    for entry in stored:
        part, axis = _WIDTHS.get(entry.name, ("", 0))
        header = found.get(entry.keys[0])
        if not part or header is None or len(header.shape) != len(entry.shape):
            continue
        if header.shape[axis] != entry.shape[axis]:
            return (
                f". Other architecture? Its {part} is {header.shape[axis]} wide, "
                f"not {entry.shape[axis]}"
            )
    return ""


def _size_hint(found: Mapping[str, Header], stored: Sequence[Stored]) -> str:
    """Names another image size in a layout of timm, whose configuration may lack it."""
    entries = {entry.name: entry for entry in stored}
    positions, patches = (
        entries.get(f"visual.{n}") for n in ("positional_embedding", "conv1.weight")
    )
    if positions is None or patches is None or not positions.keys[0].endswith("pos_embed"):
        return ""
    header = found.get(positions.keys[0])
    if header is None or len(header.shape) != len(positions.shapes[0]):
        return ""
    prefix, patch = int("visual.class_embedding" in entries), patches.shape[-1]
    theirs, ours = (
        isqrt(max(0, rows - prefix)) * patch for rows in (header.shape[-2], positions.shape[0])
    )
    if theirs == ours:
        return ""
    return (
        f". Its positions are for images of {theirs} pixels, not {ours}: give the configuration "
        "this size (img_size in timm's model_args, image_size in open_clip's vision_cfg)"
    )
