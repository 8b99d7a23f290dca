"""Contrastive training of a Perception Encoder on images or videos with captions.

A video's feature is the mean of its frames' unit features, not normalised again, as in
`PerceptionEncoder.encode_video`. An image is a video of one frame.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource, open_checkpoint
from perception_rt.config import PeConfig
from perception_rt.models.pe import PerceptionEncoder
from training.data.loader import LaneStream
from training.data.pair_batch import Pair, PairBatch, pool_frames
from training.data.validation import ValidationPairs
from training.demo.digit_source import validation_digits
from training.demo.zero_shot import evaluate
from training.distributed import Group
from training.model import lora
from training.model.adapter import ADAPTER_FOLDER, export_adapter
from training.model.export import export_encoder
from training.model.init import initial_value
from training.recipe.schema import ContrastiveConfig
from training.tasks.losses import contrastive_loss, sigmoid_loss
from training.tasks.pair_stream import pair_stream
from training.tasks.retrieval import retrieval
from training.tasks.task import Learner, Task

MAX_LOGIT_SCALE = math.log(100.0)
_FIRST_LOGIT_SCALE = math.log(1 / 0.07)
# For the sigmoid loss: almost no pair matches, and the bias says so from the first step.
_FIRST_SIGMOID = {"logit_scale": math.log(10.0), "logit_bias": -10.0}


class SigmoidEncoder(PerceptionEncoder):
    """An encoder with the bias of the sigmoid loss, which exported checkpoints do not contain."""

    def __init__(self, config: PeConfig) -> None:
        super().__init__(config)
        self.logit_bias = nn.Parameter(torch.tensor(_FIRST_SIGMOID["logit_bias"]))


class ContrastiveLearner(Learner):
    """An encoder and its loss over the batch of all ranks."""

    model: PerceptionEncoder

    def __init__(self, model: PerceptionEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro: PairBatch) -> Tensor:
        """Returns the summed loss of this rank's rows, a scalar."""
        model = self.model
        pixels = micro.pixels.to(model.visual.conv1.weight.dtype)
        image = pool_frames(model.encode_image(pixels, normalize=True), micro.frames)
        text = model.encode_text(micro.tokens, normalize=True)
        scale = model.logit_scale.float().exp()
        if isinstance(model, SigmoidEncoder):
            loss = sigmoid_loss(image, text, scale, model.logit_bias)
        else:
            loss = contrastive_loss(image, text, scale)
        return loss * micro.weight


class ContrastiveTask(Task):
    """Matches images or videos with captions.

    Args:
        config: the recipe.

    Raises:
        CheckpointError: the initial checkpoint is unreadable or has another architecture.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self.source: WeightSource | None = None
        self._validation: ValidationPairs | None = None
        if config.init.checkpoint is not None:
            self.source = open_checkpoint(config.init.checkpoint, config.model)

    def learner(self) -> ContrastiveLearner:
        """See `Task.learner`."""
        make = SigmoidEncoder if self.config.loss == "sigmoid" else PerceptionEncoder
        model = make(self.config.model)
        if self.config.lora is not None:
            lora.add_updates(model, self.config.lora)
        return ContrastiveLearner(model)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """Loads a weight from `init.checkpoint`, or draws it.

        Scale and bias of the sigmoid loss always start anew: checkpoints have no bias, and a scale
        fits its own bias only.
        """
        if self.config.loss == "sigmoid" and name in _FIRST_SIGMOID:
            return torch.tensor(_FIRST_SIGMOID[name])
        if self.source is not None and not lora.is_update(name):
            return self.source.load(name).float()
        if name == "logit_scale":
            return torch.tensor(_FIRST_LOGIT_SCALE)
        tower = self.config.model.vision if name.startswith("visual.") else self.config.model.text
        assert tower is not None
        return initial_value(
            name,
            shape,
            seed=self.config.run.seed,
            layers=tower.layers,
            gain=getattr(tower, "ls_init_value", None),
        )

    def trainable(self, name: str) -> bool:
        """Selects LoRA's updates if there are any, and what the sigmoid loss starts anew."""
        if self.config.lora is None:
            return True
        return lora.is_update(name) or (self.config.loss == "sigmoid" and name in _FIRST_SIGMOID)

    def stream(self, group: Group) -> LaneStream[Pair, PairBatch]:
        """See `Task.stream`; image sizes follow the recipe's `resolutions`."""
        config = self.config
        return pair_stream(
            config.data,
            config.model,
            config.run,
            sizes=lambda step: (config.image_size(step),),
            parts=1,
            group=group,
        )

    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Returns accuracies on the validation split at `model.vision.image_size`.

        They are of zero-shot classification for digits, and of retrieval for pairs from files.
        """
        assert isinstance(learner, ContrastiveLearner)
        data = self.config.data
        if data.dataset == "digits":
            return evaluate(learner.model, validation_digits(data))
        if self._validation is None:
            self._validation = self._open_validation()
        return retrieval(learner.model, self._validation.chunks())

    def _open_validation(self) -> ValidationPairs:
        config = self.config
        return ValidationPairs(config.data, config.model, workers=config.run.workers)

    def check(self, group: Group) -> None:
        """See `Task.check`."""
        super().check(group)
        if self.config.run.eval_every and self.config.data.dataset != "digits":
            self._validation = self._open_validation()

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes safetensors in the reference's names, without `logit_bias`, and architecture.

        LoRA's updates are merged, and written as an adapter of PEFT too.
        """
        config = self.config
        if config.lora is not None:
            export_adapter(
                weights,
                config.model,
                config.lora,
                folder / ADAPTER_FOLDER,
                base=config.init.checkpoint,
            )
            weights = lora.merged(weights, config.lora)
        kept = {name: tensor for name, tensor in weights.items() if name != "logit_bias"}
        export_encoder(kept, self.config.model, folder)

    def after_step(self, model: nn.Module) -> None:
        """Clamps the logit scale, as the reference does."""
        assert isinstance(model, PerceptionEncoder)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
