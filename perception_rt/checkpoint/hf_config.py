"""Recognises the `config.json` that other libraries put beside weights, by its content.

Each kind has a module that reads it: `hf_plm` for transformers' PerceptionLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perception_rt.checkpoint.json_files import Section, find_beside, read_json

CONFIG_JSON = "config.json"
Kind = Literal["perception_lm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """The `config.json` beside some weights.

    Attributes:
        file: path of the file.
        kind: library and model that it describes; None for one that this library cannot read.
        root: its content.
    """

    file: Path
    kind: Kind | None
    root: Section

    @property
    def label(self) -> str:
        """Description of the model for messages, from the fields that usually name it."""
        for field in ("model_type", "architecture"):
            if field in self.root:
                return f"{field} {self.root.content[field]!r:.60}"
        return "an unknown model"


def find_hub_config(path: Path | str) -> HubConfig | None:
    """Reads the `config.json` beside weights; None without one.

    Args:
        path: as for `open_checkpoint`.

    Raises:
        CheckpointError: the file is not JSON.
        InputError: the file is not an object.
    """
    file = find_beside(Path(path), CONFIG_JSON)
    if file is None:
        return None
    root = Section(file.name, read_json(file))
    return HubConfig(file=file, kind=kind_of(root.content), root=root)


def kind_of(content: Mapping[str, Any]) -> Kind | None:
    """The kind of a `config.json`, by its content; None if it is unknown."""
    if content.get("model_type") == "perception_lm":
        return "perception_lm"
    return None
