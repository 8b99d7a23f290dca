"""SEC-02: the wheel's content, and that it runs an engine where torch and onnx are not installed.

The source tree exports the engine. pip runs in processes of its own and may use the network.
"""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perception_rt.cli import export_main

ROOT = Path(__file__).parents[1]
DEMO = "perception_rt/demo/pe_demo.safetensors"
ABSENT = (
    "sentencepiece",
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "transformers",
    "training",
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> str:
    """Runs a command away from this tree and its settings; returns its standard output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ORT_"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    run(*PIP, "wheel", ROOT, "--no-deps", *isolation, "--wheel-dir", out, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the wheel and its requirements; returns the folder of the environment's commands."""
    directory = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory)
    run(
        *PIP,
        "--python",
        directory / "bin" / "python",
        "install",
        "--no-compile",
        wheel,
        cwd=directory,
    )
    return directory / "bin"


@pytest.fixture(scope="module")
def demo_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "PE-Demo"
    assert export_main(["--model", "PE-Demo", "--precision", "int8", "--out", str(out)]) == 0
    return out


def test_the_wheel_holds_the_library_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        requirements = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    needed = {
        "perception_rt/__init__.py",
        "perception_rt/py.typed",
        "perception_rt/processing/assets/bpe_simple_vocab_16e6.txt.gz",
        "perception_rt/evaluation/assets/imagenet.json",
        DEMO,
        DEMO.replace(".safetensors", ".json"),
        *(f"perception_rt/demo/packages/{name}/manifest.json" for name in ("pe", "plm")),
        "perception_rt/demo/pictures/pictures.json",
        *(f"perception_rt/serve/static/page.{kind}" for kind in ("html", "css", "js")),
    }
    assert needed - names == set()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "perception_rt").rglob("*.py")}
    assert modules - names == set()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"perception_rt"}
    licenses = sorted(n.partition("/licenses/")[2] for n in names if "/licenses/" in n)
    assert licenses == [
        "LICENSE",
        "perception_rt/evaluation/assets/LICENSE.open_clip.txt",
        "perception_rt/processing/assets/LICENSE.clip_bpe.txt",
    ]
    assert sorted(line.split()[1].partition(">")[0] for line in requirements) == [
        "ftfy",
        "numpy",
        "onnxruntime",
        "pillow",
        "regex",
    ]


def test_the_runtime_loads_what_it_requires_and_no_more(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, sys
import perception_rt.runtime.load
print(json.dumps([
    [name for name in {ABSENT} if importlib.util.find_spec(name)],
    sorted({{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names),
]))
"""
    here, loaded = json.loads(run(installed / "python", "-c", code, cwd=tmp_path))
    assert here == []
    expected = {"__main__", "perception_rt", "numpy", "PIL", "ftfy", "regex", "wcwidth"}
    assert set(loaded) <= expected  # onnxruntime only when an engine is opened


def test_an_engine_classifies_and_embeds_without_torch(
    installed: Path, demo_package: Path, tmp_path: Path
) -> None:
    from training.demo.digits import held_out_digits
    from training.demo.scenes import WORDS

    digits, labels = held_out_digits(32)
    names = [f"{i}.png" for i in range(20)]
    for name, pixels in zip(names, digits, strict=False):
        Image.fromarray(pixels).save(tmp_path / name)
    images = [part for name in names for part in ("--image", name)]

    command = [installed / "perception-rt", "classify", demo_package, "--json", *images]
    command += [part for word in WORDS for part in ("--label", word)]
    answer = json.loads(run(*command, "--template", "a handwritten {}", cwd=tmp_path))
    assert [item["image"] for item in answer] == names
    best = [max(item["probabilities"], key=item["probabilities"].get) for item in answer]
    assert sum(word == WORDS[label] for word, label in zip(best, labels, strict=False)) >= 18

    command = [installed / "perception-rt", "embed", demo_package, *images, "--text", "a seven"]
    run(*command, "--out", "rows.npy", cwd=tmp_path)
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (21, 64) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_a_language_model_answers_without_torch(installed: Path, tmp_path: Path) -> None:
    from golden_data import plm_golden

    from perception_rt.export.build import export_package
    from perception_rt.export.plan import PlmPlan
    from perception_rt.processing.llm_tokenizer import TokenizerSpec
    from perception_rt.processing.tiles import TileSpec

    data = plm_golden("plm_tied_ropescaled")
    plan = PlmPlan(
        name="tiny",
        config=data.config,
        backend="onnxruntime",
        precision="int4",
        tiles=TileSpec(tile_size=data.config.vision.image_size),
        tokenizer=(TokenizerSpec(kind="bytes", vocab_size=320, image_token_id=319), None),
    )
    export_package(plan, data, tmp_path / "plm")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    code = """
import json, sys
import perception_rt as prt
with prt.load("plm") as plm:
    pieces = list(plm.stream("What?", images=["red.png"], max_tiles=1, max_new_tokens=5))
    result = plm.generate("What?", images=["red.png"], max_tiles=1, max_new_tokens=5)
print(json.dumps([pieces, result.text, len(result.tokens), result.timings.cached_tokens]))
"""
    output = run(installed / "python", "-c", code, cwd=tmp_path)
    pieces, text, tokens, cached = json.loads(output)
    assert "".join(pieces) == text
    assert 1 <= tokens <= 5
    assert cached > 0


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 30_000_000


@pytest.mark.parametrize("links", [None, "hard", "symbolic"])
def test_the_demo_needs_the_base_dependencies_only(
    installed: Path, tmp_path: Path, links: str | None
) -> None:
    """Also where the installer linked the files; every time from an empty cache."""
    site = next((installed.parent / "lib").glob("python*/site-packages"))
    if links is not None:
        for file in (site / "perception_rt" / "demo" / "packages").rglob("*"):
            if file.is_file():
                store = tmp_path / f"{file.parent.name}-{file.name}"
                store.write_bytes(file.read_bytes())
                file.unlink()
                file.hardlink_to(store) if links == "hard" else file.symlink_to(store)
    cache = ["env", f"XDG_CACHE_HOME={tmp_path / 'cache'}"]
    output = run(*cache, installed / "perception-rt", "demo", "--json", cwd=tmp_path)
    result = json.loads(output)
    assert all(item["right"] for item in result["questions"])
    assert all((tmp_path / picture).is_file() for picture in result["pictures"])
    code = "import perception_rt as prt; print(prt.load('demo:pe'), prt.load('demo:plm'))"
    assert "PLM-Demo" in run(*cache, installed / "python", "-c", code, cwd=tmp_path)
