"""Prepares the inputs of a generation benchmark: a photograph, texts, a tokenizer and a package.

Weights are random, since no kernel here depends on their values.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from perception_rt.plm_config import PlmConfig
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.llm_vocabulary import CONTROLS, IMAGE
from perception_rt.processing.prompt import SYSTEM

PACKAGE_DIRECTORY = "package"

_SEED = 0

QUESTION = (
    "What is in this photograph? Describe the building, the colours and the weather in three "
    "sentences."
)
NEXT_QUESTION = "How many people are there, and what are they doing?"
COPY = """Repeat this text word for word:

The river rises in the hills above the old town and runs south for ninety miles. In spring it
floods the meadows, and the farmers move their sheep to the terraces that their grandparents built
of grey stone. In summer it is so low that children cross it on foot. Two bridges span it: the upper
one is of wood and carries a footpath, the lower one is of iron and carries the railway. Below the
second bridge there is a weir with a mill, which ground corn for two hundred years and now makes
electricity for the town. The miller's house is a museum. It is open on Sundays, and on other days
one has to ask for the key at the bakery across the street."""


def short_question(index: int) -> str:
    """A question without a picture; each index begins differently, so that no prefix is shared."""
    return f"{index + 1}. Where does the river rise, and what do the farmers do in spring?"


def prepare(config: PlmConfig, work: Path, *, name: str, precision: str, blocks: Any) -> None:
    """Exports a package with random weights to the directory `work`.

    Args:
        config: the architecture.
        work: an existing directory.
        name: the model's name.
        precision: precision of the package.
        blocks: bits of the decoder's blocks in int4, "int8" or "int4".
    """
    from perception_rt.checkpoint.random import RandomWeights
    from perception_rt.export.build import export_package
    from perception_rt.export.plan import PlmPlan
    from perception_rt.processing.tiles import TileSpec

    plan = PlmPlan(
        name=name,
        config=config,
        backend="onnxruntime",
        precision=precision,
        blocks=blocks,
        tiles=TileSpec(tile_size=config.vision.image_size),
        # Without the library, the decoder alone can still be measured.
        tokenizer=small_tokenizer(config) if find_spec("tokenizers") else None,
    )
    export_package(plan, RandomWeights(config, _SEED), work / PACKAGE_DIRECTORY)


def small_tokenizer(config: PlmConfig) -> tuple[TokenizerSpec, bytes]:
    """Trains a `tokenizer.json` on the texts of this benchmark.

    Each word becomes one token, so prompts are about as long as with the real tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.image_token_id,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [SYSTEM, QUESTION, NEXT_QUESTION, COPY, short_question(0), "system user assistant\n\n"]
    tokenizer.train_from_iterator(texts, trainer)
    root = json.loads(tokenizer.to_str())
    free = _free_ids(config)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    root["added_tokens"] = [
        {
            "id": config.image_token_id if name == IMAGE else next(free),
            "content": name,
            "special": True,
            **flags,
        }
        for name in CONTROLS
    ]
    data = json.dumps(root).encode()
    spec = TokenizerSpec(
        kind="hf",
        file="tokenizer.json",
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=config.decoder.vocab_size,
        image_token_id=config.image_token_id,
    )
    return spec, data


def _free_ids(config: PlmConfig) -> Iterator[int]:
    """Ids from the end of the vocabulary, without the image token."""
    ids = count(config.decoder.vocab_size - 1, -1)
    return (i for i in ids if i != config.image_token_id)
