"""Runs mteb on the held-out digits: `python examples/harness/digits_mteb.py [PACKAGE]`.

`examples/harness/write_data.py` writes the digits first.
"""

import sys
import tarfile
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict, Image
from mteb.abstasks import AbsTaskZeroShotClassification
from mteb.abstasks.task_metadata import TaskMetadata

from perception_rt.evaluation.harness.mteb import PerceptionRtEncoder

FOLDER = Path("out/harness/digits")


class Digits(AbsTaskZeroShotClassification):  # type: ignore[misc]
    """Zero-shot classification of the held-out digits by one sentence for each."""

    metadata = TaskMetadata(
        name="PerceptionRtDigits",
        description="Handwritten digits by writers that the demo was not trained on.",
        dataset={"path": "local", "revision": "1"},
        type="ZeroShotClassification",
        category="i2t",
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )

    def load_data(self, **_: Any) -> None:
        """Reads the tar that `write_data.py` wrote."""
        with tarfile.open(FOLDER / "test" / "0.tar") as tar:
            opened = {name: tar.extractfile(name) for name in tar.getnames()}
            members = {name: file.read() for name, file in opened.items() if file is not None}
        rows = {
            "image": [{"bytes": data} for name, data in members.items() if name.endswith(".png")],
            "label": [int(data) for name, data in members.items() if name.endswith(".cls")],
        }
        self.dataset = DatasetDict(test=Dataset.from_dict(rows).cast_column("image", Image()))
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        """The sentence of each class."""
        names = (FOLDER / "classnames.txt").read_text(encoding="utf-8").splitlines()
        return [f"a photo of the handwritten digit {name}" for name in names]


def main(package: str = "demo:pe") -> None:
    """Runs the task and prints its scores."""
    with PerceptionRtEncoder(package) as encoder:
        result = mteb.evaluate(encoder, Digits(), cache=None)
    scores = result.task_results[0].scores["test"][0]
    for name in ("accuracy", "f1", "precision", "recall"):
        print(f"{name:10} {scores[name]:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
