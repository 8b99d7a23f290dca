"""Every released architecture exports at full size, with random weights, and passes its gate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perception_rt.archs import PE_MODELS

# Runs in a child process, so that the recorded peak of memory is that of this export.
_EXPORT = """
import sys
from perception_rt.cli import export_main
sys.exit(export_main(sys.argv[1:]))
"""

_FP32_BYTES = {"PE-Core-L14-336": 671_137_793 * 4}
# The -Tiling checkpoints differ from their base in weights only.
_DISTINCT = [name for name in PE_MODELS if not name.endswith("-Tiling")]
# Fifteen seconds each. The others take up to minutes; test_engines has their switches in small.
_SMALL = ["PE-Core-T16-384", "PE-Spatial-T16-512"]
_LARGE = [name for name in _DISTINCT if name not in _SMALL]


def _export(name: str, precision: str, out: Path) -> dict:
    arguments = ["--model", name, "--weights", "random", "--precision", precision]
    command = [sys.executable, "-c", _EXPORT, *arguments, "--out", str(out), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["record"]


def _check(record: dict, least: float) -> None:
    assert record["fidelity"]
    for name, fidelity in record["fidelity"].items():
        assert fidelity["cosine"] >= least, name


def test_tiling_models_have_the_architecture_of_their_base() -> None:
    for name, config in PE_MODELS.items():
        assert config == PE_MODELS[name.removesuffix("-Tiling")]


@pytest.mark.parametrize("name", _SMALL)
def test_exports(name: str, tmp_path: Path) -> None:
    _check(_export(name, "fp32", tmp_path / "p"), 0.99999)


@pytest.mark.slow
@pytest.mark.parametrize("name", _LARGE)
def test_exports_large(name: str, tmp_path: Path) -> None:
    record = _export(name, "fp32", tmp_path / "p")
    _check(record, 0.99999)
    if name in _FP32_BYTES:
        peak = record["export"]["peak_rss_bytes"]
        assert peak <= 2.5 * _FP32_BYTES[name], f"{peak / _FP32_BYTES[name]:.2f} x"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PE-Core-B16-224", "PE-Core-L14-336"])
def test_int8_is_close(name: str, tmp_path: Path) -> None:
    _check(_export(name, "int8", tmp_path / "p"), 0.999)
