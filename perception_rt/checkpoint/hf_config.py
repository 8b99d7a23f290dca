"""Finds the `config.json` that transformers puts beside weights.

`hf_plm` reads that of a PerceptionLM; timm's is read by `encoder_config`.
"""

from dataclasses import dataclass
from pathlib import Path

from perception_rt.checkpoint.json_files import Section, find_beside, read_json

CONFIG_JSON = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """The `config.json` beside some weights.

    Attributes:
        file: path of the file.
        root: its content.
    """

    file: Path
    root: Section

    @property
    def is_plm(self) -> bool:
        """Whether it describes a PerceptionLM of transformers."""
        return self.root.content.get("model_type") == "perception_lm"

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
    return HubConfig(file=file, root=Section(file.name, read_json(file)))
