"""Checks that the parts of an encoder's manifest agree, and makes its tokenizer."""

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.package.pe_graphs import check_graphs
from perception_rt.package.reader import Package
from perception_rt.processing.clip_bpe import VOCAB_SIZE, ClipTokenizer, TextSpec
from perception_rt.processing.image import ImageSpec
from perception_rt.records import require


def check_agreement(
    package: Package, config: PeConfig, image: ImageSpec, text: TextSpec | None
) -> None:
    """InputError or PackageError unless the manifest's parts fit the architecture."""
    check_graphs(package.manifest.content.graphs, config, image.height, image.width)
    if config.text is None or text is None:
        require(not (config.text or text), "either the architecture or the processing lacks texts")
        return
    if text.context_length != config.text.context_length:
        raise InputError("the architecture and the text processing differ in context length")
    if text.tokenizer is not None and config.text.vocab_size != VOCAB_SIZE:
        raise InputError(f"{text.tokenizer} is not for a vocabulary of {config.text.vocab_size}")


def text_tokenizer(text: TextSpec | None, limits: Limits) -> ClipTokenizer | None:
    """The tokenizer of a package; None if it has no texts, or a tokenizer that is unknown."""
    if text is None or text.tokenizer is None:
        return None
    return ClipTokenizer(context_length=text.context_length, limits=limits)
