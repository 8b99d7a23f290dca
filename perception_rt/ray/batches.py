"""Classes for `ray.data.Dataset.map_batches`, each of whose workers loads the package once."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from perception_rt.errors import InputError, describe
from perception_rt.ray.arguments import check_names, keywords
from perception_rt.records import check_choice
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request, RequestOptions

KINDS = ("image", "text", "video")
ERROR = "error"
_OnError = Callable[[int, InputError], None]


class _Batches:
    """Base of both classes: reads input columns and adds result columns."""

    def __init__(self, column: str, output: str, skip_errors: bool) -> None:
        self._from = column
        self._output = output
        self._skip_errors = skip_errors

    def _column(self, batch: dict[str, Any], name: str) -> list[Any]:
        if not isinstance(batch, dict):
            raise InputError(
                f'a batch must be a dict of arrays, not {describe(batch)}: batch_format="numpy"'
            )
        if name not in batch:
            raise InputError(f"the batch has no column {name!r:.80}; it has {', '.join(batch)}")
        return [_plain(value) for value in batch[name]]

    def _run(self, batch: dict[str, Any], run: Callable[[_OnError | None], Any]) -> dict[str, Any]:
        if self._output in batch:
            raise InputError(
                f"the batch has a column {self._output!r:.80} already: choose another by output"
            )
        if not self._skip_errors:
            try:
                return {**batch, self._output: run(None)}
            except InputError as error:
                raise InputError(
                    f"column {self._from!r:.80}: {error}; skip_errors keeps the job going"
                ) from None
        if ERROR in batch:
            raise InputError(
                f"the batch has a column {ERROR!r} already, and skip_errors adds it: rename it"
            )
        errors: dict[int, str] = {}

        def on_error(index: int, error: InputError) -> None:
            errors[index] = str(error)

        rows = run(on_error)
        reasons = np.array([errors.get(i, "") for i in range(len(rows))], object)
        return {**batch, self._output: rows, ERROR: reasons}


class Embed(_Batches):
    """Embeds a column of each batch, and adds the unit rows as another column.

    `dataset.map_batches(Embed, fn_constructor_args=("demo:pe", "path"))`

    Args:
        package: path or name of an encoder package, which every worker can read.
        column: column with images (paths, encoded bytes or uint8 (H, W, 3) arrays), texts, or
            videos (paths or bytes).
        kind: "image", "text" or "video".
        output: new column, float32 (N, D).
        num_frames: frames per video.
        skip_errors: whether an unusable item gets a zero row and its reason in the column "error",
            which is empty for the others, instead of ending the job.
        **load: arguments of `perception_rt.load`. `threads` is, by default, the number of CPUs that
            Ray gives to the worker.

    Raises:
        PerceptionError: an argument is unknown or unusable, or the package cannot be loaded.
    """

    def __init__(
        self,
        package: str,
        column: str,
        *,
        kind: str = "image",
        output: str = "embedding",
        num_frames: int = 8,
        skip_errors: bool = False,
        **load: Any,
    ) -> None:
        super().__init__(column, output, skip_errors)
        check_choice("kind", kind, KINDS)
        self._kind = kind
        self._num_frames = num_frames
        check_names("Embed", load, keywords(Embedder.load))
        load.setdefault("threads", _own_cpus())
        self._workers = load["threads"]
        self._engine = Embedder.load(package, **load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embeds a batch of NumPy columns.

        Raises:
            InputError: a column is missing or there already, or an item is unusable and
                `skip_errors` is false.
        """
        items = self._column(batch, self._from)
        return self._run(batch, lambda on_error: self._embed(items, on_error))

    def _embed(self, items: list[Any], on_error: _OnError | None) -> Any:
        if self._kind == "image":
            return self._engine.embed_images(items, workers=self._workers, on_error=on_error)
        if self._kind == "text":
            return self._engine.embed_texts(items, on_error=on_error)
        return self._engine.embed_videos(items, num_frames=self._num_frames, on_error=on_error)


class Answer(_Batches):
    """Answers a column of prompts, and adds the texts as another column.

    `dataset.map_batches(Answer, fn_constructor_args=("demo:plm",))`

    Args:
        package: path or name of a language model package, which every worker can read.
        column: column of prompts.
        images: column with an image, a list of images or None for each prompt; None for no images.
        output: new column.
        skip_errors: whether an unusable request gets an empty answer and its reason in the column
            "error", which is empty for the others, instead of ending the job.
        request: fields of `Request` for all prompts, such as `{"max_new_tokens": 64}`; neither
            `prompt` nor `images`.
        **load: as for `Embed`.

    Raises:
        PerceptionError: an argument is unknown or unusable, or the package cannot be loaded.
    """

    def __init__(
        self,
        package: str,
        column: str = "prompt",
        *,
        images: str | None = None,
        output: str = "answer",
        skip_errors: bool = False,
        request: dict[str, Any] | None = None,
        **load: Any,
    ) -> None:
        super().__init__(column, output, skip_errors)
        self._images = images
        self._more = {} if request is None else _request_fields(request)
        check_names("Answer", load, keywords(Generator.load))
        load.setdefault("threads", _own_cpus())
        self._engine = Generator.load(package, **load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers a batch of NumPy columns together.

        Raises:
            InputError: a column is missing or there already, or a request is unusable and
                `skip_errors` is false.
        """
        prompts = self._column(batch, self._from)
        if self._images is None:
            images = [()] * len(prompts)
        else:
            images = [_images(value) for value in self._column(batch, self._images)]
        requests = [
            Request(prompt=prompt, images=several, **self._more)
            for prompt, several in zip(prompts, images, strict=True)
        ]
        return self._run(batch, lambda on_error: self._answer(requests, on_error))

    def _answer(self, requests: list[Request], on_error: _OnError | None) -> Any:
        if on_error is None:
            found: list[Any] = list(self._engine.generate_batch(requests))
        else:
            found = list(self._engine.generate_batch(requests, on_error=on_error))
        return np.array(["" if result is None else result.text for result in found], object)


def _plain(value: Any) -> Any:
    """A cell as the engines take it: Ray's strings and bytes may be NumPy scalars."""
    return value.item() if isinstance(value, np.generic) else value


def _request_fields(fields: object) -> dict[str, Any]:
    """Fields of `Request` that all prompts share; their values are checked with the first batch."""
    if not isinstance(fields, Mapping):
        raise InputError(f"request must be a dict of fields of Request, not {describe(fields)}")
    check_names("request", fields, RequestOptions.__annotations__.keys() - {"images"})
    return dict(fields)


def _images(value: Any) -> tuple[Any, ...]:
    """Images of one cell."""
    if value is None:
        return ()
    several = isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and (value.ndim in (1, 4))
    )
    return tuple(_plain(image) for image in value) if several else (value,)


def _own_cpus() -> int | None:
    """CPUs that Ray gives to this worker, at least 1; None outside of a worker."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    resources = ray.get_runtime_context().get_assigned_resources()
    return max(1, int(resources.get("CPU", 1)))
