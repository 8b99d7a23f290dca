"""Paths of the demo models PE-Demo and PLM-Demo, tiny models of handwritten digits; see CARD.md.

Both are here twice: as weights, which `perception-export` takes, and as packages, which run without
torch as `demo:pe` and `demo:plm`. `make demo-packages` makes the packages and the pictures.
"""

from pathlib import Path

LICENSE_NOTE = "Apache-2.0; trained on UCI handwritten digits (CC BY 4.0), see CARD.md"
DEMO_PE, DEMO_PLM = "demo:pe", "demo:plm"


def weights_path() -> Path:
    """Path of PE-Demo's float16 weights, under the reference's names."""
    return Path(__file__).with_name("pe_demo.safetensors")


def config_path() -> Path:
    """Path of PE-Demo's architecture, as `PeConfig.from_dict` takes it."""
    return Path(__file__).with_name("pe_demo.json")


def language_model_path() -> Path:
    """Path of PLM-Demo's folder: float16 weights, `params.json` and `tokenizer.model`."""
    return Path(__file__).with_name("plm_demo")


def package_paths() -> dict[str, Path]:
    """Folder of each ready-made package as it was installed, by the name that `load` takes."""
    packages = Path(__file__).with_name("packages")
    return {DEMO_PE: packages / "pe", DEMO_PLM: packages / "plm"}


def pictures_path() -> Path:
    """Path of the folder of held-out pictures; `pictures.json` in it lists them."""
    return Path(__file__).with_name("pictures")
