"""A resumed run ends with the same bits as an uninterrupted one."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jobs
import pytest
import torch
from jobs import (
    EXACT,
    RESUME,
    SAVE,
    STEPS,
    Faults,
    checkpoints,
    finish,
    names,
    run_here,
    start,
    steps,
)
from safetensors.torch import load_file

from perception_rt.errors import CheckpointError
from training.checkpoint import files
from training.checkpoint.files import names_of
from training.recipe.schema import TrainConfig
from training.signals import stop_requests
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]

Tiny = Callable[..., TrainConfig]


def assert_same(found: Path, expected: Path) -> None:
    """Losses, norms, rates, sample names and weights are equal to the bit."""
    assert steps(found) == steps(expected)
    assert names(found) == names(expected)
    assert all(len(sequences) == 1 for sequences in names(found).values())
    weights = load_file(expected / "model.safetensors")
    again = load_file(found / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def assert_close(found: Path, expected: Path) -> None:
    """Losses, norms and rates of all steps agree within 1e-5."""
    both = steps(found), steps(expected)
    assert both[0].keys() == both[1].keys()
    for step, values in both[0].items():
        assert values == pytest.approx(both[1][step], rel=1e-5), step


# TRN-01


def test_trn_01_killed_at_five_points_a_run_ends_with_the_same_bits(
    tmp_path: Path, whole: Path
) -> None:
    out_dir = tmp_path / "run"
    kills = [("step", 2), ("shard", 3), ("saved", 5), ("rename", 6), ("last", 9)]
    # A checkpoint is complete as soon as its folder has its final name.
    newest: list[list[str]] = []
    for moment, step in kills:
        fault = Faults(kill_step=step, kill_at=moment)
        assert start(out_dir, SAVE, RESUME, faults=[fault]).wait() == [-signal.SIGKILL]
        newest.append(names_of(out_dir / "checkpoints")[:1])
    assert newest == [[], [], ["step_0000000003"], ["step_0000000003"], ["step_0000000009"]]
    finish(out_dir, SAVE, RESUME)
    assert_same(out_dir, whole)
    assert sorted(path.name for path in (out_dir / "checkpoints").iterdir()) == [
        "LAST", "step_0000000009", "step_0000000012",
    ]  # fmt: skip
    assert (out_dir / "checkpoints" / "LAST").read_text() == "step_0000000012\n"


def test_trn_01_a_language_model_in_stage_one_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    recipe = jobs.CONFIGS / "plm_demo_stage1.yaml"
    settings = (
        "schedule.steps=3", "schedule.warmup=2", "data.batch_size=2", "optim.accumulation=2",
        "data.validation=2", "run.log_every=1", "run.eval_every=0", "run.threads=1",
        "run.save_every=1", "run.resume=true",
    )  # fmt: skip
    whole, out_dir = tmp_path / "whole", tmp_path / "run"
    finish(whole, *settings, recipe=recipe)
    job = start(out_dir, *settings, recipe=recipe, faults=[Faults(kill_step=2, kill_at="saved")])
    assert job.wait() == [-signal.SIGKILL]
    assert names_of(out_dir / "checkpoints") == ["step_0000000001"]
    finish(out_dir, *settings, recipe=recipe)
    assert_same(out_dir, whole)


@pytest.mark.slow
def test_trn_01_killed_at_twenty_random_points(tmp_path: Path, whole: Path) -> None:
    out_dir = tmp_path / "run"
    rng = random.Random(11)
    killed = 0
    while killed < 20:
        job = start(out_dir, "run.save_every=1", RESUME, faults=[Faults(pause=0.02)])
        log = out_dir / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        while not log.exists() or log.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        job.ranks[0].kill()
        (status,) = job.wait()
        if status == 0:  # the run ended before the kill
            assert_same(out_dir, whole)
            out_dir = tmp_path / f"run_{killed}"
            continue
        assert status == -signal.SIGKILL
        killed += 1
    finish(out_dir, "run.save_every=1", RESUME)
    assert_same(out_dir, whole)


def test_a_save_leaves_the_training_thread_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_step_done = threading.Event()
    threads = []

    def entry_of(path: Path) -> files.FileEntry:
        threads.append(threading.current_thread())
        assert next_step_done.wait(30)
        return original(path)

    original = files.entry_of
    monkeypatch.setattr(files, "entry_of", entry_of)
    config = tiny("schedule.steps=4", "run.save_every=3")
    step = Trainer.step

    def watched(self: Trainer, parts: list[object]) -> object:
        result = step(self, parts)  # type: ignore[arg-type]
        if self.done == 4:
            next_step_done.set()
        return result

    monkeypatch.setattr(Trainer, "step", watched)
    run_here(config)
    assert threading.main_thread() not in threads
    assert names_of(checkpoints(config)) == ["step_0000000004", "step_0000000003"]
    # The checkpoint holds the state of its own step, not of a later one.
    other = tiny("schedule.steps=4", "run.save_every=3", f"run.out_dir={config.run.out_dir}_b")
    run_here(other)
    for folder in names_of(checkpoints(config)):
        (first,) = (checkpoints(config) / folder).glob("*.safetensors")
        (second,) = (checkpoints(other) / folder).glob("*.safetensors")
        saved, again = load_file(first), load_file(second)
        assert all(torch.equal(saved[name], again[name]) for name in saved)


# TRN-02


def test_trn_02_one_of_two_ranks_killed_ends_the_job_and_it_resumes_identical(
    tmp_path: Path,
) -> None:
    out_dir, expected = tmp_path / "run", tmp_path / "expected"
    finish(expected, ranks=2)
    kill = tmp_path / "kill.py"
    # Rank 1 kills itself in step 5.
    kill.write_text(
        "import os, sys; import jobs; from training.train import main\n"
        "rank = int(os.environ['RANK'])\n"
        "jobs.watch_steps(jobs.Faults(kill_step=5 if rank else 0), rank)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    settings = [f"run.out_dir={out_dir}", SAVE, jobs.SHORT]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(kill), str(jobs.TINY), *(part for each in settings for part in ("--set", each)),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(Path(jobs.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while 4 not in (steps(out_dir) if (out_dir / "metrics.jsonl").exists() else {}):
            assert process.poll() is None
            time.sleep(0.05)
        assert process.wait(timeout=30) != 0
    finish(out_dir, SAVE, RESUME, ranks=2)
    assert_same(out_dir, expected)


@pytest.mark.parametrize(
    ("first", "second", "mode"), [(2, 1, "replicate"), (2, 1, "shard"), (1, 2, "shard")]
)
def test_trn_02_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, exact: Path, first: int, second: int, mode: str
) -> None:
    out_dir = tmp_path / "run"
    settings = (*EXACT, f"parallel.mode={mode}")
    # The signal reaches one rank only; all ranks stop after the same step.
    faults = [Faults()] * (first - 1) + [Faults(signal_step=3)]
    finish(out_dir, *settings, ranks=first, faults=faults)
    assert names_of(out_dir / "checkpoints") == ["step_0000000003"]
    finish(out_dir, *settings, RESUME, ranks=second)
    assert_close(out_dir, exact)


# TRN-04


def test_trn_04_a_signal_saves_and_a_second_one_ends_at_once(tmp_path: Path, whole: Path) -> None:
    out_dir = tmp_path / "run"
    job = start(out_dir, faults=[Faults(pause=0.1)])
    wait_for_step(out_dir, 3)
    began = time.monotonic()
    job.ranks[0].terminate()
    assert job.wait(10) == [0]
    assert time.monotonic() - began < 10
    done = max(steps(out_dir))
    assert names_of(out_dir / "checkpoints") == [files.step_name(done)]
    assert 3 <= done < STEPS
    assert not (out_dir / "model.safetensors").exists()
    job = start(out_dir, RESUME, faults=[Faults(pause=5)])
    wait_for_record(out_dir, "start", done)
    time.sleep(0.2)
    os.kill(job.ranks[0].pid or 0, signal.SIGUSR1)
    time.sleep(0.3)
    assert job.ranks[0].is_alive()
    began = time.monotonic()
    os.kill(job.ranks[0].pid or 0, signal.SIGUSR1)
    assert job.wait(3) == [-signal.SIGUSR1]
    assert time.monotonic() - began < 2
    finish(out_dir, RESUME)
    assert_same(out_dir, whole)


def wait_for_step(out_dir: Path, step: int) -> None:
    wait_for_record(out_dir, "train", step)


def wait_for_record(out_dir: Path, kind: str, step: int) -> None:
    log = out_dir / "metrics.jsonl"
    end = time.monotonic() + 30
    line = f'"kind": "{kind}", "step": {step},'
    while not log.exists() or line not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_signal_handlers_are_put_back_and_threads_need_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert signal.getsignal(signal.SIGTERM) is not before
        assert not request
        signal.raise_signal(signal.SIGUSR1)
        assert request
        assert request.name == "SIGUSR1"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
    found = []

    def inside() -> None:
        with stop_requests() as request:
            found.append(bool(request))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]


STOP_IN_A_CALL = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from training.signals import stop_requests
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with stop_requests():
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and no handler of Python is called
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_a_call_of_native_code(second: signal.Signals) -> None:
    """Such as a backward pass, after which Python would call its handlers."""
    command = [sys.executable, "-c", STOP_IN_A_CALL, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        child.terminate()
        time.sleep(0.2)
        assert child.poll() is None
        # A busy system may not have delivered the first one yet, and merges equal signals.
        limit = time.monotonic() + 10
        while child.poll() is None and time.monotonic() < limit:
            child.send_signal(second)
            time.sleep(0.2)
        child.kill()
        assert child.wait() in (128 + signal.SIGTERM, 128 + second)


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_of_stop_requests_leaves_nothing(fails: bool) -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, running = held(), threading.enumerate()
    for _ in range(3):
        with suppress(ZeroDivisionError), stop_requests():
            assert held() > before
            1 / (0 if fails else 1)
    assert held() == before
    assert set(threading.enumerate()) <= set(running)  # those of earlier tests may end meanwhile
    assert signal.set_wakeup_fd(-1) == -1


# TRN-05


def test_trn_05_a_file_that_cannot_be_written_keeps_the_last_good_checkpoint(
    tmp_path: Path, whole: Path
) -> None:
    out_dir = tmp_path / "run"
    job = start(out_dir, SAVE, faults=[Faults(limit_step=6)])
    assert job.wait() == [1]
    message = "error: checkpoint step_0000000006 was not saved: File too large, of 10.0 MB to write"
    assert job.stderr().startswith(message)
    assert "MB are free; the last one is step_0000000003\n" in job.stderr()
    assert job.stderr().count("\n") == 1
    assert sorted(path.name for path in (out_dir / "checkpoints").iterdir()) == [
        "LAST", "step_0000000003",
    ]  # fmt: skip
    finish(out_dir, SAVE, RESUME)
    assert_same(out_dir, whole)


def test_trn_05_a_full_disk_on_one_of_two_ranks_stops_both(tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    settings = ("run.save_every=1", "parallel.mode=shard")
    job = start(out_dir, *settings, ranks=2, faults=[Faults(), Faults(limit_step=2)])
    assert job.wait() == [1, 1]
    for rank in range(2):
        assert "error: checkpoint step_0000000002 was not saved" in job.stderr(rank)
    assert names_of(out_dir / "checkpoints") == ["step_0000000001"]


def test_trn_05_a_full_disk_at_the_manifest_is_one_clear_error(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.parent.name == ".step_0000000002.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, text)

    original = files.write_text
    monkeypatch.setattr(files, "write_text", full)
    config = tiny("schedule.steps=9", "run.save_every=1")
    with pytest.raises(CheckpointError) as caught:
        run_here(config)
    message = str(caught.value)
    assert message.startswith("checkpoint step_0000000002 was not saved: No space left on device")
    assert message.endswith("MB are free; the last one is step_0000000001")
    assert sorted(path.name for path in checkpoints(config).iterdir()) == [
        "LAST", "step_0000000001",
    ]  # fmt: skip


def test_trn_05_retention_never_removes_the_newest(tiny: Tiny) -> None:
    for keep, left in ((1, 1), (2, 2), (0, 3)):
        config = tiny(
            "schedule.steps=3", "run.save_every=1", f"run.keep={keep}", "run.out_dir="
            + str(Path(tiny().run.out_dir) / str(keep)),
        )  # fmt: skip
        run_here(config)
        found = names_of(checkpoints(config))
        assert len(found) == left
        assert found[0] == "step_0000000003"
        assert (checkpoints(config) / "LAST").read_text() == "step_0000000003\n"
