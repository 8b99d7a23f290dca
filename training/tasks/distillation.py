"""Distillation of a small Perception Encoder from a frozen larger one.

Student and teacher see the same images, each at its own architecture's size. The loss compares
embeddings by cosine, patch tokens by cosine at equal positions, and the cosines among an image's
patch tokens. If the teacher is wider, a linear head widens the student's vectors; it is trained but
not exported.

Legend: I images, D embedding width, T patch tokens, C token width.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource, open_checkpoint
from perception_rt.config import PeConfig
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.models.vision import VisionTower
from training.data.loader import LaneStream
from training.data.pair_batch import Pair, PairBatch, pool_frames
from training.distributed import Group
from training.model.export import export_encoder
from training.model.init import initial_value
from training.recipe.pairs import DistillationLossConfig, TeacherConfig
from training.recipe.schema import DistillationConfig
from training.tasks.pair_stream import pair_stream
from training.tasks.task import Learner, Task

_HEADS = ("embedding_head.", "token_head.")
_POOL = ("visual.attn_pool.", "visual.proj")


class Student(PerceptionEncoder):
    """A vision tower with linear heads to the teacher's widths where they differ."""

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config.model)
        own, teacher = config.model.vision, config.teacher.model.vision
        self.embedding_head: nn.Module = nn.Identity()
        self.token_head: nn.Module = nn.Identity()
        if config.loss.embedding and own.embed_dim != teacher.embed_dim:
            self.embedding_head = nn.Linear(own.embed_dim, teacher.embed_dim, bias=False)
        if config.loss.tokens and own.width != teacher.width:
            self.token_head = nn.Linear(own.width, teacher.width, bias=False)


class DistillationLearner(Learner):
    """A student, its frozen teacher and the loss between them.

    Args:
        model: the student.
        teacher: teacher in evaluation mode.
        weights: weights of the loss terms.
    """

    model: Student

    def __init__(
        self, model: Student, teacher: PerceptionEncoder, weights: DistillationLossConfig
    ) -> None:
        super().__init__()
        self.model = model
        self._teacher = (teacher,)  # in a tuple, so that it is neither sharded, trained nor saved
        self._weights = weights

    def forward(self, micro: PairBatch) -> Tensor:
        """Returns the summed loss of this rank's rows, a scalar."""
        pooled = bool(self._weights.embedding)
        with torch.no_grad():
            (teacher,) = self._teacher
            teacher.to(micro.pixels.device)  # moves it once
            pixels = micro.others[0] if micro.others else micro.pixels
            pixels = pixels.to(teacher.visual.conv1.weight.dtype)
            goal = see(teacher.visual, pixels, pooled=pooled)
        pixels = micro.pixels.to(self.model.visual.conv1.weight.dtype)
        embedding, tokens = see(self.model.visual, pixels, pooled=pooled)
        losses = self._image_losses(embedding, tokens, *goal)
        # A video's loss is its frames' mean.
        return pool_frames(losses, micro.frames).sum()

    def _image_losses(
        self, embedding: Tensor, tokens: Tensor, goal_embedding: Tensor, goal_tokens: Tensor
    ) -> Tensor:
        """Weighted sum of the loss terms, float32 (I,)."""
        weights = self._weights
        loss = torch.zeros(len(tokens), device=tokens.device)
        if weights.embedding:
            found = self.model.embedding_head(embedding)
            loss = loss + weights.embedding * (1 - _cosine(found, goal_embedding))
        if weights.tokens:
            found = self.model.token_head(tokens)
            loss = loss + weights.tokens * (1 - _cosine(found, goal_tokens)).mean(dim=1)
        if weights.pairwise:
            apart = cosines(tokens) - cosines(goal_tokens)
            loss = loss + weights.pairwise * apart.square().mean(dim=(1, 2))
        return loss


def see(tower: VisionTower, pixels: Tensor, *, pooled: bool) -> tuple[Tensor, Tensor]:
    """Runs a tower.

    Returns:
        Embeddings (I, D), or (I, 0) without `pooled`, and normed patch tokens (I, T, C).
    """
    tokens = tower.forward_features(pixels)
    embedding = tower.head(tokens) if pooled else tokens[:, :0, 0]
    return embedding, tower.ln_post(tokens)[:, tower.num_prefix :]


def cosines(tokens: Tensor) -> Tensor:
    """Returns the cosines of all token pairs of an image, (I, T, C) -> float32 (I, T, T)."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


def _cosine(found: Tensor, goal: Tensor) -> Tensor:
    """Cosine along the last axis, float32."""
    return F.cosine_similarity(found.float(), goal.float(), dim=-1)


class DistillationTask(Task):
    """Distils from images or videos; captions are not read.

    Args:
        config: the recipe.

    Raises:
        CheckpointError: a checkpoint is unreadable or has another architecture.
    """

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config
        self.teacher = load_teacher(config.teacher)
        self.source: WeightSource | None = None
        if config.init.checkpoint is not None:
            self.source = open_checkpoint(config.init.checkpoint, config.model)

    def learner(self) -> DistillationLearner:
        """Returns a new student with this process's teacher."""
        return DistillationLearner(Student(self.config), self.teacher, self.config.loss)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """Loads a weight from `init.checkpoint`, or draws it; heads are always drawn."""
        if self.source is not None and not name.startswith(_HEADS):
            return self.source.load(name).float()
        vision = self.config.model.vision
        return initial_value(
            name,
            shape,
            seed=self.config.run.seed,
            layers=vision.layers,
            gain=vision.ls_init_value,
        )

    def trainable(self, name: str) -> bool:
        """Excludes the pooling if the loss has no embedding term and so does not reach it."""
        return bool(self.config.loss.embedding) or not name.startswith(_POOL)

    def stream(self, group: Group) -> LaneStream[Pair, PairBatch]:
        """See `Task.stream`; images come in the student's size, and the teacher's if it differs."""
        config = self.config
        own, teacher = config.model.vision.image_size, config.teacher.model.vision.image_size
        return pair_stream(
            config.data,
            config.model,
            config.run,
            sizes=lambda _: (own,) if own == teacher else (own, teacher),
            parts=config.optim.accumulation,
            group=group,
        )

    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Returns nothing: the loss already is the figure."""
        return {}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes the student's tower under the reference's names and the architecture."""
        kept = {name: t for name, t in weights.items() if not name.startswith(_HEADS)}
        export_encoder(kept, self.config.model, folder)


def load_teacher(config: TeacherConfig) -> PerceptionEncoder:
    """Loads a checkpoint's vision tower, frozen, on the CPU.

    Raises:
        CheckpointError: the checkpoint is unreadable or has another architecture.
    """
    vision = PeConfig(vision=config.model.vision)
    source = open_checkpoint(config.checkpoint, vision)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = PerceptionEncoder(vision)
    weights = {name: source.load(name).to(dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
