"""Training of a Perception Language Model to predict the assistant's tokens.

Legend: N sequences, T tokens of a sequence, C decoder width, V vocabulary, L labelled tokens, I
tiles, S tile side in pixels.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_rt.models.plm import PerceptionLM
from perception_rt.processing.llm_tokenizer import Tokenizer, detect_tokenizer, open_tokenizer
from perception_rt.processing.tiles import TileSpec
from training.data.conversations import ConversationSource
from training.data.datasets import Dataset, LineDataset
from training.data.loader import LaneStream
from training.data.mixture import Mix, parse_mix
from training.data.packing import IGNORED, LanguageBatch, collate
from training.demo.scene_dataset import SCENES_PREFIX, SceneDataset
from training.distributed import Group
from training.model import lora
from training.model.adapter import ADAPTER_FOLDER, export_adapter
from training.model.attention import get_kernel
from training.model.export import export_language_model
from training.model.init import initial_value
from training.model.pretrained import PretrainedWeights
from training.recipe.schema import DatasetConfig, LanguageConfig, LanguageDataConfig
from training.tasks.task import Learner, Task

HEAD_ROWS = 2048  # labelled tokens per call of the head; see docs/training-plan.md


def is_trained(config: LanguageConfig, name: str) -> bool:
    """Whether a parameter is trained: LoRA's updates if any, else the projector's or all."""
    if config.lora is not None:
        return lora.is_update(name)
    return config.train == "all" or name.startswith("vision_projector.")


class LanguageLearner(Learner):
    """A language model and the cross entropy of its labelled tokens.

    Args:
        config: the recipe.
        spec: how tiles are normalised.
    """

    model: PerceptionLM

    def __init__(self, config: LanguageConfig, spec: TileSpec) -> None:
        super().__init__()
        kernel = get_kernel(config.parallel.attention, config.run.device)
        self.document_mask = kernel.document_mask
        self.mean, self.std = spec.mean, spec.std
        self.model = PerceptionLM(config.model, attention=kernel.attention)
        if config.lora is not None:
            lora.add_updates(self.model, config.lora)

    def forward(self, micro: LanguageBatch) -> Tensor:
        """Returns the summed loss of the labelled tokens, a scalar."""
        return self.token_losses(micro).sum()

    def token_losses(self, micro: LanguageBatch) -> Tensor:
        """Returns the cross entropy of the labelled tokens in order, float32 (L,)."""
        model = self.model
        hidden = model.hidden_states(
            self._embed(micro),
            positions=micro.positions,
            mask=self.document_mask(micro.documents),
        )
        # Logits of labelled tokens only, (L, V): the vocabulary is far wider than the model.
        chosen = micro.labels != IGNORED
        states, labels = hidden[chosen], micro.labels[chosen]  # (L, C), (L,)
        losses = [
            F.cross_entropy(model.head(part).float(), wanted, reduction="none")
            for part, wanted in zip(states.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True)
        ]
        return torch.cat(losses)

    def _embed(self, micro: LanguageBatch) -> Tensor:
        """Input embeddings (N, T, C) of text and tiles.

        Ranks that share weights must all run the tower, so a batch without tiles encodes a black
        one.
        """
        model = self.model
        if len(micro.tiles):
            return model.embed(micro.tokens, self._normalized(micro.tiles))
        black = micro.tiles.new_zeros(1, *micro.tiles.shape[1:])
        hidden = model.embed(micro.tokens)
        return hidden + 0.0 * model.encode_tiles(self._normalized(black)).sum()

    def _normalized(self, tiles: Tensor) -> Tensor:
        """Normalises tiles, uint8 (I, S, S, 3) -> float32 (I, 3, S, S)."""
        mean = torch.tensor(self.mean, device=tiles.device)
        std = torch.tensor(self.std, device=tiles.device)
        return ((tiles / 255.0 - mean) / std).permute(0, 3, 1, 2)


class LanguageTask(Task):
    """Answers questions about images and videos.

    Args:
        config: the recipe.

    Raises:
        InputError: the tokenizer is missing or does not fit the model.
        CheckpointError: an initial checkpoint is unreadable or has another architecture.
    """

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        data, model = config.data, config.model
        spec, file = detect_tokenizer(
            data.tokenizer,
            vocab_size=model.decoder.vocab_size,
            image_token_id=model.image_token_id,
        )
        self.tokenizer_file = file
        self.tokenizer_spec = spec
        self.tokenizer = open_tokenizer(spec, file)
        self.tiles = TileSpec(
            tile_size=model.vision.image_size,
            mode=data.mode,
            max_tiles=data.max_tiles,
            max_frames=data.max_frames,
        )
        self._pretrained = PretrainedWeights(config.init, model)

    def learner(self) -> LanguageLearner:
        """See `Task.learner`."""
        return LanguageLearner(self.config, self.tiles)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """Loads a weight from a checkpoint of `init`, or draws it."""
        found = None if lora.is_update(name) else self._pretrained.load(name)
        if found is not None:
            return found
        model = self.config.model
        vision = name.startswith("vision_")
        return initial_value(
            name,
            shape,
            seed=self.config.run.seed,
            layers=model.vision.layers if vision else model.decoder.n_layers,
            gain=model.vision.ls_init_value,
        )

    def trainable(self, name: str) -> bool:
        """See `is_trained`."""
        return is_trained(self.config, name)

    def source(self, *, validation: bool = False) -> ConversationSource:
        """Opens the training samples of the mix, or those kept for validation."""
        return open_conversations(
            self.config.data,
            self.tokenizer,
            self.tiles,
            self.config.model.tokens_per_tile,
            seed=self.config.run.seed,
            validation=validation,
        )

    def stream(self, group: Group) -> LaneStream[Any, LanguageBatch]:
        """See `Task.stream`; the parts are packed sequences."""
        config = self.config
        return LaneStream(
            self.source(),
            partial(collate, length=config.data.seq_len),
            lanes=config.data.batch_size,
            parts=config.optim.accumulation,
            group=group,
            workers=config.run.workers,
            bad_fraction=config.data.bad_fraction,
        )

    def check(self, group: Group) -> None:
        """See `Task.check`."""
        super().check(group)
        if self.config.run.eval_every:
            self.source(validation=True)

    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Returns the mean loss of assistant tokens in the validation samples."""
        assert isinstance(learner, LanguageLearner)
        return assistant_loss(learner, self.source(validation=True), self.config.data)

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes weights, `params.json` and tokenizer, with LoRA's updates merged.

        The updates alone are written too, as an adapter of PEFT.
        """
        if self.config.lora is not None:
            export_adapter(
                weights,
                self.config.model,
                self.config.lora,
                folder / ADAPTER_FOLDER,
                base=self.config.init.checkpoint,
            )
            weights = lora.merged(weights, self.config.lora)
        export_language_model(
            weights, self.config, self.tokenizer_spec, self.tokenizer_file, folder
        )


def open_conversations(
    config: LanguageDataConfig,
    tokenizer: Tokenizer,
    tiles: TileSpec,
    tokens_per_tile: int,
    *,
    seed: int,
    validation: bool = False,
) -> ConversationSource:
    """Opens the datasets of a mix.

    Args:
        config: the recipe's section `data`.
        tokenizer: the model's tokenizer.
        tiles: how images become tiles.
        tokens_per_tile: image tokens per tile.
        seed: RNG seed of the order of samples, and of synthetic ones.
        validation: read the samples that are kept for evaluation, in one lane.

    Raises:
        InputError: a dataset is missing or empty, or the mix is wrong.
    """
    shares = parse_mix(config.mix, config.datasets)
    datasets = [
        _open_dataset(name, config.datasets[name], seed, config.validation, validation)
        for name in shares
    ]
    return ConversationSource(
        datasets,
        Mix(list(shares.values()), seed),
        config,
        tokenizer,
        tiles,
        tokens_per_tile,
        lanes=1 if validation else config.batch_size,
    )


def _open_dataset(
    name: str, config: DatasetConfig, seed: int, kept: int, validation: bool
) -> Dataset:
    if config.annotation.startswith(SCENES_PREFIX):
        scenes = config.annotation.removeprefix(SCENES_PREFIX)
        return SceneDataset(name, scenes, seed, validation=validation)
    return LineDataset(name, config, seed, kept, validation=validation)


@torch.no_grad()
def assistant_loss(
    learner: LanguageLearner, source: ConversationSource, config: LanguageDataConfig
) -> dict[str, float]:
    """Averages the loss of the assistant's tokens over the first `config.validation` samples."""
    training = learner.training
    learner.eval()
    device = next(learner.parameters()).device
    loss, weight, samples, position = 0.0, 0, 0, 0
    while samples < config.validation:
        read = source.read(0, position)
        position = read.position
        batch = collate([read.row], config.seq_len).to(device)
        loss += float(learner(batch))
        weight += batch.weight
        samples += len(read.row)
    learner.train(training)
    return {"loss": loss / max(1, weight)}
