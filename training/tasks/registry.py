"""Maps a recipe to its task."""

from perception_rt.errors import InputError
from training.recipe.schema import (
    ContrastiveConfig,
    DistillationConfig,
    LanguageConfig,
    TrainConfig,
)
from training.tasks.contrastive import ContrastiveTask
from training.tasks.distillation import DistillationTask
from training.tasks.language import LanguageTask
from training.tasks.task import Task


def make_task(config: TrainConfig) -> Task:
    """Creates the task of a recipe; InputError if a file is missing or does not fit."""
    match config:
        case ContrastiveConfig():
            return ContrastiveTask(config)
        case DistillationConfig():
            return DistillationTask(config)
        case LanguageConfig():
            return LanguageTask(config)
    raise InputError("unknown task")
