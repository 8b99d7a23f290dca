"""The command line of a run, and mistakes that are found before its ranks form a group."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch.distributed as dist
from jobs import TINY, finish, start

from perception_rt.errors import InputError
from training import train
from training.recipe.schema import TrainConfig
from training.train import main

ROOT = Path(__file__).parents[2]
PLAN = str(jobs.CONFIGS / "plm_1b_stage1.yaml")
Tiny = Callable[..., TrainConfig]


@pytest.mark.parametrize("name", ["file", "file/run", "a" * 300])
def test_an_output_folder_that_cannot_be_made_is_named_first(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "process_group", None)
    assert main([str(TINY), "--set", f"run.out_dir={tmp_path / name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run.out_dir '{tmp_path}")
    assert line.endswith("name another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["RECIPE", "--set", "run.seed=1", "optim.lr=0.5"],
        ["RECIPE", "--set", "run.seed=1", "--set", "optim.lr=0.5"],
        ["--set", "run.seed=1", "optim.lr=0.5", "RECIPE"],
        ["--set", "run.seed=1", "RECIPE", "--set", "optim.lr=0.5"],
        ["--set", "run.seed=1", "optim.lr=0.5", "--", "RECIPE"],
    ],
)
def test_one_option_sets_several_values(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Path, list[str]]] = []

    def load(recipe: Path, settings: list[str]) -> None:
        found.append((recipe, settings))
        raise InputError("enough")

    monkeypatch.setattr(train, "load_config", load)
    assert main([str(TINY) if part == "RECIPE" else part for part in arguments]) == 2
    assert found == [(TINY, ["run.seed=1", "optim.lr=0.5"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "a=1"], "required: recipe"),
        (["--set", "a=1", "x.yaml", "y.yaml"], "required: recipe"),
        ([str(TINY), "--set", "run.seed=1", "optim.lr"], "'optim.lr' must be key.path=value"),
        ([str(TINY), "--set"], "expected at least one argument"),
    ],
)
def test_other_command_lines_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_only_the_first_rank_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "report", lambda config, ranks: f"plan for {ranks}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([PLAN, "--plan", "--ranks", "16"]) == 0
        printed[rank] = capsys.readouterr().out
    assert printed == {"0": "plan for [16]\n", "1": ""}


MISTAKES = {
    "a wrong value": (("optim.lr=fast",), "error: --set optim.lr must be float, not 'fast'"),
    "ranks": (("data.batch_size=33",), "error: data.batch_size 33 is not divisible by 2 processes"),
    "groups": (
        ("parallel.mode=hybrid", "parallel.shard_ranks=3"),
        "error: parallel.shard_ranks 3 does not divide the 2 ranks",
    ),
    "data": (
        ("data.dataset=jsonl", "data.path=/none/x.jsonl"),
        "error: data.path: '/none/x.jsonl' is not a file",
    ),
    "names": (("optim.lr_scales.txt=1",), "error: optim.lr_scales: no trained parameter's name"),
}


def no_group(*arguments: object, **options: object) -> None:
    raise AssertionError("a process group was started")


def rank_main(arguments: list[str]) -> None:
    dist.init_process_group = no_group  # type: ignore[assignment]
    sys.exit(main(arguments))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_rank_reports_a_mistake_before_a_group_starts(mistake: str, tmp_path: Path) -> None:
    settings, message = MISTAKES[mistake]
    arguments = [str(TINY), "--set", f"run.out_dir={tmp_path / 'run'}", *settings]
    job = jobs.fork(rank_main, [(arguments,)] * 2, tmp_path / "job")
    assert job.wait(30) == [2, 2]
    lines = [line for rank in range(2) for line in job.stderr(rank).splitlines()]
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert not (tmp_path / "run").exists()


def other_main(arguments: list[list[str]], rank: int) -> None:
    rank_main(arguments[rank])


def test_a_mistake_of_one_rank_ends_all(tmp_path: Path) -> None:
    """For example a file that one machine lacks."""
    good = [str(TINY), "--set", f"run.out_dir={tmp_path / 'run'}"]
    each = [good, [str(tmp_path / "none.yaml")]]
    job = jobs.fork(other_main, [(each, 0), (each, 1)], tmp_path / "job")
    assert job.wait(30) == [2, 2]
    assert job.stderr(0) == ""
    assert job.stderr(1).startswith("error: recipe ")


def test_a_folder_that_does_not_fit_is_reported_once(tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    finish(out_dir, "schedule.steps=2")
    for settings, status, message in (
        ((), [2, 2], "holds a run; continue it with --set run.resume=true"),
        (("run.resume=true", "optim.lr=1"), [1, 1], "was saved with optim.lr = 0.003, not 1.0"),
    ):
        job = start(out_dir, "schedule.steps=2", *settings, ranks=2)
        assert job.wait(30) == status
        lines = [line for rank in range(2) for line in job.stderr(rank).splitlines()]
        assert len(lines) == 1
        assert message in lines[0]


@pytest.mark.slow
def test_torchrun_shows_a_mistake_and_a_plan_once(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "training/train.py", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, _ = run(PLAN, "--plan")
    assert status == 0
    assert out.count("weights (GiB)") == 1
    status, _, error = run(str(TINY), "--set", f"run.out_dir={tmp_path}", "optim.lr=fast")
    assert status == 1  # torchrun's own
    assert error.count("error: --set optim.lr must be float, not 'fast'") == 1
