"""A dataset of questions about synthetic scenes, named `scenes:SET` in a recipe."""

from training.data.media import MediaFolders
from training.demo.questions import Record, record

SCENES_PREFIX = "scenes:"


class SceneDataset:
    """Questions of one set, drawn when they are read.

    Args:
        name: name in the recipe.
        scenes: name of the set (`training/demo/questions.py`).
        seed: RNG seed.
        validation: draw from the validation digits instead of the others.

    Raises:
        InputError: the set is unknown.
    """

    folders = MediaFolders(())  # its images are arrays

    def __init__(self, name: str, scenes: str, seed: int, *, validation: bool) -> None:
        self.name = name
        self._scenes = scenes
        self._seed = seed
        self._validation = validation
        self.load(0)  # fails here if the set is unknown

    def load(self, rank: int) -> Record:
        """See `Dataset.load`."""
        return record(self._scenes, self._seed, rank, validation=self._validation)

    def where(self, rank: int) -> str:
        """See `Dataset.where`."""
        return f"{self.name} {rank}"
