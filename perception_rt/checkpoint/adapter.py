"""LoRA adapters of PEFT, merged into a model's weights one tensor at a time.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`. For
some linear layers it holds matrices A (r, in) and B (out, r), and the merged weight is
W + scale * B @ A. Layers are named by their paths in the model that was trained: that of
transformers, timm, open_clip, Meta or this library.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perception_rt.checkpoint.adapter_config import AdapterConfig
from perception_rt.checkpoint.git_lfs import refuse_pointer
from perception_rt.checkpoint.locate import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from perception_rt.checkpoint.names import layouts_of, stored_tensors
from perception_rt.checkpoint.plm_names import current_hf_keys
from perception_rt.checkpoint.readers import FileSet, Header, Reader
from perception_rt.checkpoint.source import WeightSource, expected_tensors
from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.wrappers import without_wrappers
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.plm_config import PlmConfig

PREFIX = "base_model.model."  # of PEFT's keys
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")
_COPY = re.compile(r"(?P<path>.+)\.base_layer\.weight")  # PEFT's of a head that has an update
_PACKED = ".in_proj_weight"
_LISTED = 3
_MERGE = "merge the adapter with peft's merge_and_unload() and export the result"
_LLAMA = "model.layers."  # of a decoder that was trained alone


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One stored tensor of one of our parameters: part `index` of `entry`."""

    entry: Stored
    index: int

    @property
    def shape(self) -> Shape:
        """Shape of the layer's weight, (out, in)."""
        return self.entry.shapes[self.index]

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Equal for targets in different layouts that an update changes in the same way."""
        entry = self.entry
        return entry.name, self.index, entry.shapes, entry.transposed, entry.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """Keys of A, B and perhaps a copy of W, their scale, and the tensor that they change."""

    a: str
    b: str
    copy: str | None
    scale: float
    target: _Target


class AdaptedWeights:
    """A `WeightSource` whose layers have an adapter's updates added, in float32.

    Args:
        source: weights of the base model.
        adapter: folder of the adapter.
        config: architecture of the base model.

    Raises:
        CheckpointError: the adapter is unreadable, is not plain LoRA, or does not fit the
            architecture.
    """

    def __init__(
        self, source: WeightSource, adapter: Path | str, config: PeConfig | PlmConfig
    ) -> None:
        folder = Path(adapter)
        weights = _weights_file(folder)
        settings = AdapterConfig.read(folder / ADAPTER_CONFIG_NAME)
        self._source = source
        self._label = folder.absolute().name
        self._reader = Reader(weights.name, [weights])
        self._files = FileSet([folder / ADAPTER_CONFIG_NAME, weights])
        self._updates: dict[str, list[_Update]] = {}
        try:
            for update in _updates(self._reader.headers, settings, config):
                self._updates.setdefault(update.target.entry.name, []).append(update)
        except CheckpointError as error:
            raise CheckpointError(f"adapter {self._label}: {error}") from None

    @property
    def provenance(self) -> Mapping[str, str | int]:
        """Facts about the base weights, and the adapter's name and digest."""
        return {
            **self._source.provenance,
            "adapter": self._label,
            "adapter_sha256": self._files.sha256(),
        }

    def load(self, name: str) -> Tensor:
        """Returns a parameter: in float32 with an update, else as the base model has it.

        Raises:
            CheckpointError: a tensor is unreadable or has elements that are not finite.
        """
        base = self._source.load(name)
        updates = self._updates.get(name)
        if updates is None:
            return base
        entry = updates[0].target.entry
        parts = [torch.zeros(shape) for shape in entry.shapes]
        for update in updates:
            if update.copy is not None:
                self._check_copy(update.copy, name, entry, base)
            product = self._read(update.b) @ self._read(update.a)  # (out, r) @ (r, in)
            parts[update.target.index] = update.scale * product
        return base.float() + entry.unpack(parts)

    def load_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns `load(name)[start:stop]`; reads only these rows of a layer without an update."""
        if name in self._updates:
            return self.load(name)[start:stop]
        return self._source.load_rows(name, start, stop)

    def _check_copy(self, key: str, name: str, entry: Stored, base: Tensor) -> None:
        """CheckpointError if the adapter is for another W; a copy may be in half precision."""
        copy = entry.unpack([self._read(key)])
        if not torch.allclose(copy, base.float(), rtol=2**-7, atol=1e-6):
            raise CheckpointError(
                f"adapter {self._label} was trained for another base model: its copy of {name} "
                "differs"
            )

    def _read(self, key: str) -> Tensor:
        tensor = self._reader.read(key).float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"adapter {self._label}: {key!a:.100} has elements that are not finite"
            )
        return tensor


def _weights_file(folder: Path) -> Path:
    """The file with the matrices; CheckpointError if the folder is not one of an adapter."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: pass the adapter's folder, {folder.parent}")
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{ADAPTER_CONFIG_NAME}"))
        hint = f"; pass one of its folders {', '.join(below[:_LISTED])}" if below else ""
        raise CheckpointError(f"no adapter at {folder}: it has no {ADAPTER_CONFIG_NAME}{hint}")
    for suffix in (".safetensors", ".bin"):
        file = folder / f"{ADAPTER_NAME}{suffix}"
        if file.is_file():
            refuse_pointer(file)
            return file
    raise CheckpointError(f"no adapter at {folder}: it has no {ADAPTER_NAME}.safetensors or .bin")


