"""Packed samples have the same losses as alone."""

import dataclasses

import numpy as np
import pytest
import torch

from perception_rt.plm_config import PlmConfig
from perception_rt.processing.tiles import TileSpec
from training.data.packing import IGNORED, PADDING, Sample, collate
from training.recipe.schema import DatasetConfig, LanguageConfig, LanguageDataConfig, RunConfig
from training.tasks.language import LanguageLearner

IMAGE, VOCAB, PER_TILE, SIDE = 60, 64, 4, 8
MODEL = PlmConfig.from_dict(
    {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": VOCAB,
        "multiple_of": 32,
        "max_seqlen": 64,
        "image_token_id": IMAGE,
        "vision_model": {
            "image_size": SIDE,
            "patch_size": 4,
            "width": 16,
            "layers": 1,
            "heads": 2,
            "mlp_ratio": 2.0,
            "output_dim": None,
            "pool_type": "none",
        },
    }
)


@pytest.fixture(scope="module")
def learner():
    config = LanguageConfig(
        run=RunConfig(out_dir="unused", device="cpu"),
        model=MODEL,
        data=LanguageDataConfig(
            datasets={"a": DatasetConfig(annotation="a")}, mix="a:1", tokenizer="a", seq_len=64
        ),
    )
    torch.manual_seed(0)
    made = LanguageLearner(config, TileSpec(tile_size=SIDE))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def sample(seed, *, tiles, length):
    """Image tokens, then random tokens; the second half of these is learned."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([np.full(tiles * PER_TILE, IMAGE), rng.integers(1, 60, length)])
    learned = np.arange(len(tokens)) >= len(tokens) - length // 2
    return Sample(
        tokens=tokens,
        labels=np.where(learned, tokens, IGNORED),
        tiles=rng.integers(0, 256, (tiles, SIDE, SIDE, 3), dtype=np.uint8),
        name=f"{seed}",
    )


SAMPLES = [
    sample(1, tiles=1, length=9),
    sample(2, tiles=0, length=12),
    sample(3, tiles=2, length=5),
    sample(4, tiles=1, length=7),
]


@torch.no_grad()
def losses(learner, rows, length):
    return learner.token_losses(collate(rows, length))


def test_packed_samples_have_their_own_losses(learner):
    """Compares losses per token, with images, in one row and in two."""
    alone = torch.cat([losses(learner, [[s]], len(s.tokens)) for s in SAMPLES])
    assert len(alone) == sum(int((s.labels != IGNORED).sum()) for s in SAMPLES)
    assert alone.std() > 0.1  # otherwise nothing is compared
    one = losses(learner, [SAMPLES], 64)
    two = losses(learner, [SAMPLES[:2], SAMPLES[2:]], 40)
    padded = losses(learner, [[s] for s in SAMPLES], 50)
    for packed in (one, two, padded):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_a_sample_does_not_see_what_is_beside_it(learner):
    first, second = SAMPLES[0], SAMPLES[3]
    count = int((first.labels != IGNORED).sum())
    before = losses(learner, [[first, second]], 40)
    other = dataclasses.replace(first, tokens=first.tokens[::-1].copy(), tiles=255 - first.tiles)
    after = losses(learner, [[other, second]], 40)
    torch.testing.assert_close(after[count:], before[count:], rtol=0, atol=1e-5)
    assert (after[:count] - before[:count]).abs().max() > 1e-2


def test_a_batch_by_eye():
    a = Sample(
        tokens=np.array([5, 6, 7]),
        labels=np.array([IGNORED, 6, 7]),
        tiles=np.zeros((0, 2, 2, 3), np.uint8),
        name="a",
    )
    b = Sample(
        tokens=np.array([IMAGE, 9]),
        labels=np.array([IGNORED, 9]),
        tiles=np.ones((1, 2, 2, 3), np.uint8),
        name="b",
    )
    batch = collate([[a, b], [b]], 6)
    none = IGNORED
    assert batch.tokens.tolist() == [[5, 6, 7, IMAGE, 9, 0], [IMAGE, 9, 0, 0, 0, 0]]
    # A token's label is the next token; the last token of `a` does not predict the first of `b`.
    assert batch.labels.tolist() == [[6, 7, none, 9, none, none], [9, *[none] * 5]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, PADDING], [0, 0, *[PADDING] * 4]]
    assert batch.tiles.shape == (2, 2, 2, 3)
    assert batch.weight == 4
    assert batch.counts == {"tokens": 7, "images": 2, "samples": 3}
    assert batch.names == ("a", "b", "b")
    moved = batch.to(torch.device("cpu"))
    assert moved.names == batch.names
    assert torch.equal(moved.documents, batch.documents)


def test_a_row_of_text_has_no_tiles():
    batch = collate([[SAMPLES[1]]], 16)
    assert batch.tiles.shape == (0, SIDE, SIDE, 3)
