"""Work that every rank would otherwise repeat; the server that ranks fork from imports this.

Everything here runs on one thread (OMP_NUM_THREADS=1): a fork would miss the threads of a pool.
"""

import tempfile
from pathlib import Path

import pytest  # noqa: F401 - a fork imports the main module of its test session

from training.distributed import process_group
from training.recipe.schema import load_config
from training.tasks.registry import make_task
from training.trainer import Trainer

TINY = Path(__file__).parents[2] / "training" / "configs" / "pe_tiny.yaml"


def train_one_step(mode: str) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as group:
        settings = [f"run.out_dir={folder}/run", f"parallel.mode={mode}", "data.batch_size=2"]
        config = load_config(TINY, settings)
        trainer = Trainer(config, make_task(config), group)
        trainer.step(trainer.stream.next())
        trainer.stream.close()
        trainer.checkpoints.close()


for mode in ("replicate", "shard"):
    train_one_step(mode)