def _updates(
    headers: Mapping[str, Header], settings: AdapterConfig, config: PeConfig | PlmConfig
) -> Iterator[_Update]:
    pairs, copies = _pairs(headers)
    targets = _find_targets({path: _shape(headers, path, *pairs[path]) for path in pairs}, config)
    for path, (a, b) in pairs.items():
        rank = headers[a].shape[0]
        if rank != settings.rank_of(path):
            raise CheckpointError(
                f"{path!a:.100} has rank {rank}, and its configuration says "
                f"{settings.rank_of(path)}"
            )
        yield _Update(
            a=a,
            b=b,
            copy=copies.get(path),
            scale=settings.scale_of(path),
            target=targets[path],
        )


def _pairs(
    headers: Mapping[str, Header],
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Keys of A and B, and of copies of W, by the path of their layer."""
    copies: dict[str, str] = {}
    sides: dict[str, dict[str, str]] = {"A": {}, "B": {}}
    for key, header in headers.items():
        match, copy = _KEY.fullmatch(key), _COPY.fullmatch(key)
        if copy is not None:
            copies[copy["path"].removeprefix(PREFIX)] = key
            continue
        if match is None:
            raise CheckpointError(_not_lora(key))
        if header.unusable is not None:
            raise CheckpointError(f"{key!a:.100} is {header.unusable}")
        sides[match["side"]][match["path"].removeprefix(PREFIX)] = key
    alone = sorted(sides["A"].keys() ^ sides["B"].keys())
    if alone:
        raise CheckpointError(f"{alone[0]!a:.100} has lora_A or lora_B only")
    for path in copies.keys() - sides["A"].keys():
        raise CheckpointError(_not_lora(copies[path]))
    if not sides["A"]:
        raise CheckpointError("it has no tensors")
    return {path: (key, sides["B"][path]) for path, key in sides["A"].items()}, copies


def _not_lora(key: str) -> str:
    return f"{key!a:.100} is not a LoRA matrix of a linear layer: {_MERGE}"


def _shape(headers: Mapping[str, Header], path: str, a: str, b: str) -> Shape:
    """Shape (out, in) of B @ A."""
    first, second = headers[a].shape, headers[b].shape
    if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
        raise CheckpointError(
            f"{path!a:.100} has lora_A {first} and lora_B {second}, which is no linear layer: "
            f"{_MERGE}"
        )
    return second[0], first[1]


def _find_targets(shapes: Mapping[str, Shape], config: PeConfig | PlmConfig) -> dict[str, _Target]:
    """The tensor that each path stands for; all paths are read in one layout.

    Paths may begin above the model or within it, so one prefix is taken away from all or added to
    all.
    """
    readings: dict[Any, dict[str, _Target]] = {}
    problems: list[str] = []
    plain = _plain_paths(shapes)
    variants = [plain, renamed] if (renamed := _renamed(plain)) != plain else [plain]
    for table in _tables(config):
        for names in variants:
            for removed, added in {s for stem in table if (s := _shift(next(iter(names)), stem))}:
                try:
                    found = _read(names, removed, added, table, shapes)
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                readings[tuple(target.meaning for target in found.values())] = found
    first = next(iter(shapes))
    if not readings:
        raise CheckpointError(max(problems, key=_is_close, default=_foreign(first)))
    if len(readings) > 1:
        examples = sorted(reading[first].entry.name for reading in readings.values())
        raise CheckpointError(
            f"{first!a:.100} can be {' or '.join(examples[:_LISTED])}: put the path of the tower "
            "before its keys"
        )
    (targets,) = readings.values()
    return targets


def _read(
    names: Mapping[str, str],
    removed: str,
    added: str,
    table: Mapping[str, _Target],
    shapes: Mapping[str, Shape],
) -> dict[str, _Target]:
    """Targets by path, for one pair of prefixes; CheckpointError if a path has none."""
    found: dict[str, _Target] = {}
    for name, path in names.items():
        target = table.get(added + name.removeprefix(removed))
        if target is None or not name.startswith(removed):
            raise CheckpointError(_foreign(path))
        if target.shape != shapes[path]:
            raise CheckpointError(f"{path!a:.100} is for {shapes[path]}, not {target.shape}")
        found[path] = target
    return found


def _is_close(problem: str) -> bool:
    """Whether a message is that of a reading which finds the path and not the shape."""
    return " is for " in problem


def _foreign(path: str) -> str:
    return f"{path!a:.100} is no linear layer of this architecture"


def _plain_paths(paths: Collection[str]) -> dict[str, str]:
    """Paths by themselves without the parts that wrapper modules and PEFT add."""
    plain = without_wrappers(paths)
    # PEFT keeps the layers of a packed attention below its `base_layer`.
    return {name.replace(".base_layer.", "."): path for name, path in plain.items()}


def _renamed(plain: Mapping[str, str]) -> dict[str, str]:
    """Paths by their names in the present version of transformers."""
    decoder = f"language_{_LLAMA}"
    names = {
        decoder + name.removeprefix(_LLAMA) if name.startswith(_LLAMA) else name: path
        for name, path in plain.items()
    }
    return current_hf_keys(names) if len(names) == len(plain) else dict(plain)


def _shift(path: str, stem: str) -> tuple[str, str] | None:
    """The prefixes to take away from a path and to add to it, so that it becomes a stem."""
    if path == stem:
        return "", ""
    if path.endswith(f".{stem}"):
        return path.removesuffix(stem), ""
    if stem.endswith(f".{path}"):
        return "", stem.removesuffix(path)
    return None


def _tables(config: PeConfig | PlmConfig) -> Iterator[dict[str, _Target]]:
    """For each way to name the layers of an architecture, its matrices by path."""
    shapes = {name: tuple(shape) for name, shape in expected_tensors(config).items()}
    head_dim = config.decoder.head_dim if isinstance(config, PlmConfig) else None
    ours = [Stored(name=n, shape=s, keys=(n,), shapes=(s,)) for n, s in shapes.items()]
    yield _by_path(ours)
    for layout in layouts_of(config):
        try:
            entries = stored_tensors(layout, shapes, head_dim)
        except CheckpointError:  # timm's layout has no text tower
            continue
        yield _by_path(entries)


def _by_path(entries: Iterable[Stored]) -> dict[str, _Target]:
    table: dict[str, _Target] = {}
    for entry in entries:
        for index, key in enumerate(entry.keys):
            if len(entry.shapes[index]) != 2:
                continue
            target = _Target(entry=entry, index=index)
            if key.endswith(".weight"):
                table[key.removesuffix(".weight")] = target
            elif key.endswith(_PACKED):
                # PEFT names the attention that packs it; our recipes name the matrix itself.
                table[key.removesuffix(_PACKED)] = table[key.removesuffix("_weight")] = target
    return table
