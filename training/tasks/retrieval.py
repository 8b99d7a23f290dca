"""Retrieval accuracy of a Perception Encoder on image-text pairs.

Legend: N images, M different captions, D output, T tokens.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perception_rt.models.pe import PerceptionEncoder
from training.data.pair_batch import Pair, collate_pairs, pool_frames

RANKS = (1, 5, 10)
_CHUNK = 256


@torch.no_grad()
def retrieval(model: PerceptionEncoder, chunks: Iterable[Sequence[Pair]]) -> dict[str, float]:
    """Returns how often the match is among the k most similar candidates, from 0 to 1.

    Equal captions count as one. So if captions are class names, `image_to_text_r1` is the accuracy
    of zero-shot classification.

    Args:
        model: the model; it is evaluated in evaluation mode.
        chunks: pairs at the model's image size.

    Returns:
        `image_to_text_rK`: an image's caption among all captions; `text_to_image_rK`: one of a
        caption's images among all images. K is 1, 5 or 10, where there are more candidates than
        that. `pairs`: number of pairs.
    """
    training = model.training
    model.eval()
    weight = model.visual.conv1.weight
    captions: dict[tuple[int, ...], int] = {}  # tokens -> number
    images: list[Tensor] = []
    owners: list[int] = []
    for pairs in chunks:
        batch = collate_pairs(pairs)
        features = model.encode_image(batch.pixels.to(weight), normalize=True)
        images.append(pool_frames(features, batch.frames).float().cpu())
        tokens_of = (tuple(pair.tokens.tolist()) for pair in pairs)
        owners.extend(captions.setdefault(ids, len(captions)) for ids in tokens_of)
    tokens = torch.tensor(list(captions), device=weight.device)  # (M, T)
    texts = [model.encode_text(part, normalize=True).float().cpu() for part in tokens.split(_CHUNK)]
    model.train(training)
    similarity = torch.cat(images) @ torch.cat(texts).T  # (N, M)
    owner = torch.tensor(owners)  # (N,)
    return {
        **_recalls("image_to_text", image_ranks(similarity, owner), len(captions)),
        **_recalls("text_to_image", text_ranks(similarity, owner), len(owners)),
        "pairs": len(owners),
    }


def image_ranks(similarity: Tensor, owner: Tensor) -> Tensor:
    """Ranks each image's caption among all captions, from 0; equal similarities count as better.

    Args:
        similarity: of images and captions, (N, M).
        owner: number of each image's caption, int64 (N,).

    Returns:
        int64 (N,).
    """
    own = similarity.gather(1, owner[:, None])  # (N, 1)
    return (similarity >= own).sum(dim=1) - 1


def text_ranks(similarity: Tensor, owner: Tensor) -> Tensor:
    """Ranks the best of each caption's images among those of other captions, from 0, int64 (M,).

    The arguments are those of `image_ranks`.
    """
    mine = owner[:, None] == torch.arange(similarity.shape[1])  # (N, M)
    best = similarity.masked_fill(~mine, -torch.inf).amax(dim=0)  # (M,)
    return ((similarity >= best) & ~mine).sum(dim=0)


def _recalls(name: str, ranks: Tensor, candidates: int) -> dict[str, float]:
    return {f"{name}_r{k}": float((ranks < k).double().mean()) for k in RANKS if k < candidates}
