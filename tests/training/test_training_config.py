"""A wrong recipe or override is named in one line; a right one means what it says."""

from pathlib import Path

import pytest

from perception_rt.errors import InputError
from training.config import load_config
from training.train import main

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TINY = CONFIGS / "pe_tiny.yaml"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(recipe: Path) -> None:
    assert load_config(recipe).schedule.steps >= 1


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(TINY, ["optim.lr=1e-4", "model.vision.width=48"])
    again = tmp_path / "resolved.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


def test_overrides_have_the_declared_type() -> None:
    config = load_config(
        TINY,
        [
            "optim.lr=1",
            "run.resume=true",
            "run.out_dir=7",
            "model.vision.width=48",
            "model.vision.pool_type=avg",
            "model.vision.ls_init_value=0.1",
        ],
    )
    assert type(config.optim.lr) is float
    assert config.run.resume is True
    assert config.run.out_dir == "7"
    assert config.model.vision.width == 48
    assert config.model.vision.ls_init_value == 0.1
    assert load_config(TINY, ["model.vision.ls_init_value=null"]).model == load_config(TINY).model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning=1", "unknown key 'optim.learning'"),
        ("optim.lr.x=1", "unknown key 'optim.lr.x'"),
        ("optimizer.lr=1", "unknown key 'optimizer'"),
        ("optim.lr=fast", "optim.lr must be float, not 'fast'"),
        ("optim.lr=nan", "optim.lr must be finite"),
        ("data.batch_size=1.5", "data.batch_size must be int, not '1.5'"),
        ("run.resume=yes", "run.resume must be true or false, not 'yes'"),
        ("model.vision.heads=three", "model.vision.heads must be int"),
        ("model.vision.heads=3", "model: vision.width 32 is not divisible by vision.heads 3"),
        ("model.vision.pool_type=max", "model: vision.pool_type must be one of"),
        ("data.dataset=cats", "data.dataset must be one of ['digits']"),
        ("optim=1", "optim is a section"),
        ("optim.lr", "must be key.path=value"),
        ("schedule.steps=0", "schedule.steps must be at least 1, not 0"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(TINY, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'"),
        ("optim: {lr: '1'}", "optim.lr must be float, not str"),
        ("optim: 3", "optim must be a mapping, not int"),
        ("data: {batch_size: true}", "data.batch_size must be int, not bool"),
        ("extra: 1", "unknown key 'extra'"),
        ("1: 2", "unknown key '1'"),
        ("model: {vision: {widht: 3}}", "model: vision: unknown keys ['widht']"),
        ("run: {}", "missing key 'run.out_dir'"),
    ],
)
def test_a_wrong_key_in_a_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    tiny = load_config(TINY).to_yaml()
    section = text.partition(":")[0]
    recipe = tmp_path / "recipe.yaml"
    kept, skipping = [], False
    for line in tiny.splitlines():
        skipping = line.startswith(f"{section}:") or (skipping and line.startswith(" "))
        kept += [] if skipping else [line]
    recipe.write_text("\n".join([*kept, text]))
    with pytest.raises(InputError) as caught:
        load_config(recipe)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML at line"),
        (b"\xff\xfe\xff", "is not"),
        (b"- 1", "must be a mapping, not list"),
        (b"", "must be a mapping, not NoneType"),
        (b"model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "recipe nowhere.yaml: No such file"),
        ([], "required: recipe"),
        ([str(TINY), "--set", "optim.lr=fast"], "optim.lr must be float"),
        ([str(TINY), "--sett", "a"], "--sett"),
        ([str(TINY), "--set", "data.batch_size=1"], "data.batch_size must be at least 2"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
