"""Paths of the demo models PE-Demo and PLM-Demo, tiny models of handwritten digits; see CARD.md."""

from pathlib import Path

LICENSE_NOTE = "Apache-2.0; trained on UCI handwritten digits (CC BY 4.0), see CARD.md"


def weights_path() -> Path:
    """Path of PE-Demo's float16 weights, under the reference's names."""
    return Path(__file__).with_name("pe_demo.safetensors")


def config_path() -> Path:
    """Path of PE-Demo's architecture, as `PeConfig.from_dict` takes it."""
    return Path(__file__).with_name("pe_demo.json")


def language_model_path() -> Path:
    """Path of PLM-Demo's folder: float16 weights, `params.json` and `tokenizer.model`."""
    return Path(__file__).with_name("plm_demo")
