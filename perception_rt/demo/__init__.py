"""The demo models PE-Demo and PLM-Demo, tiny and for handwritten digits; see CARD.md of each.

Package data and where it lies, nothing else: no torch, no I/O.
"""

from pathlib import Path

LICENSE_NOTE = "Apache-2.0; trained on UCI handwritten digits (CC BY 4.0), see CARD.md"


def weights_path() -> Path:
    """`pe_demo.safetensors`: float16 weights in the reference's names."""
    return Path(__file__).with_name("pe_demo.safetensors")


def config_path() -> Path:
    """`pe_demo.json`: the architecture, as `PeConfig.from_dict` takes it."""
    return Path(__file__).with_name("pe_demo.json")


def language_model_path() -> Path:
    """The folder of PLM-Demo: float16 weights, `params.json`, `tokenizer.model`."""
    return Path(__file__).with_name("plm_demo")
