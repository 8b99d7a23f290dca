"""Conversations about images and videos to rows of packed samples.

Sample n of a run is fixed by n and the seed: `Mix` says which dataset and which line. Lane l reads
the samples p * lanes + l at its positions p = 0, 1, ... A sample that cannot be used is counted and
left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from perception_rt.errors import InputError, PerceptionError
from perception_rt.processing.llm_tokenizer import Tokenizer
from perception_rt.processing.llm_vocabulary import IMAGE
from perception_rt.processing.prompt import encode_transcript
from perception_rt.processing.tiles import TileSpec
from training.data.jsonl import JsonLines
from training.data.loader import Read
from training.data.mixture import Mix, parse_mix, shuffled
from training.data.packing import IGNORED, LanguageBatch, Sample, collate
from training.data.records import SampleError, read_record
from training.recipe.schema import DatasetConfig, LanguageDataConfig

_SCENES = "scenes:"
_MOST_BAD = 1000  # samples one after the other, without a usable one
_MOST_HELD = 64  # samples that began a row and will be asked for again


class ConversationSource:
    """The samples of a mix of datasets, packed into rows. Called by several threads.

    The kept samples of `validation` are one lane, whatever the batch.
    """

    def __init__(
        self,
        config: LanguageDataConfig,
        tokenizer: Tokenizer,
        tiles: TileSpec,
        tokens_per_tile: int,
        *,
        seed: int,
        validation: bool = False,
    ) -> None:
        """Opens the datasets that are in the mix.

        Args:
            config: which they are.
            tokenizer: the model's.
            tiles: how images become tiles.
            tokens_per_tile: image tokens of one tile.
            seed: of the order of samples, and of synthetic ones.
            validation: the samples that are kept for evaluation, instead of the others.

        Raises:
            InputError: a dataset is missing or empty, or the mix is wrong.
        """
        shares = parse_mix(config.mix, config.datasets)
        self._datasets = [
            _open(name, config.datasets[name], seed, config.validation, validation)
            for name in shares
        ]
        self._mix = Mix(list(shares.values()), seed)
        self._config = config
        self._tokenizer = tokenizer
        self._tiles = tiles
        self._tokens_per_tile = tokens_per_tile
        self._image_token = tokenizer.control(IMAGE)
        self._lanes = 1 if validation else config.batch_size
        self._held: dict[int, Sample] = {}
        self._lock = Lock()
        self._examples: dict[str, str] = {}  # of reasons: where each was met first

    def read(self, lane: int, position: int) -> Read[Sequence[Sample]]:
        """As many samples of a lane as fit into a row.

        Raises:
            PerceptionError: one after the other, too many samples cannot be used.
        """
        row: list[Sample] = []
        bad: Counter[str] = Counter()
        room, first, failures = self._config.seq_len, position, 0
        while not row or self._config.packing:
            number = position * self._lanes + lane
            try:
                sample = self._take(number)
            except SampleError as error:
                bad[str(error)] += 1
                failures += 1
                if failures == _MOST_BAD:
                    raise PerceptionError(
                        f"{failures} samples in a row are unusable: {error}"
                    ) from None
            else:
                if len(sample.tokens) > room:
                    self._hold(number, sample)
                    break
                row.append(sample)
                room -= len(sample.tokens)
                failures = 0
            position += 1
        return Read(row=row, position=position, seen=position - first, bad=bad)

    def _take(self, number: int) -> Sample:
        with self._lock:
            held = self._held.pop(number, None)
        return self._make(number) if held is None else held

    def _hold(self, number: int, sample: Sample) -> None:
        """The next row of this lane begins with it, and it costs much to make."""
        with self._lock:
            if len(self._held) >= _MOST_HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = sample

    def _make(self, number: int) -> Sample:
        """Sample `number`; SampleError, with the dataset and an example, if it cannot be used."""
        chosen, rank = self._mix.pick(number)
        dataset = self._datasets[chosen]
        try:
            return self._encode(dataset.load(rank), dataset.root, dataset.where(rank))
        except SampleError as error:
            reason = f"{dataset.name}: {error}"
            detail = f": {error.detail}" if error.detail else ""
            example = self._examples.setdefault(reason, f"{dataset.where(rank)}{detail}")
            raise SampleError(f"{reason} (first {example})") from None

    def _encode(self, record: Any, root: Path, name: str) -> Sample:
        turns, tiles = read_record(record, root, self._tiles)
        try:
            coded = encode_transcript(
                self._tokenizer, turns, self._tokens_per_tile, self._config.conversation
            )
        except InputError as error:
            raise SampleError("a text is unusable", str(error)) from None
        # What does not fit is cut after an answer. A conversation's first exchange is needed.
        fitting = [end for end in coded.ends if end <= self._config.seq_len]
        if not fitting:
            raise SampleError(
                "over-long", f"{coded.ends[0]} tokens; data.seq_len is {self._config.seq_len}"
            )
        tokens = coded.ids[: fitting[-1]]
        image = np.count_nonzero(tokens == self._image_token)
        return Sample(
            tokens=tokens,
            labels=np.where(coded.learned[: fitting[-1]], tokens, IGNORED),
            tiles=tiles[: image // self._tokens_per_tile],
            name=name,
        )


def collator(length: int) -> Callable[[Sequence[Sequence[Sample]]], LanguageBatch]:
    """Rows to a batch of sequences of `length` tokens."""
    return lambda rows: collate(rows, length)


class _Dataset(Protocol):
    """Records by rank, without end.

    Attributes:
        name: of the dataset.
        root: the folder that its paths start from.
    """

    name: str
    root: Path

    def load(self, rank: int) -> Any:
        """The record; SampleError if there is none."""

    def where(self, rank: int) -> str:
        """Its place, for whoever must find it."""


class _Lines:
    """A jsonl dataset, shuffled anew each time it begins again."""

    def __init__(
        self, name: str, config: DatasetConfig, seed: int, kept: int, *, validation: bool
    ) -> None:
        self.name = name
        self.root = Path(config.root)
        self._lines = JsonLines(Path(config.annotation), name)
        self._first = len(self._lines) - kept if validation else 0
        self._size = kept if validation else len(self._lines) - kept
        self._seed = seed
        if len(self._lines) <= kept:
            raise InputError(
                f"dataset {name!r:.60} has {len(self._lines)} lines; data.validation keeps "
                f"{kept} of them from training"
            )

    def load(self, rank: int) -> Any:
        try:
            return self._lines.load(self._number(rank))
        except InputError as error:
            raise SampleError("a line cannot be read", str(error)) from None

    def where(self, rank: int) -> str:
        return self._lines.where(self._number(rank))

    def _number(self, rank: int) -> int:
        epoch, index = divmod(rank, self._size)
        return self._first + shuffled(index, self._size, f"{self._seed} {epoch} {self.name}")


class _Scenes:
    """Synthetic scenes."""

    root = Path()

    def __init__(self, name: str, scenes: str, seed: int, *, validation: bool) -> None:
        # Here, because they need scikit-learn, and jsonl datasets do not.
        from training.demo import questions

        self.name = name
        self._record = lambda rank: questions.record(scenes, seed, rank, validation=validation)
        self._record(0)  # InputError, if there are none of that name

    def load(self, rank: int) -> Any:
        return self._record(rank)

    def where(self, rank: int) -> str:
        return f"{self.name} {rank}"


def _open(name: str, config: DatasetConfig, seed: int, kept: int, validation: bool) -> _Dataset:
    if config.annotation.startswith(_SCENES):
        scenes = config.annotation.removeprefix(_SCENES)
        return _Scenes(name, scenes, seed, validation=validation)
    return _Lines(name, config, seed, kept, validation=validation)
