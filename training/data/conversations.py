"""Turns conversations about images and videos into rows of packed samples.

The seed and a sample's number fix the sample: `Mix` maps the number to a dataset and a rank in it.
Lane l reads the samples p * lanes + l at its positions p = 0, 1, ... An unusable sample is counted
and skipped.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from perception_rt.errors import InputError, SampleError
from perception_rt.processing.llm_tokenizer import Tokenizer
from perception_rt.processing.llm_vocabulary import IMAGE
from perception_rt.processing.prompt import encode_transcript
from perception_rt.processing.tiles import TileSpec
from training.data.datasets import Dataset
from training.data.loader import Read
from training.data.media import MediaFolders
from training.data.mixture import Mix
from training.data.packing import IGNORED, Sample
from training.data.records import read_record
from training.data.unusable import Unusable, all_unusable
from training.recipe.schema import LanguageDataConfig

_MAX_BAD = 1000  # consecutive reads of unusable samples before the run stops
_MAX_HELD = 64  # encoded samples kept for the rows that begin with them


class ConversationSource:
    """Packs the samples of a mix of datasets into rows. Several threads may read it.

    Args:
        datasets: datasets in the order of the mix.
        mix: share of each dataset.
        config: the recipe's section `data`.
        tokenizer: the model's tokenizer.
        tiles: how images become tiles.
        tokens_per_tile: image tokens per tile.
        lanes: number of lanes that the samples are dealt out to.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        mix: Mix,
        config: LanguageDataConfig,
        tokenizer: Tokenizer,
        tiles: TileSpec,
        tokens_per_tile: int,
        *,
        lanes: int,
    ) -> None:
        self._datasets = datasets
        self._mix = mix
        self._config = config
        self._tokenizer = tokenizer
        self._tiles = tiles
        self._tokens_per_tile = tokens_per_tile
        self._image_token = tokenizer.control(IMAGE)
        self._lanes = lanes
        self._held: dict[int, Sample] = {}  # by sample number
        self._lock = Lock()

    def read(self, lane: int, position: int) -> Read[Sequence[Sample]]:
        """Reads as many samples of a lane as fit into a row.

        Raises:
            PerceptionError: too many consecutive samples are unusable.
        """
        row: list[Sample] = []
        bad: list[Unusable] = []
        room, first, failures = self._config.seq_len, position, 0
        while not row or self._config.packing:
            number = position * self._lanes + lane
            try:
                sample = self._take(number)
            except SampleError as error:
                bad.append(Unusable(self._name(number), str(error), error.detail))
                failures += 1
                if failures == _MAX_BAD:
                    raise all_unusable(bad[-failures:]) from None
            else:
                if len(sample.tokens) > room:
                    self._hold(number, sample)
                    break
                row.append(sample)
                room -= len(sample.tokens)
                failures = 0
            position += 1
        return Read(row=row, position=position, seen=position - first, bad=tuple(bad))

    def _take(self, number: int) -> Sample:
        with self._lock:
            held = self._held.pop(number, None)
        return self._make(number) if held is None else held

    def _hold(self, number: int, sample: Sample) -> None:
        """Keeps a sample that did not fit, so the lane's next row need not encode it again."""
        with self._lock:
            if len(self._held) >= _MAX_HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = sample

    def _name(self, number: int) -> str:
        """Place of a sample for reports."""
        chosen, rank = self._mix.pick(number)
        return self._datasets[chosen].where(rank)

    def _make(self, number: int) -> Sample:
        """Reads and encodes a sample; SampleError if it is unusable."""
        chosen, rank = self._mix.pick(number)
        dataset = self._datasets[chosen]
        return self._encode(dataset.load(rank), dataset.folders, dataset.where(rank))

    def _encode(self, record: Any, folders: MediaFolders, name: str) -> Sample:
        turns, tiles = read_record(record, folders, self._tiles)
        try:
            coded = encode_transcript(
                self._tokenizer, turns, self._tokens_per_tile, self._config.conversation
            )
        except InputError as error:
            raise SampleError("a text is unusable", str(error)) from None
        # A long conversation is cut after the last answer that fits; the first one must fit.
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
