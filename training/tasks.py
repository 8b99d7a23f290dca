"""Which task a recipe means."""

from perception_rt.errors import InputError
from training.config import ContrastiveConfig, DistillationConfig, LanguageConfig, TrainConfig
from training.contrastive import ContrastiveTask
from training.distillation import DistillationTask
from training.language import LanguageTask
from training.task import Task


def make_task(config: TrainConfig) -> Task:
    """The task of a recipe; InputError if what it names does not exist or does not fit."""
    match config:
        case ContrastiveConfig():
            return ContrastiveTask(config)
        case DistillationConfig():
            return DistillationTask(config)
        case LanguageConfig():
            return LanguageTask(config)
    raise InputError("unknown task")
