"""A wrong recipe or override gives a one-line error; a right one has the stated effect."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from perception_rt.archs import PLM_MODELS
from perception_rt.errors import InputError
from training.recipe.pairs import DistillationLossConfig, PairDataConfig
from training.recipe.schema import (
    InitConfig,
    LanguageDataConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
)
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


def test_every_setting_is_documented_with_an_example_that_exists() -> None:
    sections = {
        "run": RunConfig, "optim": OptimConfig, "schedule": ScheduleConfig, "init": InitConfig,
        "parallel": ParallelConfig, "lora": LoraConfig, "loss": DistillationLossConfig,
    }  # fmt: skip
    text = (CONFIGS.parents[1] / "docs" / "training.md").read_text()
    examples = dict(re.findall(r"`((?:[a-z_]+\.)*[a-z0-9_]+)=([^`]+)`", text))
    keys = {f"{name}.{f.name}" for name, cls in sections.items() for f in fields(cls)}
    keys |= {f"data.{f.name}" for f in fields(PairDataConfig)}
    keys |= {f"data.{f.name}" for f in fields(LanguageDataConfig)} - {"data.datasets"}
    assert keys - set(examples) == {"optim.lr_scales"}  # whose keys are prefixes of names
    recipes = [CONFIGS / f"{name}.yaml" for name in ("plm_demo_lora", "pe_tiny", "pe_distill_tiny")]
    for key, value in examples.items():
        errors = []
        for recipe in recipes:
            try:
                load_config(recipe, [f"{key}={value}"])
            except InputError as error:
                errors.append(str(error))
        assert sum("unknown key" in error for error in errors) < len(recipes), (key, errors)


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
        ("model.vision.heads=three", "model: vision.heads must be int, not str"),
        ("model.vision.heads=[", "--set model.vision.heads is not a value: '['"),
        ("model.vision.depth=3", "model: vision: unknown keys ['depth']"),
        ("model.vision.heads=3", "model: vision.width 32 is not divisible by vision.heads 3"),
        ("model.vision.pool_type=max", "model: vision.pool_type must be one of"),
        ("data.dataset=cats", "data.dataset must be one of ['digits', "),
        ("optim.lr_scales.text.=fast", "optim.lr_scales"),
        ("task=sums", "task must be one of ['contrastive'"),
        ("run.peak_tflops=0", "run.peak_tflops must be positive, not 0.0"),
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
        ("optim: {lr_scales: {text.: fast}}", "optim.lr_scales.text. must be float, not str"),
        ("optim: {lr_scales: {text.: -1}}", "optim.lr_scales.text. must not be negative, not -1"),
        ("optim: {lr_scales: 1}", "optim.lr_scales must be a mapping"),
        ("task: sums", "task must be one of ['contrastive'"),
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


PLM = CONFIGS / "plm_8b_stage1.yaml"


def test_a_released_model_is_named_and_changed() -> None:
    """Values that a recipe does not name stay as in the released model."""
    released, config = PLM_MODELS["PLM-8B"], load_config(PLM)
    vision = replace(released.vision, ls_init_value=None, drop_path=0.0)
    assert config.model == replace(released, pooling_ratio=1, vision=vision)
    assert load_config(PLM, ["model.vision_model.layers=3"]).model.vision.layers == 3
    assert load_config(PLM.with_name("plm_8b_stage3.yaml")).model == released


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("plm_?b_stage?.yaml")), ids=lambda p: p.stem)
def test_stages_follow_one_another(recipe: Path) -> None:
    """Batch sizes and steps are the reference's; each stage starts from the previous one."""
    config, stage = load_config(recipe), int(recipe.stem[-1])
    assert (config.data.batch_size, config.schedule.steps, config.data.seq_len) == {
        1: (512, 8000, 1280),
        2: (2048, 35000, 6144),
        3: (1024, 21000, 11520),
    }[stage]
    if stage == 1:
        assert config.train == "projector"
        assert config.init.vision is not None
        assert config.init.decoder is not None
    else:
        before = load_config(recipe.with_stem(f"{recipe.stem[:-1]}{stage - 1}"))
        assert config.train == "all"
        assert config.init.checkpoint == before.run.out_dir


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=PE-Core-L14-336", "model.name PE-Core-L14-336 is of another family"),
        ("model.name=PLM-9B", "unknown model 'PLM-9B'"),
        ("model.vision_model.layers=0", "model: vision.layers must be at least 1, not 0"),
        ("data.seq_len=20000", "data.seq_len must be at most model.max_seqlen 11520, not 20000"),
        ("data.mode=mosaic", "data.mode must be one of"),
        ("init.checkpoint=a", "init.checkpoint is the whole model"),
        ("lora.rank=0", "lora.rank must be at least 1, not 0"),
        ("lora.rank=8", "lora trains its updates alone; train must not be 'projector'"),
        ("lora.targets=", "lora.targets must name at least one layer"),
        ("lora.dropout=0.1", "unknown key 'lora.dropout'"),
    ],
)
def test_a_wrong_setting_of_a_language_model_is_named(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(PLM, [override])
    assert message in str(caught.value)


def test_updates_are_not_split_over_ranks() -> None:
    with pytest.raises(InputError, match=r"lora needs parallel\.tensor 1, not 2"):
        load_config(PLM, ["train=all", "lora.rank=8", "parallel.tensor=2"])


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
