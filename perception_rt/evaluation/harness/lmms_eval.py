"""Model `perception_rt` of lmms-eval, which runs a language model package.

```
lmms-eval --model perception_rt --model_args package=PATH --tasks mme --batch_size 8
```

It is one of lmms-eval's "simple" models: only these get tasks that compare log-likelihoods.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from perception_rt.bulk.sources import kind_of
from perception_rt.errors import InputError, describe
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request

_AUTO_BATCH = 8
CHUNK = 64  # requests whose images are held at a time
_MARKS = {"images": "<image>", "videos": "<video>"}
_SAMPLING = ("temperature", "top_p", "top_k")

_log = logging.getLogger(__name__)


class PerceptionRt(lmms):  # type: ignore[misc]
    """A language model package as a model of lmms-eval.

    Args:
        package: as for `perception_rt.load`.
        device: as for `perception_rt.load`.
        backend: as for `perception_rt.load`.
        threads: as for `perception_rt.load`.
        batch_size: requests decoded together, or "auto".
        max_batch_size: the most of these with "auto"; None for 8.
        max_tiles: tiles per image, at most the model's own limit; None for that limit.
        num_frames: frames per video, at most the model's own limit; None for that limit.
        seed: RNG seed of tasks that sample.
        strip_period: remove one full stop at the end of an answer, as lmms-eval's own model `plm`.

    Raises:
        PackageError, BackendError, InputError: as for `perception_rt.load`.
    """

    def __init__(
        self,
        package: str,
        *,
        device: str = "cpu",
        backend: str = "auto",
        threads: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        strip_period: bool = False,
    ) -> None:
        super().__init__()
        self._generator = Generator.load(
            package,
            device=device,
            backend=backend,
            threads=threads,
            max_batch=batch_limit(batch_size, max_batch_size),
        )
        self._media_options = {"max_tiles": max_tiles, "num_frames": num_frames}
        self._seed = seed
        self._strip_period = strip_period
        self._ignored = set[str]()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers of the model, in the order of the requests.

        Of a task's generation options, the sampling, the length and the stop strings are used.
        Others, made for other models, are named in a warning.

        Raises:
            InputError: an option needs another kind of search, or an input is unusable.
            BackendError: the engine failed.
        """
        answers = list[str]()
        with tqdm(total=len(requests), desc="Answers", disable=self.rank != 0) as bar:
            for start in range(0, len(requests), CHUNK):
                part = [instance.args for instance in requests[start : start + CHUNK]]
                asked = [self._request(start + i, *each) for i, each in enumerate(part)]
                results = self._generator.generate_batch(asked)
                for (context, options, *_), result in zip(part, results, strict=True):
                    answer = result.text
                    if self._strip_period:
                        answer = answer.removesuffix(".")
                    self.cache_hook.add_partial("generate_until", (context, options), answer)
                    answers.append(answer)
                bar.update(len(part))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Likelihood of given answers, and whether greedy decoding would give them.

        Space before an answer is removed: it separates the answer from a text that it continues,
        and a conversation has none.

        Returns:
            Pairs of both, each wrapped, because lmms-eval 0.7.3 makes texts of bare pairs. The
            likelihood of a choice is its negative log-probability: lmms-eval takes the choice with
            the lowest value. That of an expected answer is the log-probability, of which lmms-eval
            computes a perplexity.

        Raises:
            InputError: an input is unusable.
            BackendError: the engine failed.
        """
        found = list[GenerationResult]()
        question: object = None
        greedy: tuple[int, ...] = ()  # the choices of a document share its greedy answer
        for instance in tqdm(requests, desc="Likelihoods", disable=self.rank != 0):
            context, target, *where = instance.args
            is_choice = isinstance(target, str)
            answer = (target if is_choice else target(self._document(*where[1:]))).lstrip()
            options = self._question(context, *where)
            score = self._generator.score(answer=answer, **options)
            length = len(score.tokens)
            if question != (context, where[1:]) or len(greedy) < length:
                question = (context, where[1:])
                greedy = self._generator.generate(max_new_tokens=length, **options).tokens
            value = -score.total if is_choice else score.total
            found.append(GenerationResult((value, greedy[:length] == score.tokens)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported.

        Raises:
            InputError: always.
        """
        raise InputError("perception_rt does not run tasks of several rounds (multi_round)")

    def clean(self) -> None:
        """Frees the engines; lmms-eval calls it after its last request."""
        self._generator.close()
        super().clean()

    def _request(
        self, number: int, context: str, options: Mapping[str, Any], *where: Any
    ) -> Request:
        known = generation_options(options)
        ignored = set(options) - {*_SAMPLING, "do_sample", "max_new_tokens", "until", "num_beams"}
        if ignored - self._ignored:
            _log.warning("generation options without effect: %s", ", ".join(sorted(ignored)))
            self._ignored |= ignored
        return Request(seed=self._seed + number, **known, **self._question(context, *where))

    def _question(self, context: str, *where: Any) -> dict[str, Any]:
        """Prompt, images and videos as fields of a `Request`.

        Args:
            context: the prompt.
            *where: lmms-eval's `doc_to_visual`, number, task and split of the document; none for a
                prompt without images.
        """
        visuals = where[0](self._document(*where[1:])) if where else None
        media = sort_media(visuals)
        # Marks of another meaning, or too few of them, are text.
        placed = all(
            context.count(_MARKS[kind]) in (0, len(items)) for kind, items in media.items()
        )
        return {"prompt": context, **media, **self._media_options, "literal": not placed}

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Request` for the generation options of a task.

    Raises:
        InputError: the options ask for a beam search, or stop at something else than strings.
    """
    beams = options.get("num_beams") or 1
    if beams != 1:
        raise InputError(f"num_beams is {beams!r:.20}, but there is no beam search: set it to 1")
    until = options.get("until") or ()
    stop = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(text, str) for text in stop):
        raise InputError(f"until must be a string or a list of strings, not {describe(until)}")
    found: dict[str, Any] = {"stop": [text for text in stop if text]}
    if options.get("max_new_tokens") is not None:
        found["max_new_tokens"] = options["max_new_tokens"]
    if options.get("do_sample", True):
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        # As in transformers, sampling that is asked for by name has a temperature.
        default = 1.0 if options.get("do_sample") else 0.0
        found.update({"temperature": default, **given})
    return found


def sort_media(visuals: Any) -> dict[str, list[Any]]:
    """Images and videos among what a task's `doc_to_visual` returned.

    Args:
        visuals: None, or nested lists of Pillow images, paths of images and videos, and uint8
            arrays (H, W, 3) or (T, H, W, 3).

    Raises:
        InputError: an item is something else, such as sound.
    """
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    for item in _flat([visuals]):
        media[f"{_kind(item)}s"].append(item)
    return media


def _flat(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        elif item is not None:
            yield item


def _kind(item: Any) -> str:
    if isinstance(item, Image.Image):
        return "image"
    if isinstance(item, np.ndarray) and item.ndim in (3, 4):
        return "image" if item.ndim == 3 else "video"
    kind = kind_of(item) if isinstance(item, str) else None
    if kind is None:
        shown = repr(item)[:100] if isinstance(item, str) else describe(item)
        raise InputError(f"a document has something that is no image or video: {shown}")
    return kind


def batch_limit(size: int | str, most: int | None) -> int:
    """Requests decoded together for lmms-eval's options `batch_size` and `max_batch_size`.

    Raises:
        InputError: the size is neither a number nor "auto".
    """
    if size == "auto":
        return most or _AUTO_BATCH
    try:
        return int(size)
    except ValueError:
        raise InputError(f"batch_size must be a number or auto, not {size!r:.40}") from None
