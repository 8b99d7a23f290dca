"""`perception-rt match` and `perception-rt track`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perception_rt.cli import main
from perception_rt.demo import pictures_path
from perception_rt.processing.masks import read_mask

DIGITS = [str(pictures_path() / f"digit_{i}.png") for i in (1, 2)]


def test_match_and_track(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = tmp_path / "lines.png"
    same = [DIGITS[0], DIGITS[0]]
    assert main(["match", "demo:pe", *same, "--out", str(lines), "--lines", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["matches"], found["drawn"], lines.exists()) == (16, 5, True)
    assert all(pair["first"] == pair["second"] for pair in found["patches"])

    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        Image.open(DIGITS[0]).save(frames / f"{number}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, :16] = 3
    first, out = tmp_path / "first.png", tmp_path / "masks"
    Image.fromarray(mask).save(first)
    track = ["track", "demo:pe", str(frames), "--mask", str(first), "--out", str(out)]
    assert main([*track, "--top-k", "1"]) == 0
    names = ["00000.png", "00001.png", "00002.png", "overlay.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (read_mask(out / "00000.png") == mask).all()
    assert set(np.unique(read_mask(out / "00002.png"))) == {0, 3}
    assert main(track) == 2
    assert "exists; name a new or an empty folder" in capsys.readouterr().err
