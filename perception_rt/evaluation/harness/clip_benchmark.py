"""Model type `perception_rt` of CLIP_benchmark, and its command line with that type.

```
python -m perception_rt.evaluation.harness.clip_benchmark eval --model_type perception_rt ...
```

CLIP_benchmark finds models in a table, which this module extends. `--model` is the name of the
package's model, and `--pretrained` the package.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from clip_benchmark import cli, models
from PIL import Image
from torch import Tensor

from perception_rt.errors import InputError, PerceptionError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.clip_bpe import ClipTokenizer, TextSpec
from perception_rt.processing.image import ImageSpec, load_image
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.embedding.package_parts import text_tokenizer

MODEL_TYPE = "perception_rt"

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[Sequence[str]], Tensor]


class ClipModel(torch.nn.Module):
    """An encoder package with the methods that CLIP_benchmark calls.

    Args:
        embedder: a loaded encoder with a text tower.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self._embedder = embedder

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeds images, float32 (N, D), of uint8 (N, H, W, 3) at the model's size."""
        rows = self._embedder.embed_images(list(images.cpu().numpy()), workers=1)
        return torch.from_numpy(rows).to(images.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeds texts, float32 (N, D), of token ids int64 (N, context)."""
        rows = self._embedder.encode_tokens(tokens.cpu().numpy())
        return torch.from_numpy(rows).to(tokens.device)


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"
) -> tuple[ClipModel, Transform, Tokenizer]:
    """Loads a package as CLIP_benchmark loads its models.

    Args:
        model_name: name of the package's model, such as PE-Core-B16-224.
        pretrained: the package, as for `perception_rt.load`.
        cache_dir: where downloaded models are kept, which this does not need.
        device: where CLIP_benchmark has its tensors; the engine runs where it was exported for.

    Returns:
        The model; a function from a Pillow image to uint8 (H, W, 3) at the model's size, which
        worker processes may call; and a tokenizer of lists of texts.

    Raises:
        InputError: the package has another model, or one without texts.
        PackageError, BackendError: as for `perception_rt.load`.
    """
    embedder = Embedder.load(pretrained)
    content = embedder.manifest.content
    if content.name != model_name:
        raise InputError(
            f"--model is {model_name!r:.60}, but package {pretrained!r:.200} has {content.name}"
        )
    text = None if content.text is None else TextSpec.from_dict(content.text, "text")
    tokenizer = text_tokenizer(text, DEFAULT_LIMITS)
    if tokenizer is None:
        raise InputError(f"{content.name} has no text tower with a known tokenizer")
    return (
        ClipModel(embedder),
        partial(_pixels, embedder.image_spec),
        partial(_tokens, tokenizer),
    )


def main() -> int:
    """The command line of CLIP_benchmark with the model type `perception_rt`."""
    models.TYPE2FUNC[MODEL_TYPE] = load_model
    models.MODEL_TYPES.append(MODEL_TYPE)
    try:
        cli.main()
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _pixels(spec: ImageSpec, image: Image.Image) -> Tensor:
    return torch.from_numpy(load_image(image, spec))


def _tokens(tokenizer: ClipTokenizer, texts: Sequence[str]) -> Tensor:
    return torch.from_numpy(tokenizer(texts))


if __name__ == "__main__":
    sys.exit(main())
