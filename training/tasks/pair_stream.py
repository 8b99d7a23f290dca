"""Opens the stream of image-text pairs that an encoder's recipe describes."""

from perception_rt.config import PeConfig
from training.data.loader import LaneStream
from training.data.pair_batch import Pair, PairBatch, Sizes, collate_pairs
from training.data.pairs import PairSource
from training.demo.digit_source import DigitSource
from training.distributed import Group
from training.recipe.pairs import PairDataConfig
from training.recipe.schema import RunConfig


def pair_stream(
    data: PairDataConfig,
    model: PeConfig,
    run: RunConfig,
    *,
    sizes: Sizes,
    parts: int,
    group: Group,
) -> LaneStream[Pair, PairBatch]:
    """Opens this rank's share of the batches.

    Args:
        data: the recipe's section `data`.
        model: architecture that images and captions are prepared for.
        run: the recipe's section `run`; gives seed and number of reader threads.
        sizes: image sides in pixels by step.
        parts: parts per batch share, for gradient accumulation.
        group: this process's place among the ranks.

    Raises:
        InputError: a file is missing, or the batch size is not divisible by ranks times `parts`.
    """
    make = DigitSource if data.dataset == "digits" else PairSource
    return LaneStream(
        make(data, model, seed=run.seed, sizes=sizes),
        collate_pairs,
        lanes=data.batch_size,
        parts=parts,
        group=group,
        workers=run.workers,
        bad_fraction=data.bad_fraction,
    )
