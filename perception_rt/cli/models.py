"""`perception-export --list`: a table of the models that can be exported by name."""

import argparse
from typing import Any

from perception_rt.archs import PE_MODELS, PLM_MODELS
from perception_rt.families import Config
from perception_rt.plm_config import PlmConfig

_HEADER = ("model", "parameters", "image", "text", "towers")


class ListModels(argparse.Action):
    """Prints the models and ends the program, as `--version` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints one line per model."""
        try:
            from perception_rt.checkpoint.source import expected_tensors
            from perception_rt.export.architecture import demo_configs
        except ModuleNotFoundError as error:
            parser.error(f"--list needs {error.name}: pip install 'perception_rt[export]'")
        rows = [_HEADER]
        models: dict[str, Config] = {**PE_MODELS, **PLM_MODELS, **demo_configs()}
        for name, config in models.items():
            parameters = sum(shape.numel() for shape in expected_tensors(config).values())
            side = config.vision.image_size
            rows.append((name, _rounded(parameters), f"{side}x{side}", *_text(config)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        parser.exit()


def _text(config: Config) -> tuple[str, str]:
    """The longest text, and the towers."""
    if isinstance(config, PlmConfig):
        return f"{config.decoder.max_seqlen} tokens", "vision, decoder"
    if config.text is None:
        return "-", "vision"
    return f"{config.text.context_length} tokens", "vision, text"


def _rounded(count: int) -> str:
    """A count with three digits, such as 671 M."""
    value, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{value:.3g} {unit}"
