"""The task of a small Perception Encoder: to see as a frozen larger one does.

Student and teacher see the same images, each at the size of its own architecture. Embeddings are
compared by their cosine; so are patch tokens, each with the teacher's at its place, and besides
these the cosines among the tokens of an image with those among the teacher's. A linear head, which
is trained and not exported, widens the student's vectors where the teacher's are of another width.

Legend: I images, T patch tokens, C channels of a tower's tokens.
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
from training.model.init import draw
from training.recipe.pairs import DistillationLossConfig, TeacherConfig
from training.recipe.schema import DistillationConfig
from training.tasks.pair_stream import pair_stream
from training.tasks.task import Learner, Task

_HEADS = ("embedding_head.", "token_head.")
_POOL = ("visual.attn_pool.", "visual.proj")


class Student(PerceptionEncoder):
    """A vision tower, and heads to the teacher's widths where these differ."""

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
    """A student, its frozen teacher, and how far they are apart.

    Args:
        model: the student.
        teacher: in evaluation mode.
        weights: of the parts of the loss.
    """

    model: Student

    def __init__(
        self, model: Student, teacher: PerceptionEncoder, weights: DistillationLossConfig
    ) -> None:
        super().__init__()
        self.model = model
        self._teacher = (teacher,)  # in a tuple: no part of what is sharded, trained and saved
        self._weights = weights

    def forward(self, micro: PairBatch) -> Tensor:
        """The sum of the losses of this rank's rows, a scalar; a video's is its frames' mean."""
        pooled = bool(self._weights.embedding)
        with torch.no_grad():
            (teacher,) = self._teacher
            teacher.to(micro.pixels.device)  # once; then it is there
            pixels = micro.others[0] if micro.others else micro.pixels
            pixels = pixels.to(teacher.visual.conv1.weight.dtype)
            goal = see(teacher.visual, pixels, pooled=pooled)
        pixels = micro.pixels.to(self.model.visual.conv1.weight.dtype)
        embedding, tokens = see(self.model.visual, pixels, pooled=pooled)
        losses = self._image_losses(embedding, tokens, *goal)
        return pool_frames(losses, micro.frames).sum()

    def _image_losses(
        self, embedding: Tensor, tokens: Tensor, goal_embedding: Tensor, goal_tokens: Tensor
    ) -> Tensor:
        """float32 (I,): the weighted parts."""
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
    """Embeddings (I, D), empty if they are not wanted, and normed patch tokens (I, T, C)."""
    tokens = tower.forward_features(pixels)
    embedding = tower.head(tokens) if pooled else tokens[:, :0, 0]
    return embedding, tower.ln_post(tokens)[:, tower.num_prefix :]


def cosines(tokens: Tensor) -> Tensor:
    """Tokens (I, T, C) -> the cosines of all pairs of an image, float32 (I, T, T)."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


def _cosine(found: Tensor, goal: Tensor) -> Tensor:
    """Of vectors along the last axis, float32."""
    return F.cosine_similarity(found.float(), goal.float(), dim=-1)


class DistillationTask(Task):
    """Images or videos, whose captions are not read."""

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config
        self.teacher = load_teacher(config.teacher)
        self.source: WeightSource | None = None
        if config.init.checkpoint is not None:
            self.source = open_checkpoint(config.init.checkpoint, config.model)

    def learner(self) -> DistillationLearner:
        """A new student with the teacher of this process."""
        return DistillationLearner(Student(self.config), self.teacher, self.config.loss)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """From `init.checkpoint`, or drawn; heads are drawn always."""
        if self.source is not None and not name.startswith(_HEADS):
            return self.source.load(name).float()
        vision = self.config.model.vision
        return draw(
            name,
            shape,
            seed=self.config.run.seed,
            layers=vision.layers,
            gain=vision.ls_init_value,
        )

    def trainable(self, name: str) -> bool:
        """Not what the loss does not see: without embeddings, what comes after the tokens."""
        return bool(self.config.loss.embedding) or not name.startswith(_POOL)

    def stream(self, group: Group) -> LaneStream[Pair, PairBatch]:
        """Images at the student's size, and at the teacher's where that is another."""
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
        """Nothing; the loss is the figure."""
        return {}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """The student's tower in the reference's names, without heads; the architecture beside."""
        kept = {name: t for name, t in weights.items() if not name.startswith(_HEADS)}
        export_encoder(kept, self.config.model, folder)


def load_teacher(config: TeacherConfig) -> PerceptionEncoder:
    """The vision tower of a checkpoint, frozen, on the CPU.

    Raises:
        CheckpointError: it is unreadable, or does not fit the architecture.
    """
    vision = PeConfig(vision=config.model.vision)
    source = open_checkpoint(config.checkpoint, vision)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = PerceptionEncoder(vision)
    weights = {name: source.load(name).to(dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
