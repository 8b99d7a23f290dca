"""Encoder of texts and images for mteb.

```
import mteb
from perception_rt.evaluation.harness.mteb import PerceptionRtEncoder

with PerceptionRtEncoder("PATH") as encoder:
    mteb.evaluate(encoder, mteb.get_tasks(tasks=["CIFAR10ZeroShot"]))
```
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from perception_rt.errors import InputError
from perception_rt.runtime.embedder import Embedder


class PerceptionRtEncoder(AbsEncoder):  # type: ignore[misc]
    """An encoder package as a model of mteb.

    Args:
        package: as for `perception_rt.load`.
        device: as for `perception_rt.load`; None for "cpu".
        **options: other options of `Embedder.load`.

    Raises:
        PackageError, BackendError, InputError: as for `perception_rt.load`.
    """

    def __init__(self, package: str, *, device: str | None = None, **options: Any) -> None:
        self._embedder = Embedder.load(package, device=device or "cpu", **options)
        self.mteb_model_meta = _describe(self._embedder)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> torch.Tensor:
        """Embeds texts, images, or pairs of both, whose vectors are added.

        Args:
            inputs: batches with `text`, `image` or both.
            **_: what mteb tells about the task, which has no prompts here.

        Returns:
            float32 (N, D), rows of length 1; of pairs, sums of two such rows.

        Raises:
            InputError: a batch has neither texts nor images, or an item is unusable.
            BackendError: the engine failed.
        """
        rows = [self._rows(batch) for batch in inputs]
        empty = np.zeros((0, self._embedder.dim), np.float32)
        return torch.from_numpy(np.concatenate([empty, *rows]))

    def close(self) -> None:
        """Frees the engines."""
        self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, batch: Mapping[str, Any]) -> Any:
        parts = []
        if "text" in batch:
            parts.append(self._embedder.embed_texts(list(batch["text"])))
        if "image" in batch:
            parts.append(self._embedder.embed_images(list(batch["image"])))
        if not parts:
            raise InputError(
                f"a batch must have text or image, not {', '.join(batch) or 'nothing'}"
            )
        return sum(parts)


def _describe(embedder: Embedder) -> ModelMeta:
    """The package as mteb's results record it; facts that a package does not have are None."""
    content = embedder.manifest.content
    return ModelMeta(
        loader=PerceptionRtEncoder,
        name=f"perception_rt/{content.name}-{content.target.precision}",
        revision=embedder.manifest.id,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None if content.text is None else content.text["context_length"],
        embed_dim=embedder.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["ONNX"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image"] if content.text is None else ["image", "text"],
    )
