"""The benchmark of `embed_images` on photographs, with small ones, and the photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import embed_images
from benchmarks.photographs import write_photographs
from perception_rt.errors import BackendError
from perception_rt.runtime.embedder import Embedder


def test_whole_run(tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = f"--package {tiny_package} --count 5 --width 80 --height 60 --rounds 2 --out {out}"
    assert embed_images.main([*arguments.split(), "--workers=1", "--workers=3"]) == 0
    printed = capsys.readouterr()
    result = json.loads(out.read_text())
    one, three = result["rows"]
    assert (one["workers"], three["workers"], one["speed_up"]) == (1, 3, 1)
    for record in result["rows"]:
        assert len(record["seconds"]) == 2
        assert record["slowest"] <= record["images_per_s"] <= record["fastest"]
    assert result["bit_equal"] is True
    assert (result["photographs"]["count"], result["photographs"]["width"]) == (5, 80)
    assert "rows of all runs bit-equal: yes" in printed.out
    assert printed.out.count("\n| ") == 3
    runs = [line.partition(": ")[2] for line in printed.err.splitlines() if "round" in line]
    assert runs == ["workers=1", "workers=3", "workers=3", "workers=1"]


def test_rows_that_differ_by_a_bit_are_an_error(tiny_package: Path, tmp_path: Path) -> None:
    class Careless(Embedder):
        def embed_images(self, images: list[Path], **options: int) -> np.ndarray:
            rows = super().embed_images(images, **options)
            if options["workers"] > 1:
                rows[-1, -1] = np.nextafter(rows[-1, -1], np.float32(2))
            return rows

    photos = write_photographs(tmp_path, 2, 40, 30)
    with (
        Careless.load(tiny_package) as embedder,
        pytest.raises(BackendError, match="workers=2 differ"),
    ):
        embed_images.measure_workers(embedder, photos, [1, 2], 1)


def test_photographs_differ_and_depend_on_the_seed_only(tmp_path: Path) -> None:
    files = {}
    for name, count, seed in (("a", 4, 0), ("b", 2, 0), ("c", 2, 1)):
        (tmp_path / name).mkdir()
        paths = write_photographs(tmp_path / name, count, 60, 40, seed=seed)
        assert len(paths) == count
        files[name] = [path.read_bytes() for path in paths]
        with Image.open(paths[0]) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (60, 40), "RGB")
    assert len({*files["a"], *files["c"]}) == 6
    assert files["a"][:2] == files["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--count 0", "--count must be 1 to 100000, not 0"),
        ("--workers 65", "--workers must be 1 to 64, not 65"),
        ("--model PE-Core-X", "unknown model 'PE-Core-X'"),
        ("--out x.csv", "--out must be a .json file"),
    ],
)
def test_wrong_options_are_errors(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed_images.main(arguments.split()) > 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
