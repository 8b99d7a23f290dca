"""Zero-shot classification of digits and their colours, without augmentation.

An image belongs to the class whose sentences' mean embedding is most similar.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perception_rt.models.pe import PerceptionEncoder
from perception_rt.processing.clip_bpe import ClipTokenizer
from training.data.pair_batch import to_pixels
from training.data.records import Pixels
from training.demo.digits import Digits, Labels, plain_image
from training.demo.scenes import digit_prompts, draw_all, ink_prompts

_CHUNK = 256
_SCENE_SEED = 20_000_003  # evaluation scenes are the same in every run


@torch.no_grad()
def classify(
    model: PerceptionEncoder,
    images: Pixels,
    prompts: Sequence[Sequence[str]],
    tokenizer: ClipTokenizer,
) -> Labels:
    """Returns the most similar class of each image.

    Args:
        model: model in evaluation mode.
        images: uint8 (N, H, W, 3) at the model's size.
        prompts: sentences of each class.
        tokenizer: tokenizer with the model's context length.

    Returns:
        Indices into `prompts`, int64 (N,).
    """
    weight = model.visual.conv1.weight
    classes = torch.stack([_class_feature(model, sentences, tokenizer) for sentences in prompts])
    chunks = [to_pixels(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)]
    features = [model.encode_image(pixels.to(weight), normalize=True) for pixels in chunks]
    predicted: Labels = (torch.cat(features) @ classes.T).argmax(dim=1).cpu().numpy()
    return predicted


def _class_feature(
    model: PerceptionEncoder, sentences: Sequence[str], tokenizer: ClipTokenizer
) -> Tensor:
    tokens = torch.from_numpy(tokenizer(list(sentences))).to(model.visual.conv1.weight.device)
    mean = model.encode_text(tokens, normalize=True).mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=0)


def evaluate(model: PerceptionEncoder, digits: Digits) -> dict[str, float]:
    """Returns zero-shot accuracies, from 0 to 1.

    Returns:
        `plain`: digits in black on white, centred; `scene`: digits in coloured scenes; `ink`: their
        colours.
    """
    text = model.config.text
    assert text is not None
    tokenizer = ClipTokenizer(context_length=text.context_length)
    size = model.config.vision.image_size
    pages = np.stack([plain_image(ink, size) for ink in digits.ink])
    scenes, inks = draw_all(digits, size, seed=_SCENE_SEED)
    training = model.training
    model.eval()
    results = {
        "plain": _accuracy(classify(model, pages, digit_prompts(), tokenizer), digits.labels),
        "scene": _accuracy(classify(model, scenes, digit_prompts(), tokenizer), digits.labels),
        "ink": _accuracy(classify(model, scenes, ink_prompts(), tokenizer), inks),
    }
    model.train(training)
    return results


def confusion(predicted: Labels, labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Counts predictions, int64 (classes, classes): rows are labels, columns predictions."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def _accuracy(predicted: Labels, labels: Labels) -> float:
    return float((predicted == labels).mean())
