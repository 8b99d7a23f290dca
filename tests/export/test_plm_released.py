"""Language models of the released sizes with random weights; minutes each, run by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import perception_rt as prt
from perception_rt.archs import PLM_MODELS
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.package.reader import read_manifest

pytestmark = pytest.mark.slow

_SHARD_BYTES = 2 * 2**30
_GIB = 2**30


def write_shards(directory: Path, name: str) -> None:
    """Writes a sharded bfloat16 checkpoint in the reference's names, one shard in memory."""
    source = RandomWeights(PLM_MODELS[name], 0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for key in expected_tensors(PLM_MODELS[name]):
        shard[key] = source.load(key).to(torch.bfloat16)
        size += shard[key].nbytes
        if size >= _SHARD_BYTES:
            flush()
            size = 0
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def export(*arguments: str, out: Path) -> int:
    """Runs `perception-export` in a child process; returns its recorded peak memory in bytes."""
    code = "import sys; from perception_rt.cli import export_main; sys.exit(export_main())"
    subprocess.run([sys.executable, "-c", code, *arguments, "--out", str(out)], check=True)
    record = read_manifest(out).record["export"]
    print(record)
    return record["peak_rss_bytes"]


@pytest.mark.parametrize("blocks", ["int8", "int4"])
def test_plm_8b_exports_in_six_gibibytes(blocks: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, "PLM-8B")
    out = tmp_path / "package"
    peak = export(
        *("--model", "PLM-8B", "--weights", str(shards), "--precision", "int4"),
        *("--blocks", blocks),
        out=out,
    )
    assert peak <= 6 * _GIB, f"{peak / _GIB:.2f} GiB"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_plm_1b_exports_and_answers(precision: str, tmp_path: Path) -> None:
    out = tmp_path / "package"
    export("--model", "PLM-1B", "--weights", "random", "--precision", precision, out=out)
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    with prt.load(out) as plm:
        result = plm.generate("What is this?", images=[image], max_tiles=0, max_new_tokens=4)
        assert result.timings.image_tiles == 1
        assert len(result.tokens) == 4 or result.finish_reason == "stop"
