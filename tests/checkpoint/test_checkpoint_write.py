import stat

import pytest
import torch
from golden_weights import our_names, read_golden
from safetensors import SafetensorError
from safetensors.torch import load_file

from perception_rt.checkpoint import write
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.errors import CheckpointError


def test_writes_the_reference_keys(tmp_path):
    _, weights = read_golden("clip_core")
    path = tmp_path / "model.safetensors"
    parameters = {k: torch.nn.Parameter(v) for k, v in our_names(weights).items()}
    save_checkpoint(parameters, path)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["save_file", "_sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("x")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "model.safetensors"
    save_checkpoint({"visual.proj": torch.zeros(2, 3)}, path)
    before = path.read_bytes()

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(write, step, fail)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint({"visual.proj": torch.ones(2, 3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written(tmp_path):
    state = {"visual.proj": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match="its directory does not exist"):
        save_checkpoint(state, tmp_path / "none" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        save_checkpoint(state, tmp_path)
